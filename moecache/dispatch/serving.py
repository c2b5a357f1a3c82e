"""The hot path, and who may tune when. A dict answers nearly every call; one lock guards everything else."""

import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from moecache.backends.contract import Backend
from moecache.devices import Place, Places
from moecache.dispatch import log, policy, ranks
from moecache.dispatch.before_tuning import in_its_routing, noted, routing_to_tune, unmeasured, unusable
from moecache.dispatch.bounded import Bounded
from moecache.dispatch.explain import Explanation, explain
from moecache.dispatch.lookup import Lookup
from moecache.dispatch.policy import Ask
from moecache.forks import Lock
from moecache.kernels import registry as ops
from moecache.kernels.contract import Op
from moecache.schemas.config import Alternatives, Config
from moecache.schemas.errors import DeviceLost, InvalidInput, NotTuned
from moecache.schemas.problem import Problem
from moecache.schemas.timing import PASSING, Choice, Timing
from moecache.settings import Settings
from moecache.store.trying import broken_off
from moecache.team import ALONE, Team
from moecache.tuning.failing import kind
from moecache.tuning.run import Budget
from moecache.tuning.timing import Clock
from moecache.tuning.tuner import Tuned, tune
from moecache.tuning.workers import Workers

BUSY = "another thread is tuning"
BOUND = 1 << 12  # entries of `hot`, of some kilobytes each: one a shape


