"""The kernels of fused MoE and grouped GEMM compile for sm_90, gfx942 and gfx950 within the device; what cannot run is
refused; what is compiled ahead is what a launch asks for."""

import sys
from itertools import product
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from drawn import drawn

from moecache.kernels.compile import compile_source, why_unfit
from moecache.kernels.fused_moe import tiles as sorted_rows
from moecache.kernels.fused_moe.op import FUSED_MOE
from moecache.kernels.gemm.product import shared
from moecache.kernels.grouped_gemm import gpu as grouped_gemm_gpu
from moecache.kernels.grouped_gemm.op import GROUPED_GEMM
from moecache.kernels.matrix import DTYPES
from moecache.predict.ranking import rank
from moecache.schemas.config import config
from moecache.schemas.device import by_arch
from moecache.schemas.problem import Problem

ARCHS = ("sm_90", "gfx942", "gfx950")
MATRIX_UNIT = {"sm_90": "wgmma.mma_async", "gfx942": "v_mfma", "gfx950": "v_mfma"}
OAI = {"activation": "swiglu_oai", "biased": 1}


def problem(arch, op, tokens, experts, topk, hidden, middle, dtype="bf16", **dims):
    device = by_arch(arch)
    return Problem(
        op=op.name, vendor=device.vendor, arch=arch, units=device.units, tokens=tokens, experts=experts, topk=topk,
        dtype=dtype, dims=tuple(({"hidden": hidden, "intermediate": middle} | dims).items()),
    )  # fmt: skip


ASKED = {
    "one token": lambda arch: problem(arch, FUSED_MOE, 1, 128, 8, 2048, 768),
    "few rows": lambda arch: problem(arch, FUSED_MOE, 64, 32, 4, 2880, 2880, **OAI),
    "many rows": lambda arch: problem(arch, FUSED_MOE, 1024, 128, 8, 2048, 768),
    "on input, gelu": lambda arch: problem(
        arch, FUSED_MOE, 4096, 8, 2, 4096, 14336, "fp16", on_input=1, activation="gelu"
    ),
    "few rows, fp16": lambda arch: problem(arch, FUSED_MOE, 64, 64, 8, 2048, 768, "fp16"),
    "unaligned": lambda arch: problem(arch, FUSED_MOE, 512, 8, 2, 100, 33, unaligned=1, biased=1),
    "fp32": lambda arch: problem(arch, FUSED_MOE, 16, 8, 2, 256, 128, "fp32"),
    "past 2 GiB": lambda arch: problem(arch, FUSED_MOE, 64, 128, 4, 2880, 2880),
    "off sixteen": lambda arch: problem(arch, FUSED_MOE, 256, 16, 4, 1000, 360),
    "product": lambda arch: problem(arch, GROUPED_GEMM, 4096, 8, 1, 2880, 2880, biased=1, gathered=1),
    "product, few rows": lambda arch: problem(arch, GROUPED_GEMM, 16, 128, 1, 2048, 768, "fp16"),
}


def op_of(question):
    return FUSED_MOE if question.op == "fused_moe" else GROUPED_GEMM


def sample(configs):
    """The best candidate of each variant and the last of all."""
    best = {cfg.variant: cfg for cfg in reversed(configs)}
    return list(dict.fromkeys([*best.values(), configs[-1]]))


PRODUCTS = ("up", "down", "product")  # kernels that multiply, beside those that sort, lay out and add up


def products(question, cfg):
    """What each launch of a config is made of; nothing for decode, which has no tiles."""
    if cfg.variant == "decode":
        return [None, None]
    return sorted_rows.products(cfg) if question.op == "fused_moe" else [grouped_gemm_gpu._product(cfg)]


def allowed_spills(part, question):
    """Where two groups of warps multiply, each has 208 to 224 registers: a few of what outlives a tile do not fit."""
    if not part or part.parts == 1:
        return 0
    return 16 if question.dim("activation", "") == "gelu" else 8  # erf, from Triton 3.9 on


