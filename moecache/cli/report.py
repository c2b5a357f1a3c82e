"""The command that draws what cache files hold."""

from pathlib import Path
from typing import Annotated

import typer

from moecache.cli import choosing, lookup, show
from moecache.cli.command import Alone, OfArch, OfEnvironment, OfExperts, OfOp, OfRouting, OfTokens, filters, settings
from moecache.store import Store
from moecache.store.whole import write
from moecache.text import changed

PAGES = (".html", ".htm")  # nothing else is written over


def report(
    to: Annotated[Path, typer.Argument(metavar="OUT", help="The page to write, like report.html.")],
    op: OfOp = "",
    arch: OfArch = "",
    tokens: OfTokens = "",
    experts: OfExperts = "",
    routing: OfRouting = "",
    environment: OfEnvironment = "",
    db: Alone = None,
) -> None:
    """Draw the winners, their times and the failures in one HTML page.

    The page needs no network, no script and no other file. It replaces an older page of that name, and no other file.
    Predictions are drawn if --db names their file, or if the file has timings too. If the filters match nothing, no
    page is written and the exit code is 1.
    """
    wanted = filters(op=op, arch=arch, tokens=tokens, experts=experts, routing=routing, environment=environment)
    if to.suffix.lower() not in PAGES:
        told = f"{str(to)!r} ends in {to.suffix or 'nothing'!r}; allowed are {', '.join(PAGES)}"
        raise typer.BadParameter(told, param_hint="OUT")
    from moecache.report import page

    files = [store for store in lookup.stores(settings(), db) if db or _drawable(store)]
    wanted = choosing.as_stored(files, wanted)
    timings = [(timing, str(store.path)) for store in files for timing in store.timings(today=True, **wanted)]
    winners = [(winner, file) for winner, file, _ in lookup.winners(files, **wanted)]
    predictions = lookup.predictions(files, **wanted)
    if wanted and not timings and not predictions:
        raise choosing.nothing(files, wanted)
    held = [store.stats() for store in files]
    met = 0 if wanted else sum(each["wanted"] for each in held)
    made = page([str(store.path) for store in files], timings, winners, predictions, met, lookup.here())
    write(to, made, "<title>moecache: ")
    drawn = show.counted(len(timings), "timing")
    drawn += f" and {show.counted(len(predictions), 'prediction')}" if predictions else ""
    show.say(f"{drawn} of {show.counted(len(files), 'cache file')} drawn in {to}")
    if gone := sum(each["other_code"] for each in held):
        show.note(f"moecache: {changed(gone)}")


def _drawable(store: Store) -> bool:
    """Whether it has more than predictions, which are drawn of a file that is named."""
    held = store.stats()
    return bool(held["timings"] or not held["predictions"])
