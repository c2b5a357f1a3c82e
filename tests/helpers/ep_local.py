"""Ranks of expert parallelism, all in this process: each has memory of its own, and addresses of the others'."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moecache.kernels.ep.context import WORDS, EpContext, Peers
from moecache.team import Team

POISON = 0x7F  # no id, no count, no row that anybody sends: fp8 makes NaN of it


@dataclass
class Silent(Team):
    """A rank that need not ask the others."""

    rank: int
    size: int

    def same(self, digest: str, what: str = "digest") -> str:
        return digest

    def barrier(self, what: str) -> None:
        pass


def contexts(world: int, hidden: int, experts: int, topk: int, tokens: int, **options: Any) -> list[EpContext]:
    """A context for each rank."""
    boxes: list[torch.Tensor] = []

    def allocate(rank: int) -> Callable[[Any, int, torch.device], Peers]:
        def peers(group: Any, size: int, device: torch.device) -> Peers:
            if not boxes:
                for _ in range(world):
                    box = torch.full((size + 256,), POISON, dtype=torch.uint8)
                    boxes.append(box[-box.data_ptr() % 256 :][:size])
            addresses = torch.tensor([box.data_ptr() for box in boxes])
            return Peers(boxes[rank], addresses)

        return peers

    known: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "patience": 1e-5} | options
    return [EpContext(None, hidden, experts, topk, tokens, allocate=allocate(rank), team=Silent(rank, world), **known)
            for rank in range(world)]  # fmt: skip


def on_amd(ranks: Sequence[EpContext]) -> Sequence[EpContext]:
    """As contexts on AMD GPUs are."""
    for ctx in ranks:
        ctx.hip, ctx.drain = True, torch.zeros(WORDS * 64 * 16, dtype=torch.int32)
    return ranks


def poison(ranks: Sequence[EpContext]) -> None:
    """Overwrite all that peers write."""
    for ctx in ranks:
        ctx.peers.memory[ctx.parts.first_slot :].fill_(POISON)
