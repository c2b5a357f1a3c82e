"""What the interpreter in tests/cdna is worth: a wait or a barrier that is taken out of a kernel is noticed mostly."""

import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from cdna import library
from cdna.cases import ARCHS, BLOCKS, fused, sort
from cdna.mutations import campaign

WITHOUT = "no C compiler named cc, which builds the interpreter of CDNA code"
pytestmark = pytest.mark.skipif(library.compiler() is None, reason=WITHOUT)

# Small calls, as each instruction that is taken out is several launches. They compile what other cases do.
SAMPLE = (
    (fused("tiles of 16", "tiles", 16, experts=2, block=16, up_k=128), ("up", "down")),
    (fused("decode", "decode", 1, experts=4, down_k=256), ("up", "down")),
    (fused("fp8", "fp8_tiles", 16, experts=2, fuse=1, dims=BLOCKS), ("up",)),
    (sort("one launch", "oneshot", num_warps=4), ("oneshot",)),
)
# Of each kernel so many, or all. Of all, 351 of 383 waits and 53 of 61 barriers were noticed. Those that were not, as
# far as somebody looked: waits for what another wait brings in time, or for what counts for nothing; barriers that
# guard what an earlier tile has read, where there is one tile.
ALL = bool(os.environ.get("SWEEP"))
MOST = 1000 if ALL else 4
LEAST = {"s_waitcnt": 0.8 if ALL else 0.7, "s_barrier": 0.75 if ALL else 0.6}  # share; few vary more


@pytest.mark.parametrize("what", LEAST)
@pytest.mark.parametrize("arch", ARCHS)
def test_what_is_taken_out_is_noticed(arch: str, what: str) -> None:
    noticed, missed = 0, list[str]()
    for case, kernels in SAMPLE:
        for kernel in kernels:
            found = campaign(case, arch, kernel, what, MOST)
            noticed, missed = noticed + found.noticed, [*missed, *found.missed]
    total = noticed + len(missed)
    print(f"{arch}, {what}: {noticed} of {total} noticed")
    assert total >= 16 and noticed >= LEAST[what] * total, "\n".join(missed)
