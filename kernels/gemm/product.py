"""One product of an MoE layer on a GPU: what a config says of it, what fits a device, how it is launched and compiled.

A product runs in one of two kernels: `tile` (Triton, any GPU; gemm/tile.py) or `ring` (Gluon, Hopper alone;
gemm/ring.py). Both read rows in the blocks of MoE sorting.
"""

from dataclasses import dataclass, fields
from functools import cache, lru_cache
from math import ceil
from typing import Any

from moecache.kernels import activations
from moecache.kernels.agreed import RING_BOX
from moecache.kernels.gemm import tile as gemm
from moecache.kernels.gemm.work import KERNELS as KERNELS
from moecache.kernels.launch import Box, Launch, Operand, launch, part
from moecache.kernels.matrix import DTYPES, until_summed
from moecache.schemas.config import Config
from moecache.schemas.device import Device

BY_ROW, BY_PAIR, BY_LIST = 0, 1, 2  # which row of A a sorted row reads: its own, its pair's (token's), ROWS[pair]


@dataclass(frozen=True)
class Product:
    """What one kernel launch is made of.

    Attributes:
        kernel: "tile" or "ring".
        block: rows of a tile, those of a block of the sort. low: rows of the tile that a block with few rows takes.
        n, k: columns of a tile (a panel of W is n rows of it), and depth of one step.
        stages, warps: of the software pipeline or the ring; warps that multiply.
        group: blocks that share a panel of W before the next panel is read.
        programs: of a persistent launch; 0 = one a tile.
        swap: the transposed product, for few rows. tma: W through tensor descriptors.
        parts: groups of `warps` warps that multiply (ring): in turns, or each half of a tile of 256 rows.
        pdl: programmatic dependent launch. xcds: dies whose L2s are apart. options: compiler knobs.
    """

    kernel: str
    block: int
    low: int
    n: int
    k: int
    stages: int
    warps: int
    group: int = 1
    programs: int = 0
    swap: int = 0
    tma: int = 0
    parts: int = 1
    pdl: int = 0
    xcds: int = 1
    options: tuple[tuple[str, Any], ...] = ()


SINGLE = {"nvidia": 32, "amd": 64}  # sums a thread where rows are read one value at a time, which takes registers
_OWN = {field.name for field in fields(Product)} - {"kernel", "options"}


@lru_cache(maxsize=4096)
def product(config: Config, kernel: str, prefix: str) -> Product:
    """The part of a config whose parameters begin with `prefix`, and those that both parts share."""
    known = dict(config.params)
    own: dict[str, Any] = {name: known[name] for name in _OWN if name in known}
    own |= {name[len(prefix) :]: value for name, value in known.items() if name.startswith(prefix)}
    extra = dict(config.extra)
    own |= {"pdl": int(extra.pop("launch_pdl", 0)), "xcds": int(extra.pop("xcds", 1))}
    own.setdefault("low", own["block"])
    return Product(kernel, **{k: v for k, v in own.items() if k in _OWN}, options=tuple(sorted(extra.items())))


