"""Fused MoE: both products of every token's experts, activation and weighted sum. The op, its launch and its checks.

The CPU's variants stand in fused_moe/cpu.py, the GPU's in fused_moe/gpu.py and, for fp8 weights, fused_moe/fp8_tiles.py
and fused_moe/fp8_ring.py.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch

from moecache.kernels import activations
from moecache.kernels.agreed import BLOCK
from moecache.kernels.built_in import BuiltIn
from moecache.kernels.contract import EXTREME
from moecache.kernels.formats.fp8 import DTYPES as FP8
from moecache.kernels.formats.fp8 import KINDS, Quant, blocks_apart, quantised
from moecache.kernels.fused_moe import cpu as fused_moe_torch
from moecache.kernels.fused_moe.call import (
    MAX_EXPERTS,
    MAX_TOPK,
    STARTS,
    LayerCall,
    behind,
    call_args,
    check,
    operands,
    side_by_side,
)
from moecache.kernels.fused_moe.work import work as layer_work
from moecache.kernels.launch import Plan
from moecache.kernels.matrix import (
    DTYPE_NAMES,
    DTYPES,
    TOLERANCE,
    TOO_MUCH,
    random_rows,
    relative_error,
    sensible_on_cpu,
    unaligned,
    unaligned_sizes,
)
from moecache.kernels.shared_inputs import shared
from moecache.predict.work import Work
from moecache.schemas.config import Alternatives, Config
from moecache.schemas.device import Device
from moecache.schemas.layer import Layer
from moecache.schemas.problem import Problem, token_bucket

__all__ = ["FUSED_MOE", "FusedMoe", "Quant", "call_args", "check"]

TALL = 2.0**13  # of the rows behind the second product over what the router's weights leave: 5 σ fit into float16
FP8_TOLERANCE = 5e-2  # another order of summation moves an activation to the next fp8 value
OF_FP8 = ("fp8_tiles", "fp8_ring")  # variants with a file of their own


class FusedMoe(BuiltIn):
    """The op `fused_moe`."""

    name = "fused_moe"
    cpu, folder, starts = fused_moe_torch, "fused_moe", STARTS

    def problem(self, args: LayerCall, device: Device, routing: str) -> Problem:
        """The tuning question that a call asks."""
        x, (experts, hidden, middle) = args.hidden_states, args.w2.shape
        dims: dict[str, Any] = {"hidden": hidden, "intermediate": middle} | activations.dims_of(args.activation)
        dims |= {"biased": 1} if args.w1_bias is not None or args.w2_bias is not None else {}
        dims |= {"on_input": 1} if args.on_input else {}
        dims |= {"mapped": 1, "global": args.num_experts} if args.expert_map is not None else {}
        dims |= {"quant": args.quant.kind} if args.quant is not None else {}
        dims |= {"apart": 1} if blocks_apart(args.quant, args.w1, args.w2) else {}
        dims |= {"unaligned": 1} if unaligned(x, args.w1, args.w2) else {}
        tokens, topk = args.topk_ids.shape
        return self.question(device, tokens, experts, topk, DTYPE_NAMES[x.dtype], routing, dims)

    def problems(self, layer: Layer, tokens: Sequence[int], device: Device) -> list[Problem]:
        """One problem a token bucket, contiguous tensors, biases with `swiglu_oai` (as in gpt-oss). Two with fp8 whose
        gate and up may have blocks of their own, as in checkpoints, or of both as one matrix."""
        if _lacks(layer):
            return []
        fp8, act = layer.dtype == "fp8", activations.of_layer(layer)
        kind = layer.quant or KINDS[0] if fp8 else ""
        name = "bf16" if fp8 else layer.dtype
        weights = FP8[0] if fp8 else DTYPES[name]
        dims: dict[str, Any] = {"hidden": layer.hidden, "intermediate": layer.intermediate}
        dims |= activations.dims_of(act)
        biased = layer.activation == "swiglu_oai" if layer.biased is None else layer.biased
        dims |= {"biased": 1} if biased else {}
        dims |= {"mapped": 1, "global": layer.global_experts} if layer.experts != layer.global_experts else {}
        dims |= {"on_input": 1} if layer.on_input else {}
        dims |= {"quant": kind} if kind else {}
        rows = ((layer.hidden, DTYPES[name]), (layer.hidden, weights), (layer.intermediate, weights))
        dims |= {"unaligned": 1} if any(unaligned_sizes(*row) for row in rows) else {}
        found = {}
        for count in map(token_bucket, tokens):
            size = (1 + activations.panels(act)) * layer.hidden * layer.intermediate
            local = layer.experts / layer.global_experts
            if device.vendor == "cpu" and not sensible_on_cpu(
                layer.experts * size, weights, 2 * size * count * layer.topk * local
            ):
                continue
            for layout in ({}, {"apart": 1})[: 1 + _two_layouts(kind, layer.intermediate, act)]:
                problem = self.question(device, count, layer.experts, layer.topk, name, "", dims | layout)
                found[problem.key] = problem
        return list(found.values())

    def left_out(self, layer: Layer, tokens: Sequence[int], device: Device) -> str:
        """What `problems` leaves out of a layer and why, on a CPU also what would take minutes; '' for nothing."""
        if why := _lacks(layer):
            return why
        kept = {problem.tokens for problem in self.problems(layer, tokens, device)}
        gone = ", ".join(map(str, sorted({token_bucket(count) for count in tokens} - kept)))
        return f"tokens {gone}: {TOO_MUCH}" if gone else ""

    def question(
        self, device: Device, tokens: int, experts: int, topk: int, dtype: str, routing: str, dims: Mapping[str, Any]
    ) -> Problem:
        """As of any op, and whether results must be the same every time."""
        exact = {"deterministic": 1} if torch.are_deterministic_algorithms_enabled() else {}
        return super().question(device, tokens, experts, topk, dtype, routing, {**dims, **exact})

    def gpu(self, variant: str) -> Any:
        """The module that launches a variant on GPUs."""
        return self.module(variant if variant in OF_FP8 else "gpu")

    def spaces(self, problem: Problem) -> list[Any]:
        """The modules that say what is tried on GPUs."""
        return [self.module(name) for name in (("space", "fp8_space") if problem.dim("quant", "") else ("space",))]

    def work(self, problem: Problem, config: Config, device: Device) -> Work:
        """What a config makes the device do."""
        if device.vendor == "cpu":
            return fused_moe_torch.work(problem, config, device)
        panels = activations.panels(activations.word_of(problem))
        return layer_work(config, panels == 2, bool(problem.dim("quant", "")))

    def choices(self, args: LayerCall) -> torch.Tensor:
        """Local expert of every slot [T, k], −1 where it takes no part: the routing that matters here."""
        return fused_moe_torch.local_experts(args)

    def inputs(self, problem: Problem, topk_ids: torch.Tensor, seed: int) -> LayerCall:
        """Random tensors with the given local experts; weights scaled so that the results are of order one. But for
        weights on the input the second product's rows are larger by TALL, and what the router makes of them is not."""
        rng = torch.Generator(topk_ids.device).manual_seed(seed)
        ids, mapping = _global_ids(problem, topk_ids, rng)
        router = torch.rand(ids.shape, generator=rng, device=rng.device, dtype=torch.float32) + 0.1
        router /= router.sum(1, keepdim=True) * _tall(problem)
        hidden, gap = problem.dim("hidden"), behind(problem)
        x = random_rows((len(ids), hidden), DTYPES[problem.dtype], 1.0, rng, gap)
        act = activations.word_of(problem)
        shape = (problem.experts, hidden, problem.dim("intermediate"), problem.dtype, problem.dim("quant", ""))
        panels, each = activations.panels(act), 1 if shape[4] else DTYPES[problem.dtype].itemsize
        size = (1 + panels) * math.prod(shape[:3]) * each
        biased, apart = problem.dim("biased"), problem.dim("apart")
        key = (*shape, panels, gap, biased, apart, _tall(problem), problem.arch, topk_ids.device)
        make = partial(_weights, problem, topk_ids.device)
        w1, w2, bias1, bias2, quant = shared(size, abs(seed), key, make)
        if seed == EXTREME:
            ids, router = _stretched(problem, x, ids, router)
        return call_args(
            x, w1, w2, router, ids, **activations.call_of(act), w1_bias=bias1, w2_bias=bias2,
            on_input=bool(problem.dim("on_input")), expert_map=mapping, quant=quant,
        )  # fmt: skip

    def outputs(self, args: LayerCall) -> torch.Tensor:
        """Uninitialised [T, K]."""
        x = args.hidden_states
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    def reference(self, args: LayerCall) -> torch.Tensor:
        """The torch result in float32 (float64 for float32 inputs), on the device of the inputs."""
        return fused_moe_torch.reference(args)

    def error(self, got: torch.Tensor, want: torch.Tensor) -> float:
        """Relative Frobenius error; inf for non-finite values."""
        return relative_error(got, want)

    def tolerance(self, problem: Problem) -> float:
        return FP8_TOLERANCE if problem.dim("quant", "") else TOLERANCE[problem.dtype]

    def plan(self, what: Config | Alternatives, call: Any, out: Any, device: Device) -> Plan:
        """What is launched on a GPU."""
        where = self.module("alternatives") if isinstance(what, Alternatives) else self.gpu(what.variant)
        return cast(Plan, where.plan(what, call, out, device))

    def operands(self, problem: Problem) -> tuple[Any, Any]:
        """A call and its output as Operands."""
        return operands(problem)

    def side_by_side(self, call: LayerCall) -> LayerCall:
        """As kernels read it; see call.py."""
        return side_by_side(call)


