"""The commands on whole cache files: report, export, import, merge, push, pull, prune."""

import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import typer

from moecache.cli import engines, find, show
from moecache.cli.options import (
    Alone,
    Db,
    OfArch,
    OfEnvironment,
    OfExperts,
    OfOp,
    OfRouting,
    OfTokens,
    option,
    settings,
    whole,
)
from moecache.schemas.errors import InvalidInput, StoreError
from moecache.settings import Settings
from moecache.store import Store, atomic, remote
from moecache.text import changed

SQLITE = (".sqlite", ".sqlite3", ".db")
PAGES = (".html", ".htm")  # nothing else is written over
LONGEST = 64 << 20  # bytes of an export: a hundred thousand timings

commands = typer.Typer()


@commands.command(epilog="Example: moecache report h200.html --arch sm_90")
def report(
    to: Annotated[Path, typer.Argument(metavar="OUT", help="The page to write, like report.html.")],
    op: OfOp = None,
    arch: OfArch = None,
    tokens: OfTokens = None,
    experts: OfExperts = None,
    routing: OfRouting = None,
    environment: OfEnvironment = None,
    db: Alone = None,
) -> None:
    """Draw the winners, their times and the failures in one HTML page.

    The page needs no network, no script and no other file. It replaces an older page of that name, and no other file.
    Predictions are drawn if --db names their file, or if the file has timings too. If the filters match nothing, no
    page is written and the exit code is 1.
    """
    _ends(to, "OUT", *PAGES)
    from moecache.report import page

    files = [store for store in find.stores(settings(), db) if db or _drawable(store)]
    wanted = find.as_stored(
        files, op=op, arch=arch, tokens=tokens, experts=experts, routing=routing, environment=environment
    )
    timings = [(timing, str(store.path)) for store in files for timing in store.timings(today=True, **wanted)]
    winners = [(winner, file) for winner, file, _ in find.winners(files, **wanted)]
    predictions = find.predictions(files, **wanted)
    if wanted and not timings and not predictions:
        raise find.nothing(files, wanted)
    held = [store.stats() for store in files]
    met = 0 if wanted else sum(each["wanted"] for each in held)
    made = page([str(store.path) for store in files], timings, winners, predictions, met, find.here())
    atomic.write(to, made, "<title>moecache: ")
    show.say(f"{_held(timings, predictions)} of {show.counted(len(files), 'cache file')} drawn in {to}")
    if gone := sum(each["other_code"] for each in held):
        show.note(f"moecache: {changed(gone)}")


def _drawable(store: Store) -> bool:
    """Whether it has more than predictions, which are drawn of a file that is named."""
    held = store.stats()
    return bool(held["timings"] or not held["predictions"])


@commands.command(epilog="Example: moecache export h200.sqlite --arch sm_90")
def export(
    to: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="x.json to read and mail, x.sqlite for MOECACHE_PATH; with --format a folder."
        ),
    ],
    format: Annotated[
        Literal["vllm", "sglang"] | None,
        typer.Option(metavar="ENGINE", help="Write tables that this engine reads by itself: vllm or sglang."),
    ] = None,
    op: OfOp = None,
    arch: OfArch = None,
    tokens: OfTokens = None,
    experts: OfExperts = None,
    routing: OfRouting = None,
    environment: OfEnvironment = None,
    db: Db = None,
) -> None:
    """Write the timings to a file that can be shipped.

    With --format they are those of the engine's own kernel, and the folder is what VLLM_TUNED_CONFIG_FOLDER or
    SGLANG_MOE_CONFIG_DIR should name. If the filters match nothing, no file is written and the exit code is 1.
    """
    if format:
        wanted = {"arch": arch, "tokens": tokens, "experts": experts, "environment": environment}
        return engines.export(format, to, settings(db), wanted)
    _ends(to, "FILE", ".json", *SQLITE)
    with Store.open(find.user(settings(db)), readonly=True) as store:
        wanted = find.as_stored(
            [store], op=op, arch=arch, tokens=tokens, experts=experts, routing=routing, environment=environment
        )
        timings, predictions = store.timings(**wanted), find.predictions([store], **wanted)
        if wanted and not timings and not predictions:
            raise find.nothing([store], wanted)
        if to.suffix in SQLITE:
            store.export_file(to, **wanted)
        else:
            from moecache.schemas import exchange

            predictions = []
            atomic.write(to, exchange.dump(timings), '"format": "moecache"')
        show.say(f"{_held(timings, predictions)} from {store.path} written to {to}")


def _ends(to: Path, name: str, *allowed: str) -> None:
    """Refuse to write a file of another kind."""
    if to.suffix not in allowed:
        told = f"{str(to)!r} ends in {to.suffix or 'nothing'!r}; allowed are {', '.join(allowed)}"
        raise typer.BadParameter(told, param_hint=name)


def _held(timings: Sequence[object], predictions: Sequence[object]) -> str:
    also = f" and {show.counted(len(predictions), 'prediction')}" if predictions else ""
    return show.counted(len(timings), "timing") + also


