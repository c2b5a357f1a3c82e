"""Each group of instructions of the CDNA interpreter (tests/cdna) against numpy or torch."""

import itertools
import re
import struct
import sys
import zlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from cdna import assembly, library
from cdna.device import LATE, PLAIN, Mode, Work, run

pytestmark = pytest.mark.skipif(
    library.compiler() is None, reason="no C compiler named cc, which builds the interpreter"
)

LANE = np.arange(64, dtype=np.uint32)
RNG = np.random.default_rng(0)
ARCHS = ("gfx942", "gfx950")


@pytest.fixture(autouse=True)
def drawn_anew(request: pytest.FixtureRequest) -> None:
    """Each test has its own random values, whatever ran before it."""
    global RNG
    RNG = np.random.default_rng(zlib.crc32(request.node.name.encode()))


def execute(
    lines: Sequence[str],
    *given: np.ndarray,
    out: Sequence[int] = (10,),
    arch: str = "gfx942",
    lds: int = 0,
    mode: Mode = PLAIN,
    words: int = 4096,
    wrong: str = "",
) -> list[np.ndarray]:
    """Registers `out` of a wave's 64 lanes after the lines. `given` are 32-bit values of the lanes in v1, v2, …; v0 is
    the lane, v255 four times that. s[4:5] is the address of what is given, s[6:7] of `words` words of zeros, of which
    those from 4 · 64 · len(out) on come back last."""
    memory = np.concatenate([np.asarray(g).view(np.uint32) for g in given]) if given else np.zeros(1, np.uint32)
    written = np.zeros(words, np.uint32)
    before = [
        "s_load_dwordx2 s[4:5], s[0:1], 0x0",
        "s_load_dwordx2 s[6:7], s[0:1], 0x8",
        "s_waitcnt lgkmcnt(0)",
        "v_lshlrev_b32_e32 v255, 2, v0",
        *(f"global_load_dword v{i + 1}, v255, s[4:5] offset:{256 * i}" for i in range(len(given))),
        "s_waitcnt vmcnt(0)",
    ]
    after = [f"global_store_dword v255, v{index}, s[6:7] offset:{256 * i}" for i, index in enumerate(out)]
    kernel = assembly.of_lines([*before, *lines, *after, "s_endpgm"], arch)
    addresses = [array.ctypes.data for array in (memory, written)]
    regions = [(array.ctypes.data, array.nbytes) for array in (memory, written)]
    _, text = run([Work(kernel, (1,), 1, lds, addresses, regions)], mode)
    assert wrong in text and bool(text) == bool(wrong), text
    return [*written[: 64 * len(out)].reshape(-1, 64), written[64 * len(out) :]]


def draws(count: int = 64) -> np.ndarray:
    """Random words with some that matter."""
    edges = np.array([0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFF, 0x8000, 0x7FFF], np.uint32)
    values = RNG.integers(0, 1 << 32, count, dtype=np.uint32)
    at = RNG.permutation(count)[: len(edges)]
    values[at] = edges[: len(at)]
    return values


def floats(small: bool = False) -> np.ndarray:
    """Random float32 with zeros, infinities, NaN and subnormal ones; `small`: ordinary ones alone."""
    values = (RNG.standard_normal(64) * 2.0 ** RNG.integers(-8, 8, 64)).astype(np.float32)
    if not small:
        values[RNG.permutation(64)[:8]] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-42, 3e38]
    return values


def same(got: np.ndarray, want: np.ndarray, what: str = "") -> None:
    """Bit for bit; any NaN for a NaN."""
    want = np.asarray(want)
    mine = got.view(want.dtype) if want.dtype.itemsize == 4 else got
    good = mine == want
    if want.dtype.kind == "f":
        good = (np.isnan(mine) & np.isnan(want)) | (good & (np.signbit(mine) == np.signbit(want)))
    assert good.all(), f"{what}: lanes {np.flatnonzero(~good)[:8]}: {mine[~good][:8]} instead of {want[~good][:8]}"


def i32(x: Any) -> Any:
    return np.asarray(x).astype(np.uint32).view(np.int32)


def i64(x: Any) -> Any:
    return i32(x).astype(np.int64)


def u64(x: Any) -> Any:
    return np.asarray(x).astype(np.uint64)


def u32(x: Any) -> Any:
    return (np.asarray(x).astype(np.int64) & 0xFFFFFFFF).astype(np.uint32)


def s16(x: Any) -> Any:
    return (np.asarray(x) & 0xFFFF).astype(np.uint16).view(np.int16).astype(np.int64)


def s24(x: Any) -> Any:
    return i64(np.asarray(x) << np.uint32(8)) >> 8


def popcount(x: Any) -> Any:
    return np.array([int(v).bit_count() for v in x], np.uint32)


def reversed_bits(x: Any) -> Any:
    return np.array([int(f"{int(v):032b}"[::-1], 2) for v in x], np.uint32)


def cut(x: Any, first: Any, width: Any, signed: bool) -> Any:
    """A field of bits of Python integers."""
    value = [(int(a) >> (int(f) & 31)) & ((1 << (int(w) & 31)) - 1) for a, f, w in zip(x, first, width, strict=True)]
    if signed:
        value = [
            v - (1 << w) if w and v >> (w - 1) else v for v, w in zip(value, (int(w) & 31 for w in width), strict=True)
        ]
    return u32(value)


def funnel(a: Any, b: Any) -> Any:
    return (u64(a) << np.uint64(32)) | u64(b)


def chosen_bytes(a: Any, b: Any, c: Any) -> Any:
    found = []
    for high, low, which in zip(a, b, c, strict=True):
        bytes_ = struct.pack("<II", int(low), int(high))
        one = []
        for index in struct.pack("<I", int(which)):
            sign = bytes_[2 * (index - 8) + 1] >> 7 if 8 <= index < 12 else 0
            one.append(bytes_[index] if index < 8 else 255 * sign if index < 12 else 0 if index == 12 else 255)
        found.append(int.from_bytes(bytes(one), "little"))
    return np.array(found, np.uint32)


# --- integers in lanes: text with {0}, {1}, … for the operands, and what numpy says ---

BELOW = np.array([(1 << lane) - 1 for lane in range(64)], np.uint64)
ALONE = "dst_sel:DWORD dst_unused:UNUSED_PAD"
WORDS: dict[str, Callable[..., Any]] = {
    "v_mov_b32_e32 v10, {0}": lambda a: a,
    "v_accvgpr_write_b32 a3, {0}\nv_accvgpr_mov_b32 a4, a3\nv_accvgpr_read_b32 v10, a4": lambda a: a,
    "v_not_b32_e32 v10, {0}": lambda a: ~a,
    "v_and_b32_e32 v10, {0}, {1}": lambda a, b: a & b,
    "v_or_b32_e32 v10, {0}, {1}": lambda a, b: a | b,
    "v_xor_b32_e32 v10, {0}, {1}": lambda a, b: a ^ b,
    "v_xnor_b32_e32 v10, {0}, {1}": lambda a, b: ~(a ^ b),
    "v_and_or_b32 v10, {0}, {1}, {2}": lambda a, b, c: (a & b) | c,
    "v_or3_b32 v10, {0}, {1}, {2}": lambda a, b, c: a | b | c,
    "v_bfi_b32 v10, {0}, {1}, {2}": lambda a, b, c: (a & b) | (~a & c),
    "v_bfe_u32 v10, {0}, {1}, {2}": lambda a, b, c: cut(a, b, c, False),
    "v_bfe_i32 v10, {0}, {1}, {2}": lambda a, b, c: cut(a, b, c, True),
    "v_bfm_b32 v10, {0}, {1}": lambda a, b: u32(((1 << (a.astype(np.int64) & 31)) - 1) << (b & 31)),
    "v_bfrev_b32_e32 v10, {0}": reversed_bits,
    "v_ffbh_u32_e32 v10, {0}": lambda a: u32([32 - int(x).bit_length() if x else -1 for x in a]),
    "v_ffbl_b32_e32 v10, {0}": lambda a: u32([(int(x) & -int(x)).bit_length() - 1 if x else -1 for x in a]),
    "v_bcnt_u32_b32 v10, {0}, {1}": lambda a, b: popcount(a) + b,
    "v_mbcnt_lo_u32_b32 v10, {0}, {1}": lambda a, b: popcount(u64(a) & BELOW & np.uint64(0xFFFFFFFF)) + b,
    "v_mbcnt_hi_u32_b32 v10, {0}, {1}": lambda a, b: popcount(u64(a) & (BELOW >> np.uint64(32))) + b,
    "v_lshlrev_b32_e32 v10, {0}, {1}": lambda a, b: b << (a & 31),
    "v_lshrrev_b32_e32 v10, {0}, {1}": lambda a, b: b >> (a & 31),
    "v_ashrrev_i32_e32 v10, {0}, {1}": lambda a, b: u32(i64(b) >> (a & 31)),
    "v_lshlrev_b16_e32 v10, {0}, {1}": lambda a, b: (b << (a & 15)) & 0xFFFF,
    "v_lshrrev_b16_e32 v10, {0}, {1}": lambda a, b: (b & 0xFFFF) >> (a & 15),
    "v_ashrrev_i16_e32 v10, {0}, {1}": lambda a, b: u32(s16(b) >> (a & 15)) & 0xFFFF,
    "v_lshl_or_b32 v10, {0}, {1}, {2}": lambda a, b, c: (a << (b & 31)) | c,
    "v_alignbit_b32 v10, {0}, {1}, {2}": lambda a, b, c: (funnel(a, b) >> u64(c & 31)).astype(np.uint32),
    "v_alignbyte_b32 v10, {0}, {1}, {2}": lambda a, b, c: (funnel(a, b) >> u64(8 * (c & 3))).astype(np.uint32),
    "v_bitop3_b32 v10, {0}, {1}, {2} bitop3:0x96": lambda a, b, c: a ^ b ^ c,
    "v_bitop3_b32 v10, {0}, {1}, {2} bitop3:0xca": lambda a, b, c: (a & b) | (~a & c),
    "v_bitop3_b16 v10, {0}, {1}, {2} bitop3:0x40\nv_and_b32_e32 v10, 0xffff, v10": lambda a, b, c: a & b & ~c & 0xFFFF,
    "v_pack_b32_f16 v10, {0}, {1}": lambda a, b: (a & 0xFFFF) | (b << 16),
    "v_pack_b32_f16 v10, {0}, {1} op_sel:[1,1,0]": lambda a, b: (a >> 16) | (b & np.uint32(0xFFFF0000)),
    "v_add_u32_e32 v10, {0}, {1}": lambda a, b: a + b,
    "v_add_u32_e64 v10, {0}, {1} clamp": lambda a, b: np.minimum(u64(a) + u64(b), 0xFFFFFFFF).astype(np.uint32),
    "v_sub_u32_e32 v10, {0}, {1}": lambda a, b: a - b,
    "v_sub_u32_e64 v10, {0}, {1} clamp": lambda a, b: np.where(a > b, a - b, 0).astype(np.uint32),
    "v_subrev_u32_e32 v10, {0}, {1}": lambda a, b: b - a,
    "v_add3_u32 v10, {0}, {1}, {2}": lambda a, b, c: a + b + c,
    "v_add_lshl_u32 v10, {0}, {1}, {2}": lambda a, b, c: (a + b) << (c & 31),
    "v_lshl_add_u32 v10, {0}, {1}, {2}": lambda a, b, c: (a << (b & 31)) + c,
    "v_xad_u32 v10, {0}, {1}, {2}": lambda a, b, c: (a ^ b) + c,
    "v_mul_lo_u32 v10, {0}, {1}": lambda a, b: a * b,
    "v_mul_hi_u32 v10, {0}, {1}": lambda a, b: ((u64(a) * u64(b)) >> np.uint64(32)).astype(np.uint32),
    "v_mul_hi_i32 v10, {0}, {1}": lambda a, b: u32((i64(a) * i64(b)) >> 32),
    "v_mul_u32_u24_e32 v10, {0}, {1}": lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF),
    "v_mad_u32_u24 v10, {0}, {1}, {2}": lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF) + c,
    "v_mul_i32_i24_e32 v10, {0}, {1}": lambda a, b: u32(s24(a) * s24(b)),
    "v_mad_i32_i24 v10, {0}, {1}, {2}": lambda a, b, c: u32(s24(a) * s24(b)) + c,
    "v_add_u16_e32 v10, {0}, {1}": lambda a, b: (a + b) & 0xFFFF,
    "v_sub_u16_e32 v10, {0}, {1}": lambda a, b: (a - b) & 0xFFFF,
    "v_subrev_u16_e32 v10, {0}, {1}": lambda a, b: (b - a) & 0xFFFF,
    "v_mul_lo_u16_e32 v10, {0}, {1}": lambda a, b: (a * b) & 0xFFFF,
    "v_mad_u16 v10, {0}, {1}, {2}": lambda a, b, c: (a * b + c) & 0xFFFF,
    "v_min_u32_e32 v10, {0}, {1}": np.minimum,
    "v_max_u32_e32 v10, {0}, {1}": np.maximum,
    "v_min_i32_e32 v10, {0}, {1}": lambda a, b: u32(np.minimum(i32(a), i32(b))),
    "v_max_i32_e32 v10, {0}, {1}": lambda a, b: u32(np.maximum(i32(a), i32(b))),
    "v_min_u16_e32 v10, {0}, {1}": lambda a, b: np.minimum(a & 0xFFFF, b & 0xFFFF),
    "v_max_u16_e32 v10, {0}, {1}": lambda a, b: np.maximum(a & 0xFFFF, b & 0xFFFF),
    "v_min_i16_e32 v10, {0}, {1}": lambda a, b: u32(np.minimum(s16(a), s16(b))) & 0xFFFF,
    "v_max_i16_e32 v10, {0}, {1}": lambda a, b: u32(np.maximum(s16(a), s16(b))) & 0xFFFF,
    "v_min3_u32 v10, {0}, {1}, {2}": lambda *x: np.min(x, 0),
    "v_max3_u32 v10, {0}, {1}, {2}": lambda *x: np.max(x, 0),
    "v_med3_u32 v10, {0}, {1}, {2}": lambda *x: np.sort(x, 0)[1],
    "v_min3_i32 v10, {0}, {1}, {2}": lambda *x: u32(np.min([i32(v) for v in x], 0)),
    "v_max3_i32 v10, {0}, {1}, {2}": lambda *x: u32(np.max([i32(v) for v in x], 0)),
    "v_med3_i32 v10, {0}, {1}, {2}": lambda *x: u32(np.sort([i32(v) for v in x], 0)[1]),
    "v_perm_b32 v10, {0}, {1}, {2}": chosen_bytes,
    "v_swap_b32 {0}, {1}\nv_mov_b32_e32 v10, {0}": lambda a, b: b,
    # SDWA: bytes and halves of operands, and of the result
    f"v_and_b32_sdwa v10, {{0}}, {{1}} {ALONE} src0_sel:WORD_1 src1_sel:DWORD": lambda a, b: (a >> 16) & b,
    f"v_add_u32_sdwa v10, sext({{0}}), {{1}} {ALONE} src0_sel:BYTE_3 src1_sel:BYTE_1": lambda a, b: u32(
        (i64(a) >> 24) + ((b >> 8) & 255)
    ),
    "v_or_b32_sdwa {0}, {1}, {2} dst_sel:BYTE_1 dst_unused:UNUSED_PRESERVE src0_sel:WORD_0 src1_sel:BYTE_2\n"
    "v_mov_b32_e32 v10, {0}": lambda a, b, c: (a & np.uint32(0xFFFF00FF)) | (((b | (c >> 16)) & 255) << 8),
    "v_lshlrev_b16_sdwa v10, {0}, {1} dst_sel:WORD_1 dst_unused:UNUSED_PAD src0_sel:DWORD src1_sel:BYTE_0": (
        lambda a, b: ((b & 255) << (a & 15) & 0xFFFF) << 16
    ),
}


