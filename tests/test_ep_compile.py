"""Expert parallelism compiles for sm_90, gfx942 and gfx950; its machine code waits, tells and stores as it should."""

import re
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from moecache.kernels.compile import Resources, compile_source, why_unfit
from moecache.kernels.contract import Source
from moecache.kernels.ep import combine_kernels, dispatch_kernels
from moecache.schemas.device import by_arch

tl = pytest.importorskip("triton.language")
ARCHS = ("sm_90", "gfx942", "gfx950")
KERNELS = {
    "dispatch": (dispatch_kernels.dispatch_rows, {"WIRE": 0, "TOP": 448.0}),
    "quantising": (dispatch_kernels.dispatch_rows, {"WIRE": 1, "TOP": 448.0}),
    "push": (combine_kernels.push_rows, {}),
    "pull": (combine_kernels.pull_rows, {}),
}
FREE = {"tokens", "capacity", "me", "patience", "steps", "step_items"}  # whatever they are, the kernel is the same


def compiled(arch: str, name: str, world: int, block: int = 4096, warps: int = 8) -> Resources:
    """A kernel for rows of DeepSeek-V3, as `exchange` launches it."""
    device, (fn, own) = by_arch(arch), KERNELS[name]
    fp8 = {"sm_90": tl.float8e4nv, "gfx942": tl.float8e4b8, "gfx950": tl.float8e4nv}[arch]
    constants: dict[str, Any] = {
        "K": 8, "KP": 8, "H": 7168, "E": 256, "WORLD": world, "WIDE": world, "PAIR": world == 2, "WORDS": 1024,
        "SPAN": 8, "PROGRAMS": 128, "BLOCK": block, "NH": -(-7168 // block), "THREADS": 64 * warps,
        "HIP": device.vendor == "amd", "PDL": arch == "sm_90", "SEND": True, "RECEIVE": True,
        "TYPE": fp8 if name == "quantising" else tl.bfloat16,
    } | own  # fmt: skip
    kinds = dict.fromkeys(("PEERS", "WORDS_HERE", "CLOCK", "LAST"), "*i64")
    kinds |= dict.fromkeys(("X", "Y", "BACK", "OUT"), "*bf16") | dict.fromkeys(("X_SCALES", "WEIGHTS"), "*fp32")
    kinds |= dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, "*i32" if name.isupper() else "i32") for name in fn.arg_names}
    aligned = tuple(name for name, kind in signature.items() if kind != "constexpr" and name not in FREE)
    source = Source(fn, signature, constants, {"num_warps": warps}, aligned)
    found = compile_source(source, device)
    assert why_unfit(found, device) == ""
    return found


def loops(text: str) -> list[str]:
    """The instructions between each label and the last branch back to it."""
    lines, found = text.splitlines(), []
    for at, line in enumerate(lines):
        if label := re.match(r"\s*([$.\w]+):", line):
            branch = re.compile(rf"\b(bra|s_c?branch)\S*\s+{re.escape(label[1])}(?![\w.$])")
            back = [number for number in range(at, len(lines)) if branch.search(lines[number])]
            found += ["\n".join(lines[at : back[-1] + 1])] if back else []
    return found


def after(text: str, *patterns: str) -> bool:
    """Whether each of the patterns is found behind the one before."""
    at = 0
    for pattern in patterns:
        if not (found := re.compile(pattern).search(text, at)):
            return False
        at = found.end()
    return True


PAIRS = list(product(ARCHS[:2], KERNELS))
CASES = [*((*each, 2) for each in PAIRS), ("gfx950", "dispatch", 2), ("sm_90", "dispatch", 8), ("gfx942", "push", 4)]


@pytest.mark.parametrize("arch, name, world", CASES)
def test_the_machine_code_tells_after_the_data_and_polls_anew(arch: str, name: str, world: int) -> None:
    text = compiled(arch, name, world).text
    if arch == "sm_90":
        assert after(text, r"bar\.sync", r"atom\.global\.sys\.release\.exch\.b64")
        read = r"(ld|atom)\.global\.sys\.acquire\.\S*64"
    else:
        # Each wave writes back and waits for its own stores before all meet, and one of them tells; a pull stores none.
        waits = () if name == "pull" else (r"s_waitcnt vmcnt\(0\)",)
        assert after(text, r"buffer_wbl2 sc0 sc1", *waits, r"global_atomic_swap v", r"s_barrier",
                     r"buffer_wbl2 sc0 sc1", r"global_atomic_swap_x2 ")  # fmt: skip
        read = r"global_atomic_add_x2 .*sc1|global_load_dwordx2 .*sc0 sc1"
    polls = [loop for loop in loops(text) if re.search(read, loop)]
    assert polls, "the word is read in a loop"
    if arch != "sm_90":
        assert all("buffer_inv sc0 sc1" in loop for loop in polls), "what was read before is read anew"


@pytest.mark.parametrize("arch, name", PAIRS)
def test_rows_are_stored_16_bytes_at_a_time(arch: str, name: str) -> None:
    """Addresses that a kernel reads have no known alignment: without a promise a row is stored 2 bytes at a time."""
    text = compiled(arch, name, 2, block=8192 if name == "quantising" else 4096).text
    assert len(re.findall(r"st\.global\.v4\.b32|(?:buffer|global)_store_dwordx4", text)) >= 1
    assert not re.search(r"st\.global(\.v2)?\.b16|(buffer|global)_store_short", text)
