"""`warm --ray`: the GPUs of a Ray cluster measure a model's problems, each its share, into a file of its own."""

import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from moecache.cli import find
from moecache.cli.model import lacking, tell
from moecache.cli.show import note
from moecache.schemas.errors import DeviceLost, InvalidInput, MoecacheError
from moecache.schemas.problem import Problem
from moecache.schemas.warm import LeftOut, Progress, WarmRow
from moecache.settings import MEMORY, Settings
from moecache.store import Store
from moecache.text import counted

if TYPE_CHECKING:
    from moecache.cli.progress import Meter
    from moecache.models import Model

Submit = Callable[..., "Future[Any]"]  # has a process of its own call one of the functions below
START = 300.0  # seconds that a worker may take until it has said which device it has


@dataclass(frozen=True)
class Share:
    """Problems that differ in their routing alone, and so compile once, for a kind of device: environment and units."""

    kind: tuple[str, int]
    problems: tuple[Problem, ...]
    predicted_us: float

    def __str__(self) -> str:
        first = self.problems[0]
        return f"{first.op} tokens={first.tokens} experts={first.experts} ({counted(len(self.problems), 'problem')})"


class Plan(NamedTuple):
    """What a worker would measure."""

    kind: tuple[str, int]
    device: str
    host: str
    shares: list[Share]
    left: list[LeftOut]


def spread(
    chosen: Settings, model: "Model | None", meter: "Meter", as_json: bool, apart: Sequence[LeftOut], **more: Any
) -> tuple[list[WarmRow], bool]:
    """What `warming.alone` gives, by the workers of a Ray cluster; true also if a share was lost.

    Raises:
        typer.BadParameter: no model.
    """
    again, budget, wanted = more.pop("again"), more.pop("budget"), more.pop("wanted")
    if model is None or wanted:
        raise typer.BadParameter("it takes a model, and no --wanted", param_hint="--ray")
    with find.writable(chosen) as store, cluster() as workers:
        found = Fleet(workers, chosen, model, **more)
        tell(model, [*found.left, *apart], as_json)
        rows, lost = found.warm(store, again, budget, meter)
    for share in lost:
        note(f"moecache: not measured: {share}; the same command tries again")
    return rows, bool(lost) or lacking(more["ops"], found.left)


# --- what a worker calls ---


def planned(chosen: Settings, model: "Model", ops: Sequence[str] | None, **more: Any) -> Plan:
    """What there is to measure on the device of this process."""
    from moecache.dispatch import using
    from moecache.kernels import registry
    from moecache.predict.ranking import rank
    from moecache.warmup import left_out, problems

    with using(chosen, db=MEMORY, path=()) as serving:
        place, left = serving.places.first(), left_out(model, tokens=more["tokens"], ops=ops)
        shapes: dict[str, list[Problem]] = {}
        for each in problems(model, ops=ops, **more):
            shapes.setdefault(each.any_routing.key, []).append(each)

    def us(problem: Problem) -> float:
        op = registry.get(problem.op)
        return min(rank(op, problem, op.space(problem, place.device), place.device).us, default=0.0)

    kind = place.environment.id, place.device.units
    shares = [Share(kind, tuple(each), sum(map(us, each))) for each in shapes.values()]
    return Plan(kind, place.device.name, socket.gethostname(), shares, left)


def measured(
    chosen: Settings, known: bytes, share: Share, routing: Sequence[str], again: bool, budget: float | None
) -> tuple[list[WarmRow], bytes, str]:
    """The rows of a share, a cache file with its timings, and why the device is lost, if it is.
    `known` is a cache file, which a warm-up goes on with."""
    from moecache.dispatch import using
    from moecache.warmup import warmup

    rows, lost = list[WarmRow](), ""
    with TemporaryDirectory() as folder:
        (own := Path(folder, "own.sqlite")).write_bytes(known)
        with using(chosen, db=own, path=()):
            try:
                shape = [share.problems[0].any_routing]
                rows = warmup(shape, routing=routing, again=again, budget=budget)
            except DeviceLost as error:
                lost = str(error)
        with Store.open(own, readonly=True) as store:
            made = _copied(store, key=[each.key for each in share.problems])
    return rows, made, lost


