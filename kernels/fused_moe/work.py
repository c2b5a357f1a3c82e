"""What work each config of a layer makes: two grouped products, and what stands around them."""

from dataclasses import replace
from functools import lru_cache

from moecache.kernels.agreed import BLOCK
from moecache.kernels.gemm.work import KERNELS, tile_of
from moecache.predict.work import Tile, Work
from moecache.schemas.config import Config


@lru_cache(maxsize=4096)
def work(c: Config, gated: bool = True, fp8: bool = False) -> Work:
    """The work of a config that runs on a GPU."""
    early = bool(dict(c.extra).get("launch_pdl"))
    if c.variant == "decode":
        kernel = "vector_fp8" if fp8 else "vector"
        return Work(tile_of(c, kernel, "up_", gated=gated), tile_of(c, kernel, "down_"), early=early)
    if fp8:
        return _fp8(c, gated, early)
    first, second = KERNELS[c.variant]
    atomic = c["combine"] == "atomic"
    up, down = tile_of(c, first, "up_", gated=gated), tile_of(c, second, "down_")
    if atomic:
        return Work(up, down, atomic=True, early=early, launches=1)  # the sort
    return Work(up, down, early=early, launches=2, row_hidden=1, token_hidden=1)  # and the sum


def _fp8(c: Config, gated: bool, early: bool) -> Work:
    """Sort, sum, and what quantises the tokens and, unless a tile does it, the rows between the products."""
    fused = c.variant == "fp8_ring" or bool(c["fuse"])
    if c.variant == "fp8_ring":
        down = Tile("ring_fp8", c["block"], 2 * BLOCK, BLOCK, c["group"], 8, c["stages"], c["programs"])
        up = replace(down, gated=int(gated))
    else:
        up, down = tile_of(c, "tile_fp8", "up_", gated=gated), tile_of(c, "tile_fp8", "down_")
        up = replace(up, n=max(up.n, (1 + gated) * BLOCK)) if fused else up  # a tile holds all that share a scale
    return Work(
        up, down, early=early, launches=4 - fused, row_hidden=1.5, row_inner=0 if fused else 2, token_hidden=2.5
    )