@commands.command("import", epilog="Example: moecache import h200.json")
def import_(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE", help="A file that `moecache export x.json` wrote; with --from, a table or a folder."
        ),
    ] = None,
    of: Annotated[
        Literal["vllm", "sglang", "aiter"] | None,
        typer.Option(
            "--from",
            metavar="ENGINE",
            help="Read tables of vllm, sglang or aiter; without FILE those of its package.",
        ),
    ] = None,
    db: Db = None,
) -> None:
    """Add the newer and missing timings of an exported JSON file.

    What is read --from an engine answers no call. It is tried first where its problem is measured.
    """
    if of:
        return engines.import_(of, file, _chosen(db))
    if file is None:
        raise typer.BadParameter("name a file, or an engine with --from", param_hint="FILE")
    from moecache.schemas import exchange

    if file.suffix in SQLITE:
        raise typer.BadParameter(f"{str(file)!r} is a cache file; use `moecache merge {file}`", param_hint="FILE")
    try:
        with file.open("rb") as opened:
            text = opened.read(LONGEST + 1)
        if len(text) > LONGEST:
            raise InvalidInput(f"it has more than {LONGEST >> 20} MiB; export to .sqlite and use `moecache merge`")
        taken = exchange.load(text)
    except InvalidInput as error:
        raise InvalidInput(f"{file}: {error}") from None
    with Store.memory() as other, find.writable(_chosen(db)) as store:
        other.put(taken.timings)
        count = store.merge(other)
        show.say(f"{count} of {len(taken.timings)} timings from {file} taken into {store.path}")
        _note_undated(other, file)
    if taken.skipped:
        show.note(f"moecache: {taken.skipped} timings of {file} need a later moecache and were left out")


@commands.command(epilog="Example: moecache merge node1.sqlite node2.sqlite --db all.sqlite")
def merge(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="Cache files; they are only read.")],
    db: Db = None,
) -> None:
    """Add the newer and missing timings of other cache files."""
    others = [Store.open(file, readonly=True) for file in files]
    with find.writable(_chosen(db)) as store:
        for other in others:
            _merge(store, other, other.path)


def _merge(store: Store, other: Store, name: object) -> None:
    show.say(f"{show.counted(store.merge(other), 'timing')} from {name} taken into {store.path}")
    _note_undated(other, name)


def _note_undated(other: Store, file: object) -> None:
    """Say which of them replace nothing."""
    if undated := other.stats()["undated"]:
        told = "without a date, or with one that lies ahead, replace no other: they count as the oldest"
        show.note(f"moecache: {show.counted(undated, 'timing')} of {file} {told}")


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
        count = store.export_file(copy := Path(folder, "copy.sqlite"))
        remote.write(url, copy.read_bytes())
    show.say(f"{show.counted(count, 'timing')} from {file} written to {url}")


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
                with find.writable(_chosen(db)) as store:
                    return _merge(store, other, url)
            show.say(f"{show.counted(other.export_file(file), 'timing')} from {url} written to {file}")


def _age(text: str) -> timedelta | str:
    with suppress(ValueError):
        datetime.fromisoformat(text)
        return text
    if days := re.fullmatch(r"(\d{1,5})d", text):
        return timedelta(days=int(days[1]))
    raise InvalidInput(f"{text!r} is neither an age nor a date; write for example 90d, 2026-11-20 or 2026-11-20T12:00Z")


@commands.command(epilog="Example: moecache prune --stale --older-than 90d --dry-run")
def prune(
    stale: Annotated[bool, typer.Option("--stale", help="Delete timings of kernels that have changed since.")] = False,
    failed: Annotated[bool, typer.Option("--failed", help="Delete failures: their configs are tried again.")] = False,
    older_than: Annotated[
        Any, option("older-than", "AGE", "Delete what was last measured before: 90d (ago), 2026-01-31.", _age)
    ] = None,
    keep_environment: Annotated[
        str, option("keep-environment", "ID", "Delete timings of all other environments; `here` is the present one.")
    ] = "",
    max_rows: Annotated[
        int | None, option("max-rows", "N", "Delete the oldest timings until N are left.", whole)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count, delete nothing.")] = False,
    db: Db = None,
) -> None:
    """Delete timings: each one that any of the options names."""
    if not (stale or failed or older_than or keep_environment or max_rows is not None):
        raise typer.BadParameter("say what goes: --stale, --failed, --older-than, --keep-environment or --max-rows")
    path = find.user(settings(db))
    Store.open(path, readonly=True).close()  # there must be one: to prune never makes a file
    with find.writable(_chosen(db)) as store:
        count = store.prune(
            keep_environment=_environment(keep_environment, store) if keep_environment else None,
            older_than=older_than,
            max_rows=max_rows,
            sources=_sources() if stale else None,
            failed=failed,
            dry_run=dry_run,
        )
        show.say(f"{show.counted(count, 'timing')} {'to delete' if dry_run else 'deleted'} from {store.path}")


def _chosen(db: Path | None) -> Settings:
    """The settings of a command that cannot do without a file."""
    chosen = settings(db)
    find.user(chosen)
    return chosen


def _sources() -> dict[str, str]:
    from moecache.kernels import registry

    return {name: registry.get(name).source for name in registry.names()}


def _environment(text: str, store: Store) -> str:
    """An id that the file has: to keep what is not there would delete everything."""
    if text == "here":
        from moecache.devices import Places

        text = Places().first().environment.id
    there = sorted({timing.environment.id for timing in store.timings()})
    if text not in there:
        raise InvalidInput(
            f"{store.path} has nothing of environment {text!r}; allowed are {', '.join(there) or 'none'}"
        )
    return text
