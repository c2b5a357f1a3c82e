"""What ep_beside.py times: ours, the collectives, and any class `module:class` that is written as `Peer` describes.

Dispatch and combine of a peer take turns, as in a layer: some libraries allow nothing else. What arrives is compared
bit for bit with an all-gather, and what comes home with float64.
"""

from typing import Any, ClassVar

import torch
import torch.distributed as dist

from moecache.kernels.ep import collectives
from moecache.kernels.ep.context import EpContext
from moecache.kernels.ep.exchange import CombineConfig, DispatchConfig, combine, dispatch

Case = Any  # ep.Case
Rows = tuple[torch.Tensor, ...]  # of the context's dtype; or fp8 as uint8, and a float32 scale for each 128 columns


class Peer:
    """One library's buffers for one case. All ranks make it, and call it alike.

    Attributes:
        sent: the case's rows as they travel. Their contents may change from dispatch to dispatch.
    """

    name: ClassVar[str]

    def __init__(self, ctx: EpContext, case: Case, sent: Rows) -> None:
        self.ctx, self.case, self.sent = ctx, case, sent

    @classmethod
    def version(cls) -> str:
        raise NotImplementedError

    @classmethod
    def prepare(cls) -> None:
        """What has to be set before any memory is shared."""

    def dispatch(self) -> None:
        """Send the rows, ids and weights to the ranks that hold the experts. No host synchronisation."""
        raise NotImplementedError

    def received(self) -> tuple[Rows, torch.Tensor, torch.Tensor]:
        """What the last dispatch brought, in any order: rows, their ids among all experts, their weights."""
        raise NotImplementedError

    def fill(self, y: torch.Tensor) -> None:
        """Put the results for the rows of `received` where combine looks for them."""
        raise NotImplementedError

    def combine(self) -> torch.Tensor:
        """[T, hidden]. No host synchronisation."""
        raise NotImplementedError

    def close(self) -> None:
        pass


class Ours(Peer):
    name = "ours"
    configs: tuple[DispatchConfig | None, CombineConfig | None] = (None, None)  # None: what a call takes untuned

    def __init__(self, ctx: EpContext, case: Case, sent: Rows) -> None:
        super().__init__(ctx, case, sent)
        rows = ctx.world * case.tokens if self.configs[1] and self.configs[1].how == "push" else 0
        self.own = torch.zeros(rows, ctx.hidden, dtype=ctx.dtype, device=ctx.device)

    def dispatch(self) -> None:
        rows = self.sent if self.ctx.wire == "same" else (self.sent[0].view(self.ctx.fp8), self.sent[1])
        self.got = dispatch(self.ctx, rows if len(rows) > 1 else rows[0], self.case.ids, self.case.weights,
                            capacity=self.case.tokens, config=self.configs[0])  # fmt: skip

    def received(self) -> tuple[Rows, torch.Tensor, torch.Tensor]:
        held = (self.got.ids >= 0).any(1)
        rows = (self.got.rows,) if self.got.scales is None else (self.got.rows.view(torch.uint8), self.got.scales)
        return tuple(each[held] for each in rows), self.got.ids[held], self.got.weights[held]

    def fill(self, y: torch.Tensor) -> None:
        self.y()[(self.got.ids >= 0).any(1)] = y

    def combine(self) -> torch.Tensor:
        return combine(self.ctx, self.y(), self.got.handle, config=self.configs[1])

    def y(self) -> torch.Tensor:
        """Where combine looks: a push wants memory of its own."""
        return self.own if len(self.own) else self.got.sums


class Gathered(Peer):
    name = "ag_rs"

    def dispatch(self) -> None:
        *self.rows, self.ids, self.weights = collectives.gather(self.ctx, *self.sent, self.case.ids, self.case.weights)

    def received(self) -> tuple[Rows, torch.Tensor, torch.Tensor]:
        return tuple(self.rows), self.ids, self.weights

    def fill(self, y: torch.Tensor) -> None:
        self.y = y

    def combine(self) -> torch.Tensor:
        return collectives.scatter(self.ctx, self.y)


def verified(peer: Peer) -> bool:
    """Compare rows, ids and weights with those of an all-gather, bit for bit, and what comes home with float64.

    Raises:
        AssertionError: they differ on a rank; on all ranks, as none may go on alone.
    """
    ctx, case = peer.ctx, peer.case
    held = ctx.experts_of(ctx.rank)
    for turn in range(ctx.slots + 1):  # each buffer that takes turns, and one of them again
        for each in peer.sent:
            each.copy_(each.roll(1, 0))  # so that what is left of the turn before is wrong
        *rows, ids, weights = collectives.gather(ctx, *peer.sent, case.ids, case.weights)
        wanted = ordered(tuple(rows), ids, weights, held)
        peer.dispatch()
        got, ids, weights = peer.received()
        found = ordered(got, ids, weights, held)
        same = all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
        agreed("" if same else f"turn {turn}: other rows came")
        mine = (ids >= held.start) & (ids < held.stop)
        y = plain(got) * torch.where(mine, weights, 0).sum(1, keepdim=True)
        peer.fill(y.to(ctx.dtype))
        out = peer.combine().double()
        want = plain(peer.sent).double() * case.weights.double().sum(1, keepdim=True)
        error = ((out - want).norm() / want.norm()).item()
        agreed("" if error < 1e-2 else f"turn {turn}: error {error}")
    return True


def agreed(wrong: str) -> None:
    """Raise AssertionError on all ranks if anything is wrong on one."""
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, wrong)
    if any(found):
        raise AssertionError(next(filter(None, found)))


def ordered(rows: Rows, ids: torch.Tensor, weights: torch.Tensor, held: range) -> Rows:
    """Rows that have an expert among the held ones, with their ids and weights, in an order that the bits decide."""
    mine = (ids >= held.start) & (ids < held.stop)
    here = mine.any(1)
    parts = [each[here].contiguous().view(torch.uint8) for each in rows]
    parts.append(torch.where(mine, ids, -1)[here].to(torch.int32).view(torch.uint8))
    parts.append(torch.where(mine, weights, 0)[here].float().contiguous().view(torch.uint8))
    line = torch.cat(parts, 1)
    draw = torch.Generator(device=line.device).manual_seed(3)
    factors = torch.randint(1 << 40, (line.shape[1],), device=line.device, generator=draw)
    order = torch.cat(
        [(some.long() * factors).sum(1) for some in line.split(512)] or [line.new_zeros(0).long()]
    ).argsort()
    return tuple(each[order] for each in parts)


def plain(rows: Rows) -> torch.Tensor:
    """float32 rows."""
    if len(rows) == 1:
        return rows[0].float()
    fp8, scales = rows
    return fp8.view(torch.float8_e4m3fn).float() * scales.repeat_interleave(128, 1)
