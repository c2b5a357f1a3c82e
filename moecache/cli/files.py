"""The commands on whole cache files: verify, report, export, import, merge, push, pull, prune."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import typer

from moecache.cli import find, show
from moecache.cli.options import Alone, Db, Fields, measuring, option, settings, whole
from moecache.schemas.errors import InvalidInput, StoreError
from moecache.settings import MEMORY, Settings
from moecache.store import Store, atomic, remote
from moecache.text import changed, counted

SQLITE = (".sqlite", ".sqlite3", ".db")
PAGES = (".html", ".htm")  # nothing else is written over

commands = typer.Typer()


@commands.command(epilog="Example: moecache verify --db h200.sqlite --sample 20")
def verify(
    sample: Annotated[int, option("sample", "N", "Also time N of the winners here again.", whole)] = 0,
    db: Alone = None,
) -> int:
    """Check that the cache files are sound and usable.

    First checks that each file is sound. Then checks that every stored config is still known, and fits its problem and
    device. With --sample, it times winners of this machine's devices again, each beside its runner-up and the default;
    one that is proved slower by more than 5 % is a finding. It writes nothing. The exit code is 1 if there is one.
    """
    from moecache.verify.usable import verify as judge

    chosen = measuring() if sample else settings()
    wrong = 0
    for store in find.stores(chosen, db):
        found = judge(store)
        slower, told = _retimed(store, chosen, sample) if sample else ([], [])
        wrong += (count := len(found.wrong + slower))
        lines = [*found.wrong, *(f"note: {note}" for note in found.notes), *slower, *told]
        show.say(f"{store.path}: {counted(count, 'finding')}", *(f"  {line}" for line in lines))
    return int(bool(wrong))


def _retimed(store: Store, chosen: Settings, count: int) -> tuple[list[str], list[str]]:
    """What is wrong with winners that are timed again, and what else to say of them."""
    from moecache.dispatch import using
    from moecache.verify.retiming import retime

    with using(replace(chosen, db=MEMORY, path=())) as serving:
        rows, skipped = retime(store, serving, count=count, tell=show.note)
    bad = [str(row) for row in rows if row.lost]
    told = [str(row) for row in rows if not row.lost]
    return bad, told + [f"not timed: {counted(number, 'winner')}, as {why}" for why, number in skipped.items()]


@commands.command(epilog="Example: moecache report h200.html arch=sm_90")
def report(
    to: Annotated[Path, typer.Argument(metavar="OUT", help="The page to write, like report.html.")],
    fields: Fields = None,
    db: Alone = None,
) -> None:
    """Draw the winners, their times and the failures in one HTML page.

    The page needs no network, no script and no other file. It replaces an older page of that name, and no other file.
    Predictions are drawn if --db names their file, or if the file has timings too. If the fields (see ls) match
    nothing, no page is written and the exit code is 1.
    """
    _ends(to, "OUT", *PAGES)
    from moecache.devices import Places
    from moecache.report import page

    held = [(store, store.stats()) for store in find.stores(settings(), db)]
    # predictions alone are drawn of a file that is named
    held = [(store, has) for store, has in held if db or has["timings"] or not has["predictions"]]
    files, wanted = [store for store, _ in held], find.wanted(fields)
    timings = [(timing, str(store.path)) for store in files for timing in store.timings(today=True, **wanted)]
    winners, predictions = find.winners(files, **wanted), find.predictions(files, **wanted)
    if wanted and not timings and not predictions:
        raise find.nothing(files, wanted)
    met = 0 if wanted else sum(has["wanted"] for _, has in held)
    here = Places().first().environment
    made = page([str(store.path) for store in files], timings, winners, predictions, met, here)
    atomic.write(to, made, "<title>moecache: ")
    show.say(f"{_held(timings, predictions)} of {counted(len(files), 'cache file')} drawn in {to}")
    if gone := sum(has["other_code"] for _, has in held):
        show.note(f"moecache: {changed(gone)}")


@commands.command(epilog="Example: moecache export h200.sqlite arch=sm_90")
def export(
    to: Annotated[Path, typer.Argument(metavar="FILE", help="x.sqlite for MOECACHE_PATH; with --format a folder.")],
    fields: Fields = None,
    format: Annotated[
        Literal["vllm", "sglang"] | None,
        typer.Option(metavar="ENGINE", help="Write tables that this engine reads by itself: vllm or sglang."),
    ] = None,
    db: Db = None,
) -> None:
    """Write the timings to a file that can be shipped.

    With --format they are those of the engine's own kernel, and the folder is what VLLM_TUNED_CONFIG_FOLDER or
    SGLANG_MOE_CONFIG_DIR should name. If the fields (see ls) match nothing, no file is written and the exit code is 1.
    """
    wanted = find.wanted(fields)
    if format:
        return _export_tables(format, to, settings(db), wanted)
    _ends(to, "FILE", *SQLITE)
    with Store.open(find.user(settings(db)), readonly=True) as store:
        timings, predictions = store.timings(**wanted), find.predictions([store], **wanted)
        if wanted and not timings and not predictions:
            raise find.nothing([store], wanted)
        store.export_file(to, **wanted)
        show.say(f"{_held(timings, predictions)} from {store.path} written to {to}")


def _export_tables(engine: str, to: Path, settings: Settings, wanted: find.Wanted) -> None:
    """Write a table for each shape of the engine's kernel that was measured."""
    from moecache.integrations import sglang_tables, tables, vllm_tables

    of = {"vllm": vllm_tables, "sglang": sglang_tables}[engine]
    with Store.open(find.user(settings), readonly=True) as store:
        if not (groups := tables.grouped(store.timings(**wanted | {"op": [of.OP]}), partial(of.path, to))):
            raise InvalidInput(f"{store.path} has no such timings of {of.OP}; nothing was written")
        made = {path: tables.table(timings, of.default) for path, timings in groups.items()}
        of.beside(to)
        for path, rows in made.items():
            tables.write(path, rows, **of.head(groups[path][0].environment.triton))
    show.say(f"{counted(len(made), 'table')} from {store.path} written to {to}")


