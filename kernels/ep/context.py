"""The memory that ranks share for expert parallelism: who holds it, where each part lies, and how it is given back."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, Self
from weakref import WeakSet

import torch

from moecache.kernels.agreed import BLOCK
from moecache.kernels.ep.links import links
from moecache.kernels.own_mode import own_mode
from moecache.schemas.errors import InvalidInput, TeamLost, typed
from moecache.team import Team

WIRES = ("same", "fp8")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WORDS = 1024  # programs that a launch may have
MOST_RANKS, MOST_TOPK, MOST_EXPERTS = 64, 32, 1024
TURNS = 840  # after which tokens begin anew with an expert's replicas: a multiple of all counts to 8
POLLS_A_SECOND = 1_000_000  # about: a poll takes half a microsecond to one and a half
PATIENCE = 30.0  # seconds
WAITED_FOR = (
    "",
    "to have done with the rows of an earlier dispatch",
    "to send its rows",
    "to have done with an earlier combine",
    "to send back its sums",
    "to have its sums ready",
)


@dataclass(frozen=True)
class Peers:
    """One allocation of the same size on every rank, which all of them can write.

    Attributes:
        memory: this rank's, uint8.
        addresses: [world] int64 on the device, where each rank's begins as this device sees it.
        handle: of torch's symmetric memory, through which a rank's memory is a tensor as well.
    """

    memory: torch.Tensor
    addresses: torch.Tensor
    handle: Any = None


Allocate = Callable[[Any, int, torch.device], Peers]  # of a group, a number of bytes and a device


def symmetric_memory(group: Any, size: int, device: torch.device) -> Peers:
    """Memory of torch's symmetric memory. All ranks call it together, outside a capture. Multicast is not used."""
    import torch.distributed as dist
    import torch.distributed._symmetric_memory as symmetric

    memory = symmetric.empty(size, dtype=torch.uint8, device=device)
    handle = symmetric.rendezvous(memory, group or dist.group.WORLD)
    return Peers(memory, torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=device), handle)


def own_memory(group: Any, size: int, device: torch.device) -> Peers:
    """Memory that no other rank sees."""
    memory = torch.zeros(size, dtype=torch.uint8, device=device)
    return Peers(memory, torch.zeros(1, dtype=torch.int64, device=device))


@dataclass(frozen=True)
class Parts:
    """Byte offsets in the shared memory, which begins with the words."""

    first_slot: int
    slot: int  # bytes of one slot
    begins: dict[str, int]  # within a slot

    def at(self, slot: int, part: str) -> int:
        return self.first_slot + slot * self.slot + self.begins[part]