class Dispatcher:
    """Settings, files and answers of one process.

    A hit is `hot.get(key)` and a run of what it keeps, see calls.py. A miss calls `choose(..., key=key)`, which fills
    `hot` once the answer is final. Nobody else fills `hot`. It may be emptied at any time, after something was tuned or
    a config failed.

    A problem without a routing bucket is answered for any routing. Callers ask so under capture, with another key.

    The mode of `settings` may change. `notes`: wanted problems are written in replay, too. `ahead`: what a miss will
    launch is compiled by other processes, side by side.
    """

    def __init__(
        self, settings: Settings, backend: Backend | None = None, clock: Clock | None = None, team: Team = ALONE
    ) -> None:
        self.settings, self.team, self.notes, self.ahead = settings, team, False, True
        self.hot: dict[tuple[Any, ...], Any] = Bounded(BOUND)
        self._peeked: dict[tuple[Any, ...], Choice] = Bounded()
        self.places = Places(backend)
        self.lookup = Lookup(settings)
        self._clock, self._pid = clock, os.getpid()
        self._workers: Workers | None = None
        self._lock = Lock()  # the state below; held for milliseconds, never while tuning
        self._tuning = Lock(reentrant=False)
        self._bystanders: set[int | None] | None = None  # threads that are older than the present tuning
        # by problem key, and the first by variant below it
        self._answers: dict[str, dict[str, tuple[Choice, bool]]] = Bounded()  # and whether it is final
        self._wanted: dict[str, Problem] = Bounded()
        self._noted: dict[str, Problem] = Bounded()
        self._failed: dict[str, set[str]] = Bounded()  # configs that raised at launch

    def choose(
        self,
        op: Op,
        problem: Problem,
        *,
        topk_ids: torch.Tensor | None = None,
        variant: str = "",
        index: int | None = None,
        key: tuple[Any, ...] | None = None,
        prepare: Callable[[Choice], Any] = lambda choice: choice,
        began: float | None = None,
    ) -> Any:
        """The Choice that serves `problem`, with its tier and reason; tunes first where that is allowed.

        Args:
            topk_ids: [T, K], the routing of this call; only read, and only when tuning. A problem that leaves its
                routing open is tuned in the bucket of these.
            variant: allow this kernel variant alone; answered from stored timings or the cost model, never tuned.
            index: device number; None means that of `topk_ids`, else the current device.
            key: where `hot` keeps the answer, if it is final. An answer given under capture in mode=tune is not.
            prepare: makes of the Choice what `hot` keeps and this returns.
            began: when the call began, on the scale of time.perf_counter: the tuning budget counts from there. None:
                now.

        Raises:
            NotTuned: strict, and no measured choice.
            InvalidInput: no config of this op, or of `variant`, fits.
        """
        began = time.perf_counter() if began is None else began
        with self._guard():
            ask = self._ask(op, problem, topk_ids, variant, index)
            capturing = self.settings.mode != "off" and ask.place.capturing()
            blocked = policy.blocked(ask, self.settings.mode, capturing, self.settings.budget)
            if not blocked and self.lookup.starts_empty:
                self._started(ask)  # while the file is made
            untuned = not blocked and self._untuned(ask)
        if untuned:
            blocked = self._tune_now(ask, began)  # outside the lock: other threads go on being served
        with self._guard():
            choice, final = self._answer(ask, blocked, capturing)
            prepared = prepare(choice)
            if key is not None and final and not self.settings.debug:  # then every call is checked, as a miss is
                self.hot[key] = prepared
        if not untuned and key is not None:
            self._compile_ahead(ask, choice)
        return prepared

    def peek(self, op: Op, problem: Problem, *, variant: str = "", index: int | None = None) -> Choice:
        """The answer that `choose` would give now if it could not tune. Writes and notes nothing."""
        with self._guard():
            ask = self._ask(op, problem, None, variant, index)
            return policy.static(ask, "mode=off") if self.settings.mode == "off" else policy.decide(ask, self.lookup)

    def stored(self, op: Op, problem: Problem, *, index: int | None) -> Choice | None:
        """What was measured of a problem on such a device, if anything was, whatever the mode. Ranks no candidates."""
        with self._guard():
            return policy.stored(self._ask(op, problem, None, "", index), self.lookup)

    def in_graphs(self, op: Op, problem: Problem, variant: str, index: int) -> Choice:
        """What `peek` says, kept until something is tuned or forgotten: each number of tokens asks it, and `choose`."""
        key = problem.key, variant, index
        self._peeked[key] = found = self._peeked.get(key) or self.peek(op, problem, variant=variant, index=index)
        return found

    def lasts(self, choice: Choice) -> bool:
        """Whether a captured graph gets this answer as long as nothing more is measured."""
        if self.settings.strict:
            return choice.tier == "measured"
        return self.settings.mode != "tune" or (choice.tier in ("measured", "unverified") and not choice.product)

    def explain(self, problem: Problem) -> Explanation:
        """Which tier answers a problem and why, what else was timed, and why it is no hit. Never tunes or writes."""
        with self._guard():
            place = self.places.of_problem(problem)
            if why := ops.unaskable(problem):
                found = self.lookup.known(problem.op, place).get(problem.key)
                return explain(problem, why, found and policy.served(*found, place), None, place, self.lookup)
            op, graphs = ops.get(problem.op), None
            if problem.routing and ops.built_in(op.name) and self.settings.mode != "off":  # else the key says all
                graphs = self.stored(op, problem.any_routing, index=None)
            return explain(problem, op, self.peek(op, problem), graphs, place, self.lookup)

    def measure(
        self,
        op: Op,
        problem: Problem,
        topk_ids: torch.Tensor | None = None,
        *,
        seconds: float = Budget.seconds,
        index: int | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> list[Timing]:
        """Tune one problem now, even if it is known. Store every timing. Serve the winner from here on.

        All ranks of a team call this together, with the same problem, if the op's candidates are collectives.

        Args:
            op: the op of the problem.
            problem: what to measure.
            topk_ids: [tokens, top-k], the routing to measure with; None draws one from the problem's routing bucket.
            seconds: the time that this may take.
            index: number of the GPU; None takes that of topk_ids, else the current one.
            progress: called with a line of text for each step.

        Returns:
            Every timing that was taken, failures included.

        Raises:
            InvalidInput: the mode is not `tune`, a graph is being captured, or the device is not in this
                machine; on one rank or on all.
            RanksDiffer: with their present files the ranks would choose different configs.
            TeamLost: a rank died, hangs or left.
        """
        with self._guard():
            ask = self._ask(op, problem, topk_ids, "", index)
            why = policy.blocked(ask, self.settings.mode, ask.place.capturing(), seconds, called=False)
        if why := ask.team.agree(f"whether to measure {problem.key}", why, max):
            raise InvalidInput(f"cannot measure {problem.key}: {why}")
        with self._tuning, ask.team.staying():
            timings = self._measure(ask, Budget(seconds=seconds), progress).timings
            if ask.team.size > 1:
                ask.team.same(self.peek(op, problem, index=index).config.name, f"the config for {problem.key}")
        return timings

    def failed(self, problem: Problem, config: Config | Alternatives, error: BaseException, index: int = 0) -> None:
        """Note that a config, or two in one call, raised at launch. The runner-up serves this problem from now on."""
        with self._guard():
            for key in (problem.key, problem.any_routing.key):
                self._failed[key] = {*self._failed.get(key, ()), config.name}
            place = self.places.of_problem(problem, index)
            passing = kind(error) in PASSING  # says nothing of the config
            if isinstance(config, Config) and self.settings.mode == "tune" and not passing and not place.capturing():
                reason = f"at launch: {type(error).__name__}: {error}"[:500]
                self.lookup.put([unusable(problem, config, place, "raised", reason)], place)
            self._forget(problem)

    def rescue(self, ask: Ask, config: Config | Alternatives, error: Exception, run: Callable[[Config], Any]) -> Any:
        """The result of the default, after `config` raised `error`.

        If the default serves the same call, the config is at fault and never serves this problem again. Otherwise the
        call is at fault, and its error is raised. It is also raised under capture, where nothing can be tried twice,
        and where other ranks would have to try the same.
        """
        default = ask.op.space(ask.problem, ask.place.device)[0]
        if config == default or ask.place.capturing() or ranks.team_of(ask.op, self.team).size > 1:
            raise error
        try:
            result = run(default)
        except Exception:
            raise error from None
        self.failed(ask.problem, config, error, ask.place.index)
        return result

    def wanted(self) -> list[Problem]:
        """Problems that calls met without a measured choice and that are not written yet: under capture, in replay."""
        return list(self._wanted.values())

    def flush(self) -> None:
        """Write the wanted problems to the user's file, in mode=tune and where this dispatcher `notes`."""
        with self._guard():
            if self._wanted and (self.settings.mode == "tune" or self.notes):
                self.lookup.tiers.write(lambda store: store.want(self._wanted.values()))
                self._wanted.clear()

    def digest(self, names: list[str] | None = None) -> str:
        """sha256 over the winners that this process would serve on its device, for some ops or for all.

        Ranks that must agree compare it. One rank tunes, all pass a barrier, all call `reload()`, then they compare.
        Equal digests and equal code give equal choices on every rank. A call exchanges nothing, hit or miss.
        """
        with self._guard():
            asked = ops.names() if names is None else names
            return policy.digest(asked, self.places.first(), self.lookup, ops.alternating)

    def reload(self) -> None:
        """Forget every answer. The next miss reads the files again."""
        with self._guard():
            self.flush()
            for table in (self._answers, self._peeked, self.hot):
                table.clear()
            self.lookup.close()

    def close(self) -> None:
        """Write the wanted problems, close the files and end the subprocesses."""
        with self._guard():
            self.reload()
            if self._workers is not None:
                self._workers.close()
                self._workers = None

    # --- below, the lock is held ---

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Hold the lock. A forked child leaves to its parent what belongs to the parent."""
        if self._pid != os.getpid():
            self._pid, self._workers, self._bystanders = os.getpid(), None, None
        with self._lock:
            yield

    def _ask(self, op: Op, problem: Problem, topk_ids: torch.Tensor | None, variant: str, index: int | None) -> Ask:
        if index is None and topk_ids is not None and topk_ids.is_cuda:
            index = topk_ids.get_device()
        elif index is None:
            index = torch.cuda.current_device() if problem.vendor != "cpu" and torch.cuda.is_available() else 0
        place = self.places.of_problem(problem, index)
        failed, team = self._failed.get(problem.key, ()), ranks.team_of(op, self.team)
        return Ask(op, problem, place, variant, topk_ids, failed, self.settings.strict, team, ops.alternating(op.name))

    def _answer(self, ask: Ask, blocked: str, capturing: bool) -> tuple[Choice, bool]:
        """(choice, whether it is final). If a capture or a busy tuner prevents tuning, a later call tunes."""
        answers = self._answers.get(ask.problem.key, {})
        choice, final = answers.get(ask.variant, (None, False))
        if fresh := choice is None or not (final or capturing):
            choice = self._decide(ask, blocked, capturing)
            again = self.settings.strict and self.settings.mode == "tune"  # the next call tries to tune again
            final = self.lasts(choice) or not (capturing or blocked == BUSY or again)
            self._answers[ask.problem.key] = {**answers, ask.variant: (choice, final)}
        if self.settings.strict and self.settings.mode != "off" and choice.tier != "measured":
            raise NotTuned(f"strict: no measured choice for {ask.problem.key}: {choice.reason}. Warm it up first")
        return log.chosen(ask.problem, choice) if fresh else choice, final

    def _decide(self, ask: Ask, blocked: str, capturing: bool) -> Choice:
        """The answer of the tiers. If it is not measured, the problem is noted as wanted."""
        if self.settings.mode == "off":
            return policy.static(ask, "mode=off")
        choice = self._peeked.get((ask.problem.key, ask.variant, ask.place.index)) or policy.decide(ask, self.lookup)
        if choice.tier != "measured" and ask.problem.key not in self._noted:
            self._noted[ask.problem.key] = self._wanted[ask.problem.key] = ask.problem
        if not capturing:
            self.flush()
        return policy.explained(choice, blocked)

    def _untuned(self, ask: Ask) -> bool:
        """Whether a call should tune first: nothing is stored, or nothing that strict accepts."""
        _, final = self._answers.get(ask.problem.key, {}).get(ask.variant, (None, False))
        if final:
            return False
        known = policy.stored(ask, self.lookup)
        return known is None or (self.settings.strict and known.tier != "measured")

    # --- tuning: one problem at a time, without the lock ---

    def _tune_now(self, ask: Ask, began: float) -> str:
        """Tune in the middle of a call. Returns why there is no winner; '' for one. An error never fails the call.

        Only strict callers wait for another thread's tuning, as they could not be served otherwise. Threads that a
        tuning started never wait: a candidate that calls an op would wait for its own end.
        """
        older = self._bystanders
        wait = self.settings.strict and (older is None or threading.get_ident() in older)
        if not self._tuning.acquire(blocking=False):
            if not wait:
                return BUSY
            self._tuning.acquire()
            began = time.perf_counter()
        try:
            with self._guard():
                if not self._untuned(ask):
                    return ""
            tuned = self._tune_briefly(replace(ask, problem=in_its_routing(ask.problem, ask.topk_ids)), began)
        except DeviceLost:
            raise
        except Exception as error:  # also an op's own: if the call is at fault, it raises where the caller sees it
            what = f"{type(error).__name__}: {error}"
            warnings.warn(f"moecache could not tune {ask.problem.key}: {what}", RuntimeWarning, stacklevel=3)
            return f"tuning failed: {what}"
        finally:
            self._tuning.release()
        return unmeasured(tuned.timings, tuned.left, self.settings.budget)

    def _tune_briefly(self, ask: Ask, began: float) -> Tuned:
        """Tune within the budget of a call that began then. If it leaves configs untried, the problem is wanted."""
        helpers = self._started(ask)
        try:
            tuned = self._measure(ask, Budget(seconds=self.settings.budget, hurry=True), None, began)
        finally:
            if helpers is not None:
                helpers.drop()
        if tuned.left:
            with self._guard():
                self._wanted[ask.problem.key] = ask.problem
        return tuned

    def _measure(
        self, ask: Ask, budget: Budget, progress: Callable[[str], None] | None, began: float | None = None
    ) -> Tuned:
        """Tune and store. The caller holds `_tuning`."""
        place = ask.place
        assert place.backend is not None
        with self._guard():
            cache = self.lookup.tiers.user.path
            if ended := broken_off(cache):
                self.lookup.put(ended, place)
            how = policy.known(ask, self.lookup) | {"workers": self.helpers(place), "clock": self._clock}
        self._bystanders = {thread.ident for thread in threading.enumerate()}
        try:
            with noted(cache, ask.problem, place) as trying:
                ids = routing_to_tune(ask.problem, ask.topk_ids, place.torch_device)
                how |= {"budget": budget, "began": began, "progress": progress, "trying": trying, "team": ask.team}
                tuned = tune(ask.op, ask.problem, ids, place.backend, place.device, place.environment, **how)
        except DeviceLost as lost:
            self._keep(ask, [t for t in lost.timings if isinstance(t, Timing)])
            raise
        finally:
            self._bystanders = None
        with ranks.in_turn(ask.team, cache) as writes:
            self._keep(ask, tuned.timings, writes)
        return tuned

    def _keep(self, ask: Ask, timings: list[Timing], writes: bool = True) -> None:
        with self._guard():
            self.lookup.put(timings, ask.place, writes)
            for asked in (ask.problem, ask.problem.any_routing):
                self._wanted.pop(asked.key, None)
            self._forget(ask.problem)

    def _started(self, ask: Ask) -> Workers | None:
        """The subprocesses. They start when first asked for, before this process imports kernels and makes inputs."""
        first, helpers = self._workers is None, self.helpers(ask.place)
        if first and helpers is not None and ops.built_in(ask.op.name):
            helpers.start(ask.place.device)
        return helpers

    def helpers(self, place: Place) -> Workers | None:
        """Subprocesses that compile; None where they are not wanted. Plain torch on a CPU has no compiler to crash."""
        if not self.settings.isolate or place.device.vendor == "cpu":
            return None
        self._workers = self._workers or Workers()
        return self._workers

    def _compile_ahead(self, ask: Ask, choice: Choice) -> None:
        """Compile what a first launch would compile, side by side."""
        helpers = self.helpers(ask.place) if self.ahead else None
        if helpers is not None and ops.built_in(ask.op.name):
            whats: list[Any] = [choice.config, *filter(None, [choice.alternatives])]
            every = [each for what in whats for each in ask.op.sources(ask.problem, what, ask.place.device)]
            helpers.complete(every, ask.place.device)

    def _forget(self, problem: Problem) -> None:
        """Drop the answers that rest on older timings of a problem: its own answer, and those for any routing."""
        self.hot.clear()
        self._peeked.clear()
        for key in (problem.key, problem.any_routing.key):
            self._answers.pop(key, None)
