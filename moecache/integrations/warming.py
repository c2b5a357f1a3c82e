"""Warm-up inside an engine: what its layers ask is measured before it serves, with their own weights and by one rank,
compiled on all, and nothing is measured from there on."""

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from moecache import routing
from moecache.devices import Place
from moecache.dispatch import Dispatcher, dispatcher, ranks
from moecache.dispatch.lookup import Lookup
from moecache.integrations.kernel import logger
from moecache.kernels import registry as ops
from moecache.kernels.shared_inputs import layer_key, lending
from moecache.schemas.problem import BUCKETS, Problem, token_bucket
from moecache.schemas.timing import Choice, Timing
from moecache.schemas.warm import Progress, WarmRow
from moecache.settings import MEMORY
from moecache.store import locks
from moecache.team import ALONE, TIMEOUT, Team
from moecache.warmup import warmup

EVERY = 5.0  # seconds from one line about the progress to the next


@dataclass
class _Kind:
    """Layers that ask the same problems, as seen in calls; `problem` has the most tokens of them, `like` the dtypes of
    router weights and ids where our kernels run."""

    problem: Problem
    like: tuple[torch.dtype, torch.dtype] | None
    weights: dict[int, Any] = field(default_factory=dict)  # by where they lie


_seen: dict[str, _Kind] | None = None  # by layer_key; None: nobody waits for a warm-up
_measures = False  # whether it measures; else it compiles alone


def begin(name: str, active: Dispatcher, hook: Callable[[], None]) -> str:
    """An engine starts. Its calls measure nothing, whatever the mode; what they miss is noted as wanted. Its layers are
    watched until `warm`, which compiles what may serve them, and measures before with the setting `tune`. Returns what
    is to be said of that.

    Args:
        hook: has the engine call `warm`; raises where the engine is not as it is known.
    """
    global _seen, _measures
    may = active.settings.mode == "tune"
    active.notes, active.ahead = active.notes or may, False  # a process that starts takes a second of a server's cores
    _set(active, "replay")
    _measures = may and active.settings.tune
    wants = ", and measures nothing without MOECACHE_MODE=tune" if active.settings.tune and not may else ""
    if not (_measures or active.settings.kernels):
        return wants
    try:
        hook()
    except Exception as error:
        locks.most = locks.SERVING_S
        return f", and warms nothing: {type(error).__name__}: {error}"
    _seen = {}
    return f", and {'measures' if _measures else 'compiles'} before {name} captures graphs{wants}"


def watching() -> bool:
    """Whether layers are to be noted by `saw`."""
    return _seen is not None


def saw(
    problem: Problem, first: torch.Tensor, weights: Any, like: tuple[torch.dtype, torch.dtype] | None = None
) -> None:
    """Note what a layer asks, and its weights as the op's `inputs` take them. `first` is one of them."""
    if _seen is None or problem.topk > problem.experts:  # no draw gives distinct ones
        return
    kind = _seen.setdefault(layer_key(problem), _Kind(problem, like))
    kind.problem = max(kind.problem, problem, key=lambda each: each.tokens)
    kind.weights.setdefault(first.data_ptr(), weights)


def warm(engine: str, group: Callable[[], Any], show: Callable[[], int] = int) -> None:
    """Measure what the layers ask that were seen, if that is wanted, for every number of tokens up to the most, and
    compile what serves them. Only for an engine that waits for it; never raises.

    Args:
        engine: its name.
        group: gives the process group of the ranks that call this.
        show: makes layers show themselves, and returns how many tokens they may get. All ranks run it, or none.
    """
    global _seen
    active, log = dispatcher(), logger(engine)
    try:
        if _seen is not None:
            team = Team.of(group(), TIMEOUT) if dist.is_available() and dist.is_initialized() else ALONE
            with team.staying():
                team.barrier("an engine's warm-up")
                team.timeout = 2 * active.settings.tune_budget + TIMEOUT  # rank 0 measures meanwhile
                _warm(active, log, team, show())
    except Exception as error:
        log.warning("moecache goes on with what it knows: %s: %s", type(error).__name__, error)
    finally:
        _seen, locks.most = None, locks.SERVING_S


