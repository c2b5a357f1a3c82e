"""Fused MoE in plain torch: the reference, and the CPU's candidates with their search space, limits and work."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from moecache.kernels.activations import bare, panels, word_of
from moecache.kernels.formats import registry as formats
from moecache.kernels.fused_moe.call import blocks_apart
from moecache.kernels.matrix import DTYPES, MATH, grouped_mm, math_of, missing_grouped_mm, unfit_math, until_summed
from moecache.kernels.own_mode import computing, own_mode
from moecache.predict.work import Work
from moecache.schemas.config import Config, config
from moecache.schemas.device import Device
from moecache.schemas.problem import BUCKETS, Problem, bucket_index, bucket_levels

ROWS = 8192  # rows that the reference computes at a time: one expert may have all of them
WORKSPACE = 256 << 20  # bytes of padded rows at most


def local_experts(args: Any) -> torch.Tensor:
    """Local expert of every slot [T, k] int64, −1 where it takes no part: id out of range, or masked by the map."""
    ids, mapping, experts = args.topk_ids.to(torch.int64), args.expert_map, args.w1.shape[0]
    ids = torch.where((ids >= 0) & (ids < args.num_experts), ids, -1)
    if mapping is not None:
        local = mapping.to(torch.int64)[ids.clamp_min(0)]
        ids = torch.where((ids >= 0) & (local >= 0) & (local < experts), local, -1)
    return ids


def grouping(args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(pair numbers token · k + slot by expert, those that take no part left out; counts [E]), both int64."""
    expert, experts = local_experts(args).reshape(-1), args.w1.shape[0]
    order = torch.sort(torch.where(expert < 0, experts, expert), stable=True).indices
    counts = torch.bincount(expert[expert >= 0], minlength=experts)
    return order[: int(counts.sum())], counts


def activate(args: Any, both: torch.Tensor) -> torch.Tensor:
    """[…, 2N] gate and up, or [..., N] without a gate, in the dtype to compute in -> […, N]."""
    word, limit = args.activation, args.limit
    name = bare(word)
    if panels(word) == 1:
        return _PLAIN[name](both)
    gate, up = both.chunk(2, dim=-1)
    if name == "swiglu_oai":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(args.alpha * gate)
    if name == "silu_limited":
        gate, up, name = gate.clamp(max=limit), up.clamp(-limit, limit), "silu"
    return _PLAIN[name](gate) * up


_PLAIN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    "relu2": lambda gate: torch.relu(gate).square(),
}


