"""The public operations: each builds a tuple, looks it up, and launches what it finds."""

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from moecache import dispatch, posting, routing
from moecache.kernels import fused_moe as fused
from moecache.kernels import grouped_gemm as grouped
from moecache.kernels.fused_moe import FUSED_MOE
from moecache.kernels.fused_moe_fp8 import Quant as Quant
from moecache.kernels.grouped_gemm import GROUPED_GEMM
from moecache.kernels.matrix import unaligned
from moecache.kernels.op import Args
from moecache.kernels.sort import SORT, SortResult, call_args, check
from moecache.place import Place
from moecache.schemas.config import Config
from moecache.schemas.errors import InvalidInput, MoecacheError
from moecache.schemas.problem import Problem, token_bucket

POLICIES = {0: "", 1: "oneshot", 2: "multiphase"}


def moe_sort(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_m: int,
    *,
    topk_weights: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    num_tokens: torch.Tensor | None = None,
    layer: Hashable = 0,
    variant: str = "",
) -> SortResult:
    """Group (token, slot) pairs by expert and pad each group to blocks of block_m rows. Never synchronises on a hit.

    Ids outside [0, num_experts) and ids that expert_map masks take part nowhere; an expert that a row names twice gets
    both pairs.

    Args:
        topk_ids: [T, K] int32 or int64, any strides; T up to 131072, K up to 32.
        num_experts: experts that ids may name, up to 1024.
        block_m: rows of a block, 1 to 1024.
        topk_weights: [T, K], any float dtype; gives `sorted_weights`.
        expert_map: [num_experts] int32 or int64, global to local expert, −1 for experts of other ranks.
        num_tokens: [1] on the device; only the first num_tokens tokens take part, also when a graph is replayed.
        layer: names the layer, so that the choice follows this layer's routing.
        variant: allow one kernel variant alone, for example "oneshot".

    Raises:
        InvalidInput: an argument is out of range, or the variant cannot serve this problem.
        NotTuned: strict mode, and no measured choice exists.
    """
    args = call_args(
        topk_ids,
        num_experts,
        block_m,
        topk_weights=topk_weights,
        expert_map=expert_map,
        num_tokens=num_tokens,
    )
    return _sort(args, layer, variant)


