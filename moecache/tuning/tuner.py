"""Measures one problem: prune, compile in subprocesses, check each candidate when it is compiled, race them."""

import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED
from concurrent.futures import wait as wait_for
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from moecache.backends.contract import Backend
from moecache.kernels import contract, shared_inputs
from moecache.kernels.code import code_of
from moecache.kernels.compile import hash_triton
from moecache.kernels.contract import TESTED, Args, Op
from moecache.kernels.tensors import poison, tensors
from moecache.predict.ranking import rank
from moecache.schemas.config import Config
from moecache.schemas.device import Device
from moecache.schemas.errors import DeviceLost, InvalidInput, MoecacheError
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Environment, Timing, now
from moecache.team import ALONE, Team
from moecache.tuning.candidates import shortlist
from moecache.tuning.check import Trial, compare, locate
from moecache.tuning.failing import Failed
from moecache.tuning.run import DEFAULT_BUDGET, SHORT, SURE, Budget, Entry, Late, Plan, Run, in_common
from moecache.tuning.thread import CallThread, surroundings
from moecache.tuning.timing import Clock, DeviceClock, Stats, race, wait
from moecache.tuning.workers import Workers

CHECKING = 0.8  # share of the budget after which no further candidate is waited for, or checked
CALLS = 8  # that the least tuning takes: two for inputs and references each, two checks, two to prepare, samples
TIMED = 5  # of these, the ones that are left when a candidate is checked
WATCHED_BYTES = 64 << 20  # inputs up to this size are compared with a copy: a candidate may not change them


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
    team: Team = ALONE,
) -> Tuned:
    """Measure the candidates of one problem on the device of `topk_ids`, on its current stream.

    A candidate that fails comes back with its status and reason, one that the budget did not reach does not.

    Args:
        topk_ids: [tokens, topk] on the device: the routing to tune on. Only read.
        began: when the budget began to be spent, by time.perf_counter; None: now.
        incumbent: the config that serves now; tried, and timed to the end, if it still fits.
        proven: see `shortlist`.
        without: configs that are not tried.
        workers: compile there, and run built-in candidates there first where nobody has; None: all here.
        clock: replaces the device's clock, for tests.
        progress: told in words what happens.
        trying: told what runs in this process for the first time, and None when it has.
        team: ranks that tune this problem now, all within `team.staying()`, and launch each candidate at the same time.
            All end with the same timings; what fails on one rank has failed on all.

    Raises:
        InvalidInput: a graph is being captured, or no config fits.
        DeviceLost: a candidate hung or broke the device in this process; `timings` names it.
        TeamLost: another rank died, hangs or left.
    """
    _refuse_capture(backend, topk_ids)
    began = time.perf_counter() if began is None else began
    hashing = threading.Thread(target=hash_triton, daemon=True)
    if workers is not None:
        hashing.start()  # for the third of a second that the first launch would take
    asked = shortlist(op, problem, device, budget.candidates, incumbent, proven)
    plan = in_common(team, problem, Plan(asked, without, incumbent, budget))
    budget = plan.budget
    if _too_long(op, problem, plan.asked[0], backend, device, budget):
        return Tuned([], len(plan.asked))
    entries = _entries(plan, op, problem, device, workers)
    keep = {entry.config.name for entry in entries if entry.is_default or entry.config == plan.incumbent}
    clock = clock or DeviceClock(backend, device, memory_bytes=budget.memory_bytes, seconds=budget.call_seconds)
    with surroundings(backend, topk_ids) as stream, closing(CallThread(stream)) as thread, shared_inputs.sharing():
        told = progress or _silent, trying or _silent
        run = Run(op, problem, topk_ids.clone(), backend, device, budget, thread, entries, *told, began, team)
        timings = _timed(run, environment, partial(_check, run, hashing, workers), clock, keep)
    return Tuned(timings, len(entries) - len(timings))


def _timed(run: Run, environment: Environment, check: Callable[[], None], clock: Clock, keep: set[str]) -> list[Timing]:
    """Check all, race what is right."""
    try:
        with suppress(Late):
            check()
        found = _race(run, clock, keep)
    except DeviceLost as lost:
        lost.timings = tuple(_timings(run, {}, environment, now()))
        raise
    return _timings(run, found, environment, run.team.broadcast(f"timings of {run.problem.key}", now()))


