"""Where sorts leave the routing bucket of their call, so that the next call of the same layer knows it without waiting.

The kernel writes one integer into pinned host memory; the host reads it as plain memory. It may be a step old, and it
is only ever a hint: a wrong bucket costs time, never a result.
"""

import ctypes
from collections.abc import Hashable
from dataclasses import dataclass

import torch

from moecache.forks import Lock
from moecache.kernels.own_mode import own_mode

SLOTS = 1 << 14  # 256 KiB of pinned memory: (layer, token bucket) pairs of several models
STEP = 4  # int32 from one slot to the next: Triton compiles a kernel anew for an address off 16 bytes
DEVICES = ("cpu", "cuda")  # AMD's GPUs are called cuda, too
UNKNOWN = -1  # nothing is posted yet
FEW_PAIRS = 64  # fused MoE of so few hardly depends on its routing, and its fastest kernels do not post any
ANY = -2  # what is chosen must serve every routing: a graph is captured, or nobody posts


@dataclass(frozen=True)
class Post:
    """One slot: `tensor` [1] int32 is what a kernel writes, at `address`, `word.value` what the host reads."""

    tensor: torch.Tensor | None
    word: ctypes.c_int32
    address: int = 0


_NOWHERE = Post(None, ctypes.c_int32(UNKNOWN))
slots: dict[Hashable, Post] = {}  # by (layer, token bucket, experts, device)
_slabs: dict[str, torch.Tensor] = {}
_lock = Lock()


def post(layer: Hashable, tokens: int, experts: int, device: torch.device) -> Post:
    """The slot of one layer at one token bucket on one device.

    Where there is none and none can be made, because a graph is being captured before the first eager call, all are
    taken or tensors are fake here, the answer is a slot that nothing is posted to.
    """
    key = (layer, tokens, experts, device)
    return slots.get(key) or _new(key, device)


def read(slot: Post, device: int) -> int:
    """The routing bucket to choose for: the one that the last call posted; ANY while a graph is captured on a GPU.

    The question for a capture, of the current device, costs more than all the rest: hits that a capture would be
    served alike read `word`.
    """
    if device >= 0 and torch.cuda.is_current_stream_capturing():
        return ANY
    return slot.word.value


def _new(key: Hashable, device: torch.device) -> Post:
    with _lock:
        slab = _slabs.get(device.type)
        if slab is None:
            if device.type not in DEVICES:
                return _NOWHERE  # whoever serves the call says so
            with own_mode():
                slab = torch.full((SLOTS * STEP,), UNKNOWN, dtype=torch.int32)
            if type(slab) is not torch.Tensor:
                return _NOWHERE  # a fake one has no memory
            if device.type != "cpu":
                with own_mode(), torch.cuda.device(device):
                    if torch.cuda.is_current_stream_capturing():
                        return _NOWHERE  # allocating pinned memory now could break the capture
                    slab = slab.pin_memory()  # all devices see it at the same address
            _slabs[device.type] = slab
        index = len(slots) * STEP
        if index >= len(slab):
            return _NOWHERE
        word = ctypes.c_int32.from_address(slab.data_ptr() + 4 * index)
        return slots.setdefault(key, Post(slab[index : index + 1], word, slab.data_ptr() + 4 * index))