def moe_align_block_size(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`moe_sort` with the signature and results of vLLM's function of this name.

    Returns:
        sorted_ids [capacity] int32 (padding holds T · K), expert_ids [blocks] int32, num_tokens_post_padded [1] int32.
        With an expert_map, masked experts keep their blocks and are named −1, unless ignore_invalid_experts leaves
        their pairs out. Blocks past the last used one are −1.
    """
    rows = None
    if pad_sorted_ids:
        pairs = topk_ids.numel()
        rows = -(-(pairs + num_experts * (block_size - 1)) // block_size) * block_size
        rows = min(rows, pairs * block_size) if pairs < num_experts else rows
    keep = expert_map is not None and not ignore_invalid_experts
    args = call_args(topk_ids, num_experts, block_size, expert_map=expert_map, keep_masked=keep, rows=rows)
    result = _sort(args, "moe_align_block_size", "")
    return result.sorted_token_ids, result.expert_ids, result.num_tokens_post_padded[:1]


def moe_sorting(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    num_experts: int,
    model_dim: int,
    moebuf_dtype: torch.dtype,
    block_size: int = 32,
    expert_mask: torch.Tensor | None = None,
    num_local_tokens: torch.Tensor | None = None,
    dispatch_policy: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`moe_sort` with the contract of AITER's function of this name.

    Args:
        expert_mask: [num_experts] int32, non-zero for the experts of this rank.
        num_local_tokens: [1] int32 on the device.
        dispatch_policy: 0 the measured choice, 1 oneshot, 2 multi-phase.

    Returns:
        sorted_ids int32 (slot << 24 | token; padding holds K << 24 | T), sorted_weights float32, sorted_expert_ids
        int32 (local ids), num_valid_ids [2] int32 (padded rows, tokens), moe_buf [T, model_dim], zeroed. Unlike
        AITER's, every element is written, and a row that names an expert twice keeps both pairs.
    """
    if dispatch_policy not in POLICIES:
        raise InvalidInput(f"dispatch_policy={dispatch_policy}; allowed are 0 (auto), 1 (oneshot) and 2 (multi-phase)")
    mapping = None
    if expert_mask is not None:
        keep = expert_mask != 0
        mapping = torch.where(keep, torch.cumsum(keep, 0) - 1, -1).to(torch.int32)
    tokens, topk = topk_ids.shape
    args = call_args(
        topk_ids, num_experts, block_size, topk_weights=topk_weights, expert_map=mapping, num_tokens=num_local_tokens,
        packed=True, rows=max(1, tokens * topk + num_experts * block_size - min(topk, num_experts)),
    )  # fmt: skip
    result = _sort(args, "moe_sorting", POLICIES[dispatch_policy])
    assert result.sorted_weights is not None
    buffer = torch.zeros(tokens, model_dim, dtype=moebuf_dtype, device=topk_ids.device)
    return (
        result.sorted_token_ids,
        result.sorted_weights,
        result.expert_ids,
        result.num_tokens_post_padded,
        buffer,
    )


def fused_moe(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    activation: str = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
    w1_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    expert_map: torch.Tensor | None = None,
    global_num_experts: int | None = None,
    quant: Quant | None = None,
    out: torch.Tensor | None = None,
    layer: Hashable = 0,
    variant: str = "",
) -> torch.Tensor:
    """Σ over a token's slots of weight · (act(x · w1ᵀ + b1) · w2ᵀ + b2), [T, K]. Never synchronises on a hit.

    Slots whose id lies outside [0, G), or whose expert the map masks, add nothing. No gradients.

    Args:
        hidden_states: [T, K] bfloat16, float16 or float32; T up to 131072.
        w1: [E, 2N, K], the gate's rows before those of up; of the same dtype, or fp8 with `quant`.
        w2: [E, K, N].
        topk_weights: [T, k] floating; k up to 32.
        topk_ids: [T, k] int32 or int64.
        activation: "silu" and "gelu" (exact): act(gate) · up; "swiglu_oai": with gate ≤ limit and |up| ≤ limit,
            (up + 1) · gate · sigmoid(alpha · gate).
        w1_bias: [E, 2N], added before the activation.
        w2_bias: [E, K], added behind the second product.
        apply_router_weight_on_input: weigh the token instead of the result and w2_bias.
        expert_map: [G] int32 or int64, global to local expert, −1 for experts of other ranks.
        global_num_experts: G; default E, or the length of the map.
        quant: scales of fp8 weights; activations are quantised on the way.
        out: [T, K] to write into; must not overlap hidden_states.
        layer: names the layer, so that the choice follows this layer's routing.
        variant: allow one kernel variant alone.

    Raises:
        InvalidInput: an argument is out of range, or the variant cannot serve this problem.
        NotTuned: strict mode, and no measured choice exists.
    """
    args = fused.call_args(
        hidden_states, w1, w2, topk_weights, topk_ids, activation=activation, alpha=alpha, limit=limit,
        w1_bias=w1_bias, w2_bias=w2_bias, on_input=apply_router_weight_on_input, expert_map=expert_map,
        num_experts=global_num_experts, quant=quant,
    )  # fmt: skip
    fused.check(args)
    return _fuse(args, layer, variant, _output(hidden_states, hidden_states.shape, out))


def grouped_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    offsets: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    layer: Hashable = 0,
    variant: str = "",
) -> torch.Tensor:
    """Rows offsets[e] to offsets[e + 1] − 1 times b[e].T, [R, N]. Never synchronises on a hit. No gradients.

    Rows that belong to no expert, behind offsets[E], are left as they are: without `out`, uninitialised.

    Args:
        a: [M, K] bfloat16, float16 or float32.
        b: [E, N, K], of the same dtype.
        offsets: [E + 1] int32 or int64 on the device, rising from 0 to at most R.
        rows: [R] int32, each in [0, M): row r of the product reads a[rows[r]]. Without it R = M.
        bias: [E, N], added to every row of its expert.
        out: [R, N] to write into; must not overlap `a`.
        layer: names the layer, so that the choice follows this layer's routing.
        variant: allow one kernel variant alone.

    Raises:
        InvalidInput: an argument is out of range, or the variant cannot serve this problem.
        NotTuned: strict mode, and no measured choice exists.
    """
    args = grouped.call_args(a, b, offsets, rows=rows, bias=bias)
    grouped.check(args)
    out = _output(a, (grouped.product_rows(args), b.shape[1]), out)
    if not len(out):
        return out
    bucket, experts = token_bucket(len(out)), b.shape[0]
    place = posting.post(("grouped_gemm", layer), bucket, experts, a.device)
    args["posted"], posted = place.tensor, place.word.value
    key = (
        "grouped_gemm", a.device, bucket, b.shape, a.dtype, rows is None, bias is None, unaligned(a, b),
        posted, variant,
    )  # fmt: skip
    rest = (a, GROUPED_GEMM.choices, experts, posted, variant)
    return _serve(GROUPED_GEMM, args, key, out, rest)  # type: ignore[no-any-return]


def _fuse(args: Args, layer: Hashable, variant: str, out: torch.Tensor) -> torch.Tensor:
    x, w1, quant = args["hidden_states"], args["w1"], args["quant"]
    tokens, topk = args["topk_ids"].shape
    if not tokens:
        return out
    bucket, experts, device = token_bucket(tokens), w1.shape[0], x.device
    place = posting.post(layer, bucket, experts, device)
    args["posted"], posted = place.tensor, place.word.value
    key = (
        "fused_moe", device, bucket, topk, w1.shape, x.dtype, args["activation"], quant and quant.kind,
        args["w1_bias"] is None and args["w2_bias"] is None, args["on_input"],
        args["expert_map"] is not None and args["num_experts"], unaligned(x, w1, args["w2"]),
        torch.are_deterministic_algorithms_enabled(), posted, variant,
    )  # fmt: skip
    rest = (x, FUSED_MOE.choices, experts, posted, variant)
    return _serve(FUSED_MOE, args, key, out, rest)  # type: ignore[no-any-return]