def _ends(to: Path, name: str, *allowed: str) -> None:
    """Refuse to write a file of another kind."""
    if to.suffix not in allowed:
        told = f"{str(to)!r} ends in {repr(to.suffix) if to.suffix else 'nothing'}; allowed are {', '.join(allowed)}"
        raise typer.BadParameter(told, param_hint=name)


def _held(timings: Sequence[object], predictions: Sequence[object]) -> str:
    also = f" and {counted(len(predictions), 'prediction')}" if predictions else ""
    return counted(len(timings), "timing") + also


@commands.command("import", epilog="Example: moecache import --from vllm")
def import_(
    of: Annotated[
        Literal["vllm", "sglang", "aiter"],
        typer.Option("--from", metavar="ENGINE", help="Whose tables: vllm, sglang or aiter."),
    ],
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="A table or a folder; default: those of its package.")
    ] = None,
    db: Db = None,
) -> None:
    """Take the configs that tables of an engine name.

    They answer no call. They are tried first where their problem is measured.
    """
    from moecache.integrations import aiter_tables, sglang_tables, vllm_tables

    timings, others = {"vllm": vllm_tables, "sglang": sglang_tables, "aiter": aiter_tables}[of].seeds(file)
    with find.writable(_chosen(db)) as store:
        store.put(timings)
        show.say(f"{counted(len(timings), 'config')} of {of} taken into {store.path}, to be measured here")
    if others:
        told = "are of devices or configs that are not known here, and were left out"
        show.note(f"moecache: {others} tables or rows {told}")


@commands.command(epilog="Example: moecache merge node1.sqlite node2.sqlite --db all.sqlite")
def merge(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="Cache files; they are only read.")],
    db: Db = None,
) -> None:
    """Add the newer and missing timings of other cache files."""
    _merged({str(file): Store.open(file, readonly=True) for file in files}, db)


def _merged(others: Mapping[str, Store], db: Path | None) -> None:
    """Add what files have, each with the name by which it is told."""
    with find.writable(_chosen(db)) as store:
        for name, other in others.items():
            show.say(f"{counted(store.merge(other), 'timing')} from {name} taken into {store.path}")


Url = Annotated[str, typer.Argument(metavar="URL", help="Where fsspec reaches: a path, file:, s3:, hf: and others.")]


@commands.command(epilog="Example: moecache push h200.sqlite s3://bucket/h200.sqlite")
def push(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A cache file; it is only read.")],
    url: Url,
) -> None:
    """Write a cache file to a URL, and its sha256 beside it.

    What is written is what `export` makes of the file: equal timings make equal bytes.
    """
    with TemporaryDirectory() as folder, Store.open(file, readonly=True) as store:
        store.export_file(copy := Path(folder, "copy.sqlite"))
        remote.write(url, copy.read_bytes())
        show.say(f"{_held(store.timings(), store.predictions())} from {file} written to {url}")


@commands.command(epilog="Example: moecache pull s3://bucket/h200.sqlite h200.sqlite")
def pull(
    url: Url,
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Make this file, or replace it; default: merge.")
    ] = None,
    db: Db = None,
) -> None:
    """Take a cache file from a URL: what `push` wrote there.

    Without FILE its timings are merged into the user's file. FILE becomes what is at the URL, as a whole or not at all.
    A copy whose checksum or format is not right changes nothing.
    """
    if file is not None and db is not None:
        raise typer.BadParameter("give FILE, which is replaced, or --db, which is merged into", param_hint="FILE")
    with TemporaryDirectory() as folder:
        (copy := Path(folder, "copy.sqlite")).write_bytes(remote.read(url))
        try:
            other = Store.open(copy, shipped=True)
        except StoreError as error:
            raise StoreError(str(error).replace(str(copy), url)) from None
        with other:
            if file is None:
                return _merged({url: other}, db)
            other.export_file(file)
            show.say(f"{_held(other.timings(), other.predictions())} from {url} written to {file}")


@commands.command(epilog="Example: moecache prune")
def prune(
    failed: Annotated[
        bool, typer.Option("--failed", help="Delete the failures instead, so that their configs are tried again.")
    ] = False,
    db: Db = None,
) -> None:
    """Delete the timings of code that has changed since."""
    path = find.user(settings(db))
    Store.open(path, readonly=True).close()  # there must be one: to prune never makes a file
    with find.writable(_chosen(db)) as store:
        show.say(f"{counted(store.prune(failed=failed), 'timing')} deleted from {store.path}")


def _chosen(db: Path | None) -> Settings:
    """The settings of a command that cannot do without a file."""
    chosen = settings(db)
    find.user(chosen)
    return chosen
