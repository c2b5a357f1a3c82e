"""Weights that several inputs share, so that a warm-up does not make gigabytes anew for every problem; or lent ones."""

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from moecache.schemas.problem import Problem

T = TypeVar("T")

LARGE = 512 << 20  # bytes of weights of which no cache keeps a part from one call to the next
SHELF_BYTES = 48 << 30  # weights held at a time within `sharing`, the last of them in any case

_lent: Mapping[str, Sequence[Any]] = {}  # by layer_key; weights of the layers of a model that is loaded
_shelf: OrderedDict[Hashable, tuple[int, Any]] | None = None  # the last used at the end


@contextmanager
def sharing() -> Iterator[None]:
    """Within the block `inputs` may give weights that an earlier call made; the outermost block holds them.

    They must not be written to.
    """
    global _shelf
    outermost, _shelf = _shelf is None, OrderedDict() if _shelf is None else _shelf
    try:
        yield
    finally:
        if outermost:
            _shelf = None


def forget_shared() -> None:
    """Make weights anew from here on, as somebody may have written to them."""
    if _shelf is not None:
        _shelf.clear()


def shared(nbytes: int, seed: int, key: Hashable, make: Callable[[int], T]) -> T:
    """`make(seed)`, or within `sharing` what it gave for this key before: tensors of about `nbytes` bytes.

    Of what no cache holds, one seed is enough: calls that name other experts find them as cold.
    """
    if _shelf is None:
        return make(seed)
    seed = seed if nbytes < LARGE else 0
    held = _shelf.pop((key, seed), None)
    size = nbytes + sum(each for each, _ in _shelf.values())
    while held is None and _shelf and size > SHELF_BYTES:
        size -= _shelf.popitem(last=False)[1][0]
    found: T = make(seed) if held is None else held[1]
    _shelf[key, seed] = (nbytes, found)
    return found


def layer_key(problem: Problem) -> str:
    """What problems have in common that the same layer asks."""
    return problem.model_copy(update={"tokens": 0, "routing": ""}).key


@contextmanager
def lending(weights: Mapping[str, Sequence[Any]]) -> Iterator[None]:
    """Within the block `lent` gives these, by `layer_key`: tuning then takes no memory for weights, and measures those
    that will be served. They are only read."""
    global _lent
    before, _lent = _lent, weights
    try:
        yield
    finally:
        _lent = before


def lent(problem: Problem, seed: int) -> Any:
    """The weights of one of the layers that ask a problem, by turns: one is cold when its turn comes. None where
    nobody lends any."""
    layers = _lent.get(layer_key(problem)) if _lent else None
    return layers[seed % len(layers)] if layers else None


def _forget_in_child() -> None:
    """A forked child does not inherit the block of a thread that it does not have."""
    global _shelf
    _shelf = None


os.register_at_fork(after_in_child=_forget_in_child)