@pytest.mark.parametrize("arch, name", drawn(list(product(ARCHS, ASKED)), 12))
def test_candidates_compile_and_stay_within_the_device(name, arch):
    device, question = by_arch(arch), ASKED[name](arch)
    space = op_of(question).space(question, device)
    assert len(space) >= (
        2 if name in ("unaligned", "off sixteen", "fp32", "past 2 GiB") or question.op == "grouped_gemm" else 3
    )
    for cfg in drawn(sample(space), 1):
        sources, parts = op_of(question).sources(question, cfg, device), products(question, cfg)
        multiplying = [source for source in sources if source.fn.__name__ in PRODUCTS]
        for source in sources:
            number = multiplying.index(source) if source in multiplying else None
            part = None if number is None else parts[number]
            found = compile_source(source, device)
            spills = allowed_spills(part, question)
            assert why_unfit(found, device, spills=spills) == "", f"{cfg}: {source.fn.__name__}"
            if part:
                size, panels = DTYPES[question.dtype].itemsize, 2 - number if question.op == "fused_moe" else 1
                bound = shared(part, device, size, panels, 4 if (panels, question.dtype) == (1, "fp16") else size)
                assert found.shared_bytes <= bound, f"{cfg}: {source.fn.__name__}"
                wide = name not in ("unaligned", "off sixteen")  # else rows are read one value at a time, past buffers
                if arch != "gfx950" and size == 2 and wide:  # gfx950 may keep W in registers, sums of fp32 no buffer
                    assert bound <= 1.25 * found.shared_bytes + 4096, f"{cfg}: {source.fn.__name__}"
                if arch != "gfx950" and size == 2:
                    assert MATRIX_UNIT[arch] in found.text, f"{cfg}: {source.fn.__name__}"
        assert len(multiplying) == len(parts)


@pytest.mark.parametrize(
    "shape",
    drawn([(16, 128, 128, 3, 4, 1), (64, 128, 64, 5, 4, 2), (128, 128, 64, 4, 8, 1), (256, 64, 64, 4, 4, 2)], 2),
)
def test_the_ring_is_warp_specialised(shape):
    block, n, k, stages, warps, parts = shape
    device, question = by_arch("sm_90"), ASKED["many rows"]("sm_90")
    params = {"block": block, "group": 8, "combine": "sum", "swap": int(block < 64), "tma": 1, "programs": 132}
    for prefix in ("up", "down"):
        params |= {f"{prefix}_n": n, f"{prefix}_k": k, f"{prefix}_stages": stages, f"{prefix}_warps": warps}
    cfg = config("ring", {"launch_pdl": 1}, parts=parts, **params)
    assert sorted_rows.fits(question, cfg, device) == ""
    sources = [source for source in FUSED_MOE.sources(question, cfg, device) if source.fn.__name__ in PRODUCTS]
    assert len(sources) == 2
    for source in sources:
        found = compile_source(source, device)
        assert why_unfit(found, device, spills=8 if parts == 2 else 0) == ""
        for word in ("wgmma.mma_async", "cp.async.bulk.tensor", "cp.async.cg", "setmaxnreg", "mbarrier.try_wait",
                     "griddepcontrol.wait", "griddepcontrol.launch_dependents"):  # fmt: skip
            assert word in found.text, word
        assert found.text.count("setmaxnreg.dec") and found.text.count("setmaxnreg.inc")
        # slots and items; one that nobody waits for gives its memory away while the device may still write to it
        turns = parts == 2 and block == 64
        assert found.text.count("mbarrier.init") == 2 * stages + (stages + 3) + 2 * turns
        # a slot must not be handed back before every warp has read it
        before = found.text[: found.text.index("mbarrier.arrive.shared::cta.b64 _,")].splitlines()[-6:]
        assert any("bar.sync" in line for line in before), before


# --- what cannot run ---

WRONG = [
    ({"block": 48}, "powers of two"), ({"block": 512}, "powers of two"), ({"block": 8}, "under 16"),
    ({"up_n": 0}, "powers of two"), ({"up_k": 8}, "under 16"), ({"down_stages": 0}, "stages=0"),
    ({"down_stages": 13}, "stages=13"), ({"up_warps": 64}, "too many threads"), ({"group": 0}, "group=0"),
    ({"programs": -1}, "programs=-1"), ({"tma": 2}, "tma=2"), ({"swap": -1}, "swap=-1"),
    ({"combine": "max"}, "combine=max"), ({"parts": 2}, "only a ring"), ({"up_n": 256, "block": 128}, "sums a thread"),
    ({"up_k": 256, "up_stages": 9}, "shared"), ({"up_n": "wide"}, "no config"),
]  # fmt: skip


def tiles(**change):
    params = {"block": 64, "group": 1, "combine": "sum", "swap": 0, "tma": 0}
    for prefix in ("up", "down"):
        params |= {f"{prefix}_n": 64, f"{prefix}_k": 64, f"{prefix}_stages": 2, f"{prefix}_warps": 4}
    return config("tiles", **params | change)


