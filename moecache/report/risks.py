"""Where a file's answers are the least sure: what a reader should measure again, or look at, first."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moecache.report.drawing import digits
from moecache.report.figures import Cell, Panel, Report
from moecache.schemas.timing import Environment
from moecache.text import counted

LISTED = 5  # of each kind
NOISY = 0.05  # median absolute deviation, of the median
FAR = 1.5  # multiples of the limit
COSTLY = 0.01  # time lost to the best, of its time


@dataclass(frozen=True)
class Risk:
    """One problem, why it is listed, and the figure that says so."""

    why: str
    said: str
    panel: int
    cell: Cell


Judge = Callable[[Cell], float | None]  # how bad a cell is, above 0; None or less is not bad


def risks(report: Report) -> list[Risk]:
    """The worst of each kind, the worst first; of measured problems alone."""
    kinds: list[tuple[str, Judge, Callable[[float], str]]] = [
        ("nothing usable", lambda cell: 1.0 if cell.state == "failures" else None, lambda _: "every candidate failed"),
        ("slower than the default", lambda cell: -(cell.gain or 0), lambda bad: f"{100 * -bad:.1f} %"),
        ("noisy winner", lambda cell: (cell.noise or 0) - NOISY, lambda bad: f"MAD {100 * (bad + NOISY):.0f} %"),
        ("slower than another", lambda cell: (cell.regret or 0) - COSTLY, lambda bad: f"{100 * (bad + COSTLY):.1f} %"),
        ("far from the limit", lambda cell: (cell.close or 0) - FAR, lambda bad: f"{digits(bad + FAR)}×"),
    ]
    cells = [(k, cell) for k, panel in enumerate(report.panels) if not panel.predicted for cell in panel.cells]
    found = []
    for why, judge, said in kinds:
        bad = [(how, k, cell) for k, cell in cells if (how := judge(cell) or 0) > 1e-9]
        bad.sort(key=lambda each: -each[0])
        found += [Risk(why, said(how), k, cell) for how, k, cell in bad[:LISTED]]
    return found


def elsewhere(panels: Sequence[Panel], here: Environment | None) -> str:
    """How many problems answer as unverified, as another environment has measured them; '' for none or nobody asked."""
    if here is None:
        return ""
    measured = [panel for panel in panels if panel.environment is not None]
    away = sum(len(panel.cells) for panel in measured if panel.environment != here)
    if not away:
        return ""
    total, where = sum(len(panel.cells) for panel in measured), ", ".join(filter(None, dict(here).values()))
    told = f"{away} of {counted(total, 'measured problem')} answer as unverified here ({where})"
    return f"{told}: they were measured in another environment."