def _warm(active: Dispatcher, log: logging.Logger, team: Team, most: int) -> None:
    kinds, settings = _seen or {}, active.settings
    place = active.places.first(torch.cuda.current_device() if torch.cuda.is_available() else 0)
    mine = {
        kind.problem.model_copy(update={"tokens": 1 << k}): kind.like
        for kind in kinds.values()
        for k in range(max(kind.problem.tokens, token_bucket(most)).bit_length())
    }
    rows: list[WarmRow] = []
    with lending({key: list(kind.weights.values()) for key, kind in kinds.items()}):
        asked = sorted(ranks.problems(team, list(mine)), key=lambda each: each.tokens) if _measures else []
        if asked and team.rank == 0:
            log.info("moecache measures %d layers and sizes before the engine serves", len(asked))
            _set(active, "tune")
            try:
                with _bounded(place, settings.tune_gib):
                    meter = _Meter(log, settings.tune_budget)
                    rows = warmup(asked, budget=settings.tune_budget, device=place.index, progress=meter)
            finally:
                _set(active, "replay")
            count = sum(row.tier == "measured" for row in rows)
            log.info("moecache has measured choices for %d of %d problems, and measures no more", count, len(rows))
        chosen = _followed(active, team, [row.problem for row in rows], place) if asked else ""
        with _bounded(place, math.inf):  # the engine has left as much memory as its calls take
            for problem, like in mine.items():
                with suppress(torch.OutOfMemoryError):
                    _compiled(active, problem, place, like)
    team.same(chosen, "what serves the layers")


def _set(active: Dispatcher, mode: Any) -> None:
    active.flush()
    active.settings = replace(active.settings, mode=mode)
    active.hot.clear()


@contextmanager
def _bounded(place: Place, gib: float) -> Iterator[None]:
    """At most so much more memory of the GPU; what is taken is given back, and random numbers go on as if nothing had
    been."""
    gpu = place.torch_device.type == "cuda"
    with torch.random.fork_rng([place.index] if gpu else []):
        if not gpu:
            yield
            return
        torch.cuda.empty_cache()
        before = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(place.index)
        total = torch.cuda.get_device_properties(place.index).total_memory
        allowed = (torch.cuda.memory_reserved(place.index) + gib * 2**30) / total
        torch.cuda.set_per_process_memory_fraction(min(before, allowed), place.index)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(before, place.index)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(place.index)


@dataclass
class _Meter:
    """Says every few seconds how far a warm-up is."""

    log: logging.Logger
    budget: float
    said: float = 0.0

    def __call__(self, news: Progress) -> None:
        if news.elapsed - self.said >= EVERY:
            self.said = news.elapsed
            left = max(0.0, min(news.remaining or self.budget, self.budget - news.elapsed))
            how = news.done, news.total, news.elapsed, left
            self.log.info("moecache: %d of %d problems in %.0f s, at most about %.0f s to go", *how)


def _followed(active: Dispatcher, team: Team, served: Sequence[Problem], place: Place) -> str:
    """What rank 0 knows of these problems is what all ranks know from here on; others do without files of their own,
    which may say otherwise. Returns a digest of what serves these problems."""
    problems = team.broadcast("problems", [problem.model_dump_json() for problem in served])
    if team.rank:
        active.reload()
        active.lookup = Lookup(replace(active.settings, db=MEMORY, path=()))
    names = hashlib.sha256()
    for problem in map(Problem.model_validate_json, problems):
        known = [] if team.rank else [row.model_dump_json() for row, _ in active.lookup.timings(problem)]
        told = team.broadcast(f"timings of {problem.key}", known)
        if team.rank and told:
            active.lookup.put([Timing.model_validate_json(text) for text in told], place)
        names.update(active.peek(ops.get(problem.op), problem, index=place.index).config.name.encode())
    return names.hexdigest()


def _compiled(active: Dispatcher, problem: Problem, place: Place, like: tuple[torch.dtype, torch.dtype] | None) -> None:
    """Run once whatever may serve these calls, whatever their routing: a capture, and a server, may not compile. An
    odd number of tokens is run too, as an engine's kernel is compiled for multiples of 16 and for others."""
    op, whats = ops.get(problem.op), dict[Any, None]()
    for bucket in ("", *BUCKETS):
        asked = problem.model_copy(update={"routing": bucket})
        if like is not None:
            choice: Choice | None = active.in_graphs(op, asked, "", place.index)  # calls find it then
        else:
            choice = active.stored(op, asked, index=place.index)  # the engine has its own where nothing is measured
        if choice is not None:
            whats |= dict.fromkeys(filter(None, (choice.config, choice.alternatives)))
    if not whats:
        return
    helpers = active.helpers(place)
    if helpers is not None:
        helpers.complete([each for what in whats for each in op.sources(problem, what, place.device)], place.device)
    ids = routing.draw("uniform", problem.tokens, problem.experts, problem.topk).to(place.torch_device)
    for count in {problem.tokens, max(1, problem.tokens - 1)}:
        args = op.inputs(problem, ids[:count], 0)
        if like is not None:
            args.topk_weights, args.topk_ids = args.topk_weights.to(like[0]), args.topk_ids.to(like[1])
        out = op.outputs(args)
        for what in whats:
            with suppress(RuntimeError):  # a call is served by another one then
                op.bind(what, args, out)(args, out)
