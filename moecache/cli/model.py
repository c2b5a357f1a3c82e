"""The model that a command is given, and what is said of it before anything else."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moecache.cli import show
from moecache.schemas.warm import LeftOut

if TYPE_CHECKING:
    from moecache.models import Model

SIZES = dict.fromkeys(("experts", "topk", "hidden", "intermediate")).keys()


def given(config: str | None, **more: Any) -> "Model | None":
    """The model that a command means by a file, a folder or `experts=8,topk=2,…`; None for nothing.

    Raises:
        typer.BadParameter: it is empty; sizes are missing or come twice, or one is none.
        InvalidInput: see `read_model` and `model_of`.
    """
    from moecache.models import model_of, read_model

    if config == "":
        raise typer.BadParameter("it is empty", param_hint="CONFIG")
    if config is None or "=" not in config or Path(config).exists():
        return None if config is None else read_model(config, **more)
    parts = config.split(",")
    given: dict[str, Any] = dict(part.partition("=")[::2] for part in parts)
    once, word = len(given) == len(parts), given.pop("activation", "silu")
    if not once or given.keys() != SIZES or not all(value.isdecimal() for value in given.values()):
        told = f"{config!r} lacks a size, or has one that is none or twice; write {','.join(f'{s}=N' for s in SIZES)}"
        raise typer.BadParameter(f"{told}, and activation=NAME if it is not silu", param_hint="CONFIG")
    return model_of(**{name: int(value) for name, value in given.items()} | more, activation=word)


def tell(model: "Model | None", left: Sequence[LeftOut], as_json: bool) -> None:
    """What was read and what is left out of it, a line each; beside JSON on stderr."""
    lines = [*(model.told() if model else []), *map(str, left)]
    for line in lines:
        (show.note if as_json else show.say)(line)
    if lines and not as_json:
        show.say("")


def lacking(ops: Sequence[str] | None, left: Sequence[LeftOut]) -> bool:
    """Whether an op that was named has no problem."""
    return bool(ops) and any(each.nothing for each in left)
