"""What `warm` and `explain` ask for a model, after they have said what was read and what is left out."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from pydantic_core import to_jsonable_python

from moecache import receipts
from moecache.cli import find, fleet, show
from moecache.schemas.warm import OPS, LeftOut, WarmRow
from moecache.settings import Settings

EXCHANGE = "ep_exchange"  # the one op that ranks measure together
SIZES = dict.fromkeys(("experts", "topk", "hidden", "intermediate")).keys()

if TYPE_CHECKING:
    from moecache.cli.progress import Meter
    from moecache.models import Model
    from moecache.schemas.problem import Problem


def model(config: str | None, **more: Any) -> "Model | None":
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


def record(row: WarmRow) -> dict[str, Any]:
    """A row as JSON; `measured` counts the candidates of this run."""
    fields: dict[str, Any] = to_jsonable_python(row, exclude={"problem", "noise"})
    return show.named(row.problem) | fields


def asked(
    model: "Model", as_json: bool, tokens: Sequence[int], routing: Sequence[str], ops: Sequence[str] | None
) -> tuple[list["Problem"], bool]:
    """A model's problems, and whether an op that was named has none."""
    from moecache.warmup import left_out, problems

    left = left_out(model, tokens=tokens, ops=ops)
    tell(model, left, as_json)
    return problems(model, tokens=tokens, routing=routing, ops=ops), _lacking(ops, left)


def alone(
    chosen: Settings, model: "Model | None", meter: "Meter", as_json: bool, **more: Any
) -> tuple[list[WarmRow], bool]:
    """What one process warms up, at once where an earlier run left nothing to measure."""
    find.writable(chosen).close()
    cache, ops, name = chosen.user_file(), more["ops"], ""
    if model and cache and not more["wanted"] and not more["again"] and (here := receipts.here()):
        name = receipts.request(here, model, *(value for option, value in more.items() if option != "budget"))
        if (known := receipts.known(chosen, here, name)) is not None:
            tell(model, known[1], as_json)
            return known[0], _lacking(ops, known[1])
    from moecache.dispatch import using
    from moecache.warmup import ONLY_IF_NAMED, STORED, WANTED, left_out, warmup

    with using(chosen) as serving:
        left = left_out(model, tokens=more["tokens"], ops=ops) if model else []
        tell(model, left, as_json)
        if model:
            nothing = {*(each.op for each in left if each.nothing), *(() if ops else ONLY_IF_NAMED)}
            more["ops"] = [name for name in ops or OPS if name not in nothing]
        rows = warmup(model or (WANTED if more["wanted"] else STORED), progress=meter, **more)
        store = serving.lookup.tiers.user
        if cache is not None and store.path is None:
            meter.file = f"memory and lost now, as {cache} could not be written to the end"
            meter.lost = True
        elif name and rows and all(row.tier == "measured" for row in rows):
            receipts.keep(store, name, rows, left)
    return rows, _lacking(ops, left)


def spread(
    chosen: Settings, model: "Model | None", meter: "Meter", as_json: bool, together: bool, **more: Any
) -> tuple[list[WarmRow], bool]:
    """The same by the workers of a Ray cluster, without what ranks measure together; and whether a share was lost.

    Raises:
        typer.BadParameter: no model.
    """
    again, budget, wanted = more.pop("again"), more.pop("budget"), more.pop("wanted")
    if model is None or wanted:
        raise typer.BadParameter("it takes a model, and no --wanted", param_hint="--ray")
    with find.writable(chosen) as store, fleet.cluster() as workers:
        found = fleet.Fleet(workers, chosen, model, **more)
        tell(model, found.left + [LeftOut(EXCHANGE, "with --ray each GPU measures alone", True)] * together, as_json)
        rows, lost = found.warm(store, again, budget, meter)
    for share in lost:
        show.note(f"moecache: not measured: {share}; the same command tries again")
    return rows, bool(lost) or _lacking(more["ops"], found.left)


def tell(model: "Model | None", left: Sequence[LeftOut], as_json: bool) -> None:
    """What was read and what is left out of it, a line each; beside JSON on stderr."""
    lines = [*(model.told() if model else []), *map(str, left)]
    for line in lines:
        (show.note if as_json else show.say)(line)
    if lines and not as_json:
        show.say("")


def _lacking(ops: Sequence[str] | None, left: Sequence[LeftOut]) -> bool:
    return bool(ops) and any(each.nothing for each in left)
