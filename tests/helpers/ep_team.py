"""What ranks do over gloo in the tests of expert parallelism."""

from typing import Any

import torch
from ep_model import expected, of_rank, sent, worked
from ranks import LONG, lost

from moecache.kernels.ep import collectives
from moecache.kernels.ep.context import EpContext, Peers
from moecache.team import Team

HIDDEN, EXPERTS, TOPK, CAPACITY = 64, 5, 2, 6


def alone(group: Any, size: int, device: torch.device) -> Peers:
    """Memory of this rank, which nobody else sees."""
    memory = torch.zeros(size, dtype=torch.uint8)
    return Peers(memory, torch.zeros(1, dtype=torch.int64), lambda rank, at, length: memory[at : at + length])


def made(experts: int = EXPERTS) -> EpContext:
    return EpContext(None, HIDDEN, experts, TOPK, CAPACITY, torch.float32, device="cpu", allocate=alone,
                     team=Team.of(timeout=LONG))  # fmt: skip


def collective(rank: int, size: int) -> Any:
    """The layer by both pairs of collectives: [is what arrived right, errors of the sums]."""
    with made() as ctx:
        everybody = [sent(r, CAPACITY - r, HIDDEN, EXPERTS, TOPK, 1) for r in range(size)]
        mine, found = everybody[rank], []
        full = [collectives.padded(part, CAPACITY, value)
                for part, value in ((mine.x, 0), (mine.ids, -1), (mine.weights, 0))]  # fmt: skip
        for there, back in ((collectives.gather, collectives.scatter), (collectives.swap, collectives.swap_back)):
            rows, ids, weights = there(ctx, *full)
            for r, each in enumerate(everybody):
                here = slice(r * CAPACITY, r * CAPACITY + len(each.x))
                found.append(torch.equal(rows[here], each.x) and torch.equal(ids[here], each.ids))
                found.append(bool((ids[here.stop : (r + 1) * CAPACITY] == -1).all()))
            y = worked(rows, of_rank(ids, ctx.experts_of(rank)), weights).nan_to_num(0)
            out = back(ctx, y)[: len(mine.x)]
            found.append(float((out.double() - expected(mine)).abs().max()) < 1e-5)
        return found


def different(rank: int, size: int) -> Any:
    """Contexts of ranks that did not get the same arguments."""
    return lost(lambda: made(experts=EXPERTS + rank))[:2]
