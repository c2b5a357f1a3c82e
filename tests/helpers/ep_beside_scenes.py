"""What ranks do over gloo in the test of benchmarks/ep_beside.py."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from ranks import LONG

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import ep_beside
from ep_peers import Gathered, verified

from moecache.kernels.ep.context import EpContext
from moecache.team import Team

TOKENS, HIDDEN, EXPERTS, TOPK = 6, 64, 5, 2


class WrongOnOne(Gathered):
    name = "wrong"

    def combine(self) -> torch.Tensor:
        return super().combine() * (2 if self.ctx.rank else 1)


class Unmade(Gathered):
    name = "unmade"

    def __init__(self, ctx: EpContext, *rest: Any) -> None:
        if not ctx.rank:
            raise MemoryError("rank 0 has no room")
        super().__init__(ctx, *rest)


def left_out(rank: int, size: int) -> Any:
    """Three peers, of which one is right: what each rank made of them."""
    torch.cuda.synchronize = lambda device=None: None  # type: ignore[assignment]
    with EpContext(None, HIDDEN, EXPERTS, TOPK, TOKENS, device="cpu", team=Team.of(timeout=LONG)) as ctx:
        draw = torch.Generator().manual_seed(rank)
        ids = torch.stack([torch.randperm(EXPERTS, generator=draw)[:TOPK] for _ in range(TOKENS)])
        x = torch.randn(TOKENS, HIDDEN, generator=draw).bfloat16()
        case = SimpleNamespace(tokens=TOKENS, x=x, ids=ids, weights=torch.rand(TOKENS, TOPK, generator=draw))
        told: dict[str, str] = {}
        right = []
        for each in (Unmade, WrongOnOne, Gathered):
            peer = ep_beside.together(each, "made", lambda each=each: each(ctx, case, (x,)), told)
            right.append(bool(peer and ep_beside.together(each, "checked", lambda peer=peer: verified(peer), told)))
        return right, told
