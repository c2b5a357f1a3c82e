"""MoE sorting: token-to-expert pairs grouped by expert and padded to blocks. The op, its launch and its search space.

Variants: `oneshot` (one launch) and `multiphase` (all units; two or three launches, or one with a grid-wide handshake)
in Triton; `argsort`, `counting` and `by_expert` in torch for the CPU. All give bit-identical results.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import ceil
from typing import Any, cast

import torch

from moecache.kernels.built_in import BuiltIn
from moecache.kernels.launch import part, rows_of
from moecache.kernels.matrix import ID_DTYPES, MAX_EXPERTS, MAX_TOPK, check_map
from moecache.kernels.sort import cpu as sort_torch
from moecache.schemas.config import config
from moecache.schemas.device import Device
from moecache.schemas.errors import InvalidInput
from moecache.schemas.layer import Layer
from moecache.schemas.problem import Problem, token_bucket
from moecache.schemas.warm import MOST_TOKENS


@dataclass(frozen=True)
class SortResult:
    """Pairs sorted by expert; the order within an expert is that of topk_ids, so every variant gives the same bits.

    Attributes:
        sorted_token_ids: [capacity] int32, pair number token · K + slot (packed: slot << 24 | token); padding holds
            T · K (packed: K << 24 | T). Every element is written, also those past the last used row.
        expert_ids: [⌈capacity / block_m⌉] int32, expert of each block; −1 past the last used block.
        num_tokens_post_padded: [2] int32: used rows (a multiple of block_m), and tokens that took part.
        expert_offsets: [E + 1] int32, first row of each expert; the last entry is the number of used rows.
        counts: [E] int32, pairs of each expert, without padding.
        tickets: [2, 4] int32, zeros: in tickets[i, 0] the programs of product i that follows count the tiles they take.
        sorted_weights: [capacity] float32, router weights in row order, 0 in padding; None without topk_weights.
        posted: [1] int32, the routing bucket of this call (`moecache.routing.bucket_index`); in pinned host memory on a
            GPU, so that the host can read it later without waiting.
    """

    sorted_token_ids: torch.Tensor
    expert_ids: torch.Tensor
    num_tokens_post_padded: torch.Tensor
    expert_offsets: torch.Tensor
    counts: torch.Tensor
    tickets: torch.Tensor
    sorted_weights: torch.Tensor | None
    posted: torch.Tensor


def capacity(pairs: int, experts: int, block_m: int) -> int:
    """Rows that suffice for every routing: each expert that can be active adds at most block_m − 1 rows of padding."""
    return min(pairs + experts * (block_m - 1), pairs * block_m)


def usual_block_m(tokens: int, topk: int, experts: int) -> int:
    """The block_m that suits the rows of an expert, 16 to 128: what `warm` tunes for."""
    return min(128, max(16, token_bucket(max(1, tokens * topk // experts))))


@dataclass(slots=True, eq=False)
class SortCall:
    """The arguments of `moecache.moe_sort`; in a plan each tensor is an Operand.

    Attributes:
        keep_masked: pairs of experts that the map masks keep their blocks, which are labelled −1.
        packed: ids as AITER packs them, slot << 24 | token.
        posted: [1] int32, where the sort leaves the call's routing bucket; None: in memory of its own.
        rows: how many the output has room for; None: as many as any routing may take.
        expert_mask: the mask that the map was made of, for error messages.
    """

    topk_ids: torch.Tensor
    num_experts: int
    block_m: int
    topk_weights: torch.Tensor | None = None
    expert_map: torch.Tensor | None = None
    num_tokens: torch.Tensor | None = None
    keep_masked: bool = False
    packed: bool = False
    posted: torch.Tensor | None = None
    rows: int | None = None
    expert_mask: torch.Tensor | None = None


def check(call: SortCall) -> None:
    """Raise InvalidInput for arguments that no kernel may see. About a microsecond: every call pays it."""
    ids, experts, block = call.topk_ids, call.num_experts, call.block_m
    if ids.dim() != 2 or ids.dtype not in ID_DTYPES:
        raise InvalidInput(
            f"topk_ids is {ids.dtype} of shape {tuple(ids.shape)}; allowed are int32 or int64, [tokens, topk]"
        )
    if not 1 <= experts <= MAX_EXPERTS:
        raise InvalidInput(f"num_experts={experts}; allowed are 1 to {MAX_EXPERTS}")
    if not 1 <= ids.shape[1] <= MAX_TOPK:
        raise InvalidInput(f"topk={ids.shape[1]}; allowed are 1 to {MAX_TOPK}")
    if ids.shape[0] > MOST_TOKENS:
        raise InvalidInput(f"{ids.shape[0]} tokens; allowed are 0 to {MOST_TOKENS}: split the batch")
    if not 1 <= block <= 1024:
        raise InvalidInput(f"block_m={block}; allowed are 1 to 1024")
    weights, mapping, limit = call.topk_weights, call.expert_map, call.num_tokens
    if weights is not None and (
        weights.shape != ids.shape or weights.device != ids.device or not weights.is_floating_point()
    ):
        raise InvalidInput(
            f"topk_weights is {weights.dtype} {tuple(weights.shape)} on {weights.device}; allowed is floating "
            f"{tuple(ids.shape)} on {ids.device}, as topk_ids"
        )
    if mapping is not None:
        check_map(mapping, experts, ids.device)
    if limit is not None and (limit.numel() != 1 or limit.dtype not in ID_DTYPES or limit.device != ids.device):
        raise InvalidInput(
            f"num_tokens is {limit.dtype} {tuple(limit.shape)} on {limit.device}; allowed is int32 or int64, one "
            f"element, on {ids.device}"
        )


class Sort(BuiltIn):
    """The op `moe_sort`."""

    name = "moe_sort"
    cpu, bodies, open = sort_torch, ("sort.gpu",), {"routing": ""}
    soft_dims = ("block_m",)  # another block size is a neighbour: it hardly moves the crossover

    def problem(self, call: SortCall, device: Device, routing: str) -> Problem:
        """The tuning question that a call asks."""
        ids = call.topk_ids
        dims = {"block_m": call.block_m}
        dims |= {"weighted": 1} if call.topk_weights is not None else {}
        dims |= {"mapped": 1} if call.expert_map is not None else {}
        return self.question(device, ids.shape[0], call.num_experts, ids.shape[1], str(ids.dtype)[6:], routing, dims)

    def problems(self, layer: Layer, tokens: Sequence[int], device: Device) -> list[Problem]:
        """One problem a token bucket, with its usual block_m, and a dtype of ids: torch's topk gives int64."""
        if self.lacks(layer):
            return []
        found = {}
        for t, dtype in product(tokens, ("int32", "int64")):
            dims: dict[str, Any] = {"block_m": usual_block_m(t, layer.topk, layer.global_experts)}
            dims |= {"mapped": 1} if layer.experts != layer.global_experts else {}
            problem = self.question(device, t, layer.global_experts, layer.topk, dtype, "", dims)
            found[problem.key] = problem
        return list(found.values())

    def lacks(self, layer: Layer) -> str:
        """Why ids of such a layer cannot be sorted; '' where they can."""
        if layer.global_experts > MAX_EXPERTS or layer.topk > MAX_TOPK:
            return f"at most {MAX_EXPERTS} experts and top-{MAX_TOPK} are allowed"
        return ""

    def inputs(self, problem: Problem, topk_ids: torch.Tensor, seed: int) -> SortCall:
        """The given routing with fresh weights and, if the problem has one, a map that keeps every second expert."""
        rng = torch.Generator().manual_seed(seed)
        place = topk_ids.device
        weights = mapping = None
        if problem.dim("weighted"):
            weights = torch.rand(topk_ids.shape, generator=rng, dtype=torch.float32).to(place)
        if problem.dim("mapped"):
            mapping = torch.arange(problem.experts, dtype=torch.int32)
            mapping = torch.where(mapping % 2 == 0, mapping // 2, -1).to(place)
        ids = topk_ids.to(getattr(torch, problem.dtype))
        return SortCall(ids, problem.experts, problem.dim("block_m"), topk_weights=weights, expert_map=mapping)

    def outputs(self, call: SortCall) -> SortResult:
        """Uninitialised outputs."""
        ids, experts, block = call.topk_ids, call.num_experts, call.block_m
        rows = call.rows or capacity(ids.numel(), experts, block)
        starts = _starts(rows, experts, block)
        whole = torch.empty(sum(starts[-1]), dtype=torch.int32, device=ids.device)
        parts = [whole[first : first + size] for first, size in starts]
        weights = None
        if call.topk_weights is not None:
            weights = torch.empty(rows, dtype=torch.float32, device=ids.device)
        posted = call.posted
        if posted is None:
            posted = torch.empty(1, dtype=torch.int32, device=ids.device)
        return SortResult(*parts[:-1], parts[-1].view(2, 4), sorted_weights=weights, posted=posted)

    def reference(self, call: SortCall) -> SortResult:
        """The torch result, by a stable sort, on the CPU."""
        names = ("topk_ids", "topk_weights", "expert_map", "num_tokens")
        tensors = {name: tensor.cpu() for name in names if (tensor := getattr(call, name)) is not None}
        moved = replace(call, posted=None, **tensors)
        return cast(SortResult, sort_torch.launch(config("argsort", keys="int64"), moved, self.outputs(moved)))

    def operands(self, problem: Problem) -> tuple[Any, Any]:
        """A call and its output as Operands."""
        tokens, topk, experts, block = problem.tokens, problem.topk, problem.experts, problem.dim("block_m")
        of: Any = rows_of  # stands where a tensor stands in a call
        call = SortCall(
            of("topk_ids", "i64" if problem.dtype == "int64" else "i32", tokens, topk),
            experts,
            block,
            of("topk_weights", "fp32", tokens, topk) if problem.dim("weighted") else None,
            of("expert_map", "i32", experts) if problem.dim("mapped") else None,
        )
        rows = capacity(tokens * topk, experts, block)
        starts, whole = _starts(rows, experts, block), of("out.sorted_token_ids", "i32", rows)
        parts: list[Any] = [part(whole, first, size) for first, size in starts]
        weights = of("out.sorted_weights", "fp32", rows) if problem.dim("weighted") else None
        return call, SortResult(*parts, weights, of("out.posted", "i32", 1))

    def side_by_side(self, call: SortCall) -> SortCall:
        """As kernels read it: the map contiguous."""
        return call if call.expert_map is None else replace(call, expert_map=call.expert_map.contiguous())

    def error(self, got: SortResult, want: SortResult) -> float:
        """0.0 when every element of every output is equal, else inf: ids have no tolerance."""
        for name in want.__dataclass_fields__:
            a, b = getattr(got, name), getattr(want, name)
            if (a is None) != (b is None) or (a is not None and not torch.equal(a.cpu(), b.cpu())):
                return float("inf")
        return 0.0

    def tolerance(self, problem: Problem) -> float:
        return 0.0


SORT = Sort()


def _starts(rows: int, experts: int, block: int) -> list[tuple[int, int]]:
    """(first element, elements) of each part of a SortResult in one allocation: on 16 bytes, for wide stores."""
    sizes, found, first = (rows, ceil(rows / block), 2, experts + 1, experts, 8), [], 0
    for size in sizes:
        found.append((first, size))
        first += (size + 3) // 4 * 4
    return found
