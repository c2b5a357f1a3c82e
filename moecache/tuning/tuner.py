"""Measures one problem: prune, compile in subprocesses, check each candidate when it is compiled, race them."""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future
from concurrent.futures import wait as wait_for
from contextvars import copy_context
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

import torch

from moecache.backends.base import Backend
from moecache.kernels import op as ops
from moecache.kernels.compile import hash_triton
from moecache.kernels.op import Args, Op
from moecache.schemas.config import Config
from moecache.schemas.device import Device
from moecache.schemas.errors import DeviceLost, InvalidInput, MoecacheError
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Environment, Timing
from moecache.tuning import stopwatch
from moecache.tuning.budget import DEFAULT_BUDGET, Budget
from moecache.tuning.lane import GRACE, Lane, surroundings
from moecache.tuning.shortlist import SURE, leader, shortlist
from moecache.tuning.timing import Candidate, Clock, DeviceClock, Failed, Stats, race, wait
from moecache.tuning.trial import Trial, compare, failure, locate
from moecache.tuning.workers import Workers

__all__ = ["Budget", "Tuned", "Workers", "compiling", "shortlist", "tune"]

T = TypeVar("T")
CHECKING = 0.8  # share of the budget after which no further candidate is waited for, or checked
CALLS = 8  # that the least tuning takes: two for inputs and references each, two checks, two to prepare, samples
TIMED = 5  # of these, the ones that are left when a candidate is checked
SHORT = 0.2  # seconds: what takes less may begin however late it is
PREPARING = 4  # preparing a sampler makes several calls, each with its own limit
WATCHED_BYTES = 64 << 20  # inputs up to this size are compared with a copy: a candidate may not change them


class _Late(Failed):
    """The budget was over before something ended, which says nothing of it."""


@dataclass(frozen=True)
class Tuned:
    """What tuning one problem gave; `left` counts the candidates that the budget did not reach."""

    timings: list[Timing]
    left: int


def tune(
    op: Op,
    problem: Problem,
    topk_ids: torch.Tensor,
    backend: Backend,
    device: Device,
    environment: Environment,
    *,
    budget: Budget = DEFAULT_BUDGET,
    began: float | None = None,
    incumbent: Config | None = None,
    proven: Sequence[Config] = (),
    without: Collection[Config] = (),
    workers: Workers | None = None,
    clock: Clock | None = None,
    progress: Callable[[str], None] | None = None,
    trying: Callable[[Config | None], None] | None = None,
) -> Tuned:
    """Measure the candidates of one problem on the device of `topk_ids`, on its current stream.

    A candidate that raises, hangs, runs out of memory, crashes its compiler or gives wrong numbers comes back
    with its status and reason. One that the budget did not reach does not come back.

    Args:
        topk_ids: [tokens, topk] on the device: the routing to tune on. Only read.
        began: when the budget began to be spent, on the scale of time.perf_counter; None: now.
        incumbent: the config that serves now; tried, and timed to the end, if it still fits.
        proven: see `shortlist`.
        without: configs that are not tried.
        workers: compile candidates there; None: everything in this process. On a device where nobody has run the
            candidates, those of built-in ops run there first, too.
        clock: replaces the device's clock, for tests.
        progress: told in words what happens.
        trying: told what is about to run in this process for the first time, and None when it has.

    Raises:
        InvalidInput: a graph is being captured, or no config fits.
        DeviceLost: a candidate hung or broke the device in this process; `timings` names it.
    """
    with backend.current(max(0, topk_ids.get_device())):
        if backend.capturing():
            raise InvalidInput("cannot tune while a graph is being captured; warm up before the capture")
    began = time.perf_counter() if began is None else began
    hashing = threading.Thread(target=hash_triton, daemon=True)
    if workers is not None:
        hashing.start()  # for the third of a second that the first launch would take
    asked = shortlist(op, problem, device, budget.candidates, incumbent, proven)
    predicted = CALLS * op.cost(problem, asked[0], device) / 1e6  # seconds; on a GPU compilers decide
    if budget.hurry and backend.name == "cpu" and max(SHORT, budget.seconds) < predicted < math.inf:
        return Tuned([], len(asked))
    entries = _entries(asked, without, op, problem, device, budget, workers)
    keep = {entry.config.name for entry in entries if entry.is_default or entry.config == incumbent}
    clock = clock or DeviceClock(backend, device, memory_bytes=budget.memory_bytes, seconds=budget.call_seconds)
    found: dict[str, Stats] = {}
    with surroundings(backend, topk_ids) as stream, Lane(stream) as lane, ops.sharing():
        run = _Run(
            op, problem, topk_ids.clone(), backend, device, budget, lane, entries, progress or _silent,
            trying or _silent, began,
        )  # fmt: skip
        try:
            with contextlib.suppress(_Late):
                _check(run, hashing, workers if _risky(op, device) else None)
            found = _race(run, clock, keep)
        except DeviceLost as lost:
            lost.timings = tuple(_timings(run, found, environment))
            raise
    timings = _timings(run, found, environment)
    return Tuned(timings, len(entries) - len(timings))