def unfit(p: Product, device: Device, dtype: str, depth: int, panels: int, aligned: bool) -> str:
    """Why this product cannot run, or ''. `depth` is K; `panels` of W a tile reads (gate and up: 2)."""
    sizes = (p.block, p.low, p.n, p.k, p.warps)
    if any(size < 1 or size & (size - 1) for size in sizes) or p.low > p.block or p.block > 256:
        return (
            f"block={p.block}, low={p.low}, n={p.n}, k={p.k}, warps={p.warps}; allowed are powers of two, low ≤ block"
        )
    if min(p.low, p.n, p.k) < 16 or not 1 <= p.stages <= 12 or p.warps * device.wave > device.max_threads:
        return (
            f"low={p.low}, n={p.n}, k={p.k} under 16, stages={p.stages} past 12, or {p.warps} warps: too many threads"
        )
    if p.group < 1 or p.programs < 0 or p.xcds < 1 or p.tma not in (0, 1) or p.swap not in (0, 1):
        return f"group={p.group}, programs={p.programs}, xcds={p.xcds}, tma={p.tma}, swap={p.swap} are no choices"
    if p.tma and (device.vendor != "nvidia" or not aligned or p.n > 256 or (p.low != p.block and p.block > 128)):
        return "tma=1 wants NVIDIA, rows that start on 16 bytes, and at most 256 columns"
    if p.pdl and device.vendor != "nvidia":
        return "launch_pdl=1: only NVIDIA has programmatic dependent launch"
    size = DTYPES[dtype].itemsize
    if p.kernel == "ring":
        why = _unfit_ring(p, device, size, aligned and depth % 16 == 0)
    else:
        why = _unfit_tile(p, device, size, panels, aligned and depth % 16 == 0)
    written = size if panels == 2 else until_summed(DTYPES[dtype]).itemsize
    if p.kernel == "ring" and p.block > 128 and written > 2:
        return "a ring of 256 rows that writes four bytes a value spills"
    return why or _too_big(shared(p, device, size, panels, written), device)


def _too_big(used: int, device: Device) -> str:
    fits = used <= device.shared_bytes
    return "" if fits else f"about {used} bytes of shared memory; the device has {device.shared_bytes}"


def _unfit_tile(p: Product, device: Device, size: int, panels: int, wide: bool) -> str:
    lanes = p.warps * device.wave
    sums = panels * p.block * p.n // lanes
    most = 128 if device.vendor == "nvidia" else 64 if device.wave == 64 and p.warps > 4 else 128
    most = most if wide else min(most, SINGLE.get(device.vendor, most))
    if sums > most or (size == 4 and sums > 32):
        return f"{sums} sums a thread; without spills {most} are possible"
    return "" if p.parts == 1 else "parts: only a ring has them"


def _unfit_ring(p: Product, device: Device, size: int, aligned: bool) -> str:
    if device.arch != "sm_90" or size != 2 or not aligned:
        return "a ring wants sm_90, two-byte values, rows that start on 16 bytes and a depth that 16 divides"
    if p.swap:
        good = p.parts == 1 and p.warps == 4 and p.n in (64, 128) and 16 <= p.block <= 64
    else:
        shape = (p.block, p.warps, p.parts)
        wide = p.n in (64, 128) and shape in ((64, 4, 1), (64, 4, 2), (128, 8, 1))
        good = wide or (p.n == 64 and shape == (256, 4, 2))
    if not good or p.k not in (64, 128) or not p.programs or p.low != p.block:
        return f"block={p.block}, n={p.n}, k={p.k}, warps={p.warps}, parts={p.parts}: no ring of this shape exists"
    if p.stages < 2:  # a slot is handed back one step late
        return f"stages={p.stages}; a ring has at least 2"
    return ""


def shared(p: Product, device: Device, size: int, panels: int, written: int = 2) -> int:
    """Shared memory of one program, as Triton lays it out; `size` and `written`: bytes of a value read, and written."""
    step = (p.block + panels * p.n) * p.k * size
    if p.kernel == "ring":
        step = (p.block + 2 * p.n) * p.k * size
        # what changing the layout of a finished tile takes
        turned = (
            p.block * p.n * 4
            if p.swap and written == 4
            else 2048
            if p.swap
            else p.block * p.n * size
            if p.warps > 4
            else 8192 * p.parts
        )
        return p.stages * step + turned + 512 + 48 * (p.stages + 3)  # barriers, and the items that warps name
    if device.vendor == "amd":  # one buffer fewer on gfx942, padded ones on gfx950
        return step * max(1, p.stages - 1) if device.arch == "gfx942" else int(step * p.stages * 1.06)
    return max(step * p.stages, p.block * p.n * max(written, 2 * panels)) + 1024


