"""Two configs of fused MoE in one call: a word on the device says which of them multiplies, so that one captured graph
has the better one for the routing of each replay.

Sorts for both block heights, then `gate`, which gives the alternative that does not own the call's routing bucket no
rows, then the products of both. A product without rows ends at once, so no kernel of a config is changed for this.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from typing import Any

from moecache.kernels.fused_moe.call import check_rows
from moecache.kernels.launch import Launch, Operand, Plan, Workspace, launch, part, planned
from moecache.kernels.sort.op import capacity
from moecache.predict.work import Work
from moecache.schemas.config import Alternatives, Config
from moecache.schemas.device import Device
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import BUCKETS, Problem


def kind(problem: Problem, config: Config) -> str:
    """What two configs must share to be alternatives; '' of one that is none: unsorted, for fp8, or with a map."""
    if problem.vendor == "cpu":
        return ""
    from moecache.kernels.gemm.work import KERNELS

    plain = config.variant in KERNELS and not problem.dim("quant", "") and not problem.dim("mapped")
    return str(dict(config.params).get("combine", "")) if plain else ""


def idle(problem: Problem, config: Config) -> Work:
    """What an alternative adds to a call that it does not own: its sort, the gate, and two launches without rows, of
    which each program still begins."""
    rows = capacity(problem.tokens * problem.topk, problem.experts, config["block"])
    programs = 0
    if not dict(config.params).get("programs"):
        panels = ceil(problem.dim("intermediate") / config["up_n"]) + ceil(problem.dim("hidden") / config["down_n"])
        programs = ceil(rows / config["block"]) * panels
    return Work(launches=4, idle=2, programs=programs)


def mask(served: tuple[str, ...]) -> int:
    """The routing buckets as bits, numbered as the sort posts them."""
    return sum(1 << BUCKETS.index(name) for name in served)


def plan(both: Alternatives, call: Any, out: Operand, device: Device) -> Plan:
    """All launches of two configs for a LayerCall of operands: the one that owns the call's routing works.

    Workspace: the sorted rows of both, else that of the larger one.

    Raises:
        InvalidInput: the two add up differently, the call has an expert_map, or weights that kernels do not read.
    """
    if not out.numel():
        return Plan()
    from moecache.kernels.fused_moe.sort_and_sum import sort_rows
    from moecache.kernels.fused_moe.tiles import multiplied, products

    check_rows(call)
    if both.second["combine"] != both.first["combine"] or call.expert_map is not None:
        raise InvalidInput(f"{both.name}: alternatives have one way to add up, and no expert_map")
    pairs = [products(config) for config in (both.first, both.second)]
    here = replace(call, posted=None)  # the sorts post to the device, where the gate reads it

    def build(work: Workspace, free: bool) -> list[Launch]:
        found, launches = {}, []
        for first, _ in pairs:
            if first.block not in found:
                found[first.block], sorting = sort_rows(here, first.block, bool(first.pdl), device, work, free)
                launches += sorting
        rows = [found[first.block] for first, _ in pairs]
        gated, gating = _gated(both, call, rows, bool(pairs[0][0].pdl), work)
        return [*launches, gating, *multiplied(pairs, gated, both.first, call, out, work)]

    return planned(build, zeroed=both.first["combine"] == "atomic")


def _gated(both: Alternatives, call: Any, rows: Sequence[Any], pdl: bool, work: Workspace) -> tuple[list[Any], Launch]:
    """What each alternative multiplies: the sorted rows of its block height, of which the gate leaves it all or none.
    And the gate, which posts to where the call wants it."""
    from moecache.kernels.fused_moe.gate import APART, gate

    one, two = rows
    totals = work.take("i32", 2 * APART.value)
    padded, posted = (one.num_tokens_post_padded, two.num_tokens_post_padded), call.posted or one.posted
    args = one.posted, *padded, totals, posted, mask(both.served)
    gating = launch(gate, 1, args, {"PDL": pdl}, {"num_warps": 1} | ({"launch_pdl": True} if pdl else {}))
    each = [part(totals, i * APART.value, 1) for i in (0, 1)]
    return [replace(mine, num_tokens_post_padded=total) for mine, total in zip(rows, each, strict=True)], gating
