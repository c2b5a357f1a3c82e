"""Predicted times of a search space: by the cost model where it knows op and device, else by the op's own estimate.

The model takes, in this order, what it learnt of the layer here, which the user's cache file keeps, what the package
brings for the architecture, what it learnt of another layer here, and the device's constants.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from moecache import routing
from moecache.costmodel import Learned, Smoothed, candidates, cell, zero_shot
from moecache.costmodel.learned import layer_of, parse, shipped
from moecache.costmodel.tiles import KERNELS
from moecache.costmodel.work import Cell
from moecache.kernels.contract import Op
from moecache.schemas.config import Config
from moecache.schemas.device import Device
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import Problem

OPS = ("fused_moe",)  # whose times the model was fitted to
DTYPES = ("bf16", "fp16")


@dataclass(frozen=True)
class Ranking:
    """µs of every config in their order, not finite where nothing is predicted; and what predicted them."""

    us: tuple[float, ...]
    by: str

    @property
    def best(self) -> int | None:
        """The place of the lowest time; None where nothing is predicted."""
        finite = [place for place, us in enumerate(self.us) if math.isfinite(us)]
        return min(finite, key=self.us.__getitem__, default=None)


def rank(
    op: Op, problem: Problem, configs: Sequence[Config], device: Device, kept: Sequence[tuple[str, str]] = ()
) -> Ranking:
    """Predict the time of every config for one problem; takes milliseconds.

    Args:
        kept: (layer, what was learnt) of this op on such devices, from the user's cache file.
    """
    if knows(problem, configs, device):
        try:
            asked = call(problem)
            among = candidates(configs, asked.gated)
            for model, by in _models(op.name, device, layer_of(asked), kept):
                if model.parameters.knows(among):
                    return Ranking(tuple(model.times([asked], among)[0].tolist()), by)
        except InvalidInput:  # no draw gives distinct experts, or the device's rates are unknown
            pass
    return Ranking(tuple(op.cost(problem, config, device) for config in configs), "Op.cost")


def knows(problem: Problem, configs: Sequence[Config], device: Device) -> bool:
    """Whether the cost model was made for such a problem, and for all of these variants."""
    made_for = problem.op in OPS and problem.dtype in DTYPES and not problem.dim("quant", "")
    named = bool(configs) and all(config.variant in KERNELS for config in configs)
    return made_for and named and device.bandwidth_gbs > 0 and problem.tokens > 0


def outdone(problem: Problem, configs: Sequence[Config], device: Device) -> bool:
    """Whether a prediction with the constants of a device is nearer to its best than what another product is fastest
    with (benchmarks/notes/other-product.md). Of other ops nobody has compared the two."""
    return device.bandwidth_gbs > 0 and (problem.op == "moe_sort" or knows(problem, configs, device))


def fitted(op: str, device: Device, kept: Sequence[tuple[str, str]]) -> bool:
    """Whether timings stand behind the cost model on such a device, not its constants alone; `kept` as in `rank`."""
    return op in OPS and (bool(kept) or _shipped(op, device) is not None)


def call(problem: Problem) -> Cell:
    """A call that stands for a problem: as many tokens, and experts loaded as its routing bucket says.

    Raises:
        InvalidInput: an unknown bucket, or more choices than experts.
    """
    here = problem.experts / problem.dim("global", problem.experts)  # of the pairs, on this rank
    tokens = max(1, round(problem.tokens * here))
    return cell(problem, routing.representative(problem.routing, tokens, problem.experts, problem.topk))


def given(op: str, device: Device) -> Smoothed:
    """The model before anything is learnt here.

    Raises:
        InvalidInput: the device's rates are unknown.
    """
    return _shipped(op, device) or _constant(device)


def _models(op: str, device: Device, layer: str, kept: Sequence[tuple[str, str]]) -> Iterator[tuple[Smoothed, str]]:
    """What may predict, the best first: a layer's own, what the package brings, another layer's, the constants."""
    mine = [text for name, text in kept if name == layer]
    others = [text for name, text in kept if name != layer]
    for text in mine:
        if (found := _kept(text, device)) is not None:
            yield found, "the cost model, as it learnt this layer here"
    if (brought := _shipped(op, device)) is not None:
        yield brought, f"the cost model, as it learnt {device.arch}"
    for text in others:
        if (found := _kept(text, device)) is not None:
            yield found, "the cost model, as it learnt another layer here"
    yield _constant(device), "the cost model, with the device's constants"


@lru_cache(maxsize=8)
def _kept(text: str, device: Device) -> Smoothed | None:
    found = parse(text)
    return None if found is None else found.model(device)


@lru_cache(maxsize=8)
def _shipped(op: str, device: Device) -> Smoothed | None:
    found: Learned | None = shipped(device.arch)
    return None if found is None or found.op != op else found.model(device)


@lru_cache(maxsize=8)
def _constant(device: Device) -> Smoothed:
    """The model without leftovers."""
    nothing = candidates([Config(variant="none", params=(("k", 16), ("n", 16)))])
    return Smoothed(zero_shot(device), device, np.zeros((0, 3)), nothing, np.zeros((0, 1)))
