"""Measures one problem: prune by predicted cost, try in subprocesses, check against the reference, race."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

import torch

from moecache.backends.base import Backend
from moecache.kernels import op as ops
from moecache.kernels.op import Args, Op
from moecache.schemas.config import Config
from moecache.schemas.device import Device
from moecache.schemas.errors import DeviceLost, InvalidInput, MoecacheError
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Environment, Timing
from moecache.tuning.lane import Lane
from moecache.tuning.timing import Candidate, Clock, DeviceClock, Failed, Stats, race, wait
from moecache.tuning.trial import Trial, compare, failure, locate
from moecache.tuning.workers import Workers

__all__ = ["Budget", "Workers", "tune"]

T = TypeVar("T")
SURE = 2  # candidates that are tried however small the budget: the default and the best predicted other
COMPILING, CHECKING = (
    0.5,
    0.7,
)  # shares of the budget after which no further candidate is compiled, or checked
PREPARING = 4  # preparing a sampler makes several calls, each with its own limit
WATCHED_BYTES = 64 << 20  # inputs up to this size are compared with a copy: a candidate may not change them


@dataclass(frozen=True)
class Budget:
    """What tuning one problem may take.

    Attributes:
        seconds: in all; the default and the best predicted other are tried even when it is 0.
        candidates: tried at most, the default and the incumbent among them.
        call_seconds: limit of one call, or one sample.
        compile_seconds: limit of one compilation.
        memory_bytes: of all input sets together, unless a single set takes more.
    """

    seconds: float = 30.0
    candidates: int = 24
    call_seconds: float = 10.0
    compile_seconds: float = 60.0
    memory_bytes: int = 2 << 30


DEFAULT_BUDGET = Budget()


def tune(
    op: Op,
    problem: Problem,
    topk_ids: torch.Tensor,
    backend: Backend,
    device: Device,
    environment: Environment,
    *,
    budget: Budget = DEFAULT_BUDGET,
    incumbent: Config | None = None,
    workers: Workers | None = None,
    clock: Clock | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Timing]:
    """Measure the candidates of one problem on the current device.

    A candidate that raises, hangs, runs out of memory, crashes its compiler or gives wrong numbers comes back
    with its status and reason. One that the budget did not reach does not come back.

    Args:
        topk_ids: [tokens, topk] on the device: the routing to tune on. Only read.
        incumbent: the config that serves now; tried, and timed to the end, if it still fits.
        workers: compile and try candidates there first; None: everything in this process.
        clock: replaces the device's clock, for tests.
        progress: told in words what happens.

    Raises:
        InvalidInput: a graph is being captured, or no config fits.
        DeviceLost: a candidate hung or broke the device in this process; `timings` names it.
    """
    if backend.capturing():
        raise InvalidInput("cannot tune while a graph is being captured; warm up before the capture")
    entries = [_Entry(config) for config in shortlist(op, problem, device, budget.candidates, incumbent)]
    clock = clock or DeviceClock(backend, device, memory_bytes=budget.memory_bytes, seconds=budget.call_seconds)
    found: dict[str, Stats] = {}
    with _surroundings(backend, topk_ids) as stream, Lane(stream) as lane:
        run = _Run(op, problem, topk_ids.clone(), backend, device, budget, lane, entries, progress or _silent)
        try:
            if workers is not None:
                _isolate(run, workers)
            _check(run)
            found = _race(run, clock, {entries[0].config.name, incumbent.name if incumbent else ""})
        except DeviceLost as lost:
            lost.timings = tuple(_timings(run, found, environment))
            raise
    return _timings(run, found, environment)


def shortlist(op: Op, problem: Problem, device: Device, count: int, incumbent: Config | None) -> list[Config]:
    """Configs to try, the most important first: default, best predicted other, incumbent, the rest.

    Raises:
        InvalidInput: no config of the op fits.
    """
    space = op.space(problem, device)
    if not space:
        raise InvalidInput(f"no config of {op.name} fits {problem.key} on {device.arch}")
    default, *others = space
    others.sort(key=lambda config: op.cost(problem, config, device))
    if incumbent is not None and incumbent != default and not op.fits(problem, incumbent, device):
        others = [config for config in others if config != incumbent]
        others.insert(1, incumbent)
    return [default, *others][: max(count, SURE if incumbent is None else SURE + 1)]


@dataclass
class _Entry:
    """A candidate on its way."""

    config: Config
    failed: Failed | None = None
    error: float | None = None  # against the reference; None until checked


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
    started: float = field(default_factory=time.perf_counter)

    def deadline(self, share: float = 1.0) -> float:
        return self.started + share * self.budget.seconds

    def in_time(self, entries: Sequence[_Entry], share: float) -> Iterator[_Entry]:
        """Those without a failure, until the deadline; the first ones in any case."""
        for i, entry in enumerate(e for e in entries if e.failed is None):
            if i >= SURE and time.perf_counter() > self.deadline(share):
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
        try:
            return self.lane(work, seconds)
        except Failed as failed:
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
        """One call; whatever it raises is the candidate's failure."""
        try:
            return self.op.launch(config, args, out)
        except (Exception, SystemExit) as error:
            raise failure(error) from error


