"""A tiny op whose candidates take the time they are told to, the clock that says so, a fake capture."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moecache.backends.cpu import CpuBackend
from moecache.dispatch import Dispatcher
from moecache.kernels.code import code_of
from moecache.kernels.contract import Args, Bound, Source
from moecache.predict.work import Work
from moecache.schemas.config import Config, config
from moecache.schemas.device import Device
from moecache.schemas.layer import Layer
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Environment, Timing
from moecache.settings import Settings
from moecache.store import Store

A, B, C = config("plain", block=1), config("plain", block=2), config("other", block=4)


@dataclass
class Toy:
    """Doubles a tensor. `times` gives µs per config, default first; configs in `wrong` give wrong numbers."""

    name: str = "toy"
    source: str = "v1"
    times: dict[Config, float] = field(default_factory=lambda: {A: 30.0, B: 20.0, C: 10.0})
    costs: dict[Config, float] = field(default_factory=lambda: {A: 3.0, B: 1.0, C: 2.0})
    unfit: dict[Config, str] = field(default_factory=dict)
    raises: dict[Config, Exception] = field(default_factory=dict)
    wrong: set[Config] = field(default_factory=set)
    soft_dims: tuple[str, ...] = ("block_m",)
    nap: float = 0.0  # seconds that a launch really takes
    last: float = 0.0
    launches: list[tuple[Config, int]] = field(default_factory=list)  # with the thread that launched
    seen_ids: list[torch.Tensor] = field(default_factory=list)

    inputs_of_one_tuning = 3  # two to check, one to time

    def problem(self, tokens: int = 16, routing: str = "a0e0", **changes: Any) -> Problem:
        device = CpuBackend().device()
        fields: dict[str, Any] = {
            "op": self.name, "vendor": "cpu", "arch": device.arch, "units": device.units, "tokens": tokens,
            "experts": 8, "topk": 2, "routing": routing, "source": self.source, "dims": (("block_m", 16),),
        }  # fmt: skip
        return Problem(**fields | changes)

    def problems(self, layer: Layer, tokens: Sequence[int], device: Device) -> list[Problem]:
        return [self.problem(t, "", experts=layer.experts, topk=layer.topk) for t in tokens]

    def left_out(self, layer: Layer, tokens: Sequence[int], device: Device) -> str:
        return ""

    def space(self, problem: Problem, device: Device) -> list[Config]:
        return [c for c in self.times if not self.fits(problem, c, device)]

    def fits(self, problem: Problem, config: Config, device: Device) -> str:
        if device.shared_bytes > 1 << 30:  # a device on which everything fits
            return ""
        return self.unfit.get(config, "" if config in self.times else f"{config.name} does not exist")

    def work(self, problem: Problem, config: Config, device: Device) -> Work:
        return Work(us=self.costs.get(config, float("inf")))

    def inputs(self, problem: Problem, topk_ids: torch.Tensor, seed: int) -> Args:
        self.seen_ids.append(topk_ids)
        return {"x": torch.arange(8.0) + seed}

    def outputs(self, args: Args) -> torch.Tensor:
        return torch.empty_like(args["x"])

    def bind(self, config: Config, args: Args, out: torch.Tensor) -> Bound:
        return partial(self.launch, config)

    def launch(self, config: Config, args: Args, out: torch.Tensor) -> torch.Tensor:
        self.launches.append((config, threading.get_ident()))
        self.last = self.times[config]
        time.sleep(self.nap)
        if config in self.raises:
            raise self.raises[config]
        return torch.mul(args["x"], 3 if config in self.wrong else 2, out=out)

    def reference(self, args: Args) -> torch.Tensor:
        return args["x"] * 2

    def error(self, got: torch.Tensor, want: torch.Tensor) -> float:
        return 0.0 if torch.equal(got, want) else float("inf")

    def tolerance(self, problem: Problem) -> float:
        return 0.0

    def sources(self, problem: Problem, config: Config, device: Device) -> list[Source]:
        return []


class ToyClock:
    """Runs the call and believes the op."""

    def __init__(self, op: Toy) -> None:
        self.op = op

    def copies(self, set_bytes: int) -> int:
        return 1

    def prepare(self, calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
        def sample() -> float:
            calls[0]()
            return self.op.last

        return sample


class CapturingBackend(CpuBackend):
    """A CPU that says it records a graph while `on`."""

    on = False

    def capturing(self) -> bool:
        return self.on


def served(toy: Toy, db: Path, backend: CapturingBackend | None = None, **more: Any) -> Dispatcher:
    """A dispatcher with that file, which believes the toy's times."""
    return Dispatcher(Settings(db=db, **{"budget": 5.0} | more), backend or CapturingBackend(), ToyClock(toy))


def stored(db: Path, *timings: Timing) -> None:
    with Store.open(db) as store:
        store.put(timings)


def timing(problem: Problem, config: Config, us: float, environment: Environment, **more: Any) -> Timing:
    """A stored sample of today's code, as quiet as real ones are not."""
    code = "" if problem.source else code_of(problem.op, config.variant)
    return Timing(
        problem=problem, config=config, environment=environment, median_us=us, mad_us=us * 1e-3, n=20,
        measured_at="2026-01-01T00:00:00+00:00", code=code, **more,
    )  # fmt: skip
