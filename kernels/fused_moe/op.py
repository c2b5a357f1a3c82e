"""Fused MoE: both products of every token's experts, activation and weighted sum. The op, its launch and its checks.

The CPU's variants stand in fused_moe/cpu.py, the GPU's in a file for each body: see BODIES. What of them depends on the
format of the weights, kernels/formats/ says.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch

from moecache.kernels import activations
from moecache.kernels.built_in import BuiltIn
from moecache.kernels.contract import EXTREME
from moecache.kernels.formats import registry as formats
from moecache.kernels.formats.contract import Quant
from moecache.kernels.fused_moe import cpu as fused_moe_torch
from moecache.kernels.fused_moe.call import (
    STARTS,
    LayerCall,
    behind,
    blocks_apart,
    call_args,
    check,
    format_of,
    operands,
    rows_in_memory,
    side_by_side,
)
from moecache.kernels.launch import Plan
from moecache.kernels.matrix import (
    DTYPE_NAMES,
    DTYPES,
    MAX_EXPERTS,
    MAX_TOPK,
    random_rows,
    relative_error,
    sensible_on_cpu,
    unaligned,
    unaligned_sizes,
)
from moecache.kernels.shared_inputs import lent, shared
from moecache.schemas.config import Alternatives, Config
from moecache.schemas.device import Device
from moecache.schemas.layer import Layer
from moecache.schemas.problem import Problem, token_bucket

__all__ = ["FUSED_MOE", "FusedMoe", "call_args", "check"]

TALL = 2.0**13  # of the rows behind the second product over what the router's weights leave: 5 σ fit into float16
# Files of the GPU's variants; each says what it takes, what is tried, the work of a config, and what it launches.
BODIES = ("fused_moe.decode", "fused_moe.tiles", "fused_moe.fp8_tiles", "fused_moe.fp8_ring")


class FusedMoe(BuiltIn):
    """The op `fused_moe`."""

    name = "fused_moe"
    cpu, bodies, starts = fused_moe_torch, BODIES, STARTS
    choices = staticmethod(fused_moe_torch.local_experts)  # the routing that matters here
    reference, error = staticmethod(fused_moe_torch.reference), staticmethod(relative_error)
    operands, side_by_side = staticmethod(operands), staticmethod(side_by_side)

    def problem(self, args: LayerCall, device: Device, routing: str) -> Problem:
        """The tuning question that a call asks."""
        x, (experts, high, _) = args.hidden_states, args.w1.shape
        dims: dict[str, Any] = {"hidden": x.shape[1], "intermediate": high // activations.panels(args.activation)}
        dims |= activations.dims_of(args.activation)
        dims |= {"biased": 1} if args.w1_bias is not None or args.w2_bias is not None else {}
        dims |= {"on_input": 1} if args.on_input else {}
        dims |= {"mapped": 1, "global": args.num_experts} if args.expert_map is not None else {}
        dims |= {"quant": args.quant.kind} if args.quant is not None else {}
        dims |= {"apart": 1} if blocks_apart(args) else {}
        dims |= {"unaligned": 1} if unaligned(x, args.w1, args.w2) else {}
        tokens, topk = args.topk_ids.shape
        return self.question(device, tokens, experts, topk, DTYPE_NAMES[x.dtype], routing, dims)

    def problems(self, layer: Layer, tokens: Sequence[int], device: Device) -> list[Problem]:
        """One problem a token bucket, contiguous tensors, biases with `swiglu_oai` (as in gpt-oss). Two where gate and
        up may have blocks of scales of their own, as in checkpoints, or of both as one matrix."""
        if self.lacks(layer):
            return []
        kind, act = layer.quant or formats.usual(layer.dtype), activations.of_layer(layer)
        name = "bf16" if kind else layer.dtype
        form = formats.get(kind, name)
        dims: dict[str, Any] = {"hidden": layer.hidden, "intermediate": layer.intermediate}
        dims |= activations.dims_of(act)
        biased = layer.activation == "swiglu_oai" if layer.biased is None else layer.biased
        dims |= {"biased": 1} if biased else {}
        dims |= {"mapped": 1, "global": layer.global_experts} if layer.experts != layer.global_experts else {}
        dims |= {"on_input": 1} if layer.on_input else {}
        dims |= {"quant": kind} if kind else {}
        rows = rows_in_memory(form, name, layer.hidden, layer.intermediate, device.arch)
        dims |= {"unaligned": 1} if any(unaligned_sizes(*row) for row in rows) else {}
        found = {}
        gated = activations.panels(act) == 2
        for count in map(token_bucket, tokens):
            size = (2 + gated) * layer.hidden * layer.intermediate
            local = layer.experts / layer.global_experts
            if device.vendor == "cpu" and not sensible_on_cpu(
                layer.experts * size * form.nbytes, 2 * size * count * layer.topk * local
            ):
                continue
            for layout in ({}, {"apart": 1})[: 1 + form.two_layouts(layer.intermediate, gated)]:
                problem = self.question(device, count, layer.experts, layer.topk, name, "", dims | layout)
                found[problem.key] = problem
        return list(found.values())

    def lacks(self, layer: Layer) -> str:
        """Why no kernel computes such a layer; '' where one does."""
        if layer.dtype not in (*DTYPES, *formats.KINDS.values()):
            return f"there are no kernels for {layer.dtype} weights; dtype bf16 tunes the layer in bf16"
        if layer.quant and formats.KINDS.get(layer.quant) != layer.dtype:
            kinds = ", ".join(kind for kind, dtype in formats.KINDS.items() if dtype == layer.dtype)
            return f"there are no kernels for {layer.quant} weights, only for {kinds}"
        if not activations.of_layer(layer):
            limit = "" if layer.limit is None else f" with limit {layer.limit:g}"
            gate = "" if layer.gated else " without a gate"
            return f"there are no kernels for {layer.activation}{limit}{gate}; there are {', '.join(activations.NAMES)}"
        if layer.topk > layer.experts:
            return f"{layer.experts} local experts are fewer than top-{layer.topk}: no draw gives distinct ones"
        if layer.global_experts > MAX_EXPERTS or layer.topk > MAX_TOPK:
            return f"at most {MAX_EXPERTS} experts and top-{MAX_TOPK} are allowed"
        return ""

    def question(
        self, device: Device, tokens: int, experts: int, topk: int, dtype: str, routing: str, dims: Mapping[str, Any]
    ) -> Problem:
        """As of any op, and whether results must be the same every time."""
        exact = {"deterministic": 1} if torch.are_deterministic_algorithms_enabled() else {}
        return super().question(device, tokens, experts, topk, dtype, routing, {**dims, **exact})

    def inputs(self, problem: Problem, topk_ids: torch.Tensor, seed: int) -> LayerCall:
        """Random tensors with the given local experts; weights scaled so that the results are of order one. But for
        weights on the input the second product's rows are larger by TALL, and what the router makes of them is not.
        Weights that are lent are taken as they are, and nothing is made extreme for them."""
        live = lent(problem, seed)
        rng = torch.Generator(topk_ids.device).manual_seed(seed)
        ids, mapping = _global_ids(problem, topk_ids, rng)
        router = torch.rand(ids.shape, generator=rng, device=rng.device, dtype=torch.float32) + 0.1
        router /= router.sum(1, keepdim=True) * (1.0 if live else _tall(problem))
        hidden, gap = problem.dim("hidden"), behind(problem)
        x = random_rows((len(ids), hidden), DTYPES[problem.dtype], 1.0, rng, gap)
        act = activations.word_of(problem)
        shape = (problem.experts, hidden, problem.dim("intermediate"), problem.dtype, problem.dim("quant", ""))
        panels = activations.panels(act)
        size = int((1 + panels) * math.prod(shape[:3]) * format_of(problem).nbytes)
        biased, apart = problem.dim("biased"), problem.dim("apart")
        key = (*shape, panels, gap, biased, apart, _tall(problem), problem.arch, topk_ids.device)
        make = partial(_weights, problem, topk_ids.device)
        w1, w2, bias1, bias2, quant = live or shared(size, abs(seed), key, make)
        if seed == EXTREME and not live:
            ids, router = _stretched(problem, x, ids, router)
        return call_args(
            x, w1, w2, router, ids, **activations.call_of(act), w1_bias=bias1, w2_bias=bias2,
            on_input=bool(problem.dim("on_input")), expert_map=mapping, quant=quant,
        )  # fmt: skip

    def outputs(self, args: LayerCall) -> torch.Tensor:
        """Uninitialised [T, K]."""
        x = args.hidden_states
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    def tolerance(self, problem: Problem) -> float:
        """Of the format of the weights."""
        return format_of(problem).tolerance

    def plan(self, what: Config | Alternatives, call: Any, out: Any, device: Device) -> Plan:
        """What is launched on a GPU."""
        two = isinstance(what, Alternatives)
        where = self.module("fused_moe.alternatives") if two else self.body(what.variant)
        return cast(Plan, where.plan(what, call, out, device))


FUSED_MOE = FusedMoe()


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


def _weights(problem: Problem, device: torch.device, seed: int) -> tuple[Any, ...]:
    """w1, w2, their biases or None, their Quant or None."""
    rng = torch.Generator(device).manual_seed(seed)
    experts, hidden, middle = problem.experts, problem.dim("hidden"), problem.dim("intermediate")
    panels, kind = activations.panels(activations.word_of(problem)), problem.dim("quant", "")
    both, back = (experts, panels * middle, hidden), (experts, hidden, middle)
    dtype, scaled = DTYPES[problem.dtype], ((both, 1.0), (back, _tall(problem)))
    biases: list[torch.Tensor | None] = [None, None]
    if problem.dim("biased"):
        biases = [random_rows(shape[:2], dtype, 0.5 * by, rng) for shape, by in scaled]
    if not kind:
        w1, w2 = (random_rows(shape, dtype, by * shape[2] ** -0.5, rng, behind(problem)) for shape, by in scaled)
        return w1, w2, *biases, None
    apart = bool(problem.dim("apart"))
    w1, scale1 = _quantised(problem, *scaled[0], rng, apart)
    w2, scale2 = _quantised(problem, *scaled[1], rng)
    return w1, w2, *biases, Quant(kind, scale1, scale2, apart)


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
    step = everywhere // here
    mapping = torch.full((everywhere,), -1, dtype=torch.int32, device=local.device)
    own = torch.arange(here, dtype=torch.int32, device=local.device)
    mapping[own.long() * step] = own
    mine = (local >= 0) & (local < here)
    if bool((local >= 0).all()):
        mine &= torch.rand(local.shape, generator=rng, device=local.device, dtype=torch.float32) < here / everywhere
    remote = everywhere - 1 if everywhere > here else -1  # the last id is never the first of a step
    return torch.where(mine, local * step, remote).to(local.dtype), mapping


def _quantised(
    problem: Problem, shape: tuple[int, int, int], by: float, rng: torch.Generator, apart: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal weights times `by` and their scales, made one expert at a time: float32 takes four times as much."""
    (experts, rows, columns), form = shape, format_of(problem)
    stored, dtype = form.row(columns, problem.arch)
    whole = torch.empty(experts, rows, stored + behind(problem), dtype=dtype, device=rng.device)
    scales = []
    for expert in range(experts):
        plain = random_rows((rows, columns), torch.float32, by * columns**-0.5, rng)
        weights, scale = form.quantised(plain, dtype, apart)
        whole[expert, :, :stored].copy_(weights)
        scales.append(scale)
    return whole[..., :stored], torch.stack(scales)