@pytest.mark.parametrize("change, words", WRONG)
@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_what_no_kernel_can_run_is_refused(change, words, arch):
    device, question = by_arch(arch), ASKED["many rows"](arch)
    assert sorted_rows.fits(question, tiles(), device) == ""
    assert words in FUSED_MOE.fits(question, tiles(**change), device)


def test_what_the_problem_or_the_device_rules_out():
    h200, mi300x = by_arch("sm_90"), by_arch("gfx942")
    many, few = ASKED["many rows"]("sm_90"), ASKED["one token"]("sm_90")
    pdl = config("tiles", {"launch_pdl": 1}, **dict(tiles().params))
    ring = config("ring", **dict(tiles(tma=1, swap=1, programs=132).params))
    decode = config("decode", up_n=8, up_k=1024, up_warps=8, down_n=8, down_k=256, down_warps=8)
    for question, good in ((many, pdl), (many, ring), (few, decode)):
        assert FUSED_MOE.body(good.variant).fits(question, good, h200) == ""
    exact = many.model_copy(update={"dims": (*many.dims, ("deterministic", 1))})
    for question, cfg, device, words in [
        (many, decode, h200, "pairs"),
        (few, tiles(block=128), h200, "block=128"),
        (exact, tiles(combine="atomic"), h200, "no fixed order"),
        (ASKED["fp32"]("sm_90"), tiles(combine="atomic"), h200, "no fixed order"),
        (ASKED["few rows, fp16"]("sm_90"), tiles(combine="atomic"), h200, "adds up in fp16"),
        (ASKED["unaligned"]("sm_90"), tiles(tma=1), h200, "16 bytes"),
        (ASKED["unaligned"]("sm_90"), ring, h200, "16 bytes"),
        (ASKED["many rows"]("gfx942"), pdl, mi300x, "launch_pdl"),
        (ASKED["many rows"]("gfx942"), tiles(tma=1), mi300x, "tma=1"),
        (ASKED["many rows"]("gfx942"), config("ring", **dict(ring.params) | {"tma": 0}), mi300x, "sm_90"),
        (many, config("ring", **dict(ring.params) | {"up_stages": 1}), h200, "stages=1"),
        (many, config("ring", **dict(ring.params) | {"block": 128}), h200, "no ring"),
        (many, tiles(), h200.model_copy(update={"shared_bytes": 4096}), "shared memory"),
        (many, config("torch"), h200, "does not exist"),
    ]:
        assert words in FUSED_MOE.fits(question, cfg, device), cfg


@pytest.mark.parametrize(
    ("block", "n", "warps", "parts", "good"),
    [
        (64, 128, 4, 2, True), (128, 128, 8, 1, True), (256, 64, 4, 2, True), (256, 128, 4, 2, False),
        (256, 64, 8, 1, False), (256, 64, 4, 1, False), (128, 128, 4, 2, False), (64, 64, 8, 1, False),
    ],
)  # fmt: skip
def test_heights_of_a_ring(block, n, warps, parts, good):
    params = {"block": block, "group": 8, "combine": "sum", "swap": 0, "tma": 1, "programs": 132, "parts": parts}
    for prefix in ("up", "down"):
        params |= {f"{prefix}_n": n, f"{prefix}_k": 64, f"{prefix}_stages": 4, f"{prefix}_warps": warps}
    why = FUSED_MOE.fits(ASKED["many rows"]("sm_90"), config("ring", **params), by_arch("sm_90"))
    assert ("no ring" in why) != good


@pytest.mark.parametrize(("hidden", "middle", "swept"), [(7168, 256, True), (4096, 1792, False), (2048, 256, True)])
def test_additions_sweep_the_columns_where_the_second_product_is_short(hidden, middle, swept):
    device = by_arch("sm_90")
    space = FUSED_MOE.space(problem("sm_90", FUSED_MOE, 4096, 64, 8, hidden, middle), device)
    rings = [c for c in space if c.variant == "ring" and c["combine"] == "atomic"]
    assert rings and all(("down_group" in dict(c.params)) == swept for c in rings)
    assert not any("down_group" in dict(c.params) for c in space if c not in rings)
    first, second = sorted_rows.products(rings[0])
    assert (first.group, second.group) == (rings[0]["group"], 1024 if swept else rings[0]["group"])


