"""The public operations: each builds a tuple, looks it up, and launches what it finds."""

from collections.abc import Hashable
from functools import lru_cache
from typing import Any

import torch

from moecache import dispatch, posting, routing
from moecache.kernels.op import Args
from moecache.kernels.sort import SORT, SortResult, call_args, check
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


def _sort(args: Args, layer: Hashable, variant: str) -> SortResult:
    check(args)
    ids, experts = args["topk_ids"], args["num_experts"]
    tokens, device = token_bucket(ids.shape[0]), ids.device
    place = posting.post(layer, tokens, experts, device)
    args["posted"] = place.tensor
    key = (
        device, tokens, ids.shape[1], experts, args["block_m"], ids.dtype, args["topk_weights"] is None,
        args["expert_map"] is None, place.word.value, variant,
    )  # fmt: skip
    chosen = dispatch.dispatcher().hot.get(key)
    if chosen is None:
        chosen = _miss(args, key, place.word.value, variant)
    try:
        return SORT.launch(chosen, args, SORT.outputs(args))
    except (MoecacheError, NotImplementedError):
        raise
    except Exception as error:
        active, problem = dispatch.dispatcher(), _problem(args, place.word.value)
        home = active.places.of_tensor(ids)
        return active.rescue(SORT, problem, home, chosen, error, lambda c: SORT.launch(c, args, SORT.outputs(args)))


def _problem(args: Args, posted: int) -> Problem:
    """What a call asks: with the posted routing, else the exact one if it may be read, else a balanced one."""
    ids, experts = args["topk_ids"], args["num_experts"]
    active = dispatch.dispatcher()
    place = active.places.of_tensor(ids)
    if posted != posting.UNKNOWN:
        bucket = routing.bucket_name(posted)
    elif active.settings.mode == "tune" and not place.capturing():
        bucket = routing.bucket(routing.histogram(ids, experts))
    else:
        bucket = _balanced(token_bucket(ids.shape[0]), experts, ids.shape[1])
    return SORT.problem(args, place.device, bucket)


@lru_cache(maxsize=1024)
def _balanced(tokens: int, experts: int, topk: int) -> str:
    """The routing bucket of a uniform draw."""
    return routing.bucket(routing.histogram(routing.draw("uniform", tokens, experts, min(topk, experts)), experts))


def _miss(args: Args, key: tuple[Any, ...], posted: int, variant: str) -> Config:
    problem = _problem(args, posted)
    choice = dispatch.dispatcher().choose(SORT, problem, topk_ids=args["topk_ids"], variant=variant, key=key,
                                          prepare=lambda answer: answer.config)  # fmt: skip
    return choice.config