def _refuse_capture(backend: Backend, topk_ids: torch.Tensor) -> None:
    with backend.current(max(0, topk_ids.get_device())):
        if backend.capturing():
            raise InvalidInput("cannot tune while a graph is being captured; warm up before the capture")


def _too_long(op: Op, problem: Problem, default: Config, backend: Backend, device: Device, budget: Budget) -> bool:
    """Whether no tuning can end within a call, by the prediction: on a CPU, as on a GPU compilers decide."""
    predicted = CALLS * rank(op, problem, [default], device).us[0] / 1e6
    return budget.hurry and backend.name == "cpu" and max(SHORT, budget.seconds) < predicted < math.inf


def _entries(plan: Plan, op: Op, problem: Problem, device: Device, workers: Workers | None) -> list[Entry]:
    """What is tried in the order of trying, its kernels on the way."""
    entries = [Entry(config, i == 0) for i, config in enumerate(plan.asked) if config not in plan.without]
    if plan.budget.hurry and entries:  # the first may be all that there is time for: what would be served unmeasured
        likely = rank(op, problem, [entry.config for entry in entries[:SURE]], device).best
        entries.insert(0, entries.pop(likely or 0))
    if workers is not None:
        for entry in entries:
            sources = op.sources(problem, entry.config, device)
            entry.kernels = workers.compile(sources, device, plan.budget.compile_seconds)
    return entries


def _ready(run: Run) -> Iterator[Entry]:
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
            pending = {each for entry in near for each in entry.kernels if not each.done()}
            wait_for(pending, timeout=left if left > 0 else None, return_when=FIRST_COMPLETED)
            continue
        waiting.remove(entry)
        with suppress(Failed):
            run.compiled(entry)
            yield entry


def _check(run: Run, hashing: threading.Thread, workers: Workers | None) -> None:
    """Every candidate on fresh inputs and on extreme ones, with poisoned outputs, against the reference. Inputs and
    reference are made while the first candidates are compiled. Candidates of built-in ops run in a subprocess first
    where nobody has run them, if one rank can run them alone."""
    if not locate(run.op) or run.device.arch in TESTED or run.team.size > 1:
        workers = None
    truths = _truths(run)
    if any(entry.kernels for entry in run.entries):
        _rehearse(run, truths[0])
        hashing.join()
    for entry in _ready(run) if run.team.size == 1 else run.in_step(CHECKING):
        if workers is not None and not _tried(run, entry, workers):
            continue
        truths = truths or _truths(run)
        run.say(f"checking {entry.config.name}")
        began = time.perf_counter()
        if workers is None:
            run.trying(entry.config)
        with suppress(Failed):
            entry.error = max(run.agreed(entry, partial(_verify, run, entry, truth)) for truth in truths)
        run.trying(None)
        entry.seconds = time.perf_counter() - began
        if entry.error is None:
            truths = []  # it may have written anywhere, also there
            shared_inputs.forget_shared()


def _rehearse(run: Run, truth: "_Truth") -> None:
    """A check without a candidate: a GPU loads what torch compares with at its first use, here while compilers work."""
    with suppress(Failed):
        poison(run.op.outputs(truth.args))
        truth.intact()
        compare(run.op, run.problem, truth.want, truth.want)


def _tried(run: Run, entry: Entry, workers: Workers) -> bool:
    """Whether a candidate got through a run in another process, or there is none to run it."""
    trial = Trial(
        op=locate(run.op),
        problem=run.problem,
        config=entry.config,
        backend=run.backend.name,
        index=max(0, run.topk_ids.get_device()),
    )
    deadline = math.inf if entry in run.sure() else run.deadline(CHECKING)
    run.say(f"trying {entry.config.name} in a subprocess")
    try:
        return workers.run(trial, run.budget.call_seconds, deadline)
    except MoecacheError as error:
        run.say(f"trying {entry.config.name} in this process: {error}")
    except Failed as failed:
        if failed.status != "oom":  # its memory is not this process's memory
            run.reject(entry, failed)
    return entry.failed is None