def _output(read: torch.Tensor, shape: tuple[int, ...], out: torch.Tensor | None) -> torch.Tensor:
    """The caller's output once it is checked, or a fresh one, like `read` in dtype and device."""
    if out is None:
        return torch.empty(shape, dtype=read.dtype, device=read.device)
    if out.shape != shape or out.dtype != read.dtype or out.device != read.device or out.stride(-1) != 1:
        raise InvalidInput(
            f"out is {out.dtype} {list(out.shape)} on {out.device}, last stride {out.stride(-1)}; "
            f"allowed is {read.dtype} {list(shape)} on {read.device}, last stride 1"
        )
    if out.numel() and out.data_ptr() == read.data_ptr():
        raise InvalidInput("out is the input of this call; allowed is a tensor that does not overlap it")
    return out


def _sort(args: Args, layer: Hashable, variant: str) -> SortResult:
    check(args)
    ids, experts = args["topk_ids"], args["num_experts"]
    tokens, device = token_bucket(ids.shape[0]), ids.device
    place = posting.post(layer, tokens, experts, device)
    args["posted"], posted = place.tensor, place.word.value
    key = (
        device, tokens, ids.shape[1], experts, args["block_m"], ids.dtype, args["topk_weights"] is None,
        args["expert_map"] is None, posted, variant,
    )  # fmt: skip
    rest = (ids, _topk_ids, experts, posted, variant)
    return _serve(SORT, args, key, None, rest)  # type: ignore[no-any-return]


def _topk_ids(args: Args) -> torch.Tensor:
    return args["topk_ids"]  # type: ignore[no-any-return]


class _Call(NamedTuple):
    """One call of a built-in op.

    Attributes:
        op: SORT, FUSED_MOE or GROUPED_GEMM.
        at: a tensor on the device of the call.
        choices: gives the routing that counts, [T, k], from the arguments, without waiting.
        experts: those that it may name.
        posted: the routing bucket that an earlier call of the layer left.
    """

    op: Any
    args: Args
    at: torch.Tensor
    choices: Callable[[Args], torch.Tensor]
    experts: int
    posted: int
    variant: str


def _serve(op: Any, args: Args, key: tuple[Any, ...], out: Any, rest: tuple[Any, ...]) -> Any:
    """Launch what `hot` holds for the key, or what is chosen now; `out` is made where it is None.

    `rest` is what a _Call holds behind its arguments: a hit does not pay for making one.
    """
    chosen = dispatch.dispatcher().hot.get(key)
    if chosen is None:
        chosen = _miss(_Call(op, args, *rest), key)
    try:
        return op.launch(chosen, args, op.outputs(args) if out is None else out)
    except (MoecacheError, NotImplementedError):
        raise
    except Exception as error:
        active, (problem, place, _) = dispatch.dispatcher(), _problem(_Call(op, args, *rest))

        def run(config: Config) -> Any:
            return op.launch(config, args, op.outputs(args) if out is None else out)

        return active.rescue(op, problem, place, chosen, error, run)


def _problem(call: _Call) -> tuple[Problem, Place, torch.Tensor | None]:
    """What a call asks: with the posted routing, else the exact one if it may be read, else a balanced one.

    Also where, and the routing to tune on, which is only made where tuning is possible.
    """
    active, op, args = dispatch.dispatcher(), call.op, call.args
    place = active.places.of_tensor(call.at)
    may_read = active.settings.mode == "tune" and not place.capturing()
    ids = call.choices(args) if may_read else None
    if call.posted != posting.UNKNOWN:
        bucket = routing.bucket_name(call.posted)
    elif ids is not None:
        bucket = routing.bucket(routing.histogram(ids, call.experts))
    else:
        bucket = ""
    problem = op.problem(args, place.device, bucket)
    if not bucket:
        balanced = _balanced(problem.tokens, call.experts, problem.topk)
        problem = problem.model_copy(update={"routing": balanced})
    return problem, place, ids


@lru_cache(maxsize=1024)
def _balanced(tokens: int, experts: int, topk: int) -> str:
    """The routing bucket of a uniform draw."""
    return routing.bucket(routing.histogram(routing.draw("uniform", tokens, experts, min(topk, experts)), experts))


def _miss(call: _Call, key: tuple[Any, ...]) -> Config:
    problem, place, ids = _problem(call)
    choice = dispatch.dispatcher().choose(call.op, problem, topk_ids=ids, variant=call.variant, index=place.index,
                                          key=key, prepare=lambda answer: answer.config)  # fmt: skip
    return choice.config
