"""Bytes that device memory brings a second time: what is asked for again after the caches have lost it.

Tiles are taken in groups of blocks of rows; a group takes one panel of columns after the other. So blocks of an expert
that run at a time ask for the same weights, all panels ask for the same rows, and experts add to the same output.
"""

from collections.abc import Mapping

import numpy as np

from moecache.predict.products import Array, Product, in_turns
from moecache.schemas.device import Device

CACHED = 0.1  # weights of an expert that are this share of L2 survive there, half of them, until they are read again
KEPT = 0.5  # when this share of the last cache has gone by, half of what was there is lost: Hopper's halves hold copies


def again(w: Product, reread: float, own: Mapping[str, Array], device: Device) -> Array:
    """Bytes beside those that are read and written once, [cells, configs]."""
    order = _Order(w, device)
    return order.weights(reread, own["drift"]) + order.rows() + order.added()


class _Order:
    """In which order the tiles of a product come, and what the caches make of it."""

    def __init__(self, w: Product, device: Device) -> None:
        self._w, self._l2 = w, max(device.l2_bytes, 1 << 20)
        self._last = max(device.llc_bytes, self._l2)  # the cache before device memory
        self._panels = np.ceil(w.columns / w.tile["n"])
        self._at_once = device.units * w.resident  # tiles
        self._group = np.minimum(w.tile["group"], np.maximum(1, w.blocks))
        self._slab = w.size * w.tile["n"] * w.depth  # a panel of one expert's weights

    def _lost(self, gone_by: Array) -> Array:
        """Share of something that the last cache loses while so many bytes go by."""
        return gone_by / (gone_by + KEPT * self._last)

    def _experts(self, blocks: Array) -> Array:
        """Whose rows lie in so many blocks."""
        return np.minimum(self._w.active, 1 + (blocks - 1) * self._w.active / np.maximum(1, self._w.blocks))

    def weights(self, reread: float, drift: Array) -> Array:
        """Blocks of an expert share its weights where they run at a time or lie in one group, as far as they stay in
        step: the less, the more tiles lie between them, and the more bytes are on their way."""
        w, together = self._w, np.maximum(1, self._at_once / self._panels)
        window = np.maximum(together, np.minimum(self._group, self._at_once))  # blocks that run at a time
        slabs = np.minimum(self._at_once * self._experts(window) / window, w.active * self._panels)
        turns = np.where(in_turns(w.tile), w.tile["parts"], 1)  # tiles that a program has begun
        between = turns * np.sqrt(np.where(self._group > 1, 1, self._panels))
        apart = 1 / np.maximum(w.tile["group"], together)  # share of neighbours that neither run nor lie together
        cold = reread * apart * w.weights / (w.weights + CACHED * self._l2)
        late = (1 - apart) * self._lost(drift * between * slabs * self._slab)
        return (w.blocks - w.active) * w.weights * np.minimum(1, cold + late)

    def _sweeps(self) -> Array:
        """How often a group asks for its rows: once for all panels that run at a time."""
        return np.clip(self._panels * self._group / self._at_once, 1, self._panels)

    def rows(self) -> Array:
        """Every further sweep asks for the rows of its group."""
        w = self._w
        rows = w.size * w.rows * w.depth
        between = rows * self._group / np.maximum(1, w.blocks) + self._experts(self._group) * self._slab
        return (self._sweeps() - 1) * rows * self._lost(between)

    def added(self) -> Array:
        """What is added to the output is read and written once more, unless the cache still holds what another expert
        of the token added: they follow each other within a sweep, if that takes all blocks, else within the product."""
        w = self._w
        sweeps = np.where(self._group >= w.blocks, self._sweeps(), 1)
        moved = w.weights * w.active / sweeps + w.size * (w.rows * w.depth + w.written * w.columns / sweeps)
        return 2 * w.size * w.added * w.columns * self._lost(moved * w.written / w.rows)
