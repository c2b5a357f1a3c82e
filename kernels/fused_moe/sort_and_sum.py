"""What every sorted variant of fused MoE begins and ends with: the sort of its rows, the sum over a token's slots."""

from dataclasses import replace
from functools import lru_cache
from math import ceil
from typing import Any

from moecache.kernels.gemm import tile as gemm
from moecache.kernels.launch import Launch, Operand, Workspace, launch, part
from moecache.kernels.sort import gpu as sort_gpu
from moecache.kernels.sort import op as sort
from moecache.schemas.config import Config
from moecache.schemas.device import Device
from moecache.schemas.problem import pow2, token_bucket


def sort_rows(
    call: Any, block: int, pdl: bool, device: Device, work: Workspace, free: bool
) -> tuple[sort.SortResult, list[Launch]]:
    """The call's pairs in blocks of `block` rows, and what sorts them: the kernel that the cost model prefers.

    Sorting takes a few per cent of a layer, so nothing is measured for it.
    """
    ids, experts, mapped = call.topk_ids, call.num_experts, call.expert_map is not None
    asked = sort.SortCall(ids, experts, block, expert_map=call.expert_map, posted=call.posted)
    config = _sort_config(token_bucket(len(ids)), ids.shape[1], experts, block, mapped, device, pdl)
    out = sort.SortResult(**sort_gpu.results(asked, work), sorted_weights=None)
    launches = sort_gpu.launches(config, asked, out, work, free)
    if mapped:  # a map may name experts past those here: their rows come last
        out = replace(out, num_tokens_post_padded=part(out.expert_offsets, len(call.w1), 1))
    return out, launches


@lru_cache(maxsize=4096)
def _sort_config(tokens: int, topk: int, experts: int, block: int, mapped: bool, device: Device, pdl: bool) -> Config:
    return sort_gpu.of_layer(device, tokens, topk, experts, block, mapped=mapped, early=pdl)[1]


def add_up(call: Any, partial: Operand, out: Operand, pdl: bool) -> Launch:
    """out[token] = sum of the token's rows of `partial` [T · k, K], in the order of its slots."""
    ids, mapping = call.topk_ids, call.expert_map
    (tokens, topk), n = ids.shape, out.shape[1]
    bn = min(1024, pow2(n))
    args = (partial, ids, ids if mapping is None else mapping, out, *ids.strides, out.strides[0], tokens, n)
    constexprs = {"TOPK": topk, "G": call.num_experts, "E": len(call.w1), "MAPPED": mapping is not None}
    constexprs |= {"BT": 1, "BN": bn, "PDL": pdl}
    options = {"num_warps": 4} | ({"launch_pdl": True} if pdl else {})
    return launch(gemm.combine, (tokens, ceil(n / bn)), args, constexprs, options)