def compiling(
    workers: Workers, op: Op, problem: Problem, config: Config, device: Device, seconds: float = 60.0
) -> "list[Future[None]]":
    """Have the kernels of a candidate compiled, unless they are."""
    return workers.compile(ops.kernels(op, problem, config, device), device, seconds)


@dataclass(eq=False)
class _Entry:
    """A candidate on its way. `kernels` are those that are compiled elsewhere."""

    config: Config
    is_default: bool
    kernels: "list[Future[None]]" = field(default_factory=list)
    failed: Failed | None = None
    error: float | None = None  # against the reference; None until checked
    seconds: float = 0.0  # that its check took


def _entries(
    asked: Sequence[Config], without: Collection[Config], op: Op, problem: Problem, device: Device, budget: Budget,
    workers: Workers | None,
) -> list[_Entry]:  # fmt: skip
    """The candidates of a shortlist in the order of trying, their kernels on the way."""
    entries = [_Entry(config, i == 0) for i, config in enumerate(asked) if config not in without]
    if budget.hurry and entries:  # the first may be all that there is time for
        entries.insert(0, entries.pop(leader(op, problem, [entry.config for entry in entries], device)))
    if workers is not None:
        for entry in entries:
            entry.kernels = compiling(workers, op, problem, entry.config, device, budget.compile_seconds)
    return entries


@dataclass(frozen=True)
class _Run:
    """What stays the same during one tuning."""

    op: Op
    problem: Problem
    topk_ids: torch.Tensor
    backend: Backend
    device: Device
    budget: Budget
    lane: Lane
    entries: list[_Entry]
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
            _Late: the budget was over first.
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
            raise _Late("timeout", str(failed)) if failed.status == "timeout" else failed from None

    def sure(self) -> list[_Entry]:
        """Those that are tried however late it is."""
        usable = [entry for entry in self.entries if entry.failed is None]
        return usable[: 1 if self.budget.hurry else SURE]

    def checked(self) -> list[_Entry]:
        """Those that gave the right numbers."""
        return [entry for entry in self.entries if entry.error is not None]

    def in_time(self, entries: Sequence[_Entry]) -> Iterator[_Entry]:
        """Those, until the deadline; the first ones in any case."""
        for i, entry in enumerate(entries):
            if i >= SURE and time.perf_counter() > self.deadline():
                return
            yield entry

    def reject(self, entry: _Entry, failed: Failed) -> None:
        entry.failed = failed
        self.say(f"{entry.config.name} is unusable: {failed}")

    def attempt(self, entry: _Entry, work: Callable[[], T], seconds: float) -> T:
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
                raise _Late(failed.status, failed.reason) from failed
            self.reject(entry, failed)
            self._probe(entry)
            raise
        except DeviceLost as lost:
            entry.failed = Failed("timeout", str(lost))
            raise

    def _probe(self, entry: _Entry) -> None:
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


def _risky(op: Op, device: Device) -> bool:
    """Whether candidates run in a subprocess first: those of built-in ops where nobody has run them."""
    return bool(locate(op)) and device.arch not in ops.TESTED


