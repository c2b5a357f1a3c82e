"""The op `ep_exchange`: a dispatch and the combine after it, which all ranks tune together.

A config is a way to dispatch and a way to combine. Its inputs are tokens of this rank; in the place of experts each row
is multiplied with the sum of its weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from moecache.kernels.contract import Bound, Source, made_up
from moecache.kernels.ep.context import EpContext
from moecache.kernels.ep.exchange import CombineConfig, DispatchConfig, combine, dispatch
from moecache.kernels.ep.layer import dequantised
from moecache.kernels.matrix import DTYPE_NAMES, TOLERANCE
from moecache.predict.work import Work
from moecache.schemas.config import Config
from moecache.schemas.device import Device
from moecache.schemas.layer import Layer
from moecache.schemas.problem import Problem, pow2, token_bucket


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
            op=self.name, vendor=device.vendor, arch=device.arch, units=device.units, tokens=token_bucket(capacity),
            experts=ctx.experts, topk=ctx.topk, dtype=DTYPE_NAMES[ctx.dtype], dims=tuple(dims.items()),
        )  # fmt: skip

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
        programs, block = (128, 1024) if problem.tokens < 64 else (128, 4096) if problem.tokens < 512 else (256, 4096)
        usual = _pair("push", "pull", programs, 8, min(block, _longest(problem)))
        every = sorted(_every(problem, device), key=lambda each: each != usual)
        return [each for each in every if not _unfit(problem, each)]

    def fits(self, problem: Problem, config: Config, device: Device) -> str:
        """Why not, or ''."""
        try:
            unfit = _unfit(problem, config)
        except KeyError as missing:
            return f"{config.name} has no {missing}"
        return unfit or made_up(_every, problem.model_copy(update={"tokens": 0}), config, device)

    def work(self, problem: Problem, config: Config, device: Device) -> Work:
        """Two phases, and the bytes of rows that nearly all go to each peer over the link."""
        size = problem.tokens * problem.dim("hidden") * 2.0 * (problem.dim("world") - 1)
        ours = sum(way in ("push", "pull", "copy") for way in (config["dispatch"], config["combine"]))
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
    launch = (config["programs"], config["num_warps"])
    return (
        DispatchConfig(config["dispatch"], *launch, config["block"]),
        CombineConfig(config["combine"], *launch, config["block"], config["steps"]),
    )


def _pair(dispatch: str, combine: str, programs: int, warps: int, block: int, steps: int = 1) -> Config:
    given = {"dispatch": dispatch, "combine": combine, "programs": programs, "num_warps": warps, "block": block,
             "steps": steps}  # fmt: skip
    return Config(variant="pair", params=tuple(given.items()))


def _every(problem: Problem, device: Device) -> list[Config]:
    """Pairs for any number of tokens."""
    collectives = [_pair("all_gather", "reduce_scatter", 1, 1, 128), _pair("all_to_all", "all_to_all", 1, 1, 128)]
    if device.vendor == "cpu":
        return collectives
    found = [
        _pair(there, back, programs, warps, min(block, _longest(problem)), steps)
        for there, back, programs, warps, block, steps in (
            ("push", "pull", 128, 8, 4096, 1), ("push", "pull", 128, 8, 1024, 1), ("push", "pull", 128, 8, 2048, 1),
            ("push", "pull", 128, 16, 8192, 1), ("push", "pull", 256, 8, 4096, 1), ("push", "push", 64, 16, 8192, 4),
            ("push", "push", 128, 16, 8192, 4), ("copy", "copy", 256, 8, 4096, 3),
        )
    ]  # fmt: skip
    return list(dict.fromkeys([*found, *collectives]))


def _longest(problem: Problem) -> int:
    """Columns of a chunk that holds a whole row."""
    return max(128, pow2(problem.dim("hidden")))


def _unfit(problem: Problem, config: Config) -> str:
    """Why a pair cannot serve a problem."""
    if problem.dim("wire") == "fp8" and config["dispatch"] != "push":
        return f"dispatch={config['dispatch']} moves rows as they are; only push makes fp8 of them"
    return ""


EXCHANGE = Exchange()
