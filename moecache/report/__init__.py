"""Cache files as one HTML page: rows in, figures from them, pictures and tables from the figures."""

from collections.abc import Sequence

from moecache.report.figures import figures
from moecache.report.page import html
from moecache.schemas.prediction import Prediction
from moecache.schemas.timing import Environment, Timing, Winner

__all__ = ["page"]


def page(
    files: Sequence[str],
    timings: Sequence[tuple[Timing, str]],
    winners: Sequence[tuple[Winner, str]],
    predictions: Sequence[tuple[Prediction, str]] = (),
    wanted: int = 0,
    here: Environment | None = None,
) -> str:
    """A whole page that needs nothing else, no script either; well-formed as XML too.

    Args:
        files: names of the cache files that were read, one without rows included.
        timings: all of them, each with the name of its file.
        winners: what wins among them, each with the name of its file.
        predictions: what nobody measured, each with the name of its file.
        wanted: how many problems were met and not measured.
        here: the environment of this machine, to say how much was measured elsewhere; None says nothing of it.
    """
    return html(figures(files, timings, winners, predictions, wanted), here)
