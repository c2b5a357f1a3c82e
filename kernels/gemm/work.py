"""What a config says of one grouped product: its tile, in the names that all of our kernels give their parameters."""

from moecache.predict.work import Tile
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