def expert_rows(args: Any, expert: int, pairs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the expert adds for these pairs: [pairs, K], computed in `dtype`; float32 or wider."""
    quant, hidden = args.quant, args.hidden_states
    wide = torch.promote_types(dtype, torch.float32)
    router = args.topk_weights.reshape(-1)[pairs, None].to(wide)
    x = hidden[pairs // args.topk_ids.shape[1]]
    w1, w2 = args.w1[expert], args.w2[expert]
    if quant is not None:
        form = formats.get(quant.kind)
        x = form.through(x, w1.dtype)
        w1 = form.dequantised(w1, quant.w1_scale[expert], blocks_apart(args))
    if args.on_input:
        x = x.to(wide) * router
    both = (x.to(dtype) @ w1.to(dtype).T).to(wide)
    if args.w1_bias is not None:
        both += args.w1_bias[expert].to(wide)
    middle = activate(args, both)
    if quant is not None:
        middle = form.through(middle.to(hidden.dtype), w2.dtype)
        w2 = form.dequantised(w2, quant.w2_scale[expert])
    result = (middle.to(dtype) @ w2.to(dtype).T).to(wide)
    if args.w2_bias is not None:
        result += args.w2_bias[expert].to(wide)
    return result if args.on_input else result * router


@own_mode()
def reference(args: Any) -> torch.Tensor:
    """[T, K] in float32, in float64 for float32 inputs, on their device; one expert's weights at a time."""
    hidden, topk = args.hidden_states, args.topk_ids.shape[1]
    wide = torch.float64 if hidden.dtype == torch.float32 else torch.float32
    out = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)
    order, counts = grouping(args)
    at = 0
    for expert, count in enumerate(counts.tolist()):
        for pairs in order[at : at + count].split(ROWS) if count else ():
            out.index_add_(0, pairs // topk, expert_rows(args, expert, pairs, wide))
        at += count
    return out


def by_expert(args: Any, out: torch.Tensor, order: torch.Tensor, counts: list[int], dtype: torch.dtype) -> None:
    """Two products an active expert."""
    topk = args.topk_ids.shape[1]
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    at = 0
    for expert, count in enumerate(counts):
        if count:
            pairs = order[at : at + count]
            total.index_add_(0, pairs // topk, expert_rows(args, expert, pairs, dtype))
            at += count
    out.copy_(total)


def padded_bmm(args: Any, out: torch.Tensor, order: torch.Tensor, counts: list[int], step: int) -> None:
    """Batched products of `step` experts, the rows of each padded to the largest count among them."""
    sums, dtype = _sums(args), until_summed(out.dtype)
    at = 0
    for first in range(0, len(counts), step):
        some = counts[first : first + step]
        used, rows = sum(some), max(some)
        if not used:
            continue
        pairs, mine = order[at : at + used], torch.tensor(some, device=out.device)
        expert = torch.repeat_interleave(mine)
        row = torch.arange(used, device=out.device) - (mine.cumsum(0) - mine)[expert]
        x = args.hidden_states.new_zeros(len(some), rows, out.shape[1], dtype=dtype)
        x[expert, row] = _entering(args, pairs)
        group = slice(first, first + len(some))
        both = torch.bmm(x, args.w1[group].to(dtype).transpose(1, 2)).float()
        if args.w1_bias is not None:
            both += args.w1_bias[group, None].float()
        result = torch.bmm(activate(args, both).to(dtype), args.w2[group].to(dtype).transpose(1, 2))
        _leave(args, sums, pairs, result[expert, row], expert + first)
        at += used
    _add_slots(args, sums, out)


def grouped(args: Any, out: torch.Tensor, order: torch.Tensor, counts: list[int]) -> None:
    """Two of torch's grouped products over all experts."""
    sums, many, dtype = _sums(args), torch.tensor(counts, device=out.device), until_summed(out.dtype)
    ends, expert = many.cumsum(0), torch.repeat_interleave(many)
    both = grouped_mm(_entering(args, order), args.w1.to(dtype), ends).float()
    if args.w1_bias is not None:
        both += args.w1_bias[expert].float()
    result = grouped_mm(activate(args, both).to(dtype), args.w2.to(dtype), ends)
    _leave(args, sums, order, result, expert)
    _add_slots(args, sums, out)


def _entering(args: Any, pairs: torch.Tensor) -> torch.Tensor:
    """The rows [pairs, K] that go into the first product."""
    x = args.hidden_states[pairs // args.topk_ids.shape[1]]
    dtype = until_summed(x.dtype)
    if args.on_input:
        x = x.float() * args.topk_weights.reshape(-1)[pairs, None].float()
    return x.to(dtype)


def _sums(args: Any) -> torch.Tensor:
    """What each pair adds, [T · k, K] float32; zero where a pair takes no part."""
    x = args.hidden_states
    return torch.zeros(args.topk_ids.numel(), x.shape[1], dtype=torch.float32, device=x.device)


def _leave(args: Any, sums: torch.Tensor, pairs: torch.Tensor, rows: torch.Tensor, expert: torch.Tensor) -> None:
    """The second product's rows, with bias and router weight, to the places of their pairs."""
    rows = rows.float()
    if args.w2_bias is not None:
        rows = rows + args.w2_bias[expert].float()
    sums[pairs] = rows if args.on_input else rows * args.topk_weights.reshape(-1)[pairs, None].float()


def _add_slots(args: Any, sums: torch.Tensor, out: torch.Tensor) -> None:
    tokens, topk = args.topk_ids.shape
    out.copy_(sums.view(tokens, topk, -1).sum(1) if tokens else sums)


VARIANTS: dict[str, Callable[..., None]] = {
    "by_expert": lambda args, out, order, counts, c: by_expert(args, out, order, counts, math_of(c, out.dtype)),
    "padded_bmm": lambda args, out, order, counts, c: padded_bmm(args, out, order, counts, c["experts"]),
    "grouped_mm": lambda args, out, order, counts, c: grouped(args, out, order, counts),
}


@computing
def launch(config: Config, args: Any, out: torch.Tensor) -> torch.Tensor:
    """One variant on the CPU; posts the routing bucket of the local experts where that is asked for."""
    order, counts = grouping(args)
    each = counts.tolist()
    VARIANTS[config.variant](args, out, order, each, config)
    if args.posted is not None:
        args.posted.fill_(bucket_index(each))
    return out


def space(problem: Problem) -> list[Config]:
    """Every config; those that do not fit are left out by the op. The first is the default."""
    steps = sorted({min(step, problem.experts) for step in (8, 32, 128)})
    loops = [config("by_expert", math=math) for math in MATH]
    return [*loops, *(config("padded_bmm", experts=step) for step in steps), config("grouped_mm")]


def fits(problem: Problem, config: Config) -> str:
    """Why not, or ''."""
    if config.variant == "by_expert":
        return unfit_math(problem, config)
    if config.variant not in VARIANTS:
        return f"variant {config.variant!r} does not run on a CPU; allowed are {', '.join(VARIANTS)}"
    if problem.dim("quant", ""):
        return f"{config.variant} takes no quantised weights"
    step = config["experts"] if config.variant == "padded_bmm" else problem.experts
    widened = 8 * step * problem.dim("hidden") * problem.dim("intermediate") if problem.dtype == "fp16" else 0
    if config.variant == "padded_bmm":
        if not 1 <= step <= problem.experts:
            return f"experts={step}; allowed are 1 to {problem.experts}"
        width = 2 * problem.dim("hidden") + (2 + panels(word_of(problem))) * problem.dim("intermediate")
        work = widened + step * problem.tokens * width * 4  # an expert that a token names twice may double the rows
        return "" if work <= WORKSPACE else f"padded rows of {work} bytes; allowed are {WORKSPACE}"
    if problem.dim("unaligned"):
        return "grouped_mm wants rows that start on 16 bytes"
    if widened > WORKSPACE:
        return f"weights in float32 of {widened} bytes; allowed are {WORKSPACE}"
    return missing_grouped_mm(problem.dtype)


def work(problem: Problem, config: Config, device: Device) -> Work:
    """Calls of torch, weights read once, or widened first, and products in a dtype that the CPU has."""
    hidden, middle = problem.dim("hidden"), problem.dim("intermediate")
    pairs = problem.tokens * problem.topk
    idle, uneven = bucket_levels(problem.routing) if problem.routing in BUCKETS else (0, 0)
    matrices = 1 + panels(word_of(problem))
    narrow = config.variant != "by_expert" or config["math"] == "native"
    native = "bf16" if narrow and problem.dtype == "bf16" else "fp32"
    widened = 3 if native != problem.dtype or problem.dim("quant", "") else 1
    weights = widened * matrices * hidden * middle * DTYPES[problem.dtype].itemsize
    flops = 2.0 * matrices * pairs * hidden * middle
    if config.variant == "by_expert":
        active = max(1, min(problem.experts, pairs) >> idle)
        return Work(launches=12 * active, nbytes=active * weights, flops=((native, flops),))
    launches = 40
    if config.variant == "padded_bmm":
        launches, flops = 30 * -(-problem.experts // config["experts"]), flops * (2 << uneven)
    return Work(launches=launches, nbytes=problem.experts * weights, flops=((native, flops),))
