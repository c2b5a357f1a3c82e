"""What every sorted variant of fused MoE begins and ends with: the sort of its rows, the sum over a token's slots."""

from dataclasses import replace
from functools import lru_cache
from math import ceil

import torch

from moecache.backends import registry as backends
from moecache.kernels.contract import Args
from moecache.kernels.gemm import tile as gemm
from moecache.kernels.sort import gpu as sort_gpu
from moecache.kernels.sort import op as sort
from moecache.kernels.sort import space as sort_space
from moecache.schemas.config import Config
from moecache.schemas.device import KNOWN
from moecache.schemas.problem import pow2, token_bucket


def sort_rows(args: Args, block: int, pdl: bool) -> sort.SortResult:
    """The call's pairs in blocks of `block` rows, sorted by the kernel that the cost model prefers: a few per cent of a
    layer, so nothing is measured for it."""
    ids, experts, mapped = args["topk_ids"], args["num_experts"], args["expert_map"] is not None
    call = sort.call_args(ids, experts, block, expert_map=args["expert_map"], posted=args["posted"])
    index = ids.get_device() if ids.is_cuda else -1
    chosen = _sort_config(token_bucket(len(ids)), ids.shape[1], experts, block, mapped, index, pdl)
    out = sort.SORT.outputs(call)
    sort_gpu.launch(chosen, call, out)
    if not mapped:
        return out
    used = out.expert_offsets[len(args["w1"]) :]  # a map may name experts past those here: their rows come last
    return replace(out, num_tokens_post_padded=used)


@lru_cache(maxsize=4096)
def _sort_config(tokens: int, topk: int, experts: int, block: int, mapped: bool, index: int, pdl: bool) -> Config:
    device = KNOWN["h200"] if index < 0 else backends.detect().device(index)
    return sort_space.of_layer(device, tokens, topk, experts, block, mapped=mapped, early=pdl)[1]


def add_up(args: Args, partial: torch.Tensor, out: torch.Tensor, pdl: bool) -> None:
    """out[token] = sum of the token's rows of `partial` [T · k, K], in the order of its slots."""
    ids, mapping = args["topk_ids"], args["expert_map"]
    (tokens, topk), n = ids.shape, out.shape[1]
    bn = min(1024, pow2(n))
    gemm.combine[(tokens, ceil(n / bn))](
        partial, ids, ids if mapping is None else mapping, out, *ids.stride(), out.stride(0), tokens, n,
        TOPK=topk, G=args["num_experts"], E=len(args["w1"]), MAPPED=mapping is not None, BT=1, BN=bn, PDL=pdl,
        num_warps=4, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
