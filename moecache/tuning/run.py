"""One tuning on its way: its candidates, its budget, and how ranks do it in step."""

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import wait as wait_for
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from moecache.backends.contract import Backend
from moecache.kernels.contract import Args, Bound, Op, failing
from moecache.schemas.config import Config
from moecache.schemas.device import Device
from moecache.schemas.errors import DeviceLost
from moecache.schemas.problem import Problem
from moecache.team import ALONE, Team
from moecache.tuning.failing import Failed, failure
from moecache.tuning.thread import GRACE, CallThread
from moecache.tuning.timing import Call, Clock, Sampler, wait

T = TypeVar("T")
PREPARING = 4  # preparing a sampler makes several calls, each with its own limit
SURE = 2  # candidates that are tried however small the budget: the default and the best predicted other
SHORT = 0.5  # seconds: what takes less may begin however late it is


@dataclass(frozen=True)
class Budget:
    """What tuning one problem may take.

    Attributes:
        seconds: in all; the default and the best predicted other are tried even when it is 0.
        candidates: tried at most, the default and the incumbent among them.
        call_seconds: limit of one call, or one sample.
        compile_seconds: limit of one compilation.
        memory_bytes: of all input sets together, unless a single set takes more.
        hurry: once the seconds are over, the one is enough that would be served if nothing were measured.
    """

    seconds: float = 30.0
    candidates: int = 16
    call_seconds: float = 10.0
    compile_seconds: float = 60.0
    memory_bytes: int = 2 << 30
    hurry: bool = False


