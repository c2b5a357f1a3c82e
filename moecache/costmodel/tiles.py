"""How a config cuts the two GEMMs of a layer into tiles, read from the names that kernels give their parameters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

from moecache.schemas.config import Config
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import Value

# Variant -> the kernels of `up` and `down`. Any other multiplies in `plain` tiles and leaves the activation to a launch
# of its own. `vector` multiplies row by row, without a sort.
KERNELS = {
    "tiles": ("tile", "tile"), "heights": ("tile", "tile"), "tiles_ring": ("tile", "ring"), "ring": ("ring", "ring"),
    "tile": ("tile", "tile"), "decode": ("vector", "vector"),
}  # fmt: skip
PLAIN = ("plain", "plain")

NAMES = {  # by field of Tile: what the kernels call it
    "m": ("BLOCK_SIZE_M", "block_m", "block"),
    "n": ("BLOCK_SIZE_N", "block_n", "n"),
    "k": ("BLOCK_SIZE_K", "block_k", "k"),
    "group": ("GROUP_SIZE_M", "group_m", "group"),
    "warps": ("num_warps", "warps"),
    "stages": ("num_stages", "stages"),
    "programs": ("programs",),
    "low": ("low",),
    "swap": ("swap",),
    "parts": ("parts",),
}

FLAGS: dict[str, Callable[[Mapping[str, Value]], bool]] = {  # of a config: how its launches follow and end
    "early": lambda known: bool(known.get("launch_pdl")),
    "atomic": lambda known: known.get("combine") == "atomic",
}


@dataclass(frozen=True)
class Tile:
    """Rows (m), columns (n) and depth of one step (k) of a tile, and how it is computed."""

    m: int
    n: int
    k: int
    group: int = 1
    warps: int = 4
    stages: int = 2
    programs: int = 0  # of a persistent launch; 0 = one a tile
    low: int = 0  # rows of the tile that a block with few rows takes; m: there is none
    swap: int = 0  # the product is transposed: rows stand where the matrix unit wants few columns
    parts: int = 1  # groups of warps that multiply in turns, or each half of a tile of more than 64 rows
    gated: int = 0  # half of the columns are the gate's: half as many come out


SIZES = tuple(field.name for field in fields(Tile))


def kernels_of(config: Config) -> tuple[str, str]:
    """The kernels of `up` and `down`."""
    return KERNELS.get(config.variant, PLAIN)


def tiles(config: Config, gated: bool = True) -> tuple[Tile, Tile]:
    """The tiles of `up` and `down`. Parameters named `up_…` and `down_…` belong to one of them, others to both.

    A config without rows is a matrix-vector kernel: every row is a tile of its own. Kernels that name `up_n` apply the
    activation themselves, so that a tile of a layer with a gate has that many columns of it and as many beside them. A
    tile of a ring always has two such panels.

    Raises:
        InvalidInput: n or k are missing or no whole numbers.
    """
    known = dict(config.params)
    found = []
    for prefix, kernel in zip(("up_", "down_"), kernels_of(config), strict=True):
        own = {name.removeprefix(prefix): value for name, value in known.items() if name.startswith(prefix)}
        sizes = {field: _first(known | own, names) for field, names in NAMES.items()}
        given = {field: value for field, value in sizes.items() if value is not None}
        optional = ("programs", "swap")
        if not {"n", "k"} <= given.keys() or min(v for f, v in given.items() if f not in optional) < 1:
            raise InvalidInput(
                f"{config.name} names no tile: wanted are its columns ({', '.join(NAMES['n'])}) and its depth "
                f"({', '.join(NAMES['k'])}), from 1"
            )
        halved = int(gated and prefix == "up_" and "up_n" in known)
        panels = 2 if halved or kernel == "ring" else 1
        sized = {"m": 1} | given
        found.append(Tile(**sized | {"n": panels * given["n"], "low": sized.get("low", sized["m"]), "gated": halved}))
    return found[0], found[1]


def _first(known: Mapping[str, Value], names: Sequence[str]) -> int | None:
    return next((value for name in names if isinstance(value := known.get(name), int)), None)


def body(config: Config, kernel: str, tile: Tile) -> str:
    """What of a tile is compiled, whatever the order in which tiles are taken. Kernels of ours are the same in all
    variants."""
    owner = config.variant if kernel == "plain" else kernel
    low = f"/{tile.low}" if tile.low != tile.m else ""
    more = "t" * (tile.swap > 0) + f"p{tile.parts}" * (tile.parts > 1)
    return f"{owner}:{tile.m}{low}x{tile.n}x{tile.k}.w{tile.warps}.s{tile.stages}{more and '.' + more}"
