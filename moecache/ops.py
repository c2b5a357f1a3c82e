"""The public operations. Each builds a tuple, looks it up, and launches what it finds."""

import re
from collections.abc import Hashable
from typing import Any

import torch
from torch import is_grad_enabled as differentiates
from torch.compiler import is_dynamo_compiling as traces

from moecache import checks, feedback, traced
from moecache.asked import FUSED, GROUPED, SORTED, check_on_cpu
from moecache.calls import serve
from moecache.feedback import FEW_PAIRS
from moecache.kernels.formats.contract import Quant as Quant
from moecache.kernels.fused_moe import call as fused
from moecache.kernels.fused_moe.call import LayerCall, call_args
from moecache.kernels.grouped_gemm import op as grouped
from moecache.kernels.grouped_gemm.op import GROUPED_GEMM, ProductCall
from moecache.kernels.matrix import MAX_EXPERTS
from moecache.kernels.sort.op import SORT, SortCall, SortResult, check
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import token_bucket

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
    """Group (token, slot) pairs by expert, and pad each group to blocks of block_m rows. Never synchronises on a hit.

    Ids below 0, and ids that expert_map masks, take part nowhere. Nor do ids from num_experts on. These raise where
    values are read: at the first encounter, and with MOECACHE_DEBUG=1. An expert that a row names twice gets both
    pairs.

    Args:
        topk_ids: [T, K] int32 or int64, any strides; T up to 131072, K up to 32.
        num_experts: how many experts ids may name, up to 1024.
        block_m: rows of a block, 1 to 1024.
        topk_weights: [T, K], any float dtype; with it the result has `sorted_weights`.
        expert_map: [num_experts] int32 or int64, global to local expert, −1 for experts of other ranks.
        num_tokens: [1] on the device; only the first num_tokens tokens take part, also when a graph is replayed. Counts
            from 2^31 / K on are not read right.
        layer: names the layer, so that the choice follows this layer's routing.
        variant: allow only this kernel variant, for example "oneshot".

    Raises:
        InvalidInput: an argument is out of range, or the variant cannot serve this problem.
        NotTuned: strict mode, and no measured choice exists.
    """
    try:
        return _sort(SortCall(topk_ids, num_experts, block_m, topk_weights, expert_map, num_tokens), layer, variant)
    except Exception:
        if not traces():  # which cannot trace this: torch 2.11 not even locals()
            checks.types(moe_sort, locals())  # says so where a type is at fault
        raise


