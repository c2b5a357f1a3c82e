"""Activations on a GPU: what of each form compiles, in a few kernels of every variant, what is tried and what it should
cost. Their numbers are tested with those of the ops."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from parts import spent

from moecache.kernels.compile import compile_source, why_unfit
from moecache.kernels.fused_moe.op import FUSED_MOE
from moecache.kernels.gemm.work import layer
from moecache.predict.calls import cell
from moecache.predict.parameters import zero_shot
from moecache.predict.ranking import rank
from moecache.report.limit import limit_us
from moecache.schemas.device import by_arch
from moecache.schemas.problem import Problem

BARE, LIMITED, TANH = (
    {"gated": 0, "activation": "relu2", "biased": 1}, {"activation": "silu_limited"}, {"activation": "gelu_tanh"},
)  # fmt: skip
BLOCKS = {"quant": "fp8_block"}


def problem(arch, tokens=1024, experts=128, topk=6, hidden=2688, middle=1856, **dims):
    device = by_arch(arch)
    return Problem(
        op="fused_moe", vendor=device.vendor, arch=arch, units=device.units, tokens=tokens, experts=experts, topk=topk,
        dtype="bf16", dims=tuple(({"hidden": hidden, "intermediate": middle} | dims).items()),
    )  # fmt: skip


def first(question, device, variant, **params):
    """The best config of a variant that has these parameters."""
    space = FUSED_MOE.space(question, device)
    return next(c for c in space if c.variant == variant and params.items() <= dict(c.params).items())


@pytest.mark.parametrize(
    "arch, dims, tokens, variant, params",
    [
        ("sm_90", BARE, 4, "decode", {}),
        ("sm_90", BARE, 1024, "tiles", {}),
        ("sm_90", BARE, 64, "ring", {"swap": 1}),
        ("sm_90", BARE, 1024, "ring", {"parts": 2, "block": 64}),
        ("sm_90", LIMITED, 1024, "ring", {"block": 128}),
        ("sm_90", BARE | BLOCKS, 1024, "fp8_tiles", {"fuse": 1}),
        ("sm_90", BARE | BLOCKS | {"middle": 1792}, 4096, "fp8_ring", {}),
        ("gfx942", BARE, 1024, "tiles", {}),
        ("gfx942", BARE | {"quant": "fp8_channel"}, 64, "fp8_tiles", {}),
        ("gfx942", LIMITED, 4, "decode", {}),
        ("gfx950", TANH, 1024, "heights", {}),
        ("gfx950", BARE | BLOCKS, 1024, "fp8_tiles", {"fuse": 1}),
    ],
)
def test_forms_compile(arch, dims, tokens, variant, params):
    """The first product alone: the second knows no activation."""
    device, question = by_arch(arch), problem(arch, tokens, **dims)
    cfg = first(question, device, variant, **params)
    source = next(s for s in FUSED_MOE.sources(question, cfg, device) if s.constexprs.get("ACT"))
    found = compile_source(source, device)
    two = dict(cfg.params).get("parts") == 2 or variant == "fp8_ring"  # groups of warps, which share the registers
    assert why_unfit(found, device, spills=32 if two else 0) == "", cfg.name


@pytest.mark.parametrize("arch", ["sm_90", "gfx942", "gfx950"])
@pytest.mark.parametrize("dims", [{}, {"biased": 1}, BLOCKS, {"quant": "fp8_channel"}, {"quant": "fp8_tensor"}])
@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_without_a_gate_there_is_as_much_to_try_for_a_third_less(arch, dims, tokens):
    device, gated, bare = by_arch(arch), problem(arch, tokens, **dims), problem(arch, tokens, **dims, gated=0)
    spaces = [FUSED_MOE.space(question, device) for question in (gated, bare)]
    assert {c.variant for c in spaces[0]} == {c.variant for c in spaces[1]}
    for question, space in zip((gated, bare), spaces, strict=True):
        assert all(FUSED_MOE.fits(question, c, device) == "" for c in space)
    for predicted in (
        lambda question, space: min(rank(FUSED_MOE, question, space, device).us),
        lambda question, space: limit_us(question),
    ):
        both, one = (predicted(question, space) for question, space in zip((gated, bare), spaces, strict=True))
        assert (0.55 if tokens > 1 else 0.5) * both < one < (0.8 if tokens > 1 else 1.0) * both


def test_the_cost_model_counts_the_panels():
    """A product without a gate, and one of half as many columns with it, are the same to multiply."""
    device, counts = by_arch("sm_90"), (48,) * 128
    gated, bare = cell(problem("sm_90", middle=928), counts), cell(problem("sm_90", gated=0), counts)
    assert bare.wide == gated.wide == 1856
    one = first(problem("sm_90", middle=928), device, "tiles")
    two = first(problem("sm_90", gated=0), device, "tiles", down_n=one["down_n"], up_n=2 * one["up_n"])
    works = [(gated, layer(one)), (bare, layer(two, gated=False))]
    halves = [spent(zero_shot(device), device, *each).up for each in works]
    assert halves[0]["matmul"] == halves[1]["matmul"] and halves[0]["l2"] == halves[1]["l2"]
