"""Predicted µs of a search space, the same way for every op.

Grouped products take what the package ships for the architecture, which was fitted to timings, else the device's
constants.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from moecache.predict.calls import call
from moecache.predict.learned import shipped
from moecache.predict.parameters import zero_shot
from moecache.predict.products import candidates
from moecache.predict.rates import alone_us
from moecache.predict.smoothing import Smoothed, smoothed
from moecache.predict.work import Tile, Work
from moecache.schemas.config import Config
from moecache.schemas.device import Device
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import Problem
from moecache.schemas.timing import By

FITTED = ("fused_moe",)  # ops whose timings stand behind fitted parameters
DTYPES = ("bf16", "fp16")  # and theirs
NAMES: dict[By, str] = {
    "shipped": "the cost model, with its shipped parameters",
    "constants": "the cost model, with the device's constants",
    "cost": "the cost that it was wrapped with",
}


class Working(Protocol):
    """What a ranking asks of an op."""

    name: str

    def work(self, problem: Problem, config: Config, device: Device) -> Work:
        """What a config makes a device do for a problem."""


@dataclass(frozen=True)
class Ranking:
    """µs of every config in their order, not finite where nothing is predicted; and whose parameters predicted them."""

    us: tuple[float, ...]
    by: By

    @property
    def best(self) -> int | None:
        """The place of the lowest time; None where nothing is predicted."""
        finite = [place for place, us in enumerate(self.us) if math.isfinite(us)]
        return min(finite, key=self.us.__getitem__, default=None)


def rank(op: Working, problem: Problem, configs: Sequence[Config], device: Device) -> Ranking:
    """Predict the time of every config for one problem; takes milliseconds."""
    return _ranked(tuple(op.work(problem, config, device) for config in configs), problem, device)


def fitted_to(problem: Problem) -> bool:
    """Whether fitted parameters saw timings of such problems: elsewhere they are as good as constants."""
    return problem.op in FITTED and problem.dtype in DTYPES and not problem.dim("quant", "")


@lru_cache(maxsize=256)
def _ranked(works: tuple[Work, ...], problem: Problem, device: Device) -> Ranking:
    if all(work.us is not None for work in works):
        return Ranking(tuple(math.inf if work.us is None else work.us for work in works), "cost")
    if all(work.up is None for work in works):
        return Ranking(tuple(alone_us(work, device) for work in works), "constants")
    try:
        among, asked = candidates(works), call(problem)
    except InvalidInput:  # no tokens, or no draw gives distinct experts
        return Ranking((math.inf,) * len(works), "constants")
    by: By = "shipped"
    if (model := _shipped(device)) is None or not model.timed(among):
        model, by = _constant(device), "constants"
    return Ranking(tuple(model.times([asked], among)[0].tolist()), by)


@lru_cache(maxsize=8)
def _constant(device: Device) -> Smoothed:
    """The model without leftovers."""
    nothing = candidates([Work(Tile("none", 1, 16, 16))])
    return Smoothed(zero_shot(device), device, np.zeros((0, 3)), nothing, np.zeros((0, 1)))


@lru_cache(maxsize=8)
def _shipped(device: Device) -> Smoothed | None:
    found = shipped(device.arch)
    return None if found is None else smoothed(found, device)
