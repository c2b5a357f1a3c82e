"""What ranks do over gloo in the tests of expert parallelism."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ep_model import Sent, expected, of_rank, sent, wide, worked
from ranks import LONG, lost

from moecache.dispatch import using
from moecache.ep import chosen, ep_moe, tune
from moecache.kernels.ep.context import EpContext
from moecache.kernels.ep.exchange import (
    CombineConfig,
    DispatchConfig,
    combine,
    combine_receive,
    dispatch,
    dispatch_receive,
)
from moecache.ops import fused_moe
from moecache.team import Team

HIDDEN, EXPERTS, TOPK, CAPACITY = 64, 5, 2, 6


def made(experts: int = EXPERTS, places: Sequence[int] | None = None) -> EpContext:
    """A context of this rank."""
    return EpContext(
        None,
        HIDDEN,
        experts,
        TOPK,
        CAPACITY,
        torch.float32,
        device="cpu",
        team=Team.of(timeout=LONG),
        physical_to_logical=places,
    )


def collective(rank: int, size: int) -> Any:
    """Dispatch and combine by both pairs of collectives, unequal tokens: [is what arrived and came back right]."""
    experts = 128 if size == 6 else EXPERTS + size
    with made(experts) as ctx:
        everybody = [sent(r, max(0, CAPACITY - 2 * r), HIDDEN, experts, TOPK, 1) for r in range(size)]
        mine, found = everybody[rank], []
        for there, back in (("all_gather", "reduce_scatter"), ("all_to_all", "all_to_all")):
            got = dispatch(ctx, mine.x, wide(mine.ids), mine.weights, config=DispatchConfig(there))
            dispatch_receive(ctx, got.handle)
            found.append(got.counts.tolist() == [len(each.x) for each in everybody])
            for r, each in enumerate(everybody):
                here = slice(r * CAPACITY, r * CAPACITY + len(each.x))
                ids = of_rank(each.ids, ctx.experts_of(rank))
                found.append(torch.equal(got.rows[here], each.x) and torch.equal(got.ids[here], ids))
                found.append(bool((got.ids[here.stop : (r + 1) * CAPACITY] == -1).all()))
                found.append(torch.equal(got.weights[here], each.weights))
            y, config = worked(got.rows, got.ids, got.weights), CombineConfig(back)
            out = combine_receive(ctx, y, got.handle, combine(ctx, y, got.handle, config=config), config=config)
            found.append(float((out.double() - expected(mine)).abs().sum()) < 1e-3)
        return found


def tuned(rank: int, size: int) -> Any:
    """All measure together; what one file holds serves all, also a rank that has none; the layer is right."""
    folder, found = Path(os.environ["FOLDER"]), dict[str, Any]()
    with made() as ctx:
        everybody = [sent(r, CAPACITY - r, HIDDEN, EXPERTS, TOPK, 1) for r in range(size)]
        mine = everybody[rank]
        with using(db=folder / f"{rank}.sqlite", team=ctx.team):
            found["before"] = chosen(ctx, CAPACITY)[0].how
            found["refused"] = lost(lambda: tune(ctx, [CAPACITY + 1]))[:2]
            found["tiers"] = [choice.tier for choice in tune(ctx, [1, CAPACITY], seconds=LONG)]
            found["ways"] = [chosen(ctx, tokens)[0].how for tokens in (1, CAPACITY)]
        ctx.chosen.clear()
        with using(db=folder / ("0.sqlite" if not rank else "none.sqlite"), mode="replay"):
            found["again"] = [chosen(ctx, tokens)[0].how for tokens in (1, CAPACITY)]
            rng, held = torch.Generator().manual_seed(3), ctx.experts_of(rank)
            w1, w2 = (torch.randn(EXPERTS, *shape, generator=rng) for shape in ((2 * 8, HIDDEN), (HIDDEN, 8)))
            got = ep_moe(ctx, mine.x, w1[held.start : held.stop], w2[held.start : held.stop], mine.weights, mine.ids)
            want = fused_moe(mine.x, w1, w2, mine.weights, mine.ids)
            found["error"] = float((got - want).norm() / want.norm())
            found["replicas"] = [_replicated(everybody[rank], rank, exact) for exact in (False, True)]
        found["alone"] = lost(lambda: tune(ctx, [1]))[:2]
    return found


def _replicated(mine: Sent, rank: int, exact: bool) -> float:
    """The error of a layer, some of whose experts several ranks hold."""
    places = [4, 0, 1, 1, 2, 3, 0, 1]
    with made(places=places) as ctx:
        rng, held = torch.Generator().manual_seed(3), [places[physical] for physical in ctx.experts_of(rank)]
        w1, w2 = (torch.randn(EXPERTS, *shape, generator=rng) for shape in ((2 * 8, HIDDEN), (HIDDEN, 8)))
        got = ep_moe(ctx, mine.x, w1[held], w2[held], mine.weights, mine.ids, exact=exact)
        want = fused_moe(mine.x, w1, w2, mine.weights, mine.ids)
        return float((got - want).norm() / want.norm())


def different(rank: int, size: int) -> Any:
    """Contexts of ranks that did not get the same arguments."""
    return lost(lambda: made(experts=EXPERTS + rank))[:2]
