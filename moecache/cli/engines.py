"""`export --format` and `import --from`: tables of engines."""

from pathlib import Path

from moecache.cli import find, show
from moecache.schemas.errors import InvalidInput
from moecache.settings import Settings
from moecache.store import Store
from moecache.text import counted


def export(engine: str, to: Path, settings: Settings, wanted: find.Wanted) -> None:
    """Write a table for each shape of the engine's kernel that was measured."""
    from moecache.integrations import sglang, tables, vllm

    of = {"vllm": vllm, "sglang": sglang}[engine]
    with Store.open(find.user(settings), readonly=True) as store:
        if not (groups := tables.grouped(store.timings(**wanted | {"op": [of.OP]}))):
            raise InvalidInput(f"{store.path} has no such timings of {of.OP}; nothing was written")
        made = [
            (of.path(to, key, triton), tables.table(key, rows, of.default), triton) for (key, triton), rows in groups
        ]
        of.beside(to)
        for path, rows, triton in made:
            tables.write(path, rows, **of.head(triton))
    show.say(f"{counted(len(made), 'table')} from {store.path} written to {to}")


def import_(engine: str, path: Path | None, settings: Settings) -> None:
    """Take what an engine's tables name."""
    from moecache.integrations import aiter, sglang, vllm

    timings, others = {"vllm": vllm, "sglang": sglang, "aiter": aiter}[engine].seeds(path)
    with find.writable(settings) as store:
        store.put(timings)
        show.say(f"{counted(len(timings), 'config')} of {engine} taken into {store.path}, to be measured here")
    if others:
        show.note(
            f"moecache: {others} tables or rows are of devices or configs that are not known here, and were left out"
        )