def _isolate(run: _Run, workers: Workers) -> None:
    """Compile and try in subprocesses what has something to compile; drop what the budget leaves out."""
    where = locate(run.op)
    entries = [e for e in run.entries if where and run.op.sources(run.problem, e.config, run.device)]
    index = run.topk_ids.get_device() if run.topk_ids.is_cuda else 0
    trials = [
        Trial(
            op=where,
            problem=run.problem,
            config=entry.config,
            device=run.device,
            backend=run.backend.name,
            index=index,
        )
        for entry in entries
    ]
    if not trials:
        return
    run.say(f"compiling {len(trials)} candidates")
    try:
        verdicts = workers.run(
            trials, compile_seconds=run.budget.compile_seconds, call_seconds=run.budget.call_seconds,
            deadline=run.deadline(COMPILING),
        )  # fmt: skip
    except MoecacheError as error:
        run.say(f"compiling in this process: {error}")
        return
    for entry, verdict in zip(entries, verdicts, strict=True):
        if verdict is None:
            run.entries.remove(entry)
        elif verdict.status not in (
            "ok",
            "oom",
        ):  # a worker's memory is not the candidate's fault: this process decides
            run.reject(entry, Failed(verdict.status, verdict.reason))


def _check(run: _Run) -> None:
    """Every candidate on two fresh inputs, with poisoned outputs, against the reference."""
    truths: list[_Truth] = []
    for entry in run.in_time(run.entries, CHECKING):
        truths = truths or [_Truth.of(run, seed) for seed in (1, 2)]
        run.say(f"checking {entry.config.name}")
        with contextlib.suppress(Failed):
            entry.error = max(_verify(run, entry, truth) for truth in truths)
        if entry.failed is not None:
            truths = []  # it may have written anywhere, also there


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
        return cls(args, run.op.reference(args), copies)

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
    checked = [entry for entry in run.entries if entry.error is not None]
    if not checked:
        return {}
    sets = _sets(run, clock)
    run.say(f"timing {len(checked)} candidates on {len(sets)} input sets")
    candidates = []
    for entry in run.in_time(checked, 1.0):
        calls = [partial(run.launch, entry.config, args, out) for args, out in sets]
        with contextlib.suppress(Failed):
            sample = run.attempt(entry, partial(clock.prepare, calls), PREPARING * run.budget.call_seconds)
            timed = partial(run.attempt, entry, sample, run.budget.call_seconds)
            candidates.append(Candidate(entry.config.name, timed))
    return race(candidates, keep=keep, deadline=run.deadline()).stats


def _sets(run: _Run, clock: Clock) -> list[tuple[Args, Any]]:
    """Input sets to rotate, each with its outputs: as many as the clock wants and the memory holds."""

    def fresh(seed: int) -> tuple[Args, Any]:
        args = _inputs(run, seed)
        return args, run.op.outputs(args)

    sets = [fresh(0)]
    count = clock.copies(sum(tensor.nbytes for tensor in ops.tensors(list(sets[0]))))
    with contextlib.suppress(torch.OutOfMemoryError, MemoryError):
        for seed in range(1, count):
            sets.append(fresh(seed))
    return sets


def _inputs(run: _Run, seed: int) -> Args:
    """Fresh inputs; but for seed 0 with the tokens in another order, which keeps the routing's histogram."""
    ids = run.topk_ids.clone()
    if seed:
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
        ids = ids[order.to(ids.device)]
    return run.op.inputs(run.problem, ids, seed)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _timings(run: _Run, found: dict[str, Stats], environment: Environment) -> list[Timing]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    known: dict[str, Any] = {"problem": run.problem, "environment": environment, "measured_at": now}
    timings = []
    for i, entry in enumerate(run.entries):
        stats, failed = found.get(entry.config.name), entry.failed
        if failed is not None:
            outcome: dict[str, Any] = {"status": failed.status, "reason": failed.reason}
        elif stats is not None:
            outcome = {"median_us": stats.median, "mad_us": stats.mad, "n": stats.n, "error": entry.error}
        else:
            continue
        timings.append(Timing(config=entry.config, is_default=i == 0, **known, **outcome))
    return timings


@contextlib.contextmanager
def _surroundings(backend: Backend, topk_ids: torch.Tensor) -> Iterator["torch.cuda.Stream | None"]:
    """The caller's stream, its work done; random generators as they were afterwards."""
    devices = [topk_ids.get_device()] if topk_ids.is_cuda else []
    backend.synchronize()
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        yield torch.cuda.current_stream(devices[0]) if devices else None


def _silent(message: str) -> None:
    """Nobody wants to know."""
