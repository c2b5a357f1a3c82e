"""What `verify --sample` prints: the winners that were timed again as a table, in words and as JSON."""

from typing import TYPE_CHECKING, Any

from moecache.cli.meter import noisy
from moecache.cli.tables import Row, sections
from moecache.text import Column, Section, counted, dims, micros, percent

if TYPE_CHECKING:
    from moecache.cli.drift import Drift, Retimed, Side

_COLUMNS = (
    Column("id"),
    Column("op"),
    Column("tokens", right=True),
    Column("routing"),
    Column("dims", wrap=True, least=20),
    Column("winner", wrap=True, shorten=4),
    Column("stored µs", right=True, drop=1),
    Column("µs now", right=True),
    Column("now/stored", right=True),
    Column("runner-up µs", right=True, drop=3),
    Column("default µs", right=True, drop=2),
    Column("state"),
    Column("loss %", right=True),
    Column("environment", drop=5),
)


def tables(drift: "Drift", fitted: bool) -> list[Section]:
    """One row a winner, in the order of the draw; on a terminal layer by layer."""
    return sections([(row.problem, _row(row)) for row in drift.rows], fitted, _COLUMNS)


def _row(row: "Retimed") -> Row:
    p, stored, second = row.problem, row.stored, row.runner_up
    return {
        "id": p.id, "op": p.op, "tokens": str(p.tokens), "routing": p.routing or "-", "dims": dims(p),
        "winner": stored.config.name, "stored µs": micros(stored.median_us), "µs now": micros(row.winner.us),
        "now/stored": f"{row.ratio:.3f}" if row.ratio else "-",
        "runner-up µs": micros(second.us if second else None), "default µs": micros(row.default.us),
        "state": row.state, "loss %": percent(None if row.state == "fails" else row.loss),
        "environment": "here" if row.here else stored.environment.id,
    }  # fmt: skip


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
    """As JSON. The loss of a winner that fails is null."""
    return {
        "seed": drift.seed,
        "tolerance": drift.tolerance,
        "eligible": drift.eligible,
        "geomean": drift.geomean,
        "still_winning": drift.share,
        "rows": [_record(row) for row in drift.rows],
        "skipped": drift.skipped,
    }


def _record(row: "Retimed") -> dict[str, Any]:
    return {
        "id": row.problem.id,
        "key": row.problem.key,
        "environment": row.stored.environment.id,
        "here": row.here,
        "winner": _side(row.winner),
        "default": _side(row.default),
        "runner_up": None if row.runner_up is None else _side(row.runner_up),
        "ratio": row.ratio,
        "state": row.state,
        "loss": None if row.state == "fails" else row.loss,
        "reason": row.reason,
    }


def _side(side: "Side") -> dict[str, Any]:
    return {"config": side.config.model_dump(mode="json"), "stored_us": side.stored_us, "us": side.us}
