"""What `warm` and `explain` ask for a model, after they have said what was read and what is left out."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moecache import warmed as earlier
from moecache.cli import layers, lookup
from moecache.schemas.warm import WarmRow
from moecache.settings import Settings

if TYPE_CHECKING:
    from moecache.cli.progress import Meter
    from moecache.models import Model
    from moecache.schemas.problem import Problem


def asked(
    model: "Model", as_json: bool, tokens: Sequence[int], routing: Sequence[str], ops: Sequence[str] | None
) -> tuple[list["Problem"], bool]:
    """A model's problems, and whether an op that was named has none."""
    from moecache.warmup import left_out, problems

    left = left_out(model, tokens=tokens, ops=ops)
    layers.tell(model, left, as_json)
    names, failed = layers.with_problems(ops, left)
    return problems(model, tokens=tokens, routing=routing, ops=names), failed


def warmed(
    chosen: Settings, model: "Model | None", meter: "Meter", as_json: bool, **more: Any
) -> tuple[list[WarmRow], bool]:
    """The rows of a warm-up, at once where an earlier run left nothing to measure; and whether an op that was named
    has none."""
    lookup.writable(chosen).close()
    cache, name, ops = chosen.user_file(), "", more["ops"]
    if model is not None and cache is not None and not more["wanted"] and not more["again"]:
        name = earlier.request(model, *(value for option, value in more.items() if option != "budget"))
        if (found := earlier.known(chosen, cache, name)) is not None:
            layers.tell(model, found[1], as_json)
            return found[0], bool(ops) and any(each.nothing for each in found[1])
    from moecache.dispatch import using
    from moecache.warmup import STORED, WANTED, left_out, warmup

    with using(chosen) as serving:
        left = left_out(model, tokens=more["tokens"], ops=ops) if model else []
        layers.tell(model, left, as_json)
        more["ops"], failed = layers.with_problems(ops, left) if model else (ops, False)
        rows = warmup(model or (WANTED if more["wanted"] else STORED), progress=meter, **more)
        store = serving.recall.tiers.user
        if cache is not None and store.path is None:
            meter.file = f"memory and lost now, as {cache} could not be written to the end"
            meter.lost = True
        elif name and rows and all(row.tier == "measured" for row in rows):
            earlier.keep(store, name, rows, left)
    return rows, failed
