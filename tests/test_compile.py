"""Compiling without a device: resources as the assembly says, the cache key as Triton's own JIT builds it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent / "helpers"))

import tiny_kernels
from launching import driver_of

from moecache.kernels.compile import Resources, compile_source, prepare_launch, read_amdgcn, why_unfit
from moecache.kernels.contract import Source
from moecache.schemas.device import KNOWN, Device
from moecache.schemas.errors import InvalidInput

DEVICES = {"sm_90": KNOWN["h200"], "gfx942": KNOWN["mi300x"], "gfx950": KNOWN["mi355x"]}
SCALE = {
    "X": "*fp32",
    "Y": "*fp32",
    "n": "i32",
    "stride": "i32",
    "offset": "i32",
    "factor": "fp32",
    "flag": "u1",
}


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


def scale_source(aligned=("X", "Y", "n", "stride", "offset"), ones=(), **options) -> Source:
    signature = {**SCALE, "BLOCK": "constexpr", "MODE": "constexpr", **dict.fromkeys(ones, "constexpr")}
    constexprs = {"BLOCK": 256, "MODE": "DOUBLE", **dict.fromkeys(ones, 1)}
    return Source(tiny_kernels.scale, signature, constexprs, options or {"num_warps": 2}, tuple(aligned))


def square_source(tile: int, depth: int, **options) -> Source:
    signature = {"X": "*fp16", "Y": "*fp32", "M": "constexpr", "K": "constexpr"}
    return Source(tiny_kernels.square, signature, {"M": tile, "K": depth}, options, ("X", "Y"))


@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize("case", ["aligned", "misaligned", "one"])
def test_key_is_that_of_a_launch(arch, case, monkeypatch):
    """The JIT, launched with real arguments on a fake driver, must find what compile_source wrote."""
    from triton.runtime.driver import driver

    device = DEVICES[arch]
    x = torch.zeros(1024)
    n, stride = {"aligned": (64, 16), "misaligned": (63, 7), "one": (1, 16)}[case]
    start = x[1:] if case == "misaligned" else x
    names = {"aligned": ("X", "Y", "n", "stride"), "misaligned": ("Y",), "one": ("X", "Y", "stride")}[case]
    ours = compile_source(scale_source(names, ones=("n",) if case == "one" else ()), device)

    monkeypatch.setattr(driver, "_active", driver_of(device), raising=False)
    tiny_kernels.scale.device_caches.clear()
    kernel = tiny_kernels.scale.warmup(
        start, x, n, stride, 48, 2.0, True, BLOCK=256, MODE="DOUBLE", num_warps=2, grid=(1,)
    )
    tiny_kernels.scale.device_caches.clear()
    assert kernel.hash == ours.key


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_amd_figures(arch):
    lean = compile_source(square_source(32, 64, num_warps=4), DEVICES[arch])
    fat = compile_source(square_source(128, 256, num_warps=4, waves_per_eu=8), DEVICES[arch])
    assert (lean.spills, lean.scratch_bytes, lean.threads) == (0, 0, 256)
    assert 16 <= lean.registers <= 256 and lean.shared_bytes > 0
    assert "v_mfma_f32" in lean.text and re.search(r"global_load|buffer_load", lean.text)
    assert fat.spills > 100 and fat.scratch_bytes > 400, fat
    assert "spills" in why_unfit(fat, DEVICES[arch]) and why_unfit(lean, DEVICES[arch]) == ""
    assert why_unfit(fat, DEVICES[arch], spills=10_000) == ""


def test_nvidia_figures():
    lean = compile_source(square_source(64, 64, num_warps=4), DEVICES["sm_90"])
    fat = compile_source(square_source(128, 256, num_warps=4, maxnreg=96), DEVICES["sm_90"])
    assert (lean.spills, lean.scratch_bytes, lean.agprs, lean.threads) == (0, 0, 0, 128)
    assert 16 <= lean.registers <= 255 and "wgmma.mma_async" in lean.text
    assert fat.registers <= 96 and fat.spills > 100 and fat.scratch_bytes >= 4 * fat.spills, fat


def test_shared_memory_and_threads_are_checked_because_triton_does_not():
    wide = compile_source(square_source(128, 512, num_warps=16), DEVICES["gfx942"])
    assert wide.shared_bytes > 65536
    assert f"{wide.shared_bytes} B of shared memory" in why_unfit(wide, DEVICES["gfx942"], spills=1000)
    small = DEVICES["sm_90"].model_copy(update={"max_threads": 128})
    many = compile_source(scale_source(num_warps=8), small)
    assert "256 threads" in why_unfit(many, small)


def test_unfit_by_each_limit():
    device = Device(vendor="amd", arch="gfx942", name="x", units=1, shared_bytes=1000, max_threads=256)
    fine = dict(
        name="k",
        arch="gfx942",
        registers=8,
        agprs=0,
        spills=0,
        scratch_bytes=0,
        shared_bytes=1000,
        threads=256,
        key="",
    )
    assert why_unfit(Resources(**fine), device) == ""
    for change, word in [
        ({"shared_bytes": 1001}, "shared"),
        ({"threads": 512}, "threads"),
        ({"spills": 3, "scratch_bytes": 12}, "3 reg"),
    ]:
        assert word in why_unfit(Resources(**{**fine, **change}), device)
    assert why_unfit(Resources(**{**fine, "spills": 3, "scratch_bytes": 12}), device, spills=3) == ""


def test_what_triton_would_swallow_is_refused():
    with pytest.raises(InvalidInput, match="foo"):
        compile_source(scale_source(num_warps=2, foo=1), DEVICES["gfx942"])
    with pytest.raises(InvalidInput, match="sm_NN"):
        compile_source(scale_source(), Device(vendor="cpu", arch="x86_64", name="cpu", units=2))
    whole = {**SCALE, "BLOCK": "constexpr", "MODE": "constexpr"}
    for lacking in (
        Source(tiny_kernels.scale, SCALE, {"BLOCK": 64}),
        Source(tiny_kernels.scale, whole, {"MODE": ""}),
    ):
        with pytest.raises(InvalidInput, match="BLOCK"):
            compile_source(lacking, DEVICES["sm_90"])


def test_text_without_metadata_is_an_error():
    with pytest.raises(RuntimeError, match="vgpr_count"):
        read_amdgcn("s_endpgm")


def test_compile_error_surfaces():
    source = Source(tiny_kernels.broken, {"Y": "*i32", "VALUE": "constexpr"}, {"VALUE": 7})
    with pytest.raises(Exception, match="VALUE is too small"):
        compile_source(source, DEVICES["gfx950"])


ORDER = """
import sys
from moecache.kernels.sort import kernels as sort_triton
from moecache.kernels.contract import Source
from moecache.kernels.compile import hash_kernels
for name in sys.argv[1:]:
    hash_kernels(getattr(sort_triton, name))
    print(name, getattr(sort_triton, name).cache_key)
"""


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels have no key")
def test_the_key_of_a_kernel_does_not_depend_on_which_kernels_came_before():
    keys = []
    for names in (("oneshot", "count", "place"), ("place", "count", "oneshot")):
        run = subprocess.run([sys.executable, "-c", ORDER, *names], capture_output=True, text=True, check=True)
        keys.append(sorted(line for line in run.stdout.splitlines() if line.split()[0] in names))
    assert keys[0] == keys[1] and len(keys[0]) == 3


def test_preparing_a_launch_says_what_does_not_fit(tmp_path):
    assert prepare_launch(scale_source(), DEVICES["sm_90"]) == "" and any(tmp_path.rglob("*.cubin"))
    assert "threads" in prepare_launch(scale_source(), DEVICES["sm_90"].model_copy(update={"max_threads": 32}))