def _in_words_of(error: Exception, **names: str) -> Exception:
    """An InvalidInput with the names that a function gives its parameters; any other error as it is."""
    if not isinstance(error, InvalidInput):
        return error
    text = str(error)
    for ours, theirs in names.items():
        text = re.sub(rf"\b{ours}\b", theirs, text)
    return type(error)(text)


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
        With an expert_map, masked experts keep their blocks, and expert_ids has −1 for them. ignore_invalid_experts
        leaves their pairs out. Blocks after the last used one are −1.
    """
    try:
        if type(pad_sorted_ids) is not bool or type(ignore_invalid_experts) is not bool:
            raise TypeError
        rows = None
        if pad_sorted_ids:
            pairs = topk_ids.numel()
            rows = -(-(pairs + num_experts * (block_size - 1)) // block_size) * block_size
            rows = min(rows, pairs * block_size) if pairs < num_experts else rows
        keep = expert_map is not None and not ignore_invalid_experts
        call = SortCall(topk_ids, num_experts, block_size, expert_map=expert_map, keep_masked=keep, rows=rows)
        result = _sort(call, "moe_align_block_size", "")
        return result.sorted_token_ids, result.expert_ids, result.num_tokens_post_padded[:1]
    except Exception as error:
        if not traces():
            checks.types(moe_align_block_size, locals())  # says so where a type is at fault
        raise _in_words_of(error, block_m="block_size") from None


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
        int32 (local ids), num_valid_ids [2] int32 (padded rows, tokens), moe_buf [T, model_dim], zeroed. Two things
        differ from AITER: every element is written, and a row that names an expert twice keeps both pairs.
    """
    try:
        if not (type(dispatch_policy) is type(model_dim) is int and isinstance(moebuf_dtype, torch.dtype)):
            raise TypeError
        if dispatch_policy not in POLICIES:
            raise InvalidInput(
                f"dispatch_policy={dispatch_policy}; allowed are 0 (auto), 1 (oneshot) and 2 (multi-phase)"
            )
        if not 0 <= model_dim < 2**31 or len(topk_ids.shape) != 2:
            check(SortCall(topk_ids, num_experts, block_size))
            raise InvalidInput(f"model_dim={model_dim}; allowed are 0 to {2**31 - 1}")
        mapping = None
        if expert_mask is not None:
            if expert_mask.shape != (num_experts,) or expert_mask.is_floating_point():
                said = f"expert_mask is {expert_mask.dtype} {list(expert_mask.shape)}"
                raise InvalidInput(f"{said}; allowed are whole numbers or bools, [{num_experts}]")
            keep = expert_mask != 0
            mapping = torch.where(keep, torch.cumsum(keep, 0) - 1, -1).to(torch.int32)
        tokens, topk = topk_ids.shape
        rows = max(1, tokens * topk + num_experts * block_size - min(topk, num_experts))
        more: dict[str, Any] = {"packed": True, "rows": rows, "expert_mask": expert_mask}
        call = SortCall(topk_ids, num_experts, block_size, topk_weights, mapping, num_local_tokens, **more)
        result = _sort(call, "moe_sorting", POLICIES[dispatch_policy])
        assert result.sorted_weights is not None
        buffer = torch.zeros(tokens, model_dim, dtype=moebuf_dtype, device=topk_ids.device)
        return (
            result.sorted_token_ids,
            result.sorted_weights,
            result.expert_ids,
            result.num_tokens_post_padded,
            buffer,
        )
    except Exception as error:
        if not traces():
            checks.types(moe_sorting, locals())  # says so where a type is at fault
        raise _in_words_of(error, block_m="block_size", num_tokens="num_local_tokens") from None