@pytest.mark.parametrize("text", WORDS)
def test_words(text: str) -> None:
    count = max(int(found) for found in re.findall(r"\{(\d)\}", text)) + 1
    given = [draws() for _ in range(count)]
    if "v_perm_b32" in text:
        given[2] &= np.uint32(0x0F0F0F0F)
    lines = text.format(*(f"v{i + 1}" for i in range(count))).split("\n")
    with np.errstate(over="ignore"):
        same(execute(lines, *given)[0], np.asarray(WORDS[text](*given)).astype(np.uint32), text)


# --- integers of 64 bits, carries ---

LONG: dict[str, Callable[..., Any]] = {
    "v_mov_b64_e32 v[10:11], v[1:2]": lambda a, b, c, d: funnel(b, a),
    "v_lshlrev_b64 v[10:11], v3, v[1:2]": lambda a, b, c, d: funnel(b, a) << u64(c & 63),
    "v_lshrrev_b64 v[10:11], v3, v[1:2]": lambda a, b, c, d: funnel(b, a) >> u64(c & 63),
    "v_ashrrev_i64 v[10:11], v3, v[1:2]": lambda a, b, c, d: (funnel(b, a).view(np.int64) >> (c & 63)).view(np.uint64),
    "v_lshl_add_u64 v[10:11], v[1:2], 3, v[3:4]": lambda a, b, c, d: (funnel(b, a) << np.uint64(3)) + funnel(d, c),
    "v_mad_u64_u32 v[10:11], s[20:21], v1, v2, v[3:4]": lambda a, b, c, d: u64(a) * u64(b) + funnel(d, c),
    "v_mad_i64_i32 v[10:11], s[20:21], v1, v2, v[3:4]": lambda a, b, c, d: (
        (i64(a) * i64(b)).view(np.uint64) + funnel(d, c)
    ),
    "v_add_co_u32_e32 v10, vcc, v1, v3\nv_addc_co_u32_e32 v11, vcc, v2, v4, vcc": lambda a, b, c, d: (
        funnel(b, a) + funnel(d, c)
    ),
    "v_sub_co_u32_e32 v10, vcc, v1, v3\nv_subb_co_u32_e32 v11, vcc, v2, v4, vcc": lambda a, b, c, d: (
        funnel(b, a) - funnel(d, c)
    ),
    "v_subrev_co_u32_e64 v10, s[20:21], v1, v3\nv_subbrev_co_u32_e64 v11, vcc, v2, v4, s[20:21]": lambda a, b, c, d: (
        funnel(d, c) - funnel(b, a)
    ),
}


@pytest.mark.parametrize("text", LONG)
def test_long_integers(text: str) -> None:
    given = [draws() for _ in range(4)]
    low, high, _ = execute(text.split("\n"), *given, out=(10, 11))
    with np.errstate(over="ignore"):
        want = LONG[text](*given)
    assert (funnel(high, low) == want).all()


# --- comparisons ---

TESTS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lg": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
INTEGERS = {"i32": i32, "u32": u32, "i16": s16, "u16": lambda x: x & 0xFFFF}
COMPARED = [f"v_cmp_{test}_{kind}" for test in ("eq", "ne", "lt", "le", "gt", "ge") for kind in INTEGERS]
COMPARED_LONG = [f"v_cmp_{test}_{kind}" for test in ("eq", "ne", "lt", "le", "gt", "ge") for kind in ("i64", "u64")]
ORDERED = ("eq", "lg", "lt", "le", "gt", "ge")
COMPARED_FLOATS = [
    f"v_cmp_{test}_{kind}"
    for kind in ("f32", "f16")
    for test in (*ORDERED, "neq", *(f"n{test}" for test in ORDERED[1:]), "o", "u")
]


def mask(name: str, *given: np.ndarray, left: str = "v1", right: str = "v2") -> np.ndarray:
    """The mask of a comparison, one lane after the other."""
    shown = f"{name} s[20:21], {left}, {right}"
    lines = [shown, "v_mov_b32_e32 v10, 0", "v_cndmask_b32_e64 v10, v10, 1, s[20:21]"]
    return execute(lines, *given)[0].astype(bool)


@pytest.mark.parametrize("name", COMPARED)
def test_compared_integers(name: str) -> None:
    a, b = draws(), draws()
    b[::3] = a[::3]
    _, _, test, kind = name.split("_")
    assert (mask(f"{name}_e64", a, b) == TESTS[test](INTEGERS[kind](a), INTEGERS[kind](b))).all()
    small = [v & np.uint32(255) for v in (a, b)]
    part = "src0_sel:BYTE_0 src1_sel:BYTE_0"
    assert (mask(f"{name}_sdwa", a, b, right=f"v2 {part}") == TESTS[test](*small)).all()


@pytest.mark.parametrize("name", COMPARED_LONG)
def test_compared_long_integers(name: str) -> None:
    given = [draws() for _ in range(4)]
    for one, other in ((0, 2), (1, 3)):
        given[other][::3] = given[one][::3]
    kind = np.int64 if name.endswith("i64") else np.uint64
    a, b = (funnel(given[i + 1], given[i]).view(kind) for i in (0, 2))
    got = mask(f"{name}_e64", *given, left="v[1:2]", right="v[3:4]")
    assert (got == TESTS[name.split("_")[2]](a, b)).all()


@pytest.mark.parametrize("name", COMPARED_FLOATS)
def test_compared_floats(name: str) -> None:
    a, b = floats(), floats()
    b[::3] = a[::3]
    _, _, test, kind = name.split("_")
    if kind == "f16":
        with np.errstate(over="ignore"):
            a, b = a.astype(np.float16), b.astype(np.float16)
    lost = np.isnan(a) | np.isnan(b)
    positive = {f"n{t}": t for t in ORDERED}
    want = ~lost if test == "o" else lost if test == "u" else TESTS[positive.get(test, test)](a, b) & ~lost
    want = ~want if test in positive else want
    given = [x.view(np.uint16).astype(np.uint32) if kind == "f16" else x for x in (a, b)]
    assert (mask(f"{name}_e64", *given) == want).all()
    if kind == "f32":
        assert (mask("v_cmp_lt_f32_e64", a, b, left="-|v1|", right="|v2|") == ((-abs(a) < abs(b)) & ~lost)).all()


def test_classes_of_floats() -> None:
    values = np.array([np.nan, -np.inf, -2.0, -1e-40, -0.0, 0.0, 1e-40, 2.0, np.inf], np.float32)
    for number, bit in enumerate((1, 2, 3, 4, 5, 6, 7, 8, 9)):
        got = mask("v_cmp_class_f32_e64", np.resize(values, 64), np.full(64, 1 << bit, np.uint32))
        assert (got == (np.arange(64) % 9 == number)).all()


def test_lanes_that_do_not_work_keep_their_values_and_give_no_bit() -> None:
    a = draws()
    lines = [
        "s_mov_b64 exec, 0xf0",
        "v_mov_b32_e32 v10, v1",
        "v_cmp_eq_u32_e64 s[20:21], v1, v1",
        "s_mov_b64 exec, -1",
        "v_mov_b32_e32 v11, s20",
        "v_mov_b32_e32 v12, s21",
    ]
    moved, low, high, _ = execute(["v_mov_b32_e32 v10, 7", *lines], a, out=(10, 11, 12))
    assert (moved == np.where((LANE >= 4) & (LANE < 8), a, 7)).all() and set(low) == {0xF0} and set(high) == {0}


# --- float32 and float16 ---


def least(*x: np.ndarray) -> Any:
    """NaN loses, −0 is below 0."""
    best = x[0]
    for other in x[1:]:
        lower = np.where((best == other) & np.signbit(other), other, np.where(other < best, other, best))
        best = np.where(np.isnan(best), other, np.where(np.isnan(other), best, lower))
    return best