ANYTHING = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 8, 16, 24, 32, 64, 128, 256, 512, 4096, -1, -64]), st.integers(-(2**70), 2**70),
    st.booleans(), st.sampled_from(["", "sum", "atomic", "64", "ring"]),
)  # fmt: skip
NAMES = [
    f"{prefix}{name}" for prefix in ("", "up_", "down_") for name in ("block", "low", "n", "k", "stages", "warps")
] + ["group", "programs", "swap", "tma", "parts", "combine", "pdl", "options", "kernel", "foo"]  # fmt: skip
KNOBS = st.dictionaries(st.sampled_from(["launch_pdl", "xcds", "waves_per_eu", "maxnreg", "foo"]), ANYTHING, max_size=2)


@settings(max_examples=400)
@given(
    st.sampled_from(["decode", "tiles", "heights", "ring", "tiles_ring", "tile", "by_expert", "none"]),
    st.dictionaries(st.sampled_from(NAMES), ANYTHING, max_size=22), KNOBS, st.sampled_from(sorted(ASKED)),
    st.sampled_from(ARCHS), st.booleans(),
)  # fmt: skip
def test_made_up_configs_get_an_answer(variant, params, knobs, name, arch, whole):
    """Never an exception; and a config that lacks a parameter, or has one that is no number, never fits."""
    device, question = by_arch(arch), ASKED[name](arch)
    op = op_of(question)
    base = next((dict(c.params) for c in op.space(question, device) if c.variant == variant), {}) if whole else {}
    answer = op.fits(question, config(variant, knobs, **base | params), device)
    assert isinstance(answer, str)
    given_all = base | params
    sizes = ("up_n", "up_k", "up_warps", "down_n", "down_k", "down_warps") if op is FUSED_MOE else ("block", "n", "k")
    if any(not isinstance(given_all.get(name, given_all.get(name.split("_")[-1])), int) for name in sizes):
        assert answer


@settings(max_examples=200)
@given(
    st.sampled_from(ARCHS), st.sampled_from(sorted(DTYPES)), st.sampled_from([1, 2, 4, 16, 64, 512, 8192, 131072]),
    st.integers(1, 1024), st.integers(1, 32), st.integers(1, 20000), st.integers(1, 20000), st.booleans(),
)  # fmt: skip
@example("sm_90", "bf16", 512, 1, 1, 1, 1, False)
@example("sm_90", "fp16", 8192, 8, 2, 1000, 360, False)
def test_every_problem_has_candidates_with_a_cost(arch, dtype, tokens, experts, topk, hidden, middle, deterministic):
    device = by_arch(arch)
    size = DTYPES[dtype].itemsize
    dims = {"unaligned": 1} if hidden * size % 16 or middle * size % 16 else {}
    dims |= {"deterministic": 1} if deterministic else {}
    for op in (FUSED_MOE, GROUPED_GEMM):
        question = problem(arch, op, tokens, experts, topk if op is FUSED_MOE else 1, hidden, middle, dtype, **dims)
        space = op.space(question, device)
        assert space and len(set(space)) == len(space)
        if topk <= experts:
            assert all(0 < us < 1e12 for us in rank(op, question, space, device).us)
        assert not deterministic or not any(dict(c.params).get("combine") == "atomic" for c in space)


def test_half_of_the_experts_idle_reads_half_of_the_weights():
    question, device = ASKED["few rows"]("sm_90"), by_arch("sm_90")
    spread, few = (
        min(rank(FUSED_MOE, asked, FUSED_MOE.space(asked, device), device).us)
        for asked in (question.model_copy(update={"routing": name}) for name in ("a0e0", "a1e1"))
    )
    assert 0.45 < few / spread < 0.65


@settings(max_examples=100)
@given(st.sampled_from(ARCHS), st.sampled_from(["few rows", "many rows"]), st.sampled_from(["a0e0", "a0e2", "a2e3"]))
def test_faster_hardware_never_costs_more(arch, name, bucket):
    device = by_arch(arch)
    question = ASKED[name](arch).model_copy(update={"routing": bucket})
    rates = tuple((dtype, 2 * rate) for dtype, rate in device.peak_tflops)
    for better in ({"bandwidth_gbs": 2 * device.bandwidth_gbs}, {"peak_tflops": rates},
                   {"llc_bytes": 2 * device.llc_bytes}):  # fmt: skip
        faster = device.model_copy(update=better)
        space = FUSED_MOE.space(question, device)
        both = (rank(FUSED_MOE, question, space, where).us for where in (faster, device))
        assert all(a <= b * 1.0001 for a, b in zip(*both, strict=True))