def fused_moe(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    activation: str = "silu",
    gated: bool = True,
    alpha: float | None = None,
    limit: float | None = None,
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
    """A whole MoE layer, [T, K]: Σ over a token's slots of weight · (act(x · w1ᵀ + b1) · w2ᵀ + b2).

    Never synchronises on a hit. No gradients. Slots with an id below 0 or a masked expert add nothing. Nor do ids from
    G on. These raise where values are read: at the first encounter, and with MOECACHE_DEBUG=1.

    Args:
        hidden_states: [T, K] bfloat16, float16 or float32; T up to 131072.
        w1: [E, 2N, K], rows of gate before rows of up, or [E, N, K] without a gate; E up to 1024.
        w2: [E, K, N], the dtype of w1. Both have that of hidden_states, or what the format of `quant` says.
        topk_weights: [T, k], any float dtype; k up to 32.
        topk_ids: [T, k] int32 or int64.
        activation: "silu", "gelu" (exact), "gelu_tanh" or "relu2" (the square of max(0, x)) give act(gate) · up.
            "swiglu_oai" clamps to gate ≤ limit and |up| ≤ limit, and gives (up + 1) · gate · sigmoid(alpha · gate).
        gated: False for experts without a gate: act(x · w1ᵀ + b1). swiglu_oai always has a gate.
        alpha: only for swiglu_oai; default 1.702.
        limit: above 0; for swiglu_oai (default 7.0) and gated silu: silu(min(gate, limit)) · clamp(up, ±limit).
        w1_bias: [E, 2N], or [E, N] without a gate; added before the activation.
        w2_bias: [E, K]; added after the second product.
        apply_router_weight_on_input: multiply the token with the router's weight, instead of the result and w2_bias.
        expert_map: [G] int32 or int64, global to local expert, −1 for experts of other ranks.
        global_num_experts: G, at least E; default: E, or the length of the map.
        quant: scales of quantised weights, and the name of their format; with fp8 activations are quantised on the way.
        out: [T, K], last stride 1; shares no memory with an input, but may be other columns or rows of its buffer.
        layer: names the layer, so that the choice follows this layer's routing. It has an effect from 65 pairs on.
        variant: allow only this kernel variant.

    Raises:
        InvalidInput: an argument is out of range, or the variant cannot serve this problem.
        NotTuned: strict mode, and no measured choice exists.
    """
    try:
        return _fuse(call_args(
            hidden_states, w1, w2, topk_weights, topk_ids, activation, gated, alpha, limit, w1_bias, w2_bias,
            apply_router_weight_on_input, expert_map, global_num_experts, quant,
        ), layer, variant, out)  # fmt: skip
    except Exception:
        if not traces():
            checks.types(fused_moe, locals())  # says so where a type is at fault
        raise


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
    """A grouped GEMM, [R, N]: rows offsets[e] to offsets[e + 1] − 1 of a times b[e].T, plus bias[e].

    Never synchronises on a hit. No gradients. Rows from offsets[E] on belong to no expert and are left as they are.
    Without `out` they are uninitialised.

    Args:
        a: [M, K] bfloat16, float16 or float32.
        b: [E, N, K], the dtype of a.
        offsets: [E + 1] int32 or int64 on the device, rising from 0 to at most R.
        rows: [R] int32, each in [0, M): row r of the product reads a[rows[r]]. Without it R = M.
        bias: [E, N], added to every row of its expert.
        out: [R, N] to write into; shares no memory with another tensor of the call, as in `fused_moe`.
        layer: names the layer, as in `fused_moe`. It has no effect: no kernel of this op posts its routing, so one
            choice serves any routing.
        variant: allow only this kernel variant.

    Raises:
        InvalidInput: an argument is out of range, or the variant cannot serve this problem.
        NotTuned: strict mode, and no measured choice exists.
    """
    try:
        return _multiply(ProductCall(a, b, offsets, rows, bias), layer, variant, out)
    except Exception:
        if not traces():
            checks.types(grouped_gemm, locals())  # says so where a type is at fault
        raise


def _fuse(call: LayerCall, layer: Hashable, variant: str, out: torch.Tensor | None) -> torch.Tensor:
    """Most of a hit is reading attributes, 50 to 100 ns each. So none is read twice."""
    if traces():
        return traced.fuse(call, layer, variant, out)
    x, w1, w2, router, ids = call.hidden_states, call.w1, call.w2, call.topk_weights, call.topk_ids
    if differentiates() and (x.requires_grad or w1.requires_grad or w2.requires_grad or router.requires_grad):
        checks.warn_of_gradients()
    shape, first, chosen, device, dtype, quant = x.shape, w1.shape, ids.shape, x.device, x.dtype, call.quant
    unbiased, mapping = call.w1_bias is None and call.w2_bias is None, call.expert_map
    plain = quant is None and unbiased and mapping is None and w1.dtype == w2.dtype == dtype and router.shape == chosen
    together = w1.device == w2.device == ids.device == router.device == device
    kind, given = None, out is not None
    if not (plain and together and len(chosen) == 2 and shape == (chosen[0], first[-1]) and chosen[0]):
        fused.check(call)  # else the key says all that it would look at
        if mapping is not None:
            check_on_cpu(checks.mapped, mapping, call)
        call = fused.side_by_side(call)
        kind = _kind(call)
        x, router = call.hidden_states, call.topk_weights
    tokens, topk = chosen
    whole, out = out is None or out.is_contiguous(), _output(x, shape, out)
    if not tokens:
        return out
    if given:
        checks.apart(out, call, *((x, w1, w2, ids, router) if kind is None else ()))
    bucket, slot, posted, address = 1 << (tokens - 1).bit_length(), None, feedback.ANY, 0
    if tokens * topk > FEW_PAIRS:
        slot = feedback.slots.get((layer, bucket, first[0], device)) or feedback.post(layer, bucket, first[0], device)
        call.posted, posted, address = slot.tensor, slot.word.value, slot.address
    else:
        hash(layer)
    lying = None
    whole = whole and x.is_contiguous() and w1.is_contiguous() and w2.is_contiguous()
    if not (whole and router.is_contiguous() and ids.is_contiguous()):
        call = fused.side_by_side(call)
        x, router = call.hidden_states, call.topk_weights
        lying = x.stride(), w1.stride(), w2.stride(), ids.stride(), out.stride()
    a, b, c, d = x.data_ptr(), w1.data_ptr(), w2.data_ptr(), router.data_ptr()
    e, f = ids.data_ptr(), out.data_ptr()
    call.starts = a, b, c, d, e, f, address
    odd = (a | b | c | d | e | f) & 15 and (a & 15, b & 15, c & 15, d & 15, e & 15, f & 15)
    how = call.activation, call.alpha, call.limit, call.num_experts, call.on_input
    sizes = chosen, first, w2.shape, dtype, ids.dtype, router.dtype
    always = torch._C._get_deterministic_algorithms()
    key = (posted, variant, device, sizes, kind, how, lying, call.posted is None, odd, always)
    return serve(FUSED, key, call, out, x.get_device(), slot)  # type: ignore[no-any-return]


def _kind(call: LayerCall) -> Hashable:
    """What the rare arguments of a layer add to its key."""
    quant, small = call.quant, (call.w1_bias, call.w2_bias, call.expert_map)
    scales = () if quant is None else (quant.w1_scale, quant.w2_scale)
    lying = tuple(None if t is None else (t.dtype, t.shape, t.data_ptr() & 15) for t in (*small, *scales))
    return call.w1.dtype, quant and (quant.kind, quant.apart), lying


def _multiply(call: ProductCall, layer: Hashable, variant: str, out: torch.Tensor | None) -> torch.Tensor:
    if traces():
        return traced.multiply(call, layer, variant, out)
    a, b, offsets = call.a, call.b, call.offsets
    if differentiates() and (a.requires_grad or b.requires_grad):
        checks.warn_of_gradients()
    device, plain = a.device, call.rows is None and call.bias is None and len(a.shape) == 2 and len(b.shape) == 3
    if not (plain and b.device == offsets.device == device and offsets.is_cuda):
        grouped.check(call)  # else the key says all that it would look at
        check_on_cpu(checks.grouped, offsets, call)
    count = grouped.product_rows(call)
    hash(layer)
    given, out = out is not None, _output(a, (count, b.shape[1]), out)
    if given:
        checks.apart(out, call)
    call = GROUPED_GEMM.side_by_side(call)
    tensors = (call.a, call.b, call.offsets, out, call.rows, call.bias)
    key = (feedback.ANY, variant, "grouped_gemm", device, tuple(_lies(tensor) for tensor in tensors))
    return serve(GROUPED, key, call, out, a.get_device())  # type: ignore[no-any-return]


def _lies(tensor: torch.Tensor | None) -> Hashable:
    """How a tensor lies in memory, as far as machine code depends on it."""
    return None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() & 15)


