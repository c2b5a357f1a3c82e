"""Counters for grid-wide handshakes: zeroed once, then advanced by the kernels themselves.

A slot may serve one launch at a time. Eager launches on one stream are ordered, so a stream keeps its slot; a captured
launch gets a slot of its own, because graphs captured on one stream may be replayed side by side.
"""

import torch

from moecache.forks import Lock
from moecache.kernels.own_mode import own_mode

SLOTS, STRIDE = 4096, 32  # 128 bytes apart: no two handshakes share a cache line
_arenas: dict[torch.device, "_Arena"] = {}
_lock = Lock()  # an arena that a second thread replaced would be freed under the graphs that use it


class _Arena:
    """The counters of one device: those that streams keep, and those that are free."""

    def __init__(self, device: torch.device) -> None:
        with own_mode():
            self.whole = torch.zeros(SLOTS * STRIDE, dtype=torch.int32, device=device)
        self.by_stream: dict[int, torch.Tensor] = {}
        self.left = SLOTS
        torch.cuda.synchronize(device)

    def take(self) -> torch.Tensor | None:
        """A counter that nobody has."""
        if not self.left:
            return None
        self.left -= 1
        return self.whole[self.left * STRIDE : self.left * STRIDE + 1]


def slot(device: torch.device) -> torch.Tensor | None:
    """One zero-initialised counter on the device that no concurrent launch uses; None when a capture can get none."""
    if device.type == "cpu":
        return torch.zeros(1, dtype=torch.int32)
    with _lock:
        capturing, arena = torch.cuda.is_current_stream_capturing(), _arenas.get(device)
        if arena is None:
            if capturing:  # allocating and zeroing now would become part of the graph
                return None
            arena = _arenas[device] = _Arena(device)
        if capturing:
            return arena.take()
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        kept = arena.by_stream.get(stream)
        if kept is None and (kept := arena.take()) is not None:
            arena.by_stream[stream] = kept
        return kept
