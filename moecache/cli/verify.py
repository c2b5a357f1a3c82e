"""`moecache verify`: prints findings in words, and the winners that were timed again as a table or as JSON."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic_core import to_jsonable_python
from typer.core import TyperCommand

from moecache.cli import find, show
from moecache.cli.options import Alone, Json, measuring, option, settings, whole
from moecache.cli.progress import noisy
from moecache.cli.records import named
from moecache.cli.tables import Row, problem_row, sections
from moecache.schemas.errors import InvalidInput
from moecache.settings import MEMORY, Settings
from moecache.store import Store
from moecache.text import Section, counted, micros, percent

if TYPE_CHECKING:
    from moecache.verify.retiming import Drift, Retimed

SAMPLE = "20"  # winners that `--sample` times again


def _share(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise InvalidInput(f"{text!r} is no share; write per cent, for example 5 or 2.5")
    return float(text) / 100


class Sampling(TyperCommand):
    """`--sample` may stand without a number. An option of typer cannot."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--sample" in args:
            behind = args.index("--sample") + 1
            if args[behind : behind + 1] == [] or args[behind].startswith("-"):
                args = [*args[:behind], SAMPLE, *args[behind:]]
        return super().parse_args(ctx, args)


def verify(
    sample: Annotated[
        int | None, option("sample", "[N]", f"Time N of the winners here again; default N: {SAMPLE}.", whole)
    ] = None,
    seed: Annotated[int, option("seed", "N", "Another number draws another sample.", whole)] = 0,
    tolerance: Annotated[
        Any,
        option("tolerance", "PERCENT", "In the sample, a winner that loses by more than this is a finding.", _share),
    ] = "5",
    db: Alone = None,
    as_json: Json = False,
) -> int:
    """Check that the cache files are sound and usable, and that a sample still wins.

    First checks that each file is sound. Then checks that every stored config is still known, and fits its problem and
    device. With --sample, it draws winners of this machine's devices, spread over ops, tokens and routing, and times
    each again beside its runner-up and the default. It writes nothing. The exit code is 1 if there is a finding.
    """
    from moecache.verify.usable import verify as judge

    chosen = settings() if sample is None else measuring()
    files = find.stores(chosen, db)
    verdicts = [(str(store.path), judge(store)) for store in files]
    drifts = {} if sample is None else _drifts(files, chosen, sample, seed, tolerance)
    found = [(file, [*v.wrong, *(drifts[file].findings if drifts else ())], v.notes) for file, v in verdicts]
    if as_json:
        told: list[dict[str, Any]] = [{"file": file, "findings": wrong, "notes": notes} for file, wrong, notes in found]
        show.say_json([each | ({"drift": record(drifts[each["file"]])} if drifts else {}) for each in told])
    for file, findings, notes in [] if as_json else found:
        show.say(f"{file}: {show.counted(len(findings), 'finding')}")
        for text in (*findings, *(f"note: {note}" for note in notes)):
            show.say(f"  {text}")
        if drifts:
            _say_drift(drifts[file])
    return int(any(findings for _, findings, _ in found))


def _say_drift(drift: Any) -> None:
    if drift.rows:
        show.say()
        show.say_sections(tables(drift, show.terminal()))
        show.say()
    for text in words(drift):
        show.say(f"  {text}")


def _drifts(files: Sequence[Store], chosen: Settings, count: int, seed: int, tolerance: float) -> dict[str, Any]:
    """How the winners of each file have drifted, by its name."""
    from moecache.dispatch import using
    from moecache.verify.retiming import retime

    found = {}
    for store in files:
        with using(replace(chosen, db=MEMORY, path=())) as serving:
            found[str(store.path)] = retime(store, serving, count=count, seed=seed, tolerance=tolerance, tell=show.note)
    return found


def tables(drift: "Drift", fitted: bool) -> list[Section]:
    """One row a winner, in the order of the draw; on a terminal layer by layer."""
    return sections([(row.problem, _row(row)) for row in drift.rows], fitted)


def _row(row: "Retimed") -> Row:
    stored, second = row.stored, row.runner_up
    return {
        **problem_row(row.problem),
        "winner": stored.config.name,
        "stored µs": micros(stored.median_us),
        "µs now": micros(row.winner.us),
        "now/stored": f"{row.ratio:.3f}" if row.ratio else "-",
        "runner-up µs": micros(second.us if second else None),
        "default µs": micros(row.default.us),
        "state": row.state,
        "loss %": percent(None if row.state == "fails" else row.loss),
        "environment": "here" if row.here else stored.environment.id,
    }


def words(drift: "Drift") -> list[str]:
    """What the table comes to, and what is not in it."""
    timed, lines = len(drift.rows), list[str]()
    if timed:
        still = [row.state for row in drift.rows if row.state in ("wins", "ties")]
        share = f"{len(still)} of {timed}, {still.count('ties')} of them tied"
        lines = [
            f"timed again: {timed} of {counted(drift.eligible, 'winner')} that can be, seed {drift.seed}",
            f"still winning: {share}; a loss of more than {percent(drift.tolerance)} % is a finding",
        ]
    if drift.geomean is not None:
        lines.append(f"now / stored: {drift.geomean:.3f}, geometric mean")
    skipped = [f"not timed: {counted(count, 'winner')}, as {why}" for why, count in drift.skipped.items()]
    return [*(lines or ["timed again: none of its winners"]), *skipped, *noisy(row.noise for row in drift.rows)]


def record(drift: "Drift") -> dict[str, Any]:
    """What a sample says of a file. The loss of a winner that fails is null."""
    fields: dict[str, Any] = to_jsonable_python(drift, exclude={"rows"})
    rows = [
        named(row.problem)
        | {"environment": row.stored.environment.id, "ratio": row.ratio}
        | to_jsonable_python(row, exclude={"stored", "noise"})
        | {"loss": None if row.state == "fails" else row.loss}
        for row in drift.rows
    ]
    return fields | {"geomean": drift.geomean, "still_winning": drift.share, "rows": rows}
