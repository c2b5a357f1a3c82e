"""What a config makes a device do for a call: the record in which every op says it. Nothing is timed here."""

from dataclasses import dataclass

from moecache.schemas.errors import InvalidInput

BYTES = {"fp8": 1, "bf16": 2, "fp16": 2, "fp32": 4}  # of an element


@dataclass(frozen=True)
class Tile:
    """How one kernel cuts a grouped product: rows (m), columns (n) and depth of one step (k), and how it is computed.

    Attributes:
        kernel: whose parameters count. `vector` multiplies row by row, without a sort.
        group: blocks that share a panel of weights before the next panel is read.
        programs: of a persistent launch; 0 = one a tile.
        low: rows of the tile that a block with few rows takes; 0 = there is none.
        swap: the product is transposed: rows stand where the matrix unit wants few columns.
        parts: groups of warps that multiply in turns, or each half of a tile of more than 64 rows.
        gated: half of the columns are the gate's: half as many come out.
    """

    kernel: str
    m: int
    n: int
    k: int
    group: int = 1
    warps: int = 4
    stages: int = 2
    programs: int = 0
    low: int = 0
    swap: int = 0
    parts: int = 1
    gated: int = 0

    def __post_init__(self) -> None:
        least = min(self.m, self.n, self.k, self.group, self.warps, self.stages, self.parts)
        if least < 1 or not 0 <= self.low <= self.m or self.programs < 0:
            raise InvalidInput(f"{self} is no tile; allowed are sizes from 1, low from 0 to m and programs from 0")

    @property
    def body(self) -> str:
        """What of a tile is compiled, whatever the order in which tiles are taken."""
        low = f"/{self.low}" if self.low else ""
        more = "t" * (self.swap > 0) + f"p{self.parts}" * (self.parts > 1)
        return f"{self.kernel}:{self.m}{low}x{self.n}x{self.k}.w{self.warps}.s{self.stages}{more and '.' + more}"


@dataclass(frozen=True)
class Work:
    """All launches of a config, one after the other. What is not named does not happen.

    Attributes:
        up, down: grouped products, whose sizes the call says; `up` alone is a product without a layer around it.
        atomic: `down` adds its rows to the output.
        early: launches begin before the ones before them end.
        launches: beside those of the products; on a CPU, calls of torch.
        row_hidden, row_inner, token_hidden: elements that these launches move for each routed row, times the hidden or
            the intermediate size, and for each token, times the hidden size.
        nbytes, flops: that they move and compute beside that; flops by dtype.
        instructions: that the busiest unit issues, in warps; on a CPU, elements that one core touches.
        barriers: that the busiest unit waits at, one after the other.
        idle: products among the launches that find no rows; programs: that begin there.
        meetings, linked: phases in which GPUs wait for each other, and bytes that go from this one to others in them.
        collectives, gathered: the same of a library of collectives.
        us: what the author of a kernel says that it takes. Nothing else counts then.
    """

    up: Tile | None = None
    down: Tile | None = None
    atomic: bool = False
    early: bool = False
    launches: float = 0.0
    row_hidden: float = 0.0
    row_inner: float = 0.0
    token_hidden: float = 0.0
    nbytes: float = 0.0
    flops: tuple[tuple[str, float], ...] = ()
    instructions: float = 0.0
    barriers: float = 0.0
    idle: float = 0.0
    programs: float = 0.0
    meetings: float = 0.0
    linked: float = 0.0
    collectives: float = 0.0
    gathered: float = 0.0
    us: float | None = None


@dataclass(frozen=True)
class Cell:
    """One call of one layer, as one GPU sees it: `counts` are its rows per expert. Not `whole`: `up` alone. Not
    `gated`: w1 has no rows of a gate."""

    hidden: int
    intermediate: int
    tokens: int
    counts: tuple[int, ...]
    dtype: str = "bf16"
    whole: bool = True
    gated: bool = True

    @property
    def wide(self) -> int:
        """Columns of `up`."""
        return self.intermediate * (2 if self.gated else 1)

    def __post_init__(self) -> None:
        sizes = (self.hidden, self.intermediate, self.tokens, sum(self.counts))
        if min(sizes) < 1 or min(self.counts) < 0 or self.dtype not in BYTES:
            given = (
                f"hidden={self.hidden}, intermediate={self.intermediate}, tokens={self.tokens}, dtype={self.dtype!r}"
            )
            raise InvalidInput(
                f"{given}, {sum(self.counts)} rows; allowed are sizes from 1, counts from 0 and {', '.join(BYTES)}"
            )
