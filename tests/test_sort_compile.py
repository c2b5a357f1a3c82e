"""Candidates of the sorting search spaces compile for gfx942, gfx950 and sm_90, and stay within the device: a few drawn
ones, all of them with SWEEP=1."""

import sys
from itertools import product
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from drawn import drawn

from moecache.kernels.compile import compile_source, why_unfit
from moecache.kernels.sort import gpu as sort_gpu
from moecache.kernels.sort.op import SORT
from moecache.schemas.config import config
from moecache.schemas.device import by_arch
from moecache.schemas.problem import Problem

SHAPES = [(8, 2), (128, 8), (512, 10)]
TOKENS = [1, 64, 1024, 16384]
DIMS = {
    1: {"block_m": 16},
    64: {"block_m": 16, "weighted": 1},
    1024: {"block_m": 64, "mapped": 1},
    16384: {"block_m": 128},
}


def problem(arch: str, experts: int, topk: int, tokens: int) -> Problem:
    device = by_arch(arch)
    return Problem(
        op="moe_sort", vendor=device.vendor, arch=arch, units=device.units, tokens=tokens, experts=experts, topk=topk,
        dtype="int64" if tokens == 64 else "int32", dims=tuple(DIMS[tokens].items()),
    )  # fmt: skip


@pytest.mark.parametrize("arch, shape, tokens", drawn(list(product(("gfx942", "gfx950", "sm_90"), SHAPES, TOKENS)), 12))
def test_candidates_compile(arch, shape, tokens):
    device, (experts, topk) = by_arch(arch), shape
    question = problem(arch, experts, topk, tokens)
    space = SORT.space(question, device)
    assert {c.variant for c in space} >= ({"oneshot", "multiphase"} if tokens == 64 else {"multiphase"})
    assert len(space) >= 4
    for cfg in drawn(space, 1):
        for source in SORT.sources(question, cfg, device):
            found = compile_source(source, device)
            assert why_unfit(found, device) == "", f"{cfg}: {source.fn.__name__}"
            assert found.shared_bytes <= sort_gpu._shared(question, cfg), f"{cfg}: {source.fn.__name__}"
            assert found.spills == 0 and found.scratch_bytes == 0, f"{cfg}: {source.fn.__name__}"


def test_the_handshake_is_a_loop_of_atomics_on_cdna():
    """A poll that is hoisted out of its loop hangs for ever; so does one that reads a stale line."""
    for arch in ("gfx942", "gfx950"):
        device = by_arch(arch)
        question = problem(arch, 64, 8, 1024)
        cfg = next(c for c in SORT.space(question, device) if dict(c.params).get("fused"))
        text = compile_source(SORT.sources(question, cfg, device)[0], device).text
        assert "global_atomic_add" in text and "s_cbranch" in text
        assert "buffer_inv sc1" in text, "an acquire must drop stale lines"
        assert "buffer_wbl2 sc1" in text, "a release must write back"


def test_dependent_launch_is_in_the_machine_code():
    device = by_arch("sm_90")
    question = problem("sm_90", 128, 8, 1)
    cfg = next(c for c in SORT.space(question, device) if dict(c.extra).get("launch_pdl"))
    text = compile_source(SORT.sources(question, cfg, device)[0], device).text
    assert "griddepcontrol.wait" in text and "griddepcontrol.launch_dependents" in text


@pytest.mark.parametrize(("arch", "experts", "fits"), [("gfx942", 64, True), ("gfx942", 65, False),
                                                       ("gfx950", 256, False), ("sm_90", 256, True)])  # fmt: skip
def test_waves_that_nobody_waits_for_raise_no_flag(arch, experts, fits):
    """On CDNA a barrier waits for no stores of other waves: one wave alone may store what a flag stands for."""
    device = by_arch(arch)
    problem = Problem(op="moe_sort", vendor=device.vendor, arch=arch, units=device.units, tokens=256, experts=experts,
                      topk=8, dims=(("block_m", 16),))  # fmt: skip
    cfg = config("multiphase", chunks=16, block=32, step=32, num_warps=4, scan=0, fused=1)
    assert ("a handshake" in sort_gpu.fits(problem, cfg, device)) != fits
    assert fits or not any(c.variant == "multiphase" and c["fused"] for c in SORT.space(problem, device))