FUSED_MOE = FusedMoe()


def _two_layouts(kind: str, middle: int, act: str) -> bool:
    return kind == "fp8_block" and middle % BLOCK != 0 and activations.panels(act) == 2


def _tall(problem: Problem) -> float:
    return 1.0 if problem.dim("on_input") else TALL


def _stretched(
    problem: Problem, x: torch.Tensor, ids: torch.Tensor, router: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and router weights for which rows do not fit into float16 before they are weighed and, in float16, not before
    they are summed either: of two slots of one expert the second takes back what the first gives. Rows of bfloat16 are
    rounded before the sum, as they may: it reaches as far as float32. Changes `x`.

    With weights on the input what does not fit is the first product.
    """
    if problem.dim("on_input"):
        x.copy_(x.sign() * (4e4 + 5e3 * x.abs().clamp_max(5)))
        return ids, router * 1e-4
    # rows of about 9e4, of which 2e3 are to be left: of few columns the largest are far from the mean
    x.mul_(2 if problem.dim("activation", "") == "relu2" else 4)
    router = router * (TALL * min(1 / 45, problem.dim("intermediate") ** 0.5 / 360))
    ids, even = ids.clone(), ids.shape[1] // 2 * 2
    ids[:, 1:even:2] = ids[:, :even:2]
    if problem.dtype == "fp16":
        router[:, :even:2] += 1
        router[:, 1:even:2] -= 1
    return ids, router


def _lacks(layer: Layer) -> str:
    """Why no kernel computes such a layer; '' where one does."""
    kinds = ", ".join(KINDS)
    if layer.dtype not in (*DTYPES, "fp8"):
        return f"there are no kernels for {layer.dtype} weights; dtype bf16 tunes the layer in bf16"
    if layer.dtype == "fp8" and layer.quant and layer.quant not in KINDS:
        return f"there are no kernels for {layer.quant} weights, only for {kinds} (blocks of 128 × 128)"
    if not activations.of_layer(layer):
        limit = "" if layer.limit is None else f" with limit {layer.limit:g}"
        gate = "" if layer.gated else " without a gate"
        return f"there are no kernels for {layer.activation}{limit}{gate}; there are {', '.join(activations.NAMES)}"
    if layer.topk > layer.experts:
        return f"{layer.experts} local experts are fewer than top-{layer.topk}: no draw gives distinct ones"
    if layer.global_experts > MAX_EXPERTS or layer.topk > MAX_TOPK:
        return f"at most {MAX_EXPERTS} experts and top-{MAX_TOPK} are allowed"
    return ""


def _weights(problem: Problem, device: torch.device, seed: int) -> tuple[Any, ...]:
    """w1, w2, their biases or None, their Quant or None."""
    rng = torch.Generator(device).manual_seed(seed)
    experts, hidden, middle = problem.experts, problem.dim("hidden"), problem.dim("intermediate")
    dtype, gap, kind = DTYPES[problem.dtype], behind(problem), problem.dim("quant", "")
    panels = activations.panels(activations.word_of(problem))
    both, back = (experts, panels * middle, hidden), (experts, hidden, middle)
    biases: list[torch.Tensor | None] = [None, None]
    tall = _tall(problem)
    if problem.dim("biased"):
        biases = [random_rows(shape[:2], dtype, 0.5 * by, rng) for shape, by in ((both, 1.0), (back, tall))]
    if not kind:
        scaled = ((both, 1.0), (back, tall))
        w1, w2 = (random_rows(shape, dtype, by * shape[2] ** -0.5, rng, gap) for shape, by in scaled)
        return w1, w2, *biases, None
    fp8 = FP8[1] if problem.arch == "gfx942" else FP8[0]
    apart = bool(problem.dim("apart"))
    w1, scale1 = _random_fp8(both, kind, fp8, rng, gap, apart)
    w2, scale2 = _random_fp8(back, kind, fp8, rng, gap, False)
    return w1, w2, *biases, Quant(kind, scale1, scale2 * tall, apart)


def _global_ids(
    problem: Problem, local: torch.Tensor, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids over all ranks, and the map that makes local ones of them; the ids as they are without a map.

    Drawn ids are all local ones: of those, only the share that this rank has is kept. Ids of a call, where some are
    −1 already, keep their places.
    """
    if not problem.dim("mapped"):
        return local, None
    everywhere, here = problem.dim("global"), problem.experts
    step, known = max(1, everywhere // here), min(here, everywhere)
    mapping = torch.full((everywhere,), -1, dtype=torch.int32, device=local.device)
    mapping[torch.arange(known, device=local.device) * step] = torch.arange(
        known, dtype=torch.int32, device=local.device
    )
    mine = (local >= 0) & (local < known)
    if bool((local >= 0).all()):
        mine &= torch.rand(local.shape, generator=rng, device=local.device, dtype=torch.float32) < here / everywhere
    remote = everywhere - 1 if everywhere > here else -1  # the last id is never the first of a step
    return torch.where(mine, local * step, remote).to(local.dtype), mapping


def _random_fp8(
    shape: tuple[int, int, int], kind: str, dtype: torch.dtype, rng: torch.Generator, gap: int, apart: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantised normal weights and their scales, made one expert at a time: float32 takes four times as much."""
    experts, rows, columns = shape
    whole = torch.empty(experts, rows, columns + gap, dtype=dtype, device=rng.device)
    scales = []
    for expert in range(experts):
        weights, scale = quantised(random_rows((rows, columns), torch.float32, columns**-0.5, rng), kind, dtype, apart)
        whole[expert, :, :columns].copy_(weights)
        scales.append(scale)
    return whole[..., :columns], torch.stack(scales)
