"""The op `ep_exchange`: a dispatch and the combine after it, which all ranks tune together.

A config is a way to dispatch and a way to combine. Its inputs are tokens of this rank; in the place of experts each row
is multiplied with the sum of its weights.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from itertools import product
from typing import ClassVar

import torch

from moecache.kernels.contract import Bound, Source, made_up
from moecache.kernels.ep.context import EpContext
from moecache.kernels.ep.exchange import (
    CombineConfig,
    DispatchConfig,
    combine,
    default_combine,
    default_dispatch,
    dequantised,
    dispatch,
    fitting,
)
from moecache.kernels.matrix import DTYPE_NAMES, TOLERANCE
from moecache.predict.work import Work
from moecache.schemas.config import Config
from moecache.schemas.device import Device
from moecache.schemas.layer import Layer
from moecache.schemas.problem import Problem, token_bucket

THERE = ("dispatch", "programs", "num_warps", "block")
BACK = ("combine", "back_programs", "back_warps", "back_block", "steps")
PUSHES = [DispatchConfig("push", 128, 8, block) for block in (1024, 4096, 8192)]
BACKS = [
    CombineConfig("pull", 128, 8, 1024),
    CombineConfig("pull", 128, 8, 4096),
    CombineConfig("pull", 256, 8, 4096),
    CombineConfig("push", 64, 16, 8192, 16),
]
COLLECTIVES = [
    (DispatchConfig("all_gather", 1, 1, 128), CombineConfig("reduce_scatter", 1, 1, 128)),
    (DispatchConfig("all_to_all", 1, 1, 128), CombineConfig("all_to_all", 1, 1, 128)),
]


@dataclass(frozen=True)
class Tokens:
    """What one rank sends."""

    x: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor


class Exchange:
    """The op, for the ranks of a context; without one it answers whatever needs no other rank."""

    name = "ep_exchange"
    source = ""
    collective: ClassVar[bool] = True

    def __init__(self, ctx: EpContext | None = None) -> None:
        self.ctx = ctx

    def question(self, device: Device, capacity: int) -> Problem:
        """What all ranks know of a call with so many tokens a rank at most."""
        ctx = self.context()
        dims = {"world": ctx.world, "hidden": ctx.hidden, "wire": ctx.wire, "links": ctx.links}
        if ctx.wire == "fp8":
            dims["fp8"] = str(ctx.fp8).removeprefix("torch.float8_")
        return Problem(
            op=self.name,
            vendor=device.vendor,
            arch=device.arch,
            units=device.units,
            tokens=token_bucket(capacity),
            experts=ctx.experts,
            topk=ctx.topk,
            dtype=DTYPE_NAMES[ctx.dtype],
            dims=tuple(dims.items()),
        )

    def context(self) -> EpContext:
        assert self.ctx is not None, "only a context's own op is run"
        return self.ctx

    def problems(self, layer: Layer, tokens: Sequence[int], device: Device) -> list[Problem]:
        """None: a layer does not say which ranks there are. `ep.tune` measures those of a context."""
        return []

    def left_out(self, layer: Layer, tokens: Sequence[int], device: Device) -> str:
        return "only a context knows its ranks: see moecache.ep.tune"

    def space(self, problem: Problem, device: Device) -> list[Config]:
        """Every pair worth trying; the first is the default: what is fastest, or nearly, on two H200s."""
        hidden = problem.dim("hidden")
        usual = _pair(default_dispatch(hidden, problem.tokens), default_combine(hidden, problem.tokens))
        return sorted(_every(problem, device), key=lambda each: each != usual)

    def fits(self, problem: Problem, config: Config, device: Device) -> str:
        """Why not, or ''."""
        return made_up(_every, problem.model_copy(update={"tokens": 0}), config, device)

    def work(self, problem: Problem, config: Config, device: Device) -> Work:
        """Two phases, and the bytes of rows that nearly all go to each peer over the link."""
        size = problem.tokens * problem.dim("hidden") * 2.0 * (problem.dim("world") - 1)
        ours = sum(way in ("push", "pull") for way in (config["dispatch"], config["combine"]))
        return Work(meetings=ours, linked=ours * size, collectives=2 - ours, gathered=(2 - ours) * size)

    def inputs(self, problem: Problem, topk_ids: torch.Tensor, seed: int) -> Tokens:
        """Random tokens of this rank, with the given routing."""
        ctx = self.context()
        rng = torch.Generator().manual_seed(1000 * (seed + 1) + ctx.rank)
        topk_ids = topk_ids[: ctx.max_tokens].fmod(ctx.routed)  # replicas have numbers of the problem, but no router's
        x = torch.randn(len(topk_ids), ctx.hidden, generator=rng).to(topk_ids.device, ctx.dtype)
        weights = torch.rand(topk_ids.shape, generator=rng).to(topk_ids.device)
        return Tokens(x, topk_ids.contiguous(), weights)

    def outputs(self, args: Tokens) -> torch.Tensor:
        return torch.empty_like(args.x)

    def bind(self, config: Config, args: Tokens, out: torch.Tensor) -> Bound:
        """A dispatch, the stand-in for the experts, a combine."""
        return partial(self._run, *ways(config))

    def _run(self, there: DispatchConfig, back: CombineConfig, args: Tokens, out: torch.Tensor) -> torch.Tensor:
        ctx = self.context()
        capacity = min(token_bucket(len(args.x)), ctx.max_tokens)
        got = dispatch(ctx, args.x, args.topk_ids, args.topk_weights, capacity=capacity, config=there)
        scale = torch.where(got.ids >= 0, got.weights, 0).sum(1, keepdim=True)
        into = got.sums if back.how == "pull" else None
        y = torch.mul(dequantised(ctx, got), scale.to(ctx.dtype), out=into)
        return combine(ctx, y, got.handle, out, config=back)

    def reference(self, args: Tokens) -> torch.Tensor:
        """In float64: no other rank is asked."""
        return args.x.double() * torch.where(args.topk_ids >= 0, args.topk_weights, 0).double().sum(1, keepdim=True)

    def error(self, got: torch.Tensor, want: torch.Tensor) -> float:
        return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))

    def tolerance(self, problem: Problem) -> float:
        return 6e-2 if problem.dim("wire") == "fp8" else TOLERANCE[problem.dtype]

    def sources(self, problem: Problem, config: Config, device: Device) -> list[Source]:
        """None is compiled ahead."""
        return []


def ways(config: Config) -> tuple[DispatchConfig, CombineConfig]:
    """How to dispatch and how to combine."""
    return DispatchConfig(*(config[name] for name in THERE)), CombineConfig(*(config[name] for name in BACK))


def _pair(there: DispatchConfig, back: CombineConfig) -> Config:
    params = zip((*THERE, *BACK), (*astuple(there), *astuple(back)), strict=True)
    return Config(variant="pair", params=tuple(params))


def _every(problem: Problem, device: Device) -> list[Config]:
    """Pairs for any number of tokens. Collectives do not quantise."""
    found = [] if device.vendor == "cpu" else list(product(PUSHES, BACKS))
    found += COLLECTIVES if problem.dim("wire") == "same" else []
    fit = partial(fitting, problem.dim("hidden"))
    pairs = (_pair(*(replace(way, block=fit(way.block)) for way in pair)) for pair in found)
    return list(dict.fromkeys(pairs))


EXCHANGE = Exchange()
