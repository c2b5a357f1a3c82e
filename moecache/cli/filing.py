"""The commands on whole cache files: export, import, merge, verify, prune."""

import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from moecache.cli import lookup, show
from moecache.cli.command import (
    Alone,
    Db,
    Json,
    OfArch,
    OfEnvironment,
    OfExperts,
    OfOp,
    OfRouting,
    OfTokens,
    filters,
    settings,
    whole,
)
from moecache.schemas.errors import InvalidInput
from moecache.store import Store

SQLITE = (".sqlite", ".sqlite3", ".db")

commands = typer.Typer()


@commands.command(epilog="Example: moecache export h200.sqlite --arch sm_90")
def export(
    to: Annotated[Path, typer.Argument(metavar="FILE", help="x.json to read and mail, x.sqlite for MOECACHE_PATH.")],
    op: OfOp = "",
    arch: OfArch = "",
    tokens: OfTokens = "",
    experts: OfExperts = "",
    routing: OfRouting = "",
    environment: OfEnvironment = "",
    db: Db = None,
) -> None:
    """Write the timings to a file that can be shipped."""
    wanted = filters(op=op, arch=arch, tokens=tokens, experts=experts, routing=routing, environment=environment)
    if to.suffix not in (*SQLITE, ".json"):
        allowed = ", ".join((".json", *SQLITE))
        raise typer.BadParameter(
            f"{str(to)!r} ends in {to.suffix or 'nothing'!r}; allowed are {allowed}", param_hint="FILE"
        )
    with Store.open(lookup.user(settings(db)), readonly=True) as store:
        if to.suffix in SQLITE:
            count = store.export_file(to, **wanted)
        else:
            from moecache.schemas import exchange

            timings = store.timings(**wanted)
            to.write_text(exchange.dump(exchange.pack(timings)), encoding="utf-8")
            count = len(timings)
        show.say(f"{show.counted(count, 'timing')} from {store.path} written to {to}")


@commands.command("import", epilog="Example: moecache import h200.json")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `moecache export x.json` wrote.")],
    db: Db = None,
) -> None:
    """Take in the newer and missing timings of an exported JSON file."""
    from moecache.schemas import exchange

    if file.suffix in SQLITE:
        raise typer.BadParameter(f"{str(file)!r} is a cache file; use `moecache merge {file}`", param_hint="FILE")
    try:
        taken = exchange.load(file.read_bytes())
    except InvalidInput as error:
        raise InvalidInput(f"{file}: {error}") from None
    with Store.memory() as other, Store.open(lookup.user(settings(db))) as store:
        other.put(taken.timings)
        count = store.merge(other)
        show.say(f"{count} of {len(taken.timings)} timings from {file} taken into {store.path}")
    if taken.skipped:
        show.note(f"moecache: {taken.skipped} timings of {file} need a later moecache and were left out")


@commands.command(epilog="Example: moecache merge node1.sqlite node2.sqlite --db all.sqlite")
def merge(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="Cache files; they are only read.")],
    db: Db = None,
) -> None:
    """Take in the newer and missing timings of other cache files."""
    others = [Store.open(file, readonly=True) for file in files]
    with Store.open(lookup.user(settings(db))) as store:
        for other in others:
            taken = show.counted(store.merge(other), "timing")
            show.say(f"{taken} from {other.path} taken into {store.path}")


@commands.command(epilog="Example: moecache verify --db h200.sqlite && echo sound")
def verify(db: Alone = None, as_json: Json = False) -> int:
    """Check that the cache files are sound and usable.

    Integrity first; then every stored config must still be known, and fit its problem and device. The exit
    code is 1 when there is a finding.
    """
    from moecache.cli.verify import verify as judge

    files = lookup.stores(settings(), db)
    verdicts = [(str(store.path), judge(store)) for store in files]
    if as_json:
        show.say_json([{"file": file, "findings": v.findings, "notes": v.notes} for file, v in verdicts])
    for file, verdict in [] if as_json else verdicts:
        show.say(f"{file}: {show.counted(len(verdict.findings), 'finding')}")
        for text in (*verdict.findings, *(f"note: {note}" for note in verdict.notes)):
            show.say(f"  {text}")
    return int(any(verdict.findings for _, verdict in verdicts))


@commands.command(epilog="Example: moecache prune --stale --older-than 90d --dry-run")
def prune(
    stale: Annotated[bool, typer.Option("--stale", help="Timings of kernels that have changed since.")] = False,
    older_than: Annotated[
        str, typer.Option(metavar="AGE", help="Problems last measured before: 90d, 2026-01-31.")
    ] = "",
    keep_environment: Annotated[
        str, typer.Option(metavar="ID", help="All but this environment's; `here` is the present one.")
    ] = "",
    max_rows: Annotated[
        int | None, typer.Option(parser=whole, metavar="N", help="The oldest, until N are left.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    db: Db = None,
) -> None:
    """Delete timings: all that any of the options names."""
    rules: dict[str, Any] = {}
    if older_than:
        rules["older_than"] = _age(older_than)
    if max_rows is not None:
        rules["max_rows"] = max_rows
    if stale:
        from moecache.kernels import op

        rules["source_hashes"] = {name: op.get(name).source for name in op.names()}
    if not rules and not keep_environment:
        raise typer.BadParameter("say what goes: --stale, --older-than, --keep-environment or --max-rows")
    path = lookup.user(settings(db))
    Store.open(path, readonly=True).close()  # there must be one: to prune never makes a file
    with Store.open(path) as store:
        if keep_environment:
            rules["keep_environment"] = _environment(keep_environment, store)
        count = store.prune(**rules, dry_run=dry_run)
        show.say(f"{show.counted(count, 'timing')} {'to delete' if dry_run else 'deleted'} from {store.path}")


def _age(text: str) -> timedelta | str:
    days = re.fullmatch(r"(\d+)d", text)
    return timedelta(days=int(days[1])) if days else text


def _environment(text: str, store: Store) -> str:
    """An id that the file has: to keep what is not there would delete everything."""
    if text == "here":
        from moecache.place import Places

        text = Places().first().environment.id
    there = sorted({timing.environment.id for timing in store.timings()})
    if text not in there:
        raise InvalidInput(
            f"{store.path} has nothing of environment {text!r}; allowed are {', '.join(there) or 'none'}"
        )
    return text
