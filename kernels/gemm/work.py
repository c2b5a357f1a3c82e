"""What a config says of grouped products: their tiles, in the names that all of our kernels give their parameters.

Imports neither torch nor Triton: what scores ways to choose asks it too.
"""

from functools import lru_cache

from moecache.predict.work import Tile, Work
from moecache.schemas.config import Config

KERNELS = {  # variant of fused MoE -> kernels of its two products
    "tiles": ("tile", "tile"),
    "heights": ("tile", "tile"),
    "ring": ("ring", "ring"),
    "tiles_ring": ("tile", "ring"),
}
KNOBS = ("group", "warps", "stages", "programs", "low", "swap", "parts")


def tile_of(config: Config, kernel: str, prefix: str = "", *, gated: bool = False) -> Tile:
    """The tile of a product. Parameters with the prefix are its own, others those of both products of a layer.

    A config without rows multiplies row by row. A tile of a product with a gate has as many of its columns beside it,
    and a tile of a ring always has two such panels.
    """
    known = dict(config.params)
    own = known | {name.removeprefix(prefix): value for name, value in known.items() if name.startswith(prefix)}
    rows, panels = own.get("block", 1), 2 if gated or kernel.startswith("ring") else 1
    knobs = {name: own[name] for name in KNOBS if name in own and (name, own[name]) != ("low", rows)}
    return Tile(kernel, rows, panels * own["n"], own["k"], gated=int(gated), **knobs)


@lru_cache(maxsize=4096)
def layer(c: Config, gated: bool = True) -> Work:
    """The work of a layer that sorts its rows, multiplies twice with KERNELS, and adds up."""
    (first, second), early = KERNELS[c.variant], is_early(c)
    up, down = tile_of(c, first, "up_", gated=gated), tile_of(c, second, "down_")
    if c["combine"] == "atomic":
        return Work(up, down, atomic=True, early=early, launches=1)  # the sort
    return Work(up, down, early=early, launches=2, row_hidden=1, token_hidden=1)  # and the sum


@lru_cache(maxsize=4096)
def vectors(c: Config, kernel: str = "vector", gated: bool = True) -> Work:
    """The work of a layer that multiplies row by row, without a sort."""
    return Work(tile_of(c, kernel, "up_", gated=gated), tile_of(c, kernel, "down_"), early=is_early(c))


def is_early(c: Config) -> bool:
    """Whether launches begin before the ones before them end."""
    return bool(dict(c.extra).get("launch_pdl"))