def _output(read: torch.Tensor, shape: tuple[int, ...], out: torch.Tensor | None) -> torch.Tensor:
    """The caller's output once it is checked, or a fresh one, like `read` in dtype and device."""
    if out is None:
        return read.new_empty(*shape)  # as numbers: torch takes twice as long to read a tuple of two
    if out.shape != shape or out.dtype != read.dtype or out.device != read.device or out.stride()[-1] != 1:
        raise InvalidInput(
            f"out is {out.dtype} {list(out.shape)} on {out.device}, strides {list(out.stride())}; "
            f"allowed is {read.dtype} {list(shape)} on {read.device}, last stride 1"
        )
    return out


def _sort(call: SortCall, layer: Hashable, variant: str) -> SortResult:
    if traces():
        return traced.sort(call, layer, variant)
    ids, experts, weights, mapping = call.topk_ids, call.num_experts, call.topk_weights, call.expert_map
    shape, device = ids.shape, ids.device
    rare, possible = None, len(shape) == 2 and 0 < experts <= MAX_EXPERTS and call.block_m > 0  # else no output is
    if not possible or weights is not None or mapping is not None or call.num_tokens is not None or call.rows:
        check(call)  # else the key says all that it would look at
        if mapping is not None:
            check_on_cpu(checks.mapped, mapping, call)
        call = SORT.side_by_side(call)
        rare = (*map(_lies, (weights, call.expert_map, call.num_tokens)), call.keep_masked, call.packed, call.rows)
    slot = feedback.post(layer, token_bucket(shape[0]), experts, device)
    call.posted = slot.tensor
    lying = ids.dtype, ids.stride(), ids.data_ptr() & 15
    key = (slot.word.value, variant, device, shape, experts, call.block_m, lying, rare, call.posted is None)
    return serve(SORTED, key, call, SORT.outputs(call), ids.get_device(), slot)  # type: ignore[no-any-return]


traced.register(_fuse, _multiply, _sort)
