"""The ops in torch's library, `torch.ops.moecache`: what `torch.compile` sees of a call. Eager calls go around it."""

from collections.abc import Callable, Hashable
from dataclasses import fields
from typing import Any, cast

import torch

from moecache.kernels.formats.contract import Quant
from moecache.kernels.fused_moe.call import LayerCall
from moecache.kernels.grouped_gemm.op import ProductCall
from moecache.kernels.sort.op import SortCall, SortResult

_LAYER = """Tensor hidden_states, Tensor w1, Tensor w2, Tensor topk_weights, Tensor topk_ids, str activation,
    float alpha, float limit, Tensor? w1_bias, Tensor? w2_bias, bool on_input, Tensor? expert_map, SymInt num_experts,
    str quant, Tensor? w1_scale, Tensor? w2_scale, bool? apart, str layer, str variant"""
_PRODUCT = "Tensor a, Tensor b, Tensor offsets, Tensor? rows, Tensor? bias, str layer, str variant"
_PAIRS = """Tensor topk_ids, SymInt num_experts, SymInt block_m, Tensor? topk_weights, Tensor? expert_map,
    Tensor? num_tokens, bool keep_masked, bool packed, SymInt? rows, str layer, str variant"""
_torch: Any = torch  # much of its library has no types
_library = _torch.library.Library("moecache", "FRAGMENT")
_ops = _torch.ops.moecache
Out = torch.Tensor | None


def register(fuse: Callable[..., Any], multiply: Callable[..., Any], sort: Callable[..., SortResult]) -> None:
    """Define the ops. These run them, with a call, its layer and variant, and an output but for a sort."""

    def run_layer(*args: Any) -> Any:
        given, (kind, s1, s2, apart, layer, variant, *out) = args[:13], args[13:]
        quant = Quant(kind, s1, s2, apart) if kind else None
        call = LayerCall(*given, quant=quant, posted=None)  # type: ignore[misc]
        return fuse(call, layer or 0, variant, *(out or [None]))

    def run_product(*args: Any) -> Any:
        layer, variant, *out = args[5:]
        return multiply(ProductCall(*args[:5]), layer or 0, variant, *(out or [None]))

    def run_sort(*args: Any) -> list[torch.Tensor]:
        *pairs, rows, layer, variant = args
        done = sort(SortCall(*pairs, rows=rows), layer or 0, variant)  # type: ignore[misc]
        parts = (getattr(done, field.name) for field in fields(done) if field.name != "posted")
        return [part.clone() for part in parts if part is not None]  # a graph may not know that they share memory

    _define(f"fused_moe({_LAYER}) -> Tensor", run_layer, lambda x, *rest: x.new_empty(x.shape))
    _define(f"fused_moe_out({_LAYER}, Tensor(a!) out) -> ()", _only_writes(run_layer), lambda *args: None)
    _define(f"grouped_gemm({_PRODUCT}) -> Tensor", run_product, _product_like)
    _define(f"grouped_gemm_out({_PRODUCT}, Tensor(a!) out) -> ()", _only_writes(run_product), lambda *args: None)
    _define(f"moe_sort({_PAIRS}) -> Tensor[]", run_sort, _sort_like)


def _define(schema: str, run: Callable[..., Any], like: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        _library.impl(name, run, device)
    torch.library.register_fake(f"moecache::{name}", like, lib=_library)
    if "!" not in schema:  # torch has no gradients of what is written to: it warns itself
        torch.library.register_autograd(f"moecache::{name}", _backward, lib=_library)


def _only_writes(run: Callable[..., torch.Tensor]) -> Callable[..., None]:
    def write(*args: Any) -> None:
        run(*args)

    return write


def _backward(ctx: Any, *gradients: Any) -> Any:
    raise NotImplementedError("ops of moecache have no gradient: call them under torch.no_grad()")


# --- what results look like; sizes may be symbols ---


def _product_like(
    a: torch.Tensor, b: torch.Tensor, offsets: Any, rows: torch.Tensor | None, *rest: Any
) -> torch.Tensor:
    return a.new_empty((a if rows is None else rows).shape[0], b.shape[1])


def _sort_like(ids: torch.Tensor, experts: int, block: int, weights: Out, *rest: Any) -> list[torch.Tensor]:
    pairs, (*_, room, _, _) = ids.numel(), rest
    rows = room or _torch.sym_min(pairs + experts * (block - 1), pairs * block)
    shapes = (rows,), ((rows + block - 1) // block,), (2,), (experts + 1,), (experts,), (2, 4)
    whole = [ids.new_empty(shape, dtype=torch.int32) for shape in shapes]
    return whole if weights is None else [*whole, ids.new_empty((rows,), dtype=torch.float32)]


# --- calls, where a graph is traced ---


def fuse(call: LayerCall, layer: Hashable, variant: str, out: Out) -> torch.Tensor:
    """`moecache.fused_moe`."""
    quant = call.quant
    scales = ("", None, None, None) if quant is None else (quant.kind, quant.w1_scale, quant.w2_scale, quant.apart)
    tensors = call.hidden_states, call.w1, call.w2, call.topk_weights, call.topk_ids
    form = call.activation, call.alpha, call.limit, call.w1_bias, call.w2_bias, call.on_input
    args = (*tensors, *form, call.expert_map, call.num_experts, *scales, _word(layer), variant)
    return _made(_ops.fused_moe, _ops.fused_moe_out, args, out)


def multiply(call: ProductCall, layer: Hashable, variant: str, out: Out) -> torch.Tensor:
    """`moecache.grouped_gemm`."""
    args = call.a, call.b, call.offsets, call.rows, call.bias, _word(layer), variant
    return _made(_ops.grouped_gemm, _ops.grouped_gemm_out, args, out)


def sort(call: SortCall, layer: Hashable, variant: str) -> SortResult:
    """`moecache.moe_sort`, and the functions of engines that are like it."""
    asked = call.topk_ids, call.num_experts, call.block_m, call.topk_weights, call.expert_map, call.num_tokens
    how = call.keep_masked, call.packed, call.rows, _word(layer), variant
    token_ids, experts, used, offsets, counts, tickets, *weights = _ops.moe_sort(*asked, *how)
    posted = call.topk_ids.new_empty(0, dtype=torch.int32)  # in a graph it lies elsewhere
    return SortResult(token_ids, experts, used, offsets, counts, tickets, weights[0] if weights else None, posted)


def _made(fresh: Any, into: Any, args: tuple[Any, ...], out: Out) -> torch.Tensor:
    if out is None:
        return cast(torch.Tensor, fresh(*args))
    into(*args, out)
    return out


def _word(layer: Hashable) -> str:
    """A layer's name in a graph; '' for 0, which eager calls have by default."""
    return "" if layer == 0 else str(layer)
