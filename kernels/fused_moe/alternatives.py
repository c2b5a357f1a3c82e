"""Two configs of fused MoE in one call: a word on the device says which of them multiplies, so that one captured graph
has the better one for the routing of each replay.

Sorts for both block heights, then `gate`, which gives the alternative that does not own the call's routing bucket no
rows, then the products of both. A product without rows ends at once, so no kernel of a config is changed for this.
"""

from dataclasses import replace
from functools import partial
from math import ceil
from typing import Any

import torch

from moecache.kernels.contract import Args, Source
from moecache.kernels.signatures import signature_of
from moecache.kernels.sort.op import capacity
from moecache.schemas.config import Alternatives, Config
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import BUCKETS, Problem

IDLE_US, PROGRAM_US = 9.0, 1.25e-3


def kind(problem: Problem, config: Config) -> str:
    """What two configs must share to be alternatives; '' of one that is none: unsorted, for fp8, or with a map."""
    if problem.vendor == "cpu":
        return ""
    from moecache.kernels.gemm.product import KERNELS

    plain = config.variant in KERNELS and not problem.dim("quant", "") and not problem.dim("mapped")
    return str(dict(config.params).get("combine", "")) if plain else ""


def idle_us(problem: Problem, config: Config) -> float:
    """What an alternative adds to a call that it does not own, in µs: its sort, the gate and two launches without rows,
    of which each program still begins. Set by benchmarks/results/h100/in_graph.json."""
    rows = capacity(problem.tokens * problem.topk, problem.experts, config["block"])
    programs = 0
    if not dict(config.params).get("programs"):
        panels = ceil(problem.dim("intermediate") / config["up_n"]) + ceil(problem.dim("hidden") / config["down_n"])
        programs = ceil(rows / config["block"]) * panels
    return IDLE_US + PROGRAM_US * programs


def mask(served: tuple[str, ...]) -> int:
    """The routing buckets as bits, numbered as the sort posts them."""
    return sum(1 << BUCKETS.index(name) for name in served)


def launch(both: Alternatives, args: Args, out: torch.Tensor) -> torch.Tensor:
    """Run the alternative that owns the call's routing into `out` on the current stream. Workspace: the sorted rows of
    both, else that of the larger one.

    Raises:
        InvalidInput: elements of a row of weights are not side by side, or the two add up differently.
    """
    if not out.numel():
        return out
    from moecache.kernels.fused_moe.gpu import multiplied, products, side_by_side

    if both.second["combine"] != both.first["combine"] or args["expert_map"] is not None:
        raise InvalidInput(f"{both.name}: alternatives have one way to add up, and no expert_map")
    pairs = [products(config) for config in (both.first, both.second)]
    multiplied(pairs, partial(_gated, pairs, mask(both.served)), both.first, side_by_side(args), out)
    return out


def _gated(products: Any, mask: int, args: Args) -> list[Any]:
    """What each alternative multiplies: the sorted rows of its block height, of which the gate leaves it all or none.

    The sorts post to the device, where the gate reads it; the gate posts to where the call wants it.
    """
    from moecache.kernels.fused_moe.gate import APART, gate
    from moecache.kernels.fused_moe.sort_and_sum import sort_rows

    here, found = args | {"posted": None}, {}
    for first, _ in products:
        if first.block not in found:
            found[first.block] = sort_rows(here, first.block, bool(first.pdl))
    one, two = rows = [found[first.block] for first, _ in products]
    totals = torch.empty(2, APART.value, dtype=torch.int32, device=one.counts.device)
    posted = one.posted if args["posted"] is None else args["posted"]
    constants, options = _gate(bool(products[0][0].pdl))
    gate[(1,)](one.posted, one.num_tokens_post_padded, two.num_tokens_post_padded, totals, posted, mask, **constants,
               **options)  # fmt: skip
    return [replace(each, num_tokens_post_padded=total) for each, total in zip(rows, totals, strict=True)]


def _gate(pdl: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """(constexprs, launch options) of the gate."""
    return {"PDL": pdl}, {"num_warps": 1} | ({"launch_pdl": True} if pdl else {})


def sources(both: Alternatives) -> list[Source]:
    """The gate, which is all that the kernels of the two configs do not cover."""
    from moecache.kernels.fused_moe.gate import gate

    constants, options = _gate(bool(dict(both.first.extra).get("launch_pdl")))
    signature = signature_of(gate, constants, {})
    aligned = tuple(name for name, type_ in signature.items() if type_.startswith("*"))
    return [Source(gate, signature, constants, options, aligned=aligned)]
