"""One tuning on its way: its candidates, its budget, and how work is done within it."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch

from moecache.backends.contract import Backend
from moecache.kernels.contract import Args, Op
from moecache.schemas.config import Config
from moecache.schemas.device import Device
from moecache.schemas.errors import DeviceLost
from moecache.schemas.problem import Problem
from moecache.tuning.budget import Budget
from moecache.tuning.lane import GRACE, Lane
from moecache.tuning.shortlist import SURE
from moecache.tuning.timing import Failed, wait
from moecache.tuning.trial import failure

T = TypeVar("T")
SHORT = 0.5  # seconds: what takes less may begin however late it is


class Late(Failed):
    """The budget was over before something ended, which says nothing of it."""


@dataclass(eq=False)
class Entry:
    """A candidate on its way. `kernels` are those that are compiled elsewhere."""

    config: Config
    is_default: bool
    kernels: "list[Future[None]]" = field(default_factory=list)
    failed: Failed | None = None
    error: float | None = None  # against the reference; None until checked
    seconds: float = 0.0  # that its check took


@dataclass(frozen=True)
class Run:
    """What stays the same during one tuning."""

    op: Op
    problem: Problem
    topk_ids: torch.Tensor
    backend: Backend
    device: Device
    budget: Budget
    lane: Lane
    entries: list[Entry]
    say: Callable[[str], None]
    trying: Callable[[Config | None], None]
    began: float

    def deadline(self, share: float = 1.0) -> float:
        return self.began + share * self.budget.seconds

    def limit(self) -> float:
        """Seconds that something may take which is waited for within the budget alone: in a call, on a CPU, whose work
        can be left behind. Calls on a GPU are short, and what follows would wait for them anyway."""
        if not self.budget.hurry or self.backend.name != "cpu":
            return math.inf
        return max(self.deadline() - time.perf_counter(), SHORT)

    def within(self, work: Callable[[], T]) -> T:
        """Work of the op's own, inputs and references.

        Raises:
            Failed: it raised what is no Exception.
            Late: the budget was over first.
        """

        def guarded() -> T:
            try:
                return work()
            except Exception:
                raise
            except BaseException as error:
                raise failure(error) from error

        if self.limit() == math.inf:
            return work()
        try:
            return self.lane(partial(copy_context().run, guarded), self.limit(), grace=0.0)
        except Failed as failed:
            raise Late("timeout", str(failed)) if failed.status == "timeout" else failed from None

    def sure(self) -> list[Entry]:
        """Those that are tried however late it is."""
        usable = [entry for entry in self.entries if entry.failed is None]
        return usable[: 1 if self.budget.hurry else SURE]

    def checked(self) -> list[Entry]:
        """Those that gave the right numbers."""
        return [entry for entry in self.entries if entry.error is not None]

    def in_time(self, entries: Sequence[Entry]) -> Iterator[Entry]:
        """Those, until the deadline; the first ones in any case."""
        for i, entry in enumerate(entries):
            if i >= SURE and time.perf_counter() > self.deadline():
                return
            yield entry

    def reject(self, entry: Entry, failed: Failed) -> None:
        entry.failed = failed
        self.say(f"{entry.config.name} is unusable: {failed}")

    def attempt(self, entry: Entry, work: Callable[[], T], seconds: float) -> T:
        """`work` of a candidate in the lane.

        Raises:
            Failed: noted in the entry.
            DeviceLost: likewise; nothing can run any more.
        """
        limit = self.limit()
        try:
            return self.lane(work, min(seconds, limit), GRACE if seconds <= limit else 0.0)
        except Failed as failed:
            if failed.status == "timeout" and limit < seconds:
                raise Late(failed.status, failed.reason) from failed
            self.reject(entry, failed)
            self._probe(entry)
            raise
        except DeviceLost as lost:
            entry.failed = Failed("timeout", str(lost))
            raise

    def _probe(self, entry: Entry) -> None:
        """A bad access breaks the device's context for good: say so, and blame no later candidate."""
        try:
            self.lane(partial(wait, self.backend, self.budget.call_seconds), self.budget.call_seconds)
        except Failed as failed:
            raise DeviceLost(f"{entry.config.name} broke the device: {failed.reason}; restart the process") from failed

    def launch(self, config: Config, args: Args, out: Any) -> Any:
        """One call; whatever it raises is the candidate's failure: a Ctrl-C reaches the main thread, not the lane."""
        try:
            return self.op.launch(config, args, out)
        except BaseException as error:
            raise failure(error) from error