@lru_cache(maxsize=4096)
def constants(
    p: Product, topk: int, source: int, act: str, weighted: bool, biased: bool, atomic: bool, depth: int
) -> Any:
    """(jit function, its constexprs, launch options) of a product."""
    c: dict[str, Any] = {
        "TOPK": topk, "BLOCK": p.block, "LOW": p.low, "BM": p.block, "BN": p.n, "BK": p.k, "STAGES": p.stages,
        "GROUP": p.group, "XCDS": p.xcds, "SOURCE": source, "ACT": act, "WEIGHTED": weighted, "BIASED": biased,
        "ATOMIC": atomic, "SWAP": p.swap, "TMA": p.tma, "TMA_A": bool(p.tma and p.block >= 64 and source == BY_ROW),
        "EVEN": depth % p.k == 0, "PDL": bool(p.pdl),
    }
    options: dict[str, Any] = {"num_warps": p.warps, **dict(p.options)} | ({"launch_pdl": True} if p.pdl else {})
    if p.kernel == "ring":
        from moecache.kernels.gemm import ring

        c |= {"STEP": p.n if activations.panels(act) == 2 else 2 * p.n, "PARTS": p.parts, "num_warps": p.warps}
        fn: Any = ring.product
    else:
        fn = gemm.up if act else gemm.down
    return fn, {name: value for name, value in c.items() if name in fn.arg_names}, options


def described(w: Operand, rows: int, p: Product, height: int) -> Box:
    """A descriptor of blocks of `height` rows over a matrix of that many rows, p.k or RING_BOX deep."""
    deep, layout = (RING_BOX, ring_layout(16)) if p.kernel == "ring" else (p.k, None)
    return Box(w, (rows, w.shape[-1]), (w.strides[-2], 1), (height, deep), layout)


@cache
def ring_layout(bits: int) -> Any:
    """How a ring keeps rows of values of that many bits in shared memory."""
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout(128, bits, 2)


def multiply(
    p: Product,
    a: Operand,
    w: Operand,
    rows: Any,
    out: Operand,
    *,
    pairs: int,
    topk: int,
    source: int,
    act: str = "",
    alpha: float = 0.0,
    limit: float = 0.0,
    weights: Operand | None = None,
    bias: Operand | None = None,
    listed: Operand | None = None,
    atomic: bool = False,
) -> Launch:
    """One product into `out`.

    With `act`, a word of activations.py, [sorted rows, N] of both halves of w, or of all of it without a gate. Else
    [pairs, N], or added to [tokens, N] if atomic. `rows` is a SortResult; `weights` scales rows by pair.
    """
    experts, height, depth = w.shape
    n = height // activations.panels(act)
    fn, c, options = constants(p, topk, source, act, weights is not None, bias is not None, atomic, depth)
    per = w.strides[0] // w.strides[1] if p.tma or p.kernel == "ring" else height
    whole = (experts - 1) * per + height
    order, owners, total = rows.sorted_token_ids, rows.expert_ids, rows.num_tokens_post_padded
    weights, bias, listed = (rows.counts if t is None else t for t in (weights, bias, listed))
    gated = activations.panels(act) == 2
    columns = p.n if gated or p.kernel == "tile" else 2 * p.n
    tiles = ceil(order.numel() / p.block) * ceil(n / columns)
    grid = min(tiles, p.programs) if p.programs else tiles
    alpha, limit = float(alpha), float(limit)
    if p.kernel == "ring":
        tickets = part(rows.tickets, 0 if act else 4, 4)
        args = (a, described(w, whole, p, p.n), out, bias, weights, order, owners, total, tickets, listed, pairs,
                a.strides[0], out.strides[0], per, n if gated else p.n, n, depth, alpha, limit)
        return launch(fn, grid, args, c, options)
    wd = described(w, whole, p, p.n) if p.tma else w
    if act:
        args = (a, wd, bias, out, weights, order, owners, total, pairs, a.strides[0], per, *w.strides[:2], n, depth,
                alpha, limit)
        return launch(fn, grid, args, c, options)
    at = described(a, len(a), p, p.block) if c["TMA_A"] else a
    args = (a, at, wd, bias, out, weights, order, owners, total, listed, pairs, a.strides[0], per, *w.strides[:2],
            out.strides[0], n, depth)
    return launch(fn, grid, args, c, options)
