"""The progress of a warm-up: a line a problem, on stderr."""

import os
import signal
import statistics
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from moecache.cli.options import INTERRUPTED
from moecache.cli.show import note
from moecache.schemas.warm import Progress, WarmRow
from moecache.text import counted

NOISY = 0.10  # of a median: a quiet GPU has 0.2 to 1 %, a quiet CPU 1 to 3 %


class Meter:
    """Called with every news of a warm-up that keeps its results in `file`; sees to it that Ctrl-C ends it.

    Until the first news, Ctrl-C ends the process at once: nothing is written yet, and an exception within torch's
    import may become an ImportError or an abort. Later, should code swallow it, it comes again at the next news.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = str(file or "memory")
        self.lost = False  # what was measured could not be kept
        self._done = self._total = 0
        self._began = time.perf_counter()
        self._interrupted = False
        self._handler: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
        self._close(interrupted=kind is KeyboardInterrupt)

    def _close(self, interrupted: bool) -> None:
        if interrupted and self._done:
            kept = f"after {self._done} of {self._total} problems, kept in {self.file}"
            note(f"interrupted {kept}; the same command goes on from there")
        elif interrupted:
            note("interrupted before the first problem was done; the same command starts again")

    def _interrupt(self, *_: object) -> None:
        self._interrupted = True
        if not self._total:
            self._close(interrupted=True)
            os._exit(INTERRUPTED)
        raise KeyboardInterrupt

    def __call__(self, news: Progress) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._done, self._total = news.done, news.total
        if not news.text:
            left = [] if news.remaining is None else [f"about {duration(news.remaining)} left"]
            what = f"{news.problem.op} tokens={news.problem.tokens} routing={news.problem.routing or 'any'}"
            note(f"[{news.done + 1}/{news.total}] {what} ({', '.join([duration(news.elapsed), *left])})")

    def conclude(self, rows: Sequence[WarmRow]) -> list[str]:
        """What was measured, and what was not and why."""
        fresh = [row for row in rows if row.measured]
        left = [row for row in rows if row.tier != "measured"]
        lines = []
        if fresh:
            took = duration(time.perf_counter() - self._began)
            tried = counted(sum(row.measured for row in fresh), "candidate")
            lines.append(f"measured {counted(len(fresh), 'problem')} ({tried}) in {took}, kept in {self.file}")
        elif not left:
            known = f"{counted(len(rows), 'problem')} known in {self.file}" if rows else f"{self.file} names no problem"
            lines.append(f"nothing to measure: {known}")
        for why in dict.fromkeys(row.reason.rpartition("not measured: ")[2] for row in left):
            same = sum(row.reason.endswith(why) for row in left)
            lines.append(f"not measured: {counted(same, 'problem')}, as {why}")
        return lines + _noisy(row.noise for row in fresh)


def _noisy(shares: Iterable[float | None]) -> list[str]:
    """A word of warning where samples of a run scatter as widely. Shares are median absolute deviation / median."""
    usual = statistics.median([share for share in shares if share is not None] or [0.0])
    told = f"this machine is noisy: samples lie {100 * usual:.0f} % from their median, so little can be proved"
    return [f"{told} better than the default; measure again when nothing else runs here"] if usual > NOISY else []


def duration(seconds: float) -> str:
    """`7 s`, `2 min 05 s`, `1 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