def _truths(run: Run) -> "list[_Truth]":
    """Two of them.

    Raises:
        Late: the budget does not suffice for what follows, if a call takes as long as the reference.
    """
    truths = []
    for seed in (1, contract.EXTREME):
        began = time.perf_counter()
        truths.append(run.within(partial(_Truth.of, run, seed)))
        if (seed == 1) * CALLS / 2 * (time.perf_counter() - began) > run.limit():
            raise Late("timeout", "the budget does not suffice for a check")
    return truths


@dataclass(frozen=True)
class _Truth:
    """Inputs, their result, and copies of those inputs that are small enough."""

    args: Args
    want: Any
    copies: list[torch.Tensor | None]

    @classmethod
    def of(cls, run: Run, seed: int) -> "_Truth":
        args = _inputs(run, seed)
        copies = [_bytes(t).clone() if t.nbytes <= WATCHED_BYTES else None for t in tensors(args)]
        want = run.op.reference(args)
        run.backend.synchronize()
        return cls(args, want, copies)

    def intact(self) -> bool:
        pairs = zip(tensors(self.args), self.copies, strict=True)
        return all(copy is None or torch.equal(_bytes(tensor), copy) for tensor, copy in pairs)


def _verify(run: Run, entry: Entry, truth: _Truth) -> float:
    """The error of one checked call. The first one of a candidate may compile."""

    def work() -> Any:
        out = poison(run.op.outputs(truth.args))
        got = run.launch(run.bound(entry.config, truth.args, out), truth.args, out)
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


def _race(run: Run, clock: Clock, keep: set[str]) -> dict[str, Stats]:
    checked = run.checked()
    if not checked or TIMED * min(entry.seconds for entry in checked) / 2 > run.limit():
        return {}
    sets = _sets(run, clock)
    run.say(f"timing {len(checked)} candidates on {len(sets)} input sets")
    samplers = {}
    for entry in run.in_time(checked):
        if TIMED * entry.seconds / 2 > run.limit():
            continue
        bound = run.bound(entry.config, *sets[0])  # the sets lie alike
        calls = [partial(run.launch, bound, args, out) for args, out in sets]
        with suppress(Failed):
            timed = partial(run.attempt, entry, run.prepared(entry, clock, calls), run.budget.call_seconds)
            samplers[entry.config.name] = partial(run.agreed, entry, timed)
    return race(samplers, keep=keep, deadline=run.deadline(), now=run.now)


def _sets(run: Run, clock: Clock) -> list[tuple[Args, Any]]:
    """Input sets to rotate, each with its outputs: as many as the clock wants and the memory holds."""

    def fresh(seed: int) -> tuple[Args, Any]:
        args = _inputs(run, seed)
        return args, run.op.outputs(args)

    sets = [fresh(0)]
    count = clock.copies(_touched(run, sets[0]))
    with suppress(torch.OutOfMemoryError, MemoryError):
        for seed in range(1, count):
            sets.append(fresh(seed))
    return sets[: run.team.agree(f"input sets of {run.problem.key}", len(sets), min)]


def _touched(run: Run, one: tuple[Args, Any]) -> int:
    """Bytes of a set that a call reads or writes: of what is held for every expert only the parts of those named."""
    experts = run.problem.experts
    share = len(set(run.topk_ids.flatten().tolist())) / max(1, experts)
    sizes = (t.nbytes * (min(1.0, share) if t.shape[:1] == (experts,) else 1.0) for t in tensors(list(one)))
    return math.ceil(sum(sizes))


def _inputs(run: Run, seed: int) -> Args:
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
    args = run.op.inputs(run.problem, ids.to(run.topk_ids.device), seed)
    run.backend.synchronize()
    return args


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _timings(run: Run, found: dict[str, Stats], environment: Environment, at: str) -> list[Timing]:
    known: dict[str, Any] = {"problem": run.problem, "environment": environment, "measured_at": at}
    timings = []
    for entry in run.entries:
        stats, failed = found.get(entry.config.name), entry.failed
        if failed is not None:
            outcome: dict[str, Any] = {"status": failed.status, "reason": failed.reason}
        elif stats is not None:
            outcome = {"median_us": stats.median, "mad_us": stats.mad, "n": stats.n, "error": entry.error}
        else:
            continue
        code = code_of(run.problem.op, entry.config.variant)
        timings.append(Timing(config=entry.config, is_default=entry.is_default, code=code, **known, **outcome))
    return timings


def _silent(message: object) -> None:
    """Nobody wants to know."""