def answered(work: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """What work gives, or raises of ours: whatever else a future raises ended its worker."""
    try:
        return work(*given, **named)
    except MoecacheError as error:
        return error


# --- who has them called ---


class _Worker(NamedTuple):
    submit: Submit
    kind: tuple[str, int]
    name: str


class Fleet:
    """Workers that have said what they would measure. One that fails gets nothing more to do.

    Attributes:
        left: what is left out.
    """

    def __init__(self, workers: Sequence[Submit], chosen: Settings, model: "Model", **asked: Any) -> None:
        """`asked` are arguments of `problems`.

        Raises:
            MoecacheError: nothing can be measured that way, or no worker answers.
        """
        self._chosen, self._routing = chosen, asked["routing"]
        self._idle, plans = list[_Worker](), list[Plan]()
        futures = {submit(planned, chosen, model, **asked): submit for submit in workers}
        wait(futures, START)
        for number, (future, submit) in enumerate(futures.items(), 1):
            try:
                plan = _result(future, 0.0)
            except MoecacheError:
                raise
            except Exception as error:
                why = _why(error) if future.done() else f"it has not begun within {START:g} s"
                note(f"moecache: worker {number} is left out: {why}")
            else:
                plans.append(plan)
                self._idle.append(_Worker(submit, plan.kind, f"worker {number} ({plan.device}, {plan.host})"))
        if not plans:
            raise InvalidInput("no worker of the cluster answers: each needs the moecache and torch of this process")
        self.left = list(dict.fromkeys(each for plan in plans for each in plan.left))
        shares = {plan.kind: plan.shares for plan in plans}
        self._shares = [share for every in shares.values() for share in every]
        devices = ", ".join(f"{count} × {name}" for name, count in Counter(plan.device for plan in plans).items())
        kinds = "; they are of several kinds, and each kind measures all for itself" if len(shares) > 1 else ""
        note(f"moecache: {counted(len(plans), 'worker')}: {devices}{kinds}")

    def warm(
        self, store: Store, again: bool, budget: float | None, tell: Callable[[Progress], None]
    ) -> tuple[list[WarmRow], list[Share]]:
        """The rows of what was measured, whose timings the store has then, and the shares that were lost: each is tried
        by two workers."""
        began, running = time.monotonic(), dict[Future[Any], tuple[_Worker, Share]]()
        # what takes longest first, so that nobody begins it when the others are done
        waiting = sorted(self._shares, key=lambda share: share.predicted_us, reverse=True)
        rows, failed = dict[Share, list[WarmRow]](), set[Share]()
        total = sum(len(share.problems) for share in waiting)
        while True:
            for worker in list(self._idle):
                if (share := next((each for each in waiting if each.kind == worker.kind), None)) is not None:
                    part = None if budget is None else max(0.0, budget - (time.monotonic() - began))
                    part = part and part * min(1.0, (len(self._idle) + len(running)) / len(waiting))
                    known = _copied(store, op=share.problems[0].op, experts=share.problems[0].experts)
                    future = worker.submit(measured, self._chosen, known, share, self._routing, again, part)
                    running[future] = worker, share
                    self._idle.remove(worker)
                    waiting.remove(share)
            if not running:
                break
            done, now = sum(len(share.problems) for share in rows), time.monotonic() - began
            first = next(iter(running.values()))[1].problems[0].any_routing
            tell(Progress(done, total, first, "", now, now / done * (total - done) if done else None))
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                worker, share = running.pop(future)
                try:
                    found, made, lost = _result(future)
                    _merge(store, made, found)
                except MoecacheError:
                    raise
                except Exception as error:
                    lost = _why(error)
                if not lost:
                    rows[share] = found
                    self._idle.append(worker)
                    continue
                note(f"moecache: {worker.name} is lost with {share}: {lost}")
                waiting[:0] = [share] if share not in failed else []
                failed.add(share)
        return [row for each in self._shares for row in rows.get(each, ())], [s for s in self._shares if s not in rows]


def _result(future: "Future[Any]", seconds: float | None = None) -> Any:
    if isinstance(value := future.result(seconds), MoecacheError):
        raise value
    return value


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def _copied(store: Store, **filters: Any) -> bytes:
    with TemporaryDirectory() as folder:
        store.export_file(path := Path(folder, "copy.sqlite"), **filters)
        return path.read_bytes()


def _merge(store: Store, made: bytes, rows: Sequence[WarmRow]) -> None:
    with TemporaryDirectory() as folder:
        (path := Path(folder, "copy.sqlite")).write_bytes(made)
        with Store.open(path, shipped=True) as other:
            store.merge(other)
    store.unwant(each for row in rows if row.measured for each in (row.problem, row.problem.any_routing))


@contextmanager
def cluster() -> Iterator[list[Submit]]:
    """A worker for each free GPU of the Ray cluster, or for each free core where it has no GPU: of that which
    RAY_ADDRESS names, that which runs here, else one of this machine for as long.

    Raises:
        InvalidInput: Ray is not installed or not reached, or nothing is free.
    """
    try:
        import ray
    except ImportError:
        raise InvalidInput("--ray takes Ray: pip install 'moecache[ray]'") from None
    try:
        ray.init(log_to_driver=False, logging_level="warning")
    except (OSError, RuntimeError, ValueError) as error:
        raise InvalidInput(f"Ray does not start: {_why(error)}") from None
    try:
        kind = "GPU" if "GPU" in ray.cluster_resources() else "CPU"
        if not (free := int(ray.available_resources().get(kind, 0))):
            raise InvalidInput(f"the Ray cluster has no free {kind}; `ray status` shows who holds them")
        actors = ray.remote(_Actor).options(**{f"num_{kind.lower()}s": 1})
        yield [partial(_call, actors.remote()) for _ in range(free)]
    finally:
        ray.shutdown()


class _Actor:
    """A process of Ray's, which keeps its GPU."""

    def call(self, *given: Any, **named: Any) -> Any:
        return answered(*given, **named)


def _call(actor: Any, *given: Any, **named: Any) -> Any:
    return actor.call.remote(*given, **named).future()
