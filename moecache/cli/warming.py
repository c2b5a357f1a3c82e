"""What `warm` measures in one process, and what `explain` asks for a model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic_core import to_jsonable_python

from moecache import receipts
from moecache.cli import find, show
from moecache.cli.model import lacking, tell
from moecache.schemas.warm import OPS, LeftOut, WarmRow
from moecache.settings import Settings

if TYPE_CHECKING:
    from moecache.cli.progress import Meter
    from moecache.models import Model
    from moecache.schemas.problem import Problem


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
    return problems(model, tokens=tokens, routing=routing, ops=ops), lacking(ops, left)


def alone(
    chosen: Settings, model: "Model | None", meter: "Meter", as_json: bool, apart: Sequence[LeftOut], **more: Any
) -> tuple[list[WarmRow], bool]:
    """What one process warms up, at once where an earlier run left nothing to measure; and whether an op that was
    named has nothing. `apart` is what else is left out."""
    find.writable(chosen).close()
    cache, ops, name = chosen.user_file(), more["ops"], ""
    if model and cache and not more["wanted"] and not more["again"] and (here := receipts.here()):
        name = receipts.request(here, model, *(value for option, value in more.items() if option != "budget"))
        if (known := receipts.known(chosen, here, name)) is not None:
            tell(model, [*known[1], *apart], as_json)
            return known[0], lacking(ops, known[1])
    from moecache.dispatch import using
    from moecache.warmup import ONLY_IF_NAMED, STORED, WANTED, left_out, warmup

    with using(chosen) as serving:
        left = left_out(model, tokens=more["tokens"], ops=ops) if model else []
        tell(model, [*left, *apart], as_json)
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
    return rows, lacking(ops, left)