DEFAULT_BUDGET = Budget()


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
    thread: CallThread
    entries: list[Entry]
    say: Callable[[str], None]
    trying: Callable[[Config | None], None]
    began: float
    team: Team = ALONE
    met: list[float] = field(default_factory=list)  # when the ranks agreed, on the scale of `began`

    @property
    def patience(self) -> float:
        """Seconds that anything may take while other ranks wait: half of what they would wait for."""
        return math.inf if self.team.size == 1 else self.team.timeout / 2

    def now(self) -> float:
        """The time that decides. In a team it stands still between agreements, so that all ranks decide alike."""
        return time.perf_counter() if self.team.size == 1 else (self.met or [self.began])[-1]

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
            Late: the budget was over first.
        """
        if self.limit() == math.inf:
            return work()
        try:
            return self.thread(partial(copy_context().run, work), self.limit(), grace=0.0)
        except Failed as failed:
            raise Late("timeout", str(failed)) if failed.status == "timeout" else failed from None

    def sure(self) -> list[Entry]:
        """Those that are tried however late it is."""
        usable = [entry for entry in self.entries if entry.failed is None]
        return usable[: 1 if self.budget.hurry else SURE]

    def checked(self) -> list[Entry]:
        """Those that gave the right numbers."""
        return [entry for entry in self.entries if entry.error is not None]

    def in_time(self, entries: Sequence[Entry], share: float = 1.0) -> Iterator[Entry]:
        """Those, until the deadline; the first ones in any case."""
        for i, entry in enumerate(entries):
            if i >= SURE and self.now() > self.deadline(share):
                return
            yield entry

    def reject(self, entry: Entry, failed: Failed) -> None:
        entry.failed = failed
        self.say(f"{entry.config.name} is unusable: {failed}")

    def compiled(self, entry: Entry) -> float:
        """0.0, once the compilers are done with it; kernels that nobody compiled, this process will.

        Raises:
            Failed: they do not compile; noted in the entry.
        """
        faults = [fault for each in entry.kernels if (fault := _fault(each)) is not None]
        if (failed := next((fault for fault in faults if isinstance(fault, Failed)), None)) is not None:
            self.reject(entry, failed)
            raise failed
        if faults:
            self.say(f"compiling {entry.config.name} in this process: {faults[0]}")
        return 0.0

    def agreed(self, entry: Entry, work: Callable[[], float]) -> float:
        """The largest of what `work` gives on the ranks; whoever gave it waits for the others. Alone it is just done.

        Of samples, too, each one's largest counts, not the largest median: a call of all ranks ends with the slowest,
        which is another one from call to call, and its median and spread are those of such calls.

        Raises:
            Failed: `work` failed on one rank. It is noted in the entry of all, so all go on without that candidate.
        """
        if self.team.size == 1:
            return work()
        value, bad = 0.0, None
        try:
            value = work()
        except Failed as failed:
            bad = failed.status, failed.reason
        said: Any = [time.perf_counter() - self.began, value, bad]
        told = self.team.gather(f"{entry.config.name} for {self.problem.key}", said)
        self.met.append(self.began + max(seconds for seconds, *_ in told))
        for rank, (_, _, fault) in enumerate(told):
            if fault:
                entry.failed = Failed(fault[0], f"on rank {rank}: {fault[1]}")
                raise entry.failed
        return float(max(each for _, each, _ in told))

    def attempt(self, entry: Entry, work: Callable[[], T], seconds: float) -> T:
        """`work` of a candidate in the thread.

        Raises:
            Failed: noted in the entry.
            DeviceLost: likewise; nothing can run any more.
        """
        limit, seconds = self.limit(), min(seconds, self.patience)
        try:
            return self.thread(work, min(seconds, limit), GRACE if seconds <= limit else 0.0)
        except Failed as failed:
            if failed.status == "timeout" and limit < seconds:
                raise Late(failed.status, failed.reason) from failed
            self.reject(entry, failed)
            self._probe(entry)
            raise
        except DeviceLost as lost:
            entry.failed = Failed("timeout", str(lost))
            raise

    def in_step(self, share: float) -> Iterator[Entry]:
        """Entries in the order of the shortlist, each once its kernels are compiled on every rank: none launches it
        alone, and waits for ranks that cannot."""
        for entry in self.in_time(self.entries, share):
            wait_for(entry.kernels, timeout=self.patience)
            try:
                self.agreed(entry, partial(self.compiled, entry))
            except Failed:
                continue
            yield entry

    def prepared(self, entry: Entry, clock: Clock, calls: Sequence[Call]) -> Sampler:
        """What samples a candidate, on all ranks by the same times, so that all launch it as often.

        Raises:
            Failed: it cannot be prepared, on one rank at least.
        """
        limit = PREPARING * self.budget.call_seconds
        if self.team.size == 1:
            return self.attempt(entry, partial(clock.prepare, calls), limit)
        steps, found, us = clock.steps(calls), list[Sampler](), None

        def step() -> float:
            try:
                return self.attempt(entry, partial(steps.send, us), limit)
            except StopIteration as done:
                found.append(done.value)
                return 0.0

        while not found:
            us = self.agreed(entry, step)
        return found[0]

    def _probe(self, entry: Entry) -> None:
        """A bad access breaks the device's context for good: say so, and blame no later candidate."""
        try:
            self.thread(partial(wait, self.backend, self.budget.call_seconds), self.budget.call_seconds)
        except Failed as failed:
            raise DeviceLost(f"{entry.config.name} broke the device: {failed.reason}; restart the process") from failed

    def bound(self, config: Config, args: Args, out: Any) -> Bound:
        """What runs the candidate; where it cannot be bound, what raises the reason."""
        try:
            return self.op.bind(config, args, out)
        except Exception as error:
            return failing(error)

    def launch(self, bound: Bound, args: Args, out: Any) -> Any:
        """One call; whatever it raises is the candidate's failure: a Ctrl-C reaches the main thread, not this one."""
        try:
            return bound(args, out)
        except BaseException as error:
            raise failure(error) from error


def _fault(kernel: "Future[None]") -> BaseException | None:
    if not kernel.done():
        return Failed("timeout", "its kernels are not compiled in time")
    return CancelledError("nobody compiled it") if kernel.cancelled() else kernel.exception()


class Plan(NamedTuple):
    """What is tried: see `tune`."""

    asked: Sequence[Config]
    without: Collection[Config]
    incumbent: Config | None
    budget: Budget


def in_common(team: Team, problem: Problem, mine: Plan) -> Plan:
    """The candidates of rank 0 but for those that any rank leaves out, and the shortest of the budgets."""
    if team.size == 1:
        return mine
    asked = [config.model_dump_json() for config in mine.asked]
    without = sorted(config.model_dump_json() for config in mine.without)
    said: Any = [asked, without, mine.incumbent and mine.incumbent.model_dump_json(), mine.budget.seconds]
    told = team.gather(f"candidates for {problem.key}", said)
    first, _, best, _ = told[0]
    return Plan(
        [Config.model_validate_json(text) for text in first],
        {Config.model_validate_json(text) for _, without, *_ in told for text in without},
        best and Config.model_validate_json(best),
        replace(mine.budget, seconds=min(seconds for *_, seconds in told), hurry=False),
    )
