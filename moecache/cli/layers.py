"""The layers that a command asks about, from a model's file or from sizes, and what it says of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moecache.cli import show
from moecache.cli.command import text, whole
from moecache.schemas.warm import LeftOut

if TYPE_CHECKING:
    from moecache.models import Model


def _size(name: str, help: str) -> Any:
    return typer.Option(f"--{name}", parser=whole, metavar="N", help=help)


File = Annotated[Path | None, typer.Argument(metavar="CONFIG", help="A model's config.json, or the folder with it.")]
Experts = Annotated[int | None, _size("experts", "Experts of the router, for a model without a file.")]
Topk = Annotated[int | None, _size("topk", "Experts for each token, for a model without a file.")]
Hidden = Annotated[int | None, _size("hidden", "Hidden size, for a model without a file.")]
Intermediate = Annotated[int | None, _size("intermediate", "Intermediate size, for a model without a file.")]
Activation = Annotated[
    str | None, text("activation", "NAME", "silu, gelu, gelu_tanh, relu2 or swiglu_oai, for a model without a file.")
]


def asked(config: Path | None, activation: str | None, sizes: dict[str, int | None], **more: Any) -> "Model | None":
    """The model that a command means; None for neither a file nor sizes.

    Raises:
        typer.BadParameter: both, or sizes are missing.
        InvalidInput: see `read_model` and `model_of`.
    """
    from moecache.models import model_of, read_model

    given: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
    if config is not None:
        if given or activation:
            hint = ", ".join(f"--{name}" for name in [*given, *(["activation"] if activation else [])])
            raise typer.BadParameter(
                f"a config.json says the layer itself, so {hint} has no place", param_hint="CONFIG"
            )
        return read_model(config, **more)
    if not given and not activation:
        return None
    if missing := [f"--{name}" for name in sizes if name not in given]:
        raise typer.BadParameter(f"a layer without a file also takes {', '.join(missing)}", param_hint="CONFIG")
    return model_of(**given, activation=activation or "silu", **more)


def tell(model: "Model | None", left: Sequence[LeftOut], as_json: bool) -> None:
    """What was read and what is left out of it, a line each; beside JSON on stderr."""
    lines = [*(model.told() if model else []), *map(str, left)]
    for line in lines:
        (show.note if as_json else show.say)(line)
    if lines and not as_json:
        show.say()


def with_problems(ops: Sequence[str] | None, left: Sequence[LeftOut]) -> tuple[list[str] | None, bool]:
    """The ops to go on with, and whether one that was named has nothing."""
    nothing = {each.op for each in left if each.nothing}
    if ops is None:
        from moecache.kernels import registry
        from moecache.warmup import ONLY_IF_NAMED

        return [name for name in registry.names() if name not in nothing and name not in ONLY_IF_NAMED], False
    return [name for name in ops if name not in nothing], bool(nothing)