def _ready(run: _Run) -> Iterator[_Entry]:
    """Entries in the order in which their kernels are compiled, as long as another check ends before the deadline; the
    sure ones in any case."""
    waiting = list(run.entries)
    while True:
        # the shortest so far: the first one also loads what all of them need
        check = min((entry.seconds for entry in run.entries if entry.seconds), default=0.0)
        left = run.deadline(CHECKING) - check - time.perf_counter()
        if run.limit() < math.inf:  # time must be left to time those that are checked
            left = min(left, run.limit() - check - TIMED / 2 * check * (1 + len(run.checked())))
        near = waiting if left > 0 else [entry for entry in waiting if entry in run.sure()]
        if not near:
            return
        entry = next((entry for entry in near if all(each.done() for each in entry.kernels)), None)
        if entry is None:
            with stopwatch.phase("compile"):
                pending = {each for entry in near for each in entry.kernels if not each.done()}
                wait_for(pending, timeout=left if left > 0 else None, return_when=FIRST_COMPLETED)
            continue
        waiting.remove(entry)
        faults = [fault for each in entry.kernels if (fault := _fault(each)) is not None]
        if (failed := next((fault for fault in faults if isinstance(fault, Failed)), None)) is not None:
            run.reject(entry, failed)
            continue
        if faults:
            run.say(f"compiling {entry.config.name} in this process: {faults[0]}")
        yield entry


def _fault(kernel: "Future[None]") -> BaseException | None:
    return CancelledError("nobody compiled it") if kernel.cancelled() else kernel.exception()


def _check(run: _Run, hashing: threading.Thread, workers: Workers | None) -> None:
    """Every candidate on fresh inputs and on extreme ones, with poisoned outputs, against the reference. Inputs and
    reference are made while the first candidates are compiled."""
    truths = _truths(run)
    if any(entry.kernels for entry in run.entries):
        _rehearse(run, truths[0])
        hashing.join()
    for entry in _ready(run):
        if workers is not None and not _tried(run, entry, workers):
            continue
        truths = truths or _truths(run)
        run.say(f"checking {entry.config.name}")
        began = time.perf_counter()
        if workers is None:
            run.trying(entry.config)
        with stopwatch.phase("check"), contextlib.suppress(Failed):
            entry.error = max(_verify(run, entry, truth) for truth in truths)
        run.trying(None)
        entry.seconds = time.perf_counter() - began
        if entry.error is None:
            truths = []  # it may have written anywhere, also there
            ops.forget_shared()


def _rehearse(run: _Run, truth: "_Truth") -> None:
    """A check without a candidate: a GPU loads what torch compares with at its first use, here while compilers work."""
    with stopwatch.phase("compile"), contextlib.suppress(Failed):
        ops.poison(run.op.outputs(truth.args))
        truth.intact()
        compare(run.op, run.problem, truth.want, truth.want)


def _tried(run: _Run, entry: _Entry, workers: Workers) -> bool:
    """Whether a candidate got through a run in another process, or there is none to run it."""
    trial = Trial(
        op=locate(run.op), problem=run.problem, config=entry.config, backend=run.backend.name,
        index=max(0, run.topk_ids.get_device()),
    )  # fmt: skip
    deadline = math.inf if entry in run.sure() else run.deadline(CHECKING)
    run.say(f"trying {entry.config.name} in a subprocess")
    try:
        verdict = workers.run(trial, run.budget.call_seconds, deadline)
    except MoecacheError as error:
        run.say(f"trying {entry.config.name} in this process: {error}")
        return True
    if verdict is not None and verdict.status not in ("ok", "oom"):  # its memory is not this process's memory
        run.reject(entry, Failed(verdict.status, verdict.reason))
    return verdict is not None and entry.failed is None


def _truths(run: _Run) -> "list[_Truth]":
    """Two of them.

    Raises:
        _Late: the budget does not suffice for what follows, if a call takes as long as the reference.
    """
    truths = []
    for seed in (1, ops.EXTREME):
        began = time.perf_counter()
        truths.append(run.within(partial(_Truth.of, run, seed)))
        if (seed == 1) * CALLS / 2 * (time.perf_counter() - began) > run.limit():
            raise _Late("timeout", "the budget does not suffice for a check")
    return truths


@dataclass(frozen=True)
class _Truth:
    """Inputs, their result, and copies of those inputs that are small enough."""

    args: Args
    want: Any
    copies: list[torch.Tensor | None]

    @classmethod
    def of(cls, run: _Run, seed: int) -> "_Truth":
        args = _inputs(run, seed)
        copies = [_bytes(t).clone() if t.nbytes <= WATCHED_BYTES else None for t in ops.tensors(args)]
        with stopwatch.phase("reference"):
            want = run.op.reference(args)
            run.backend.synchronize()
        return cls(args, want, copies)

    def intact(self) -> bool:
        pairs = zip(ops.tensors(self.args), self.copies, strict=True)
        return all(copy is None or torch.equal(_bytes(tensor), copy) for tensor, copy in pairs)