def _parts(world: int, tokens: int, topk: int, hidden: int, row: int, itemsize: int, scaled: bool) -> Parts:
    """Parts one after the other, each on a multiple of 256 bytes."""
    rows, scales = world * tokens, -(-hidden // BLOCK) * 4 if scaled else 0
    sizes = {
        "counts": world * 4,
        "ids": rows * topk * 4,
        "weights": rows * topk * 4,
        "rows": rows * row,
        "scales": rows * scales,
        "back": rows * hidden * itemsize,
    }
    *begins, end = accumulate((-(-size // 256) * 256 for size in sizes.values()), initial=0)
    return Parts(world * WORDS * 8, end, dict(zip(sizes, begins, strict=True)))


class EpContext:
    """What dispatch and combine need beyond a call's tensors: memory that all ranks of a group share, clocks and words.

    All ranks make it with the same arguments, outside a capture, and make the same calls with it in the same order, on
    one stream at a time. Two micro-batches that overlap have a context each, made before either is captured.

    Args:
        group: a torch.distributed process group; None means the default group.
        hidden: columns of a row; a multiple of 16, and of 128 with the fp8 wire.
        num_experts: experts that the router chooses from. Each rank holds a range of them, as `experts_of` says.
        topk: experts of a token.
        max_tokens_per_rank: the most tokens that a rank may send.
        dtype: of the rows that come back, and of those that are sent unless they are fp8.
        wire: "same" sends rows as they are; "fp8" sends e4m3 with a float32 scale for each 128 columns.
        slots: dispatches whose results are kept side by side. With one, a dispatch without a combine since the last one
            first asks the peers whether they have done with it.
        patience: seconds, roughly, that a kernel waits for a rank. Then it ends, its result is garbage, and `check`
            says whom it has waited for.
        device: default: the current GPU.
        allocate: where the shared memory comes from; default: torch's symmetric memory, and for a CPU, whose ranks have
            collectives alone, memory of each rank's own.
        team: the ranks as they agree on the host; default: `Team.of(group)`.
        physical_to_logical: of each physical expert which one of the router's it is, where some are held more than once
            (redundant experts of EPLB). Then ranks hold ranges of the physical ones, and only those have numbers in
            what is received. None: all are held once.

    Raises:
        InvalidInput: an argument is out of range; an expert is held by nobody.
        RanksDiffer: the ranks did not give the same arguments.
        TeamLost: a rank did not come.
    """

    _opened: ClassVar[WeakSet["EpContext"]] = WeakSet()  # in this process

    def __init__(
        self, group: Any, hidden: int, num_experts: int, topk: int, max_tokens_per_rank: int,
        dtype: torch.dtype = torch.bfloat16, wire: str = "same", *, slots: int = 1, patience: float = PATIENCE,
        device: torch.device | str | None = None, allocate: Allocate | None = None, team: Team | None = None,
        physical_to_logical: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.team = Team.of(group) if team is None else team
        self.rank, self.world, self.group = self.team.rank, self.team.size, group
        for name, value, least, most in (
            ("hidden", hidden, 16, 1 << 20),
            ("num_experts", num_experts, 1, MOST_EXPERTS),
            ("topk", topk, 1, MOST_TOPK),
            ("max_tokens_per_rank", max_tokens_per_rank, 1, 1 << 17),
            ("slots", slots, 1, 16),
        ):
            if not least <= typed(name, value, int) <= most:
                raise InvalidInput(f"{name}={value}; allowed are {least} to {most}")
        replicas = None if physical_to_logical is None else _replicas(physical_to_logical, num_experts)
        self.experts = num_experts if physical_to_logical is None else len(physical_to_logical)
        if self.experts < self.world:
            raise InvalidInput(f"{self.experts} experts for {self.world} ranks; each rank holds at least one")
        step = BLOCK if wire == "fp8" else 16
        if wire not in WIRES or hidden % step:
            raise InvalidInput(f"wire={wire!r}, hidden={hidden}; allowed are {', '.join(WIRES)}, multiples of {step}")
        if dtype not in DTYPES:
            raise InvalidInput(f"dtype={dtype}; allowed are {', '.join(map(str, DTYPES))}")
        if self.world > MOST_RANKS or not typed("patience", patience, int, float) > 0:
            raise InvalidInput(f"{self.world} ranks, patience={patience}; allowed are {MOST_RANKS}, and above 0")
        self.hidden, self.topk, self.max_tokens, self.routed = hidden, topk, max_tokens_per_rank, num_experts
        self.dtype, self.wire, self.slots = dtype, wire, slots
        self.patience = min(int(patience * POLLS_A_SECOND) + 1, 2**31 - 1)
        self.device = torch.device("cuda", torch.cuda.current_device()) if device is None else torch.device(device)
        self.pair = self.world == 2  # one word to poll: a load does, where several want an atomic of many lanes
        gpu = self.device.type == "cuda"
        self.hip = gpu and torch.version.hip is not None
        self._can_be_early = gpu and not self.hip and torch.cuda.get_device_capability(self.device) >= (9, 0)
        sizes = (hidden, num_experts, topk, max_tokens_per_rank, str(dtype), wire, slots)
        self.team.same(repr(sizes if physical_to_logical is None else (*sizes, list(physical_to_logical))), "EpContext")
        self.fp8 = torch.float8_e4m3fnuz if self.hip and "gfx942" in _arch(self.device) else torch.float8_e4m3fn
        self.links = links(self.team, self.device)
        row = hidden * (1 if wire == "fp8" else dtype.itemsize)
        self.parts = _parts(self.world, self.max_tokens, topk, hidden, row, dtype.itemsize, wire == "fp8")
        with own_mode():
            allocate = allocate or (own_memory if self.device.type == "cpu" else symmetric_memory)
            self.peers = allocate(group, self.parts.first_slot + slots * self.parts.slot, self.device)
            self.peers.memory[: self.parts.first_slot].zero_()
            self.words = self.peers.memory[: self.parts.first_slot].view(torch.int64)
            self.clock = torch.zeros(WORDS, dtype=torch.int64, device=self.device)
            # When each slot was used last: [dispatch or combine, slot, program].
            self.last = torch.full((2, slots, WORDS), -1, dtype=torch.int64, device=self.device)
            self.error = torch.zeros(1, dtype=torch.int32, device=self.device)
            self.expert_map = torch.full((self.experts,), -1, dtype=torch.int32, device=self.device)
            held = self.experts_of(self.rank)
            self.expert_map[held.start : held.stop] = torch.arange(len(held), dtype=torch.int32, device=self.device)
            self._replicas = None if replicas is None else replicas.to(self.device)
            self._turns = ((torch.arange(self.max_tokens) + self.rank) % TURNS)[:, None].to(self.device)
            drains = WORDS * 64 * 16 if self.hip else 1  # a word for each thread of a launch: see `signal`
            self.drain = torch.zeros(drains, dtype=torch.int32, device=self.device)
        self.chosen: dict[int, Any] = {}  # how to exchange so many tokens, as all ranks have agreed
        self._turn, self._open = 0, True
        self.synchronize()
        self.team.barrier("EpContext: the words are zero")
        self._opened.add(self)

    @property
    def early(self) -> bool:
        """Whether a launch may begin before the kernel ahead of it has ended (programmatic dependent launch).

        Not beside another context. A kernel that has begun early keeps its room while the one ahead waits for a peer.
        If that leaves none for the other context's kernel, and the peer lacks room for this one's, both wait for ever.
        """
        return self._can_be_early and len(self._opened) == 1

    def experts_of(self, rank: int) -> range:
        """The experts that a rank holds: as many as any other, or one more in the first ranks."""
        each, more = divmod(self.experts, self.world)
        first = rank * each + min(rank, more)
        return range(first, first + each + (rank < more))

    def physical(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """The physical experts that tokens go to. Tokens and ranks take the replicas of an expert in turn."""
        if self._replicas is None:
            return topk_ids
        return self._replicas[topk_ids.clamp(-1, self.routed), self._turns[: len(topk_ids)]]

    def rebalance(self, physical_to_logical: Sequence[int]) -> None:
        """Place the replicas anew. All ranks call it at the same place among their calls; captured graphs follow. Each
        rank's weights must be those of its new experts.

        Raises:
            InvalidInput: the context had no replicas, or another number of physical experts; see there.
            RanksDiffer: the ranks did not give the same.
        """
        if self._replicas is None or len(physical_to_logical) != self.experts:
            held = "each expert once" if self._replicas is None else f"{self.experts} physical experts"
            raise InvalidInput(f"{len(physical_to_logical)} physical experts; this EpContext holds {held}")
        found = _replicas(physical_to_logical, self.routed)
        self.team.same(repr(list(physical_to_logical)), "physical_to_logical")
        self._replicas.copy_(found)

    def part(self, slot: int, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """A part of a slot of this rank's memory."""
        at = self.parts.at(slot, name)
        return self.peers.memory[at : at + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def next_slot(self) -> int:
        """The slot of the next dispatch: each in turn, alike on all ranks."""
        if not self._open:
            raise InvalidInput("this EpContext is closed")
        self._turn += 1
        return (self._turn - 1) % self.slots

    def check(self) -> None:
        """Wait for what was launched, and look whether a kernel gave up waiting.

        Raises:
            TeamLost: it did; the message says for which rank. The context cannot be used any more: results since then
                are garbage. Restart all ranks.
        """
        self.synchronize()
        if code := int(self.error.item()):
            phase, late = divmod(code, 256)
            raise TeamLost(
                f"rank {self.rank} of {self.world} waited for rank {late - 1} {WAITED_FOR[phase]}, in vain; "
                "look at its log and restart all ranks; if it is only slow, give the context a longer patience"
            )

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Give the memory back once no rank can write to it any more. All ranks call it; a second call does nothing.

        Graphs that were captured with this context must not be replayed afterwards.
        """
        if not self._open:
            return
        self._open = False
        self._opened.discard(self)
        self.synchronize()
        with suppress(TeamLost):  # a rank that is gone writes nothing
            self.team.barrier("EpContext: closing")
        del self.peers, self.words

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _replicas(physical_to_logical: Sequence[int], experts: int) -> torch.Tensor:
    """[experts + 2, TURNS] int32: the physical expert of each turn; the last two rows are of ids that name none, those
    past the last expert and −1.

    Raises:
        InvalidInput: a number that is none of the experts, an expert that nobody holds, too many physical ones.
    """
    held: list[list[int]] = [[] for _ in range(experts)]
    for physical, logical in enumerate(physical_to_logical):
        if not 0 <= typed("physical_to_logical", logical, int) < experts:
            raise InvalidInput(f"physical_to_logical has {logical}; allowed are 0 to {experts - 1}")
        held[logical].append(physical)
    if len(physical_to_logical) > MOST_EXPERTS or not all(held):
        missing = [expert for expert, places in enumerate(held) if not places]
        size = f"physical_to_logical has {len(physical_to_logical)} experts"
        raise InvalidInput(f"{size} and lacks {missing}; allowed are {MOST_EXPERTS}, among them each of the router's")
    turns = [[places[turn % len(places)] for turn in range(TURNS)] for places in held]
    return torch.tensor([*turns, [-1] * TURNS, [-1] * TURNS], dtype=torch.int32)


def _arch(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    return str(getattr(properties, "gcnArchName", ""))
