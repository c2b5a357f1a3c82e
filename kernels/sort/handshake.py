"""Counters for grid-wide handshakes: zeroed once, then advanced by the kernels themselves.

A slot may serve one launch at a time. Eager launches on one stream are ordered, so a stream keeps its slot; a captured
launch gets a slot of its own, because graphs captured on one stream may be replayed side by side.
"""

import torch

from moecache.forks import Lock
from moecache.kernels.own_mode import own_mode

SLOTS, STRIDE = 4096, 32  # 128 bytes apart: no two handshakes share a cache line
_arenas: dict[torch.device, tuple[torch.Tensor, dict[int, int], list[int]]] = {}
_lock = Lock()  # an arena that a second thread replaced would be freed under the graphs that use it


def slot(device: torch.device) -> torch.Tensor | None:
    """One zero-initialised counter on the device that no concurrent launch uses; None when a capture can get none."""
    if device.type == "cpu":
        return torch.zeros(1, dtype=torch.int32)
    with _lock:
        return _take(device)


def _take(device: torch.device) -> torch.Tensor | None:
    capturing = torch.cuda.is_current_stream_capturing()
    if device not in _arenas:
        if capturing:  # allocating and zeroing now would become part of the graph
            return None
        with own_mode():
            arena = torch.zeros(SLOTS * STRIDE, dtype=torch.int32, device=device)
        _arenas[device] = (arena, {}, list(range(SLOTS)))
        torch.cuda.synchronize(device)
    arena, by_stream, free = _arenas[device]
    stream = torch.cuda.current_stream(device).cuda_stream
    index = None if capturing else by_stream.get(stream)
    if index is None:
        if not free:
            return None
        index = free.pop()
        if not capturing:
            by_stream[stream] = index
    return arena[index * STRIDE : index * STRIDE + 1]