def _verify(run: _Run, entry: _Entry, truth: _Truth) -> float:
    """The error of one checked call. The first one of a candidate may compile."""

    def work() -> Any:
        out = ops.poison(run.op.outputs(truth.args))
        got = run.launch(entry.config, truth.args, out)
        wait(run.backend, run.budget.call_seconds)
        return got

    compiles = bool(run.op.sources(run.problem, entry.config, run.device))
    got = run.attempt(entry, work, run.budget.call_seconds + compiles * run.budget.compile_seconds)
    try:
        if not truth.intact():
            raise Failed("wrong", "it changed its inputs")
        return compare(run.op, run.problem, got, truth.want)
    except Failed as failed:
        run.reject(entry, failed)
        raise


def _race(run: _Run, clock: Clock, keep: set[str]) -> dict[str, Stats]:
    checked = run.checked()
    if not checked or TIMED * min(entry.seconds for entry in checked) / 2 > run.limit():
        return {}
    sets = _sets(run, clock)
    run.say(f"timing {len(checked)} candidates on {len(sets)} input sets")
    candidates = []
    for entry in run.in_time(checked):
        if TIMED * entry.seconds / 2 > run.limit():
            continue
        calls = [partial(run.launch, entry.config, args, out) for args, out in sets]
        with stopwatch.phase("prepare"), contextlib.suppress(Failed):
            sample = run.attempt(entry, partial(clock.prepare, calls), PREPARING * run.budget.call_seconds)
            timed = partial(run.attempt, entry, sample, run.budget.call_seconds)
            candidates.append(Candidate(entry.config.name, timed))
    with stopwatch.phase("race"):
        return race(candidates, keep=keep, deadline=run.deadline()).stats


def _sets(run: _Run, clock: Clock) -> list[tuple[Args, Any]]:
    """Input sets to rotate, each with its outputs: as many as the clock wants and the memory holds."""

    def fresh(seed: int) -> tuple[Args, Any]:
        args = _inputs(run, seed)
        return args, run.op.outputs(args)

    sets = [fresh(0)]
    count = clock.copies(_touched(run, sets[0]))
    with contextlib.suppress(torch.OutOfMemoryError, MemoryError):
        for seed in range(1, count):
            sets.append(fresh(seed))
    return sets


def _touched(run: _Run, one: tuple[Args, Any]) -> int:
    """Bytes of a set that a call reads or writes: of what is held for every expert only the parts of those named."""
    experts = run.problem.experts
    share = len(set(run.topk_ids.flatten().tolist())) / max(1, experts)
    sizes = (t.nbytes * (min(1.0, share) if t.shape[:1] == (experts,) else 1.0) for t in ops.tensors(list(one)))
    return math.ceil(sum(sizes))


def _inputs(run: _Run, seed: int) -> Args:
    """Fresh inputs; but for seed 0 tokens and experts trade places, which keeps how many rows the experts have: sets
    may share their weights, and yet find none of them in a cache. Ids are int32, for which kernels are compiled ahead.
    """
    ids = run.topk_ids.to("cpu", copy=True).to(torch.int32)  # a GPU would load half a dozen kernels for this
    if seed:
        rng = torch.Generator().manual_seed(seed)
        order, names = torch.randperm(len(ids), generator=rng), torch.randperm(run.problem.experts, generator=rng)
        ids, names = ids[order], names.to(ids)
        inside = (ids >= 0) & (ids < len(names))
        ids[inside] = names[ids[inside].long()]
    with stopwatch.phase("inputs"):
        args = run.op.inputs(run.problem, ids.to(run.topk_ids.device), seed)
        run.backend.synchronize()
    return args


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _timings(run: _Run, found: dict[str, Stats], environment: Environment) -> list[Timing]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    known: dict[str, Any] = {"problem": run.problem, "environment": environment, "measured_at": now}
    timings = []
    for entry in run.entries:
        stats, failed = found.get(entry.config.name), entry.failed
        if failed is not None:
            outcome: dict[str, Any] = {"status": failed.status, "reason": failed.reason}
        elif stats is not None:
            outcome = {"median_us": stats.median, "mad_us": stats.mad, "n": stats.n, "error": entry.error}
        else:
            continue
        timings.append(Timing(config=entry.config, is_default=entry.is_default, **known, **outcome))
    return timings


def _silent(message: object) -> None:
    """Nobody wants to know."""
