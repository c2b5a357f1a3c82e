"""MoE sorting: token-to-expert pairs grouped by expert and padded to blocks. The op, its launch and its search space.

Variants: `oneshot` (one launch) and `multiphase` (all units; two or three launches, or one with a grid-wide handshake)
in Triton; `argsort`, `counting` and `by_expert` in torch for the CPU. All give bit-identical results.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil
from typing import Any

import torch

from moecache.kernels.built_in import BuiltIn
from moecache.kernels.contract import Args
from moecache.kernels.sort import cpu as sort_torch
from moecache.schemas.config import config
from moecache.schemas.device import Device
from moecache.schemas.errors import InvalidInput
from moecache.schemas.layer import Layer
from moecache.schemas.problem import Problem, token_bucket

MAX_EXPERTS, MAX_TOPK, MAX_TOKENS = 1024, 32, 131072
ID_DTYPES = (torch.int32, torch.int64)


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


def call_args(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_m: int,
    *,
    topk_weights: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    num_tokens: torch.Tensor | None = None,
    keep_masked: bool = False,
    packed: bool = False,
    posted: torch.Tensor | None = None,
    rows: int | None = None,
) -> Args:
    """The arguments of one call, by name; see `moecache.moe_sort`."""
    return {
        "topk_ids": topk_ids, "num_experts": num_experts, "block_m": block_m, "topk_weights": topk_weights,
        "expert_map": expert_map, "num_tokens": num_tokens, "keep_masked": keep_masked, "packed": packed,
        "posted": posted, "rows": rows,
    }  # fmt: skip


def check(args: Args) -> None:
    """Raise InvalidInput for arguments that no kernel may see. About a microsecond: every call pays it."""
    ids, experts, block = args["topk_ids"], args["num_experts"], args["block_m"]
    if ids.dim() != 2 or ids.dtype not in ID_DTYPES:
        raise InvalidInput(
            f"topk_ids is {ids.dtype} of shape {tuple(ids.shape)}; allowed are int32 or int64, [tokens, topk]"
        )
    if not 1 <= experts <= MAX_EXPERTS:
        raise InvalidInput(f"num_experts={experts}; allowed are 1 to {MAX_EXPERTS}")
    if not 1 <= ids.shape[1] <= MAX_TOPK:
        raise InvalidInput(f"topk={ids.shape[1]}; allowed are 1 to {MAX_TOPK}")
    if ids.shape[0] > MAX_TOKENS:
        raise InvalidInput(f"{ids.shape[0]} tokens; allowed are 0 to {MAX_TOKENS}: split the batch")
    if not 1 <= block <= 1024:
        raise InvalidInput(f"block_m={block}; allowed are 1 to 1024")
    weights, mapping, limit = args["topk_weights"], args["expert_map"], args["num_tokens"]
    if weights is not None and (
        weights.shape != ids.shape or weights.device != ids.device or not weights.is_floating_point()
    ):
        raise InvalidInput(
            f"topk_weights is {weights.dtype} {tuple(weights.shape)} on {weights.device}; allowed is floating "
            f"{tuple(ids.shape)} on {ids.device}, as topk_ids"
        )
    if mapping is not None and (
        mapping.shape != (experts,) or mapping.dtype not in ID_DTYPES or mapping.device != ids.device
    ):
        raise InvalidInput(
            f"expert_map is {mapping.dtype} {tuple(mapping.shape)} on {mapping.device}; allowed is int32 or int64 "
            f"[{experts}] on {ids.device}"
        )
    if limit is not None and (limit.numel() != 1 or limit.dtype not in ID_DTYPES or limit.device != ids.device):
        raise InvalidInput(
            f"num_tokens is {limit.dtype} {tuple(limit.shape)} on {limit.device}; allowed is int32 or int64, one "
            f"element, on {ids.device}"
        )


class Sort(BuiltIn):
    """The op `moe_sort`."""

    name = "moe_sort"
    cpu, folder, open = sort_torch, "sort", {"routing": ""}
    soft_dims = ("block_m",)  # another block size is a neighbour: it hardly moves the crossover

    def problem(self, args: Args, device: Device, routing: str) -> Problem:
        """The tuning question that a call asks."""
        ids = args["topk_ids"]
        dims = {"block_m": args["block_m"]}
        dims |= {"weighted": 1} if args["topk_weights"] is not None else {}
        dims |= {"mapped": 1} if args["expert_map"] is not None else {}
        return self.question(device, ids.shape[0], args["num_experts"], ids.shape[1], str(ids.dtype)[6:], routing, dims)

    def problems(self, layer: Layer, tokens: Sequence[int], device: Device) -> list[Problem]:
        """One problem a token bucket, with its usual block_m, and a dtype of ids: torch's topk gives int64."""
        if _lacks(layer):
            return []
        found = {}
        for t, dtype in product(tokens, ("int32", "int64")):
            dims: dict[str, Any] = {"block_m": usual_block_m(t, layer.topk, layer.global_experts)}
            dims |= {"mapped": 1} if layer.experts != layer.global_experts else {}
            problem = self.question(device, t, layer.global_experts, layer.topk, dtype, "", dims)
            found[problem.key] = problem
        return list(found.values())

    def left_out(self, layer: Layer, tokens: Sequence[int], device: Device) -> str:
        """What `problems` leaves out of a layer and why; '' for nothing."""
        return _lacks(layer)

    def inputs(self, problem: Problem, topk_ids: torch.Tensor, seed: int) -> Args:
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
        return call_args(ids, problem.experts, problem.dim("block_m"), topk_weights=weights, expert_map=mapping)

    def outputs(self, args: Args) -> SortResult:
        """Uninitialised outputs."""
        ids, experts, block = args["topk_ids"], args["num_experts"], args["block_m"]
        rows = args["rows"] or capacity(ids.numel(), experts, block)
        blocks = ceil(rows / block)
        # one allocation for all: each part starts on 16 bytes, so that stores stay wide
        sizes = [rows, blocks, 2, experts + 1, experts, 8]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + (size + 3) // 4 * 4)
        whole = torch.empty(starts[-1], dtype=torch.int32, device=ids.device)
        parts = [whole[a : a + size] for a, size in zip(starts, sizes, strict=False)]
        weights = None
        if args["topk_weights"] is not None:
            weights = torch.empty(rows, dtype=torch.float32, device=ids.device)
        posted = args["posted"]
        if posted is None:
            posted = torch.empty(1, dtype=torch.int32, device=ids.device)
        return SortResult(*parts[:-1], parts[-1].view(2, 4), sorted_weights=weights, posted=posted)

    def reference(self, args: Args) -> SortResult:
        """The torch result, by a stable sort, on the CPU."""
        moved = {k: v.cpu() if isinstance(v, torch.Tensor) and k != "posted" else v for k, v in args.items()}
        moved["posted"] = None
        return self.launch(config("argsort", keys="int64"), moved, self.outputs(moved))

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


def _lacks(layer: Layer) -> str:
    """Why ids of such a layer cannot be sorted; '' where they can."""
    if layer.global_experts > MAX_EXPERTS or layer.topk > MAX_TOPK:
        return f"at most {MAX_EXPERTS} experts and top-{MAX_TOPK} are allowed"
    return ""