def most(*x: np.ndarray) -> Any:
    return -least(*(-v for v in x))


def middle(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> Any:
    lost = np.isnan(a) | np.isnan(b) | np.isnan(c)
    return np.where(lost, least(a, b, c), most(least(a, b), least(most(a, b), c)))


def fused(a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once: float64 is near, and where it lies between two float32 the exact sum decides."""
    a, b, c = (np.broadcast_to(np.asarray(v, np.float32), (64,)) for v in (a, b, c))
    near = (a.astype(np.float64) * b + c).astype(np.float32)
    for lane in np.flatnonzero(np.isfinite(near)):
        exact = Fraction(float(a[lane])) * Fraction(float(b[lane])) + Fraction(float(c[lane]))
        beside = [near[lane], *(np.nextafter(near[lane], np.float32(end)) for end in (-np.inf, np.inf))]
        near[lane] = min(
            (v for v in beside if np.isfinite(v)),
            key=lambda v: (abs(Fraction(float(v)) - exact), int(v.view(np.uint32)) & 1),
        )
    return near


EXACT: dict[str, Callable[..., Any]] = {
    "v_add_f32_e32 v10, v1, v2": lambda a, b, c: a + b,
    "v_sub_f32_e32 v10, v1, v2": lambda a, b, c: a - b,
    "v_subrev_f32_e32 v10, v1, v2": lambda a, b, c: b - a,
    "v_mul_f32_e32 v10, v1, v2": lambda a, b, c: a * b,
    "v_mul_f32_e64 v10, -v1, |v2| mul:2": lambda a, b, c: -a * abs(b) * 2,
    "v_add_f32_e64 v10, v1, 1.0 div:2": lambda a, b, c: (a + 1) / 2,
    "v_add_f32_e64 v10, v1, v2 clamp": lambda a, b, c: np.where(a + b > 0, np.minimum(a + b, 1), 0),
    "v_min_f32_e32 v10, v1, v2": lambda a, b, c: least(a, b),
    "v_max_f32_e32 v10, v1, v2": lambda a, b, c: most(a, b),
    "v_min3_f32 v10, v1, v2, v3": least,
    "v_max3_f32 v10, v1, v2, v3": most,
    "v_minimum3_f32 v10, v1, v2, v3": lambda *x: np.where(np.isnan(sum(map(abs, x))), np.nan, least(*x)),
    "v_maximum3_f32 v10, v1, v2, v3": lambda *x: np.where(np.isnan(sum(map(abs, x))), np.nan, most(*x)),
    "v_med3_f32 v10, v1, v2, v3": middle,
    "v_fma_f32 v10, v1, v2, v3": fused,
    "v_fma_f32 v10, -v1, v2, 1.0": lambda a, b, c: fused(-a, b, 1.0),
    "v_mov_b32_e32 v10, v3\nv_fmac_f32_e32 v10, v1, v2": fused,
    "v_fmaak_f32 v10, v1, v2, 0x40400000": lambda a, b, c: fused(a, b, 3.0),
    "v_fmamk_f32 v10, v1, 0x40400000, v2": lambda a, b, c: fused(a, np.float32(3.0), b),
    "v_sqrt_f32_e32 v10, v1": lambda a, b, c: np.sqrt(a),
    "v_rndne_f32_e32 v10, v1": lambda a, b, c: np.rint(a),
    "v_floor_f32_e32 v10, v1": lambda a, b, c: np.floor(a),
    "v_ceil_f32_e32 v10, v1": lambda a, b, c: np.ceil(a),
    "v_trunc_f32_e32 v10, v1": lambda a, b, c: np.trunc(a),
    "v_fract_f32_e32 v10, v1": lambda a, b, c: a - np.floor(a),
    "v_rcp_f32_e32 v10, v1": lambda a, b, c: np.float32(1) / a,
    "v_rcp_iflag_f32_e32 v10, v1": lambda a, b, c: np.float32(1) / a,
    "v_rsq_f32_e32 v10, v1": lambda a, b, c: np.float32(1) / np.sqrt(a),
    "v_cvt_i32_f32_e32 v10, v1": lambda a, b, c: u32(
        np.clip(np.nan_to_num(np.trunc(a.astype(np.float64)), posinf=2**31), -(2**31), 2**31 - 1)
    ),
    "v_cvt_u32_f32_e32 v10, v1": lambda a, b, c: np.clip(
        np.nan_to_num(np.trunc(a.astype(np.float64)), posinf=2**32), 0, 2**32 - 1
    ).astype(np.uint32),
    "v_cndmask_b32_e64 v10, -v1, v2, vcc": lambda a, b, c: -a,
}


@pytest.mark.parametrize("text", EXACT)
def test_floats(text: str) -> None:
    given = [floats(), floats(), floats()]
    given[1][::5] = given[0][::5]
    with np.errstate(all="ignore"):
        want = np.asarray(EXACT[text](*given))
    same(
        execute(["s_mov_b64 vcc, 0", *text.split("\n")], *given)[0],
        want if want.dtype == np.uint32 else want.astype(np.float32),
        text,
    )


def test_a_product_and_its_sum_are_rounded_once() -> None:
    one = np.full(64, 1 + 2.0**-12, np.float32)
    got = execute(["v_fma_f32 v10, v1, v1, v2"], one, np.full(64, -(1 + 2.0**-11), np.float32))[0]
    assert (got.view(np.float32) == 2.0**-24).all()


def test_functions_of_floats() -> None:
    a = np.abs(floats(small=True)) + np.float32(1e-3)
    for name, function in (("v_exp_f32_e32", np.exp2), ("v_log_f32_e32", np.log2)):
        got = execute([f"{name} v10, v1"], a)[0].view(np.float32)
        with np.errstate(over="ignore"):
            want = function(a.astype(np.float64)).astype(np.float32)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    powers = RNG.integers(-20, 20, 64).astype(np.int32)
    same(execute(["v_ldexp_f32 v10, v1, v2"], a, powers)[0], np.ldexp(a, powers))


def test_division_is_rounded_right() -> None:
    """The sequence that the compiler emits, of ordinary and of extreme operands."""
    lines = [
        "v_div_scale_f32 v10, s[20:21], v2, v2, v1",
        "v_rcp_f32_e32 v11, v10",
        "v_div_scale_f32 v12, vcc, v1, v2, v1",
        "v_fma_f32 v13, -v10, v11, 1.0",
        "v_fmac_f32_e32 v11, v13, v11",
        "v_mul_f32_e32 v13, v12, v11",
        "v_fma_f32 v14, -v10, v13, v12",
        "v_fmac_f32_e32 v13, v14, v11",
        "v_fma_f32 v10, -v10, v13, v12",
        "v_div_fmas_f32 v10, v10, v11, v13",
        "v_div_fixup_f32 v10, v10, v2, v1",
    ]
    sizes = 2.0 ** np.arange(-126, 128, 4.0)
    for shift in (0, 7, 21, 40):
        a = (RNG.uniform(1, 2, 64) * sizes).astype(np.float32)
        b = (RNG.uniform(1, 2, 64) * np.roll(sizes, shift)).astype(np.float32)
        with np.errstate(over="ignore", under="ignore"):
            want = a / b
        ordinary = (want == 0) | ~np.isfinite(want) | (abs(want) >= np.finfo(np.float32).tiny)
        same(execute(lines, a, b)[0][ordinary], want[ordinary], f"shift {shift}")
    special = np.array([0.0, -0.0, 1.0, -3.0, np.inf, -np.inf, np.nan, 3e38], np.float32)
    a, b = (np.array(list(pairs), np.float32) for pairs in zip(*itertools.product(special, special), strict=True))
    with np.errstate(all="ignore"):
        same(execute(lines, a, b)[0], a / b)


def test_two_floats_at_a_time() -> None:
    x = [floats(small=True) for _ in range(6)]  # v[1:2], v[3:4], v[5:6]
    shown = {
        "v_pk_add_f32 v[10:11], v[1:2], v[3:4]": (x[0] + x[2], x[1] + x[3]),
        "v_pk_mul_f32 v[10:11], v[1:2], v[3:4] op_sel_hi:[1,0]": (x[0] * x[2], x[1] * x[2]),
        "v_pk_mul_f32 v[10:11], v[1:2], v[3:4] op_sel:[1,0] op_sel_hi:[0,1]": (x[1] * x[2], x[0] * x[3]),
        "v_pk_fma_f32 v[10:11], v[1:2], v[3:4], v[5:6]": (fused(x[0], x[2], x[4]), fused(x[1], x[3], x[5])),
        "v_pk_add_f32 v[10:11], v[1:2], v[3:4] neg_lo:[0,1] neg_hi:[0,1]": (x[0] - x[2], x[1] - x[3]),
        "v_pk_mul_f32 v[10:11], v[1:2], 2.0": (x[0] * 2, x[1] * 2),
        "v_pk_mov_b32 v[10:11], v[1:2], v[3:4] op_sel:[1,0]": (x[1], x[2]),
        "v_pk_mov_b32 v[10:11], v[1:2], v[3:4] op_sel:[0,1]": (x[0], x[3]),
    }
    for text, want in shown.items():
        for got, each in zip(execute([text], *x, out=(10, 11)), want, strict=False):
            same(got, each, text)


def halves(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two float16 of each word, in float32."""
    return tuple((x >> shift & 0xFFFF).astype(np.uint16).view(np.float16).astype(np.float32) for shift in (0, 16))


def packed(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        bits = [np.asarray(v, np.float32).astype(np.float16).view(np.uint16).astype(np.uint32) for v in (low, high)]
    return bits[0] | bits[1] << 16


def half_words() -> np.ndarray:
    return packed(floats(small=True), floats(small=True))


TWO_HALVES: dict[str, Callable[..., Any]] = {
    "add": lambda a, b, c: a + b,
    "mul": lambda a, b, c: a * b,
    "fma": lambda a, b, c: a * b + c,
    "min": lambda a, b, c: least(a, b),
    "max": lambda a, b, c: most(a, b),
    "minimum3": least,
    "maximum3": most,
}
SINGLE_HALVES = ("add", "sub", "mul", "fma", "min", "max")
PACKED_HALVES = [f"v_pk_{name}_f16" for name in TWO_HALVES]
ALONE_HALVES = [f"v_{name}_f16" for name in SINGLE_HALVES]


@pytest.mark.parametrize("name", [*PACKED_HALVES, *ALONE_HALVES])
def test_float16(name: str) -> None:
    given = [half_words() for _ in range(3)]
    (a, a2), (b, b2), (c, c2) = map(halves, given)
    kind = name.split("_")[-2]
    operands = "v1, v2, v3" if kind in ("fma", "minimum3", "maximum3") else "v1, v2"
    function = TWO_HALVES.get(kind, lambda a, b, c: a - b)
    with np.errstate(over="ignore", invalid="ignore"):
        want = packed(function(a, b, c), function(a2, b2, c2))
    got = execute([f"{name} v10, {operands}"], *given)[0]
    packed_one = name.startswith("v_pk_")
    same(got if packed_one else got & 0xFFFF, want if packed_one else want & 0xFFFF, name)
    if name == "v_pk_add_f16":
        same(
            execute([f"{name} v10, v1, v2 op_sel:[1,0] op_sel_hi:[0,1] neg_lo:[0,1]"], *given)[0],
            packed(a2 - b, a + b2),
        )


SHORTS: dict[str, Callable[..., Any]] = {
    "v_pk_add_u16": lambda a, b, c: a + b,
    "v_pk_sub_i16": lambda a, b, c: a - b,
    "v_pk_sub_u16": lambda a, b, c: a - b,
    "v_pk_mul_lo_u16": lambda a, b, c: a * b,
    "v_pk_mad_u16": lambda a, b, c: a * b + c,
    "v_pk_lshlrev_b16": lambda a, b, c: b << (a & 15),
    "v_pk_lshrrev_b16": lambda a, b, c: b >> (a & 15),
    "v_pk_ashrrev_i16": lambda a, b, c: s16(b) >> (a & 15),
    "v_pk_min_u16": lambda a, b, c: np.minimum(a, b),
    "v_pk_max_u16": lambda a, b, c: np.maximum(a, b),
    "v_pk_min_i16": lambda a, b, c: np.minimum(s16(a), s16(b)),
    "v_pk_max_i16": lambda a, b, c: np.maximum(s16(a), s16(b)),
}


@pytest.mark.parametrize("name", SHORTS)
def test_two_short_integers_at_a_time(name: str) -> None:
    given = [draws() for _ in range(3)]
    parts = [[(v >> shift & 0xFFFF).astype(np.int64) for v in given] for shift in (0, 16)]
    low, high = (u32(SHORTS[name](*part)) & 0xFFFF for part in parts)
    same(execute([f"{name} v10, v1, v2{', v3' if '_mad_' in name else ''}"], *given)[0], low | high << 16, name)


def test_products_of_float16_and_float32() -> None:
    h, x, y = half_words(), floats(small=True), floats(small=True)
    (low, high), zero = halves(h), np.zeros(64, np.float32)
    shown = {
        "v_fma_mix_f32 v10, v1, v2, v3 op_sel_hi:[1,0,0]": fused(low, x, y),
        "v_fma_mix_f32 v10, v1, v2, -v3 op_sel:[1,0,0] op_sel_hi:[1,0,0]": fused(high, x, -y),
        "v_fma_mix_f32 v10, v2, 1.0, v1 op_sel:[0,0,1] op_sel_hi:[0,1,1]": fused(
            x, np.float32(1), high
        ),  # 1.0 of float16
        "v_fma_mix_f32 v10, v2, v3, neg(0)": fused(x, y, np.float32(-0.0)),
    }
    for text, want in shown.items():
        same(execute([text], h, x, y)[0], want, text)
    for text, want in (
        ("lo", (h & np.uint32(0xFFFF0000)) | packed(x * y, zero)),
        ("hi", (h & 0xFFFF) | packed(zero, x * y)),
    ):
        got = execute(["v_mov_b32_e32 v10, v1", f"v_fma_mix{text}_f16 v10, v2, v3, 0"], h, x, y)[0]
        same(got, want, text)


# --- conversions ---


def test_integers_become_floats() -> None:
    a = draws()
    same(execute(["v_cvt_f32_u32_e32 v10, v1"], a)[0], a.astype(np.float32))
    same(execute(["v_cvt_f32_i32_e32 v10, v1"], a)[0], i32(a).astype(np.float32))
    for byte, name in enumerate(("v_cvt_f32_ubyte0", "v_cvt_f32_ubyte1", "v_cvt_f32_ubyte2", "v_cvt_f32_ubyte3")):
        same(execute([f"{name}_e32 v10, v1"], a)[0], (a >> 8 * byte & 255).astype(np.float32))


def test_float16_and_bfloat16() -> None:
    codes = np.arange(1 << 16, dtype=np.uint32)
    for some in codes.reshape(-1, 64)[::16]:
        same(
            execute(["v_cvt_f32_f16_e32 v10, v1"], some)[0], some.astype(np.uint16).view(np.float16).astype(np.float32)
        )
        same(execute(["v_cvt_f32_bf16_e32 v10, v1"], some)[0], (some << 16).view(np.float32))
    for _ in range(8):
        a, b = floats(), (2.0 ** RNG.integers(-28, 18, 64) * floats(small=True)).astype(np.float32)
        same(execute(["v_cvt_pk_f16_f32 v10, v1, v2"], a, b)[0] & 0x7FFF7FFF, packed(a, b) & 0x7FFF7FFF)
        same(execute(["v_cvt_f16_f32_e32 v10, v1"], b)[0], packed(b, np.zeros(64)))
        bf16 = [
            torch.from_numpy(v).bfloat16().view(torch.int16).numpy().view(np.uint16).astype(np.uint32) for v in (a, b)
        ]
        got, good = execute(["v_cvt_pk_bf16_f32 v10, v1, v2"], a, b)[0], ~np.isnan(a)
        same(got[good], (bf16[0] | bf16[1] << 16)[good])
        with np.errstate(over="ignore"):
            near = b.astype(np.float16).astype(np.float32)
        toward = np.where(
            abs(near) > abs(b), np.nextafter(near.astype(np.float16), np.float16(0)), near.astype(np.float16)
        )
        same(execute(["v_cvt_pkrtz_f16_f32 v10, v1, v2"], b, b)[0] & 0xFFFF, packed(toward, np.zeros(64)))


FP8 = {
    ("gfx942", "fp8"): torch.float8_e4m3fnuz,
    ("gfx942", "bf8"): torch.float8_e5m2fnuz,
    ("gfx950", "fp8"): torch.float8_e4m3fn,
    ("gfx950", "bf8"): torch.float8_e5m2,
}
BYTES = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize(("arch", "kind"), FP8)
def test_all_codes_of_fp8_become_floats(arch: str, kind: str) -> None:
    want = BYTES.view(FP8[arch, kind]).float().numpy()
    codes = BYTES.numpy().view(np.uint32)  # four a lane
    same(execute([f"v_cvt_f32_{kind}_e32 v10, v1"], codes, arch=arch)[0], want[::4])
    for byte in range(4):
        same(execute([f"v_cvt_f32_{kind}_sdwa v10, v1 src0_sel:BYTE_{byte}"], codes, arch=arch)[0], want[byte::4])
    for half, sel in enumerate(
        ("_e32 v[10:11], v1", "_sdwa v[10:11], v1 src0_sel:WORD_1", "_e64 v[10:11], v1 op_sel:[1,0]")
    ):
        both = execute([f"v_cvt_pk_f32_{kind}{sel}"], codes, arch=arch, out=(10, 11))
        for i in range(2):
            same(both[i], want[2 * min(half, 1) + i :: 4])


@pytest.mark.parametrize(("arch", "kind"), FP8)
def test_floats_become_the_nearest_fp8(arch: str, kind: str) -> None:
    dtype = FP8[arch, kind]
    values = BYTES.view(dtype).float()
    values = values[values.isfinite()].sort().values
    between = (values[1:] + values[:-1]) / 2  # ties go to even
    each = torch.cat([values, between, between * (1 + 2**-12), between * (1 - 2**-12), torch.tensor([-0.0])])
    each = torch.cat([each, torch.zeros(-len(each) % 128)])
    want = each.to(dtype).view(torch.uint8).numpy().astype(np.uint32)
    for a, b, x, y in zip(
        *(v.reshape(-1, 64) for v in (each[::2].numpy(), each[1::2].numpy(), want[::2], want[1::2])), strict=True
    ):
        lines = [f"v_cvt_pk_{kind}_f32 v10, v1, v2", f"v_cvt_pk_{kind}_f32 v10, v2, v1 op_sel:[0,0,1]"]
        same(execute(lines, a, b, arch=arch)[0], x | y << 8 | y << 16 | x << 24)


@pytest.mark.parametrize(("arch", "kind"), FP8)
def test_what_fp8_does_not_hold(arch: str, kind: str) -> None:
    """NaN or infinity, but the largest value where the MODE register says so."""
    dtype = FP8[arch, kind]
    past = np.resize(np.array([1e6, -1e6, np.inf, -np.inf], np.float32), 64)
    lines = [f"v_cvt_pk_{kind}_f32 v10, v1, v1"]
    plain, largest = (
        execute([*mode, *lines], past, arch=arch)[0].astype(np.uint8)
        for mode in ((), ["s_setreg_imm32_b32 hwreg(HW_REG_MODE, 23, 1), 1"])
    )
    got = torch.from_numpy(plain).view(dtype).float()
    assert (got.isinf() if dtype == torch.float8_e5m2 else got.isnan()).all()
    assert (torch.from_numpy(largest).view(dtype).float().numpy() == np.sign(past) * torch.finfo(dtype).max).all()
    lost = execute(lines, np.full(64, np.nan, np.float32), arch=arch)[0].astype(np.uint8)
    assert torch.from_numpy(lost).view(dtype).float().isnan().all()


def test_scaled_fp8() -> None:
    a, b, codes = floats(small=True), floats(small=True), BYTES.numpy().view(np.uint32)
    scale = (2.0 ** RNG.integers(-3, 4, 64) * 1.5).astype(np.float32)  # of which the exponent counts
    power = np.exp2(np.floor(np.log2(scale))).astype(np.float32)
    to = [
        torch.from_numpy(v / power).to(torch.float8_e4m3fn).view(torch.uint8).numpy().astype(np.uint32) for v in (a, b)
    ]
    lines = [
        "v_mov_b32_e32 v10, 0",
        "v_cvt_scalef32_pk_fp8_f32 v10, v1, v2, v3",
        "v_cvt_scalef32_pk_fp8_f32 v10, v2, v1, v3 op_sel:[0,0,0,1]",
    ]
    inside = np.maximum(abs(a), abs(b)) / power < 448
    same(
        execute(lines, a, b, scale, arch="gfx950")[0][inside], (to[0] | to[1] << 8 | to[1] << 16 | to[0] << 24)[inside]
    )
    want = [BYTES.view(torch.float8_e4m3fn).float().numpy()[i::4] * power for i in range(4)]
    for half, sel in enumerate(("", " op_sel:[1,0]")):
        low, high = want[2 * half], want[2 * half + 1]
        got = execute([f"v_cvt_scalef32_pk_f32_fp8 v[10:11], v1, v2{sel}"], codes, scale, arch="gfx950", out=(10, 11))
        same(got[0], low), same(got[1], high)
        good = ~(np.isnan(low) | np.isnan(high))
        f16 = execute([f"v_cvt_scalef32_pk_f16_fp8 v10, v1, v2{sel}"], codes, scale, arch="gfx950")[0]
        same(f16[good], packed(low, high)[good])
        bf16 = execute([f"v_cvt_scalef32_pk_bf16_fp8 v10, v1, v2{sel}"], codes, scale, arch="gfx950")[0]
        same(bf16[good], ((low.view(np.uint32) >> 16) | (high.view(np.uint32) & np.uint32(0xFFFF0000)))[good])


# --- scalars ---

FULL, WIDE = (1 << 32) - 1, (1 << 64) - 1


def signed(x: int, width: int = 32) -> int:
    return (x & ((1 << width) - 1)) - ((1 << width) if x >> (width - 1) & 1 else 0)


def carried(total: int) -> tuple[int, int]:
    return total & FULL, int(not 0 <= total <= FULL)


def overflowed(total: int) -> tuple[int, int]:
    return total & FULL, int(total != signed(total & FULL))


def taken(x: int, where: int, width: int, is_signed: bool) -> int:
    count = min(where >> 16 & 127, width)
    found = x >> (where & (width - 1)) & ((1 << count) - 1)
    return signed(found, count) if is_signed and count else found


def truth(x: int) -> tuple[int, int]:
    return x, int(x != 0)


PAIRS = {  # name -> (result, SCC) or the result alone, of two operands
    "s_mov_b32": lambda a, b: a,
    "s_not_b32": lambda a, b: truth(~a & FULL),
    "s_and_b32": lambda a, b: truth(a & b),
    "s_or_b32": lambda a, b: truth(a | b),
    "s_xor_b32": lambda a, b: truth(a ^ b),
    "s_andn2_b32": lambda a, b: truth(a & ~b),
    "s_orn2_b32": lambda a, b: truth((a | ~b) & FULL),
    "s_nand_b32": lambda a, b: truth(~(a & b) & FULL),
    "s_nor_b32": lambda a, b: truth(~(a | b) & FULL),
    "s_xnor_b32": lambda a, b: truth(~(a ^ b) & FULL),
    "s_lshl_b32": lambda a, b: truth(a << (b & 31) & FULL),
    "s_lshr_b32": lambda a, b: truth(a >> (b & 31)),
    "s_ashr_i32": lambda a, b: truth(signed(a) >> (b & 31) & FULL),
    "s_bfm_b32": lambda a, b: ((1 << (a & 31)) - 1) << (b & 31) & FULL,
    "s_pack_ll_b32_b16": lambda a, b: a & 0xFFFF | b << 16 & FULL,
    "s_pack_lh_b32_b16": lambda a, b: a & 0xFFFF | b & 0xFFFF0000,
    "s_pack_hh_b32_b16": lambda a, b: a >> 16 | b & 0xFFFF0000,
    "s_sext_i32_i8": lambda a, b: signed(a & 255, 8) & FULL,
    "s_sext_i32_i16": lambda a, b: signed(a & 0xFFFF, 16) & FULL,
    "s_bcnt1_i32_b32": lambda a, b: truth(a.bit_count()),
    "s_ff1_i32_b32": lambda a, b: (a & -a).bit_length() - 1 & FULL,
    "s_flbit_i32_b32": lambda a, b: 32 - a.bit_length() if a else FULL,
    "s_brev_b32": lambda a, b: int(f"{a:032b}"[::-1], 2),
    "s_bfe_u32": lambda a, b: truth(taken(a, b, 32, False)),
    "s_bfe_i32": lambda a, b: truth(taken(a, b, 32, True) & FULL),
    "s_add_u32": lambda a, b: carried(a + b),
    "s_sub_u32": lambda a, b: carried(a - b),
    "s_add_i32": lambda a, b: overflowed(signed(a) + signed(b)),
    "s_sub_i32": lambda a, b: overflowed(signed(a) - signed(b)),
    "s_mul_i32": lambda a, b: a * b & FULL,
    "s_mul_hi_u32": lambda a, b: a * b >> 32,
    "s_mul_hi_i32": lambda a, b: signed(a) * signed(b) >> 32 & FULL,
    "s_abs_i32": lambda a, b: truth(abs(signed(a)) & FULL),
    "s_lshl1_add_u32": lambda a, b: carried((a << 1) + b),
    "s_lshl2_add_u32": lambda a, b: carried((a << 2) + b),
    "s_lshl3_add_u32": lambda a, b: carried((a << 3) + b),
    "s_lshl4_add_u32": lambda a, b: carried((a << 4) + b),
    "s_min_i32": lambda a, b: (min(signed(a), signed(b)) & FULL, int(signed(a) < signed(b))),
    "s_max_i32": lambda a, b: (max(signed(a), signed(b)) & FULL, int(signed(a) > signed(b))),
    "s_min_u32": lambda a, b: (min(a, b), int(a < b)),
    "s_max_u32": lambda a, b: (max(a, b), int(a > b)),
}
LONGS = {  # of two operands of 64 bits
    "s_mov_b64": lambda a, b: a,
    "s_not_b64": lambda a, b: truth(~a & WIDE),
    "s_and_b64": lambda a, b: truth(a & b),
    "s_or_b64": lambda a, b: truth(a | b),
    "s_xor_b64": lambda a, b: truth(a ^ b),
    "s_andn2_b64": lambda a, b: truth(a & ~b),
    "s_orn2_b64": lambda a, b: truth((a | ~b) & WIDE),
    "s_nand_b64": lambda a, b: truth(~(a & b) & WIDE),
    "s_nor_b64": lambda a, b: truth(~(a | b) & WIDE),
    "s_xnor_b64": lambda a, b: truth(~(a ^ b) & WIDE),
    "s_brev_b64": lambda a, b: int(f"{a:064b}"[::-1], 2),
}
SHIFTS = {  # of 64 bits and 32
    "s_lshl_b64": lambda a, b: truth(a << (b & 63) & WIDE),
    "s_lshr_b64": lambda a, b: truth(a >> (b & 63)),
    "s_ashr_i64": lambda a, b: truth(signed(a, 64) >> (b & 63) & WIDE),
    "s_bfe_u64": lambda a, b: truth(taken(a, b, 64, False)),
    "s_bfe_i64": lambda a, b: truth(taken(a, b, 64, True) & WIDE),
}
OF_LONG = {
    "s_bcnt1_i32_b64": lambda a: truth(a.bit_count()),
    "s_ff1_i32_b64": lambda a: (a & -a).bit_length() - 1 & FULL,
}
SCALAR_ENDS = {"eq": "__eq__", "lg": "__ne__", "lt": "__lt__", "le": "__le__", "gt": "__gt__", "ge": "__ge__"}
SCALAR_TESTS = [f"s_cmp_{end}_{kind}32" for end in SCALAR_ENDS for kind in "iu"] + ["s_cmp_eq_u64", "s_cmp_lg_u64"]
SMALL_TESTS = [f"s_cmpk_{end}_{kind}32" for end in SCALAR_ENDS for kind in "iu"]
WORD_PAIRS = [(int(a), int(b)) for a, b in zip(draws(30), draws(30), strict=True)] + [(5, 5), (0, 0)]


def one(name: str, operands: Sequence[Any], wide: str = "") -> str:
    """The line of a scalar instruction with results in s[20:21]."""
    unary = name in (
        "s_mov_b32",
        "s_not_b32",
        "s_sext_i32_i8",
        "s_sext_i32_i16",
        "s_bcnt1_i32_b32",
        "s_ff1_i32_b32",
        "s_flbit_i32_b32",
        "s_brev_b32",
        "s_abs_i32",
        "s_mov_b64",
        "s_not_b64",
        "s_brev_b64",
        *OF_LONG,
    )
    return f"{name} {wide or 's20'}, {', '.join(operands[: 1 if unary else 2])}"


def scalars(lines: Callable[[int, int], Sequence[str]], pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(s20, s21, SCC) after the lines of each pair."""
    program = []
    for lane, (a, b) in enumerate(pairs):
        program += [*lines(a, b), "s_cselect_b32 s22, 1, 0"]
        program += [f"v_writelane_b32 v{10 + i}, s{20 + i}, {lane}" for i in range(3)]
    found = execute(program, out=(10, 11, 12))
    return [tuple(int(column[lane]) for column in found[:3]) for lane in range(len(pairs))]


def agree(name: str, got: Sequence[tuple[int, int, int]], want: Sequence[Any], wide: bool = False) -> None:
    for (low, high, scc), each in zip(got, want, strict=True):
        value, flag = each if isinstance(each, tuple) else (each, scc)
        assert (low | high << 32 if wide else low, scc) == (value, flag), f"{name}: {low:x} {high:x} {scc}, not {each}"


@pytest.mark.parametrize("name", PAIRS)
def test_scalars(name: str) -> None:
    def lines(a: int, b: int) -> list[str]:
        return [f"s_mov_b32 s10, {a:#x}", f"s_mov_b32 s11, {b:#x}", one(name, ("s10", "s11"))]

    pairs = [(a, b & 0x7F001F) if "_bfe_" in name else (a, b) for a, b in WORD_PAIRS]
    agree(name, scalars(lines, pairs), [PAIRS[name](a, b) for a, b in pairs])


@pytest.mark.parametrize("name", [*LONGS, *SHIFTS, *OF_LONG, "s_bfm_b64"])
def test_scalars_of_64_bits(name: str) -> None:
    def lines(a: int, b: int) -> list[str]:
        second = "s12" if name in SHIFTS or name == "s_bfm_b64" else "s[12:13]"
        first = "s10" if name == "s_bfm_b64" else "s[10:11]"
        moves = [f"s_mov_b32 s{10 + i}, {v:#x}" for i, v in enumerate((a & FULL, a >> 32, b & FULL, b >> 32))]
        return [*moves, one(name, (first, second), "s20" if name in OF_LONG else "s[20:21]")]

    pairs = [(a | b << 32, b | a << 32) for a, b in WORD_PAIRS]
    if "_bfe_" in name:
        pairs = [(a, b & 0x3F003F) for a, b in pairs]
    functions = LONGS | SHIFTS | {n: lambda a, b, f=f: f(a) for n, f in OF_LONG.items()}
    functions["s_bfm_b64"] = lambda a, b: ((1 << (a & 63)) - 1) << (b & 63) & WIDE
    want = [functions[name](a, b & FULL if name in SHIFTS else b) for a, b in pairs]
    agree(name, scalars(lines, pairs), want, wide=name not in OF_LONG)


@pytest.mark.parametrize("name", [*SCALAR_TESTS, *SMALL_TESTS, "s_bitcmp0_b32", "s_bitcmp1_b32"])
def test_scalar_tests(name: str) -> None:
    small, wide = name.startswith("s_cmpk"), name.endswith("64")

    def lines(a: int, b: int) -> list[str]:
        moves = [f"s_mov_b32 s10, {a:#x}", f"s_mov_b32 s11, {b:#x}", "s_mov_b64 s[12:13], s[10:11]"]
        moves += [] if a == b else ["s_mov_b32 s10, 0"] if wide else []
        return [
            *moves,
            f"{name} {'s[10:11]' if wide else 's10'}, {f'{b & 0xFFFF:#x}' if small else 's[12:13]' if wide else 's11'}",
        ]

    pairs = [*WORD_PAIRS, (0xFFFF8000, 0x8000), (0x8000, 0x8000), (0xFFFFFFFF, 0xFFFF)]

    def want(a: int, b: int) -> int:
        if "bitcmp" in name:
            return int((a >> (b & 31) & 1) == int(name[8]))
        if wide:
            return int((a == b or a == 0) == ("_eq_" in name))
        b = b & 0xFFFF if small else b
        if name.endswith("i32"):
            a, b = signed(a), signed(b, 16 if small else 32)
        return int(getattr(a, SCALAR_ENDS[name.split("_")[2]])(b))

    got = [scc for _, _, scc in scalars(lines, pairs)]
    assert got == [want(a, b) for a, b in pairs]


def test_scalars_with_carries_small_constants_and_choices() -> None:
    def long(add: str, more: str) -> Callable[[int, int], list[str]]:
        return lambda a, b: [
            f"s_mov_b32 s10, {a:#x}",
            f"s_mov_b32 s11, {b:#x}",
            f"{add} s20, s10, s11",
            f"{more} s21, s11, s10",
        ]

    for names, sign in ((("s_add_u32", "s_addc_u32"), 1), (("s_sub_u32", "s_subb_u32"), -1)):
        totals = [(a | b << 32) + sign * (b | a << 32) for a, b in WORD_PAIRS]
        agree(
            names[1],
            scalars(long(*names), WORD_PAIRS),
            [(t & WIDE, int(not 0 <= t <= WIDE)) for t in totals],
            wide=True,
        )
    for name, text, function in (
        ("s_movk_i32", "s_movk_i32 s20, 0x8001", lambda a: 0xFFFF8001),
        ("s_addk_i32", "s_addk_i32 s20, 0xff00", lambda a: overflowed(signed(a) - 256)),
        ("s_mulk_i32", "s_mulk_i32 s20, 0xfffd", lambda a: a * -3 & FULL),
        ("s_bitset0_b32", "s_bitset0_b32 s20, 4", lambda a: a & ~16),
        ("s_bitset1_b32", "s_bitset1_b32 s20, 4", lambda a: a | 16),
    ):
        got = scalars(lambda a, b, text=text: [f"s_mov_b32 s20, {a:#x}", text], WORD_PAIRS)
        agree(name, got, [function(a) for a, _ in WORD_PAIRS])
    lines = lambda a, b: [f"s_cmp_eq_u32 {a & 1}, 1", "s_cselect_b64 s[20:21], -1, 5"]  # noqa: E731
    agree("s_cselect_b64", scalars(lines, WORD_PAIRS), [WIDE if a & 1 else 5 for a, _ in WORD_PAIRS], wide=True)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("s_and_saveexec_b64", lambda a, x: a & x),
        ("s_or_saveexec_b64", lambda a, x: a | x),
        ("s_xor_saveexec_b64", lambda a, x: a ^ x),
        ("s_andn2_saveexec_b64", lambda a, x: a & ~x),
        ("s_orn2_saveexec_b64", lambda a, x: (a | ~x) & WIDE),
    ],
)
def test_saved_masks(name: str, function: Callable[[int, int], int]) -> None:
    a, x = 0x0123_4567_89AB_CDEF, 0xFF00_FF00_1234_0001
    lines = [f"s_mov_b32 s{i}, {v:#x}" for i, v in ((10, a & FULL), (11, a >> 32), (12, x & FULL), (13, x >> 32))]
    lines += [
        "s_mov_b64 exec, s[12:13]",
        f"{name} s[20:21], s[10:11]",
        "s_mov_b64 s[22:23], exec",
        "s_mov_b64 exec, -1",
    ]
    lines += [f"v_mov_b32_e32 v{10 + i}, s{20 + i}" for i in range(4)]
    saved, saved_high, now, now_high, _ = (int(v[0]) for v in execute(lines, out=(10, 11, 12, 13)))
    assert (saved | saved_high << 32, now | now_high << 32) == (x, function(a, x))


BRANCHES = {
    "s_cbranch_scc0": ("s_cmp_eq_u32 0, 1", "s_cmp_eq_u32 1, 1"),
    "s_cbranch_scc1": ("s_cmp_eq_u32 1, 1", "s_cmp_eq_u32 0, 1"),
    "s_cbranch_vccz": ("s_mov_b64 vcc, 0", "s_mov_b64 vcc, 2"),
    "s_cbranch_vccnz": ("s_mov_b64 vcc, 2", "s_mov_b64 vcc, 0"),
    "s_cbranch_execz": ("s_mov_b64 exec, 0", "s_mov_b64 exec, 1"),
    "s_cbranch_execnz": ("s_mov_b64 exec, 1", "s_mov_b64 exec, 0"),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_branches(name: str) -> None:
    for condition, goes in zip(BRANCHES[name], (True, False), strict=True):
        lines = [
            condition,
            f"{name} .there",
            "s_mov_b32 s20, 1",
            "s_branch .end",
            ".there:",
            "s_mov_b32 s20, 2",
            ".end:",
            "s_mov_b64 exec, -1",
            "v_mov_b32_e32 v10, s20",
        ]
        assert set(execute(lines)[0]) == {2 if goes else 1}


def test_scalars_and_lanes() -> None:
    a = draws()
    lines = [
        "v_readlane_b32 s20, v1, 5",
        "s_mov_b64 exec, 0x300",
        "v_readfirstlane_b32 s21, v1",
        "s_mov_b64 exec, -1",
        "v_mov_b32_e32 v10, s20",
        "v_mov_b32_e32 v11, s21",
        "v_writelane_b32 v10, s21, 63",
    ]
    first, second, _ = execute(lines, a, out=(10, 11))
    assert set(first[:63]) == {a[5]} and set(second) == {a[8]} and first[63] == a[8]


def test_loads_of_scalars() -> None:
    data = np.arange(64, dtype=np.uint32) + 1000
    for words, name in (
        (1, "s_load_dword"),
        (2, "s_load_dwordx2"),
        (4, "s_load_dwordx4"),
        (8, "s_load_dwordx8"),
        (16, "s_load_dwordx16"),
    ):
        target = f"s[32:{32 + words - 1}]" if words > 1 else "s32"
        lines = [f"{name} {target}, s[4:5], 0x10", "s_waitcnt lgkmcnt(0)"]
        lines += [f"v_mov_b32_e32 v{10 + i}, s{32 + i}" for i in range(words)]
        got = execute(lines, data, out=tuple(range(10, 10 + words)), mode=LATE)
        assert [int(v[0]) for v in got[:words]] == list(range(1004, 1004 + words))


def test_what_has_no_effect() -> None:
    idle = (
        "s_nop 0",
        "s_setprio 1",
        "s_sleep 1",
        "s_sched_barrier 0",
        "s_icache_inv",
        "s_dcache_inv",
        "s_dcache_wb",
        "buffer_inv sc1",
        "buffer_wbl2 sc1",
        "v_nop",
    )
    assert (execute([*idle, "v_mov_b32_e32 v10, v0"])[0] == LANE).all()


# --- lanes that read others ---


def rows(function: Callable[[int], int | None]) -> np.ndarray:
    """For each lane the one that it reads, by its place in a row of 16; −1 for none."""
    found = [function(lane % 16) for lane in range(64)]
    return np.array([-1 if at is None or not 0 <= at < 16 else lane // 16 * 16 + at for lane, at in enumerate(found)])


DPP = {
    "quad_perm:[3,0,2,1]": np.array([lane // 4 * 4 + (3, 0, 2, 1)[lane % 4] for lane in range(64)]),
    "row_shl:3": rows(lambda at: at + 3),
    "row_shr:5": rows(lambda at: at - 5),
    "row_ror:4": rows(lambda at: (at - 4) % 16),
    "row_mirror": rows(lambda at: 15 - at),
    "row_half_mirror": rows(lambda at: at // 8 * 8 + 7 - at % 8),
    "row_newbcast:6": rows(lambda at: 6),
    "row_bcast:15": np.array([lane // 16 * 16 - 1 for lane in range(64)]),  # none in the first row
    "wave_shl:1": np.array([*range(1, 64), -1]),
    "row_bcast:31": np.array([31 if lane >= 32 else -1 for lane in range(64)]),
}


@pytest.mark.parametrize("move", DPP)
def test_dpp(move: str) -> None:
    a, kept, source = draws(), draws(), DPP[move]
    there = source >= 0
    chosen = np.isin(LANE // 16, (1, 3)) & np.isin(LANE // 4 % 4, (0, 1, 2))
    for bound in ("", " bound_ctrl:1"):
        for row, bank, some in ((15, 15, np.ones(64, bool)), (10, 7, chosen)):
            lines = [
                "v_mov_b32_e32 v10, v2",
                f"v_mov_b32_dpp v10, v1 {move} row_mask:{row:#x} bank_mask:{bank:#x}{bound}",
            ]
            want = np.where(some & (there | bool(bound)), np.where(there, a[source], 0), kept)
            same(execute(lines, a, kept)[0], want, f"{move}{bound}")
    lines = [f"v_add_u32_dpp v1, v1, v1 {move} row_mask:0xf bank_mask:0xf bound_ctrl:1", "v_mov_b32_e32 v10, v1"]
    with np.errstate(over="ignore"):
        same(execute(lines, a)[0], np.where(there, a[source], 0).astype(np.uint32) + a)


def test_dpp_of_lanes_that_do_not_work() -> None:
    """They are read as 0 with bound_ctrl, and leave the reader as it is without."""
    a, kept = draws(), draws()
    for bound, want in (
        ("", np.where(LANE == 0, kept, a[LANE ^ 1])),
        (" bound_ctrl:1", np.where(LANE == 0, 0, a[LANE ^ 1])),
    ):
        lines = [
            "v_mov_b32_e32 v10, v2",
            "s_mov_b64 exec, -3",
            f"v_mov_b32_dpp v10, v1 quad_perm:[1,0,3,2] row_mask:0xf bank_mask:0xf{bound}",
            "s_mov_b64 exec, -1",
        ]
        got = execute(lines, a, kept)[0]
        assert got[0] == want[0] and got[1] == kept[1] and (got[2:] == want[2:]).all()


def test_permutes() -> None:
    a = draws()
    order = RNG.permutation(64).astype(np.uint32)
    for mode in (PLAIN, LATE):
        got = execute(["ds_bpermute_b32 v10, v2, v1", "s_waitcnt lgkmcnt(0)"], a, order * 4, mode=mode)[0]
        same(got, a[order])
        shifted = execute(["ds_bpermute_b32 v10, v255, v1 offset:8", "s_waitcnt lgkmcnt(0)"], a, mode=mode)[0]
        same(shifted, np.roll(a, -2))
        pushed = execute(["ds_permute_b32 v10, v2, v1", "s_waitcnt lgkmcnt(0)"], a, order * 4, mode=mode)[0]
        same(pushed[order], a)
    quads = execute([f"ds_swizzle_b32 v10, v1 offset:{0x8000 | 0b00011011}", "s_waitcnt lgkmcnt(0)"], a)[0]
    same(quads, a[LANE ^ 3])
    xor = execute([f"ds_swizzle_b32 v10, v1 offset:{31 | 5 << 10}", "s_waitcnt lgkmcnt(0)"], a)[0]
    swapped = execute(["ds_swizzle_b32 v10, v1 offset:swizzle(SWAP,16)", "s_waitcnt lgkmcnt(0)"], a)[0]
    same(swapped, a[LANE ^ 16])
    same(xor, a[LANE ^ 5])
    dark = execute(["s_mov_b64 exec, -2", "ds_bpermute_b32 v10, v2, v1", "s_mov_b64 exec, -1"], a, 0 * LANE)[0]
    assert not dark[1:].any()


def test_swapped_halves_of_registers() -> None:
    a, b = draws(), draws()
    for step, name in ((32, "v_permlane32_swap_b32_e32"), (16, "v_permlane16_swap_b32_e32")):
        one, other, _ = execute([f"{name} v1, v2"], a, b, out=(1, 2), arch="gfx950")
        upper = (LANE & step) > 0
        same(one, np.where(upper, b[LANE ^ step], a))
        same(other, np.where(upper, b, a[LANE ^ step]))


# --- LDS ---


@pytest.mark.parametrize("mode", [PLAIN, LATE])
def test_lds_of_every_width(mode: Mode) -> None:
    data = [draws() for _ in range(4)]
    for words, bits in ((1, 32), (2, 64), (3, 96), (4, 128)):
        place = ["v_mul_lo_u32 v20, v0, 16", "v_mov_b32_e32 v21, v20"]
        source = f"v[1:{words}]" if words > 1 else "v1"
        target = f"v[10:{9 + words}]" if words > 1 else "v10"
        lines = [
            *place,
            f"ds_write_b{bits} v20, {source} offset:16",
            "s_waitcnt lgkmcnt(0)",
            f"ds_read_b{bits} {target}, v21 offset:16",
            "s_waitcnt lgkmcnt(0)",
        ]
        got = execute(lines, *data[:words], out=tuple(range(10, 10 + words)), lds=2048, mode=mode)
        for i in range(words):
            same(got[i], data[i])


def test_lds_of_bytes_and_shorts() -> None:
    a = draws()
    shown = {
        "ds_write_b8 v255, v1|ds_read_u8": a & 255,
        "ds_write_b8_d16_hi v255, v1|ds_read_u8": a >> 16 & 255,
        "ds_write_b16 v255, v1|ds_read_u16": a & 0xFFFF,
        "ds_write_b16_d16_hi v255, v1|ds_read_u16": a >> 16,
        "ds_write_b32 v255, v1|ds_read_i8": u32(i64(a << 24) >> 24),
        "ds_write_b32 v255, v1|ds_read_i16": u32(s16(a)),
        "ds_write_b32 v255, v1|ds_read_u16_d16": (a & 0xFFFF) | 0x77770000,
        "ds_write_b32 v255, v1|ds_read_u16_d16_hi": a << 16 | 0x7777,
        "ds_write_b32 v255, v1|ds_read_u8_d16": (a & 255) | 0x77770000,
        "ds_write_b32 v255, v1|ds_read_u8_d16_hi": (a & 255) << 16 | 0x7777,
    }
    for text, want in shown.items():
        write, read = text.split("|")
        lines = [
            "v_mov_b32_e32 v10, 0x77777777",
            write,
            "s_waitcnt lgkmcnt(0)",
            f"{read} v10, v255",
            "s_waitcnt lgkmcnt(0)",
        ]
        same(execute(lines, a, lds=256)[0], want.astype(np.uint32), text)


@pytest.mark.parametrize("mode", [PLAIN, LATE])
def test_lds_in_two_places(mode: Mode) -> None:
    a, b, c, d = (draws() for _ in range(4))
    for step, stride, far in (("", 1, 128), ("st64", 64, 4)):
        lines = [
            f"ds_write2{step}_b32 v255, v1, v2 offset1:{far}",
            "s_waitcnt lgkmcnt(0)",
            f"ds_read2{step}_b32 v[10:11], v255 offset1:{far}",
            f"v_add_u32_e32 v20, {far * stride * 4}, v255",
            "ds_read_b32 v12, v20",
            "s_waitcnt lgkmcnt(0)",
        ]
        got = execute(lines, a, b, out=(10, 11, 12), lds=4096, mode=mode)
        same(got[0], a), same(got[1], b), same(got[2], b)
        lines = [
            "v_lshlrev_b32_e32 v20, 3, v0",
            f"ds_write2{step}_b64 v20, v[1:2], v[3:4] offset0:1 offset1:{far}",
            "s_waitcnt lgkmcnt(0)",
            f"ds_read2{step}_b64 v[10:13], v20 offset0:1 offset1:{far}",
            "s_waitcnt lgkmcnt(0)",
        ]
        for got_one, want in zip(
            execute(lines, a, b, c, d, out=(10, 11, 12, 13), lds=8192, mode=mode), (a, b, c, d), strict=False
        ):
            same(got_one, want)


def test_atomics_in_lds() -> None:
    a = draws() & np.uint32(0xFFFF)
    start = ["v_mov_b32_e32 v20, 0", "v_mov_b32_e32 v21, 3", "ds_write_b32 v20, v21", "s_waitcnt lgkmcnt(0)"]
    read = ["s_waitcnt lgkmcnt(0)", "ds_read_b32 v10, v20", "s_waitcnt lgkmcnt(0)"]
    shown = {
        "ds_add_u32": 3 + int(a.sum()),
        "ds_or_b32": 3 | int(np.bitwise_or.reduce(a)),
        "ds_max_u32": int(a.max()),
        "ds_max_i32": int(a.max()),
    }
    for name, want in shown.items():
        assert set(execute([*start, f"{name} v20, v1", *read], a, lds=64)[0]) == {want}
    total = execute(
        [*start[:1], "v_mov_b32_e32 v21, 1.0", *start[2:], "ds_add_f32 v20, v1", *read], LANE.astype(np.float32), lds=64
    )[0]
    assert set(total.view(np.float32)) == {1.0 + 63 * 32}
    old = execute([*start, "ds_add_rtn_u32 v10, v20, v1", "s_waitcnt lgkmcnt(0)"], a, lds=64, mode=LATE)[0]
    assert (old == 3 + np.cumsum(a) - a).all()


@pytest.mark.parametrize("bits", [16, 8])
def test_lds_read_transposed(bits: int) -> None:
    """gfx950: 16 lanes read rows and get columns."""
    each, kind = 64 // bits, np.uint16 if bits == 16 else np.uint8
    columns = 16 // each * each  # a row of 16 elements lies in 16 / each lanes
    data = RNG.integers(0, 1 << bits, (4, each, columns)).astype(kind)  # by group of 16 lanes
    words = data.reshape(4, 16, 8 // (bits // 8)).view(np.uint32).reshape(64, 2)
    lines = [
        "v_lshlrev_b32_e32 v20, 3, v0",
        "ds_write_b64 v20, v[1:2]",
        "s_waitcnt lgkmcnt(0)",
        f"ds_read_b64_tr_b{bits} v[10:11], v20",
        "s_waitcnt lgkmcnt(0)",
    ]
    low, high, _ = execute(lines, words[:, 0].copy(), words[:, 1].copy(), out=(10, 11), lds=512, arch="gfx950")
    got = np.stack([low, high], 1).view(kind).reshape(4, 16, each)
    assert (got == data.transpose(0, 2, 1)).all()


def test_outside_of_lds() -> None:
    execute(["ds_read_b32 v10, v255 offset:16"], lds=128, wrong="accesses outside of LDS")


# --- global memory and buffers ---

BUFFER = ["s_mov_b64 s[8:9], s[4:5]", "s_mov_b32 s10, 0x100", "s_mov_b32 s11, 0x27000"]  # of 256 bytes
OUTPUT = ["s_mov_b64 s[12:13], s[6:7]", "s_mov_b32 s14, 0x1000", "s_mov_b32 s15, 0x27000"]
NARROW = {
    "ubyte": lambda x: x & 255,
    "sbyte": lambda x: u32(i64(x << np.uint32(24)) >> 24),
    "ushort": lambda x: x & 0xFFFF,
    "sshort": lambda x: u32(s16(x)),
    "ubyte_d16": lambda x: x & 255 | 0x77770000,
    "ubyte_d16_hi": lambda x: (x & 255) << 16 | 0x7777,
    "short_d16": lambda x: x & 0xFFFF | 0x77770000,
    "short_d16_hi": lambda x: x << 16 | 0x7777,
}
LOADS = [
    f"{kind}_load_{end}" for kind in ("buffer", "global") for end in (*NARROW, "dword", "dwordx2", "dwordx3", "dwordx4")
]
STORES = [
    f"{kind}_store_{end}"
    for kind in ("buffer", "global")
    for end in ("byte", "byte_d16_hi", "short", "short_d16_hi", "dword", "dwordx2", "dwordx3", "dwordx4")
]


@pytest.mark.parametrize("name", LOADS)
def test_loads(name: str) -> None:
    a = draws(512)
    kind, _, end = name.split("_", 2)
    words = int(end[-1]) if end.startswith("dwordx") else 1
    at = f"v[10:{9 + words}]" if words > 1 else "v10"
    where = "s[8:11], 0 offen offset:4" if kind == "buffer" else "s[4:5] offset:4"
    lines = [
        "v_mov_b32_e32 v10, 0x77777777",
        *BUFFER,
        "s_mov_b32 s10, 0x800",
        f"{name} {at}, v255, {where}",
        "s_waitcnt vmcnt(0)",
    ]
    for mode in (PLAIN, LATE):
        got = execute(lines, *a.reshape(8, 64), out=tuple(range(10, 10 + words)), mode=mode)
        for i in range(words):
            same(got[i], np.asarray(NARROW.get(end, lambda x: x)(a[1 + i : 65 + i])).astype(np.uint32), name)


@pytest.mark.parametrize("name", STORES)
def test_stores(name: str) -> None:
    data = [draws() for _ in range(4)]
    kind, _, end = name.split("_", 2)
    words = int(end[-1]) if end.startswith("dwordx") else 1
    source = f"v[1:{words}]" if words > 1 else "v1"
    place = (
        f"{name} {source}, v20, s[12:15], 0 offen offset:1024"
        if kind == "buffer"
        else f"{name} v20, {source}, s[6:7] offset:1024"
    )
    lines = [*OUTPUT, "v_lshlrev_b32_e32 v20, 4, v0", place, "s_waitcnt vmcnt(0)"]
    for mode in (PLAIN, LATE):
        got = execute(lines, *data[:words], out=(), mode=mode)[-1][256:512].reshape(64, 4)
        width = 255 if "byte" in end else 0xFFFF if "short" in end else FULL
        for i in range(4):
            want = (data[i] >> (16 if end.endswith("hi") else 0)) & np.uint32(width) if i < words else 0 * LANE
            same(np.ascontiguousarray(got[:, i]), want, name)


def test_bounds_of_a_buffer() -> None:
    """Past its end loads give 0 and stores do nothing, word by word; below its start is past its end."""
    a = draws(128)
    lines = [
        *BUFFER,
        "v_lshlrev_b32_e32 v20, 3, v0",
        "buffer_load_dword v10, v20, s[8:11], 0 offen",
        "buffer_load_dwordx2 v[11:12], v20, s[8:11], 0 offen offset:4",
        "s_movk_i32 s20, 0x80",
        "buffer_load_dword v13, v255, s[8:11], s20 offen",
        "v_subrev_u32_e32 v21, 64, v255",
        "buffer_load_dword v14, v21, s[8:11], 0 offen",
        "buffer_load_dword v15, off, s[8:11], 0 offset:12",
        "s_waitcnt vmcnt(0)",
    ]
    got = execute(lines, a[:64], a[64:], out=tuple(range(10, 16)))
    inside = np.concatenate([a[:64], np.zeros(512, np.uint32)])
    same(got[0], inside[2 * LANE])
    same(got[1], inside[2 * LANE + 1])
    same(got[2], inside[2 * LANE + 2])
    same(got[3], inside[LANE + 32])
    same(got[4], np.where(LANE < 16, 0, a[np.maximum(LANE, 16) - 16]))
    same(got[5], np.full(64, a[3]))
    lines = [*OUTPUT, "s_mov_b32 s14, 0x80", "buffer_store_dword v1, v255, s[12:15], 0 offen"]
    same(execute(lines, a[:64], out=())[-1][:64], np.where(LANE < 32, a[:64], 0))


def test_memory_that_is_nobodys() -> None:
    execute(["v_mov_b32_e32 v20, 0x10000", "global_load_dword v10, v20, s[4:5]"], wrong="global address")
    execute(
        [*BUFFER, "s_mov_b32 s10, -1", "v_mov_b32_e32 v20, 0x10000", "buffer_load_dword v10, v20, s[8:11], 0 offen"],
        wrong="buffer address",
    )
    execute(["s_load_dword s20, s[4:5], 0x10000"], wrong="address of scalars")
    lines = ["v_mov_b32_e32 v20, s6", "v_mov_b32_e32 v21, s7", "global_store_dword v[20:21], v0, off offset:8"]
    assert execute(lines, out=())[-1][2] == 63  # an address of 64 bits; the last lane wins


@pytest.mark.parametrize("mode", [PLAIN, LATE])
@pytest.mark.parametrize(
    "name",
    [
        "global_load_lds_dword",
        "global_load_lds_dwordx3",
        "global_load_lds_dwordx4",
        "buffer_load_dword",
        "buffer_load_dwordx4",
    ],
)
def test_loads_into_lds(name: str, mode: Mode) -> None:
    """Lanes lie one after the other from M0 on."""
    a = draws(256)
    words = int(name[-1]) if name[-1].isdigit() else 1
    where = "v20, s[4:5]" if name.startswith("global") else "v20, s[8:11], 0 offen lds"
    lines = [
        *BUFFER,
        "s_mov_b32 s10, 0x400",
        "s_mov_b32 m0, 0x40",
        "v_mul_lo_u32 v20, v0, 16",
        f"{name} {where}",
        "s_waitcnt vmcnt(0)",
        f"v_mul_lo_u32 v21, v0, {4 * words}",
        "ds_read_b32 v10, v21 offset:64",
        "s_waitcnt lgkmcnt(0)",
    ]
    same(execute(lines, *a.reshape(4, 64), lds=2048, mode=mode)[0], a[4 * LANE])


def summed(kind: torch.dtype, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    one, other = (torch.from_numpy(v.view(np.int32)).view(kind) for v in (a, b))
    return (one + other).view(torch.int32).numpy().view(np.uint32)


ATOMICS: dict[str, Callable[..., Any]] = {
    "add": lambda old, x: old + x,
    "sub": lambda old, x: old - x,
    "swap": lambda old, x: x,
    "and": lambda old, x: old & x,
    "or": lambda old, x: old | x,
    "umax": np.maximum,
    "umin": np.minimum,
    "smax": lambda old, x: u32(np.maximum(i32(old), i32(x))),
    "smin": lambda old, x: u32(np.minimum(i32(old), i32(x))),
    "cmpswap": lambda old, x: np.where(LANE % 2 == 0, x, old),
    "add_f32": lambda old, x: (old.view(np.float32) + x.view(np.float32)).view(np.uint32),
    "pk_add_f16": lambda old, x: summed(torch.float16, old, x),
    "pk_add_bf16": lambda old, x: summed(torch.bfloat16, old, x),
}
ATOMIC = [f"{kind}_atomic_{end}" for kind in ("buffer", "global") for end in ATOMICS]


@pytest.mark.parametrize("name", ATOMIC)
def test_atomics(name: str) -> None:
    kind, _, end = name.split("_", 2)
    old, x = draws(), draws()
    if "f32" in end or "f16" in end:
        old, x = (
            (half_words() for _ in range(2)) if "f16" in end else (floats(small=True).view(np.uint32) for _ in range(2))
        )
    wanted = np.where(LANE % 2 == 0, old, ~old)
    given = "v[2:3]" if end == "cmpswap" else "v2"
    where = f"{given}, v20, s[12:15], 0 offen sc0" if kind == "buffer" else f"v10, v20, {given}, s[6:7] sc0"
    lines = [
        *OUTPUT,
        "v_add_u32_e32 v20, 0x400, v255",
        "buffer_store_dword v1, v20, s[12:15], 0 offen",
        f"{name} {where}",
        "s_waitcnt vmcnt(0)",
    ]
    lines += ["v_mov_b32_e32 v10, v2"] if kind == "buffer" else []
    for mode in (PLAIN, LATE):
        returned, rest = execute(lines, old, x, wanted, mode=mode)
        same(returned, old)
        with np.errstate(over="ignore"):
            same(rest[192:256], np.asarray(ATOMICS[end](old, x)).astype(np.uint32), name)


ATOMIC_LONG = [f"{kind}_atomic_{end}_x2" for kind in ("buffer", "global") for end in ("add", "swap")]


@pytest.mark.parametrize("name", ATOMIC_LONG)
def test_atomics_of_two_words(name: str) -> None:
    kind, _, end, _ = name.split("_")
    low, high, x = draws(), draws(), draws()
    low[:4] = 0xFFFFFFFF  # a carry
    where = "v[2:3], v20, s[12:15], 0 offen sc0" if kind == "buffer" else "v[10:11], v20, v[2:3], s[6:7] sc0"
    lines = [
        *OUTPUT,
        "v_mov_b32_e32 v22, v1",
        "v_mov_b32_e32 v23, v2",
        "v_mov_b32_e32 v2, v3",
        "v_mov_b32_e32 v3, v3",
        "v_lshl_add_u32 v20, v255, 1, 0x400",
        "buffer_store_dwordx2 v[22:23], v20, s[12:15], 0 offen",
        f"{name} {where}",
        "s_waitcnt vmcnt(0)",
    ]
    lines += ["v_mov_b32_e32 v10, v2", "v_mov_b32_e32 v11, v3"] if kind == "buffer" else []
    given, old = x.astype(np.uint64) << np.uint64(32) | x, high.astype(np.uint64) << np.uint64(32) | low
    with np.errstate(over="ignore"):
        want = old + given if end == "add" else given
    for mode in (PLAIN, LATE):
        returned, rest = execute(lines, low, high, x, mode=mode)
        same(returned, low)
        found = rest[192:320].copy().view(np.uint64)
        assert (found == want).all(), name


def test_atomics_of_all_lanes_on_one_word() -> None:
    a = draws() & np.uint32(0xFFFF)
    got, rest = execute(
        ["v_mov_b32_e32 v20, 0x400", "global_atomic_add v10, v20, v1, s[6:7] sc0", "s_waitcnt vmcnt(0)"], a
    )
    assert (got == np.cumsum(a) - a).all() and rest[192] == a.sum()


# --- matrices ---

FORMATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "fp8": None}
MATRICES = [
    ("gfx942", 16, 4, "f32"),
    ("gfx942", 32, 2, "f32"),
    ("gfx942", 16, 16, "f16"),
    ("gfx942", 32, 8, "f16"),
    ("gfx942", 16, 16, "bf16"),
    ("gfx942", 32, 8, "bf16"),
    ("gfx942", 16, 32, "fp8"),
    ("gfx942", 32, 16, "fp8"),
    ("gfx950", 16, 32, "f16"),
    ("gfx950", 32, 16, "f16"),
    ("gfx950", 16, 32, "bf16"),
    ("gfx950", 32, 16, "bf16"),
    ("gfx950", 16, 128, "fp8"),
    ("gfx950", 32, 64, "fp8"),
]


def matrix_name(arch: str, size: int, depth: int, kind: str) -> str:
    end = kind if kind != "fp8" else "fp8_fp8" if arch == "gfx942" else "f8f6f4"
    return f"v_mfma_f32_{size}x{size}x{depth}_{end}"


MATRIX_NAMES = [matrix_name(*each) for each in MATRICES]


@pytest.mark.parametrize(("arch", "size", "depth", "kind"), MATRICES)
def test_matrices(arch: str, size: int, depth: int, kind: str) -> None:
    """A and B by rows: lane l has row l % size, from element (l / size) · elements of a lane on."""
    dtype = FORMATS[kind] or FP8[arch, "fp8"]
    rng = torch.Generator().manual_seed(size + depth)
    a, b = (torch.randn(size, depth, generator=rng).to(dtype) for _ in range(2))
    held, results = depth * size // 64, size * size // 64
    lanes = [m.view(size, 64 // size, held).transpose(0, 1).reshape(64, held).contiguous() for m in (a, b)]
    words = [lane.view(torch.uint8).numpy().reshape(64, -1).view(np.uint32).T.copy() for lane in lanes]
    count = len(words[0])
    c = torch.randn(results, 64, generator=rng)
    given = [*words[0], *words[1], *c.numpy()]
    second, third = 1 + count, 1 + 2 * count

    def span(first: int, length: int) -> str:
        return f"v[{first}:{first + length - 1}]" if length > 1 else f"v{first}"

    name = matrix_name(arch, size, depth, kind)
    texts = [
        f"{name} v[40:{39 + results}], {span(1, count)}, {span(second, count)}, {span(third, results)}",
        f"{name} a[0:{results - 1}], {span(1, count)}, {span(second, count)}, 0",
    ]
    lines = [*texts, *(f"v_accvgpr_read_b32 v{100 + i}, a{i}" for i in range(results))]
    out = (*range(40, 40 + results), *range(100, 100 + results))
    got = np.stack(execute(lines, *given, out=out, arch=arch)[:-1]).view(np.float32)
    want = a.double() @ b.double().T
    lane, register = np.arange(64), np.arange(results)[:, None]
    row = register + 4 * (lane // 16) if size == 16 else register // 4 * 8 + lane // 32 * 4 + register % 4
    product = want[row, lane % size].numpy()
    np.testing.assert_allclose(got[:results], product + c.numpy(), rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(got[results:], product, rtol=1e-6, atol=1e-5)


# --- waits, barriers, and what is refused ---


def test_a_load_lands_at_its_wait() -> None:
    a = draws(128)
    early = ["global_load_dword v10, v255, s[4:5]", "v_mov_b32_e32 v11, v10", "s_waitcnt vmcnt(0)"]
    got, unwaited, _ = execute(early, a[:64], out=(10, 11), mode=LATE)
    assert (got == a[:64]).all() and (unwaited != a[:64]).all()
    two = [
        "global_load_dword v10, v255, s[4:5]",
        "global_load_dword v11, v255, s[4:5] offset:256",
        "s_waitcnt vmcnt(1)",
        "v_mov_b32_e32 v12, v10",
        "v_mov_b32_e32 v13, v11",
        "s_waitcnt vmcnt(0)",
    ]
    _, _, first, second, _ = execute(two, a[:64], a[64:], out=(10, 11, 12, 13), mode=LATE)
    assert (first == a[:64]).all() and (second != a[64:]).all()


HANDED_OVER = [
    "v_xor_b32_e32 v20, 0x100, v255",
    "ds_write_b32 v255, v0",
    "{wait}",
    "{barrier}",
    "ds_read_b32 v10, v20",
    "s_waitcnt lgkmcnt(0)",
    "global_store_dword v255, v10, s[6:7]",
]


def handed_over(wait: str, barrier: str, mode: Mode) -> bool:
    """Whether each of two waves reads from LDS what the other has written."""
    written = np.zeros(128, np.uint32)
    before = ["s_load_dwordx2 s[6:7], s[0:1], 0x8", "s_waitcnt lgkmcnt(0)", "v_lshlrev_b32_e32 v255, 2, v0"]
    kernel = assembly.of_lines(
        [*before, *(line.format(wait=wait, barrier=barrier) for line in HANDED_OVER), "s_endpgm"], "gfx942"
    )
    work = Work(kernel, (1,), 2, 512, [0, written.ctypes.data], [(written.ctypes.data, written.nbytes)])
    _, wrong = run([work], mode)
    assert not wrong
    return bool((written == np.arange(128) ^ 64).all())


def test_a_missing_wait_and_a_missing_barrier_are_seen() -> None:
    assert all(handed_over("s_waitcnt lgkmcnt(0)", "s_barrier", mode) for mode in (PLAIN, LATE, Mode(quantum=2)))
    assert not handed_over("s_waitcnt vmcnt(0)", "s_barrier", LATE)
    assert not handed_over("s_waitcnt lgkmcnt(0)", "s_nop 0", PLAIN)


def test_waves_that_wait_for_ever_are_given_up() -> None:
    execute([".again:", "s_branch .again"], mode=Mode(most_steps=1000), wrong="gave up after steps")
    execute(["s_trap 2"], wrong="trap")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("v_dream_f32 v1, v2", "instruction v_dream_f32"),
        ("v_add_f32_e32 v1, ttmp3, v2", "operand ttmp3"),
        ("v_mfma_f32_16x16x128_f8f6f4 v[0:3], v[8:15], v[16:23], 0 cbsz:4", "formats"),
        ("s_waitcnt 0x3f", "s_waitcnt 0x3f"),
        ("s_setreg_imm32_b32 hwreg(HW_REG_MODE, 4, 2), 0", "s_setreg_imm32_b32"),
    ],
)
def test_what_is_not_understood_is_refused(line: str, what: str) -> None:
    with pytest.raises(assembly.Unsupported, match=re.escape(what)):
        assembly.of_lines([line], "gfx950")


def test_every_instruction_has_a_test() -> None:
    lists = (
        WORDS,
        LONG,
        COMPARED,
        COMPARED_LONG,
        COMPARED_FLOATS,
        EXACT,
        PACKED_HALVES,
        ALONE_HALVES,
        SHORTS,
        PAIRS,
        LONGS,
        SHIFTS,
        OF_LONG,
        SCALAR_TESTS,
        SMALL_TESTS,
        BRANCHES,
        LOADS,
        STORES,
        ATOMIC,
        ATOMIC_LONG,
        MATRIX_NAMES,
    )
    texts = [Path(__file__).read_text(), *(text for each in lists for text in each)]
    in_loops = (
        "ds_write_b32 ds_write_b64 ds_write_b96 ds_write_b128 ds_read_b32 ds_read_b64 ds_read_b96 ds_read_b128 "
        "ds_write2_b32 ds_write2st64_b32 ds_read2_b32 ds_read2st64_b32 ds_write2_b64 ds_write2st64_b64 "
        "ds_read2_b64 ds_read2st64_b64 v_cvt_f32_fp8 v_cvt_f32_bf8 v_cvt_pk_f32_fp8 v_cvt_pk_f32_bf8 "
        "v_cvt_pk_fp8_f32 v_cvt_pk_bf8_f32 v_fma_mixlo_f16 v_fma_mixhi_f16 ds_read_b64_tr_b16 ds_read_b64_tr_b8"
    )
    named = {
        assembly.mnemonic(word)
        for text in [*texts, in_loops]
        for word in re.findall(r"\b[vs]_\w+|\b(?:ds|buffer|global)_\w+", text)
    }
    assert not set(library.codes()) - named
