"""The fp8 path of fused MoE for GPUs: its kernels interpreted against the reference, compiled for three architectures,
and every candidate on a GPU."""

import sys
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from drawn import NO_FNUZ, drawn, fnuz_fails, in_turn
from interpreting import INTERPRETED, full_of_nan, knows_fnuz, marked, of_the_cpu_test, poison_workspaces, sort_in_torch
from placed import placed

from moecache.kernels.compile import compile_source, why_unfit
from moecache.kernels.formats import registry as formats
from moecache.kernels.formats.contract import Quant
from moecache.kernels.formats.registry import KINDS
from moecache.kernels.fused_moe import fp8_ring as ringed
from moecache.kernels.fused_moe import fp8_tiles as gpu
from moecache.kernels.fused_moe.op import FUSED_MOE
from moecache.kernels.gemm import fp8_ring, fp8_tile
from moecache.kernels.launch import Plan, Workspace
from moecache.kernels.running import NAMES, Running, described
from moecache.kernels.tensors import poison
from moecache.predict.ranking import rank
from moecache.schemas.config import config
from moecache.schemas.device import KNOWN, by_arch
from moecache.schemas.problem import Problem

ARCHS = ("sm_90", "gfx942", "gfx950")


cpu = of_the_cpu_test("fused_moe")


def fp8(args, kind, dtype=torch.float8_e4m3fn):
    """The same weights in fp8 with the scales of a kind."""
    made = []
    for name in ("w1", "w2"):
        parts = [formats.get(kind).quantised(weights.float(), dtype) for weights in getattr(args, name)]
        made += [torch.stack([w for w, _ in parts]), torch.stack([s for _, s in parts])]
    return replace(args, w1=made[0], w2=made[2], quant=Quant(kind, made[1], made[3], apart=False))


def beyond(args):
    """A map that names experts which are not here: they take no part."""
    count = len(args.w1) + 4
    ids = torch.randint(0, count, args.topk_ids.shape)
    return replace(args, topk_ids=ids, expert_map=torch.arange(count, dtype=torch.int32), num_experts=count)


def transposed(args):
    """Elements of a row that are not side by side."""
    return replace(args, **{name: getattr(args, name).mT.contiguous().mT for name in ("hidden_states", "w1", "w2")})


@cache
def cases():
    """Fresh calls over everything that the kernels treat apart."""
    call, bad = cpu.call, torch.randint(0, 5, (9, 3))
    bad[1], bad[2, 1], bad[3, 0], bad[4, 2] = -1, 5, 2**40 + 1, -(2**33)
    made = {
        "whole blocks": call(hidden=256, middle=128),
        "fp16": call(hidden=128, middle=256, dtype=torch.float16),
        "fp32": call(hidden=144, middle=64, dtype=torch.float32),
        "odd sizes": call(hidden=131, middle=77),
        "panel over two blocks": call(hidden=160, middle=208),
        "gelu": call(hidden=48, middle=80, activation="gelu"),
        "swiglu_oai": call(hidden=48, middle=80, activation="swiglu_oai", alpha=1.3, limit=0.5),
        "limit": call(hidden=48, middle=80, limit=0.4),
        "gelu_tanh, whole blocks": call(hidden=128, middle=128, activation="gelu_tanh"),
        "no gate": cpu.biased(call(hidden=140, middle=200, gated=False, activation="relu2")),
        "no gate, whole blocks": call(hidden=256, middle=128, gated=False, on_input=True),
        "biases": cpu.biased(call(hidden=140, middle=200)),
        "second bias": replace(cpu.biased(call()), w1_bias=None),
        "on input": cpu.biased(call(hidden=130, middle=65, on_input=True)),
        "invalid ids": call(ids=bad),
        "nothing valid": call(ids=torch.full((4, 2), -1)),
        "one expert takes all": call(ids=torch.full((37, 1), 3)),
        "experts twice": call(ids=torch.randint(0, 2, (9, 4))),
        "empty experts": call(experts=40, tokens=3),
        "one token": call(tokens=1),
        "ten slots": call(experts=12, topk=10),
        "mapped": cpu.mapped(call(tokens=20, experts=6)),
        "mapped beyond": beyond(call(tokens=20, experts=5)),
        "half weights": replace(call(), topk_weights=torch.rand(9, 2).half()),
        "transposed ids": call(ids=torch.randint(0, 5, (3, 9), dtype=torch.int32).T),
        "no token": call(ids=torch.empty(0, 2, dtype=torch.int32)),
        "zero rows": replace(call(hidden=160), hidden_states=torch.zeros(9, 160, dtype=torch.bfloat16)),
    }
    few = (
        "whole blocks",
        "odd sizes",
        "biases",
        "on input",
        "one token",
        "mapped",
        "no gate",
        "limit",
    )  # where the kinds differ
    made = {
        f"{kind}, {name}": fp8(args, kind)
        for kind in KINDS for name, args in made.items() if kind == "fp8_block" or name in few
    }  # fmt: skip
    made |= {f"{kind}, strided": cpu.strided(fp8(call(hidden=160, middle=136), kind)) for kind in KINDS}
    made |= {f"{kind}, transposed": transposed(fp8(call(hidden=160, middle=136), kind)) for kind in KINDS}
    made |= {
        f"scales of gate and up apart, {middle}": cpu.apart(cpu.loud(call(hidden=160, middle=middle)), middle == 96)
        for middle in (136, 96)
    }
    fnuz = torch.float8_e4m3fnuz
    kinds = KINDS if not INTERPRETED or knows_fnuz() else ()
    return made | {f"{kind}, fnuz": fp8(call(hidden=160, middle=136), kind, fnuz) for kind in kinds}


def tiles(block=16, up=(64, 128, 2, 4), down=(64, 128, 2, 4), **more):
    return gpu.tiles({}, block, up, down, **more)


def shapes(args):
    """Tiles of every kind that the call allows."""
    blocked, even = args.quant.kind == "fp8_block", all(gpu._described(described(w)) for w in (args.w1, args.w2))
    own = [tiles(16, swap=1), tiles(32, up=(32, 128, 2, 4), down=(128, 128, 3, 4), group=4)]
    own += [tiles(16, swap=1, fuse=1), tiles(16, fuse=1, up=(128, 128, 2, 4))] if blocked else []
    own += [tiles(64, tma=1, fuse=int(blocked), group=2), tiles(16, tma=1, swap=1)] if even else []
    return own


# --- interpreted ---


def rounded(data, source, target, rounding_mode):
    """Conversions of Triton's interpreter as torch does them: its own cut digits off, or lose the carry of rounding."""
    import numpy
    import triton.language as tl

    types = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e4b8: torch.float8_e4m3fnuz, tl.bfloat16: torch.bfloat16,
             tl.float16: torch.float16, tl.float32: torch.float32}  # fmt: skip
    raw = torch.from_numpy(numpy.array(data, copy=True, order="C").reshape(-1).view(numpy.uint8))
    size = torch.empty(0, dtype=types[target]).element_size()
    made = raw.view(types[source]).to(types[target]).contiguous().view(torch.uint8)
    return made.numpy().view(f"uint{8 * size}").reshape(data.shape)


@pytest.fixture
def interpreted(monkeypatch):
    """Right conversions, the sort in torch, and workspaces full of NaN."""
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    sort_in_torch(monkeypatch)
    poison_workspaces(monkeypatch)


DRAWN = drawn(list(cases()), 6)


@marked
@pytest.mark.parametrize("name", DRAWN)
def test_tiles(name, interpreted):
    args = cases()[name]
    want = FUSED_MOE.reference(args)
    for cfg in shapes(args):
        got = FUSED_MOE.launch(cfg, args, poison(FUSED_MOE.outputs(args)))
        assert FUSED_MOE.error(got, want) <= 5e-3, f"{name}: {cfg}"


def written(x, kind, dtype, used=None):
    """(what `quantise` makes of rows after the way back, its scales)."""
    rows, columns = x.shape
    names, work = (NAMES[dtype], NAMES[x.dtype]), Workspace()
    case = gpu.Case(kind, *names, 1, columns, columns, "silu", False, (False, False), (False, False))
    q = full_of_nan(torch.empty(gpu.narrow(work, names[0], rows, columns).shape, dtype=dtype))
    s = poison(torch.empty(gpu.scales(work, case, rows, columns).shape))
    call = SimpleNamespace(x=x, q=q, s=s, total=torch.tensor([rows if used is None else used, 0], dtype=torch.int32))
    lying = SimpleNamespace(**{name: described(tensor, name) for name, tensor in vars(call).items()})
    step = gpu.quantising(case, torch.finfo(dtype).max, columns, used is not None, False, {})
    sorted_rows = SimpleNamespace(num_tokens_post_padded=lying.total)
    Running(Plan((gpu.quantise(step, lying.x, lying.q, lying.s, sorted_rows, columns),)))(call, q)
    width, end = (128, -(-columns // 128) * 128) if kind == "fp8_block" else (columns, q.shape[1])
    behind = q[: call.total[0], columns:end].float()
    assert torch.equal(behind, torch.zeros_like(behind))
    return q[:, :columns].float() * s.repeat_interleave(width, 1)[:, :columns], s


@marked
@pytest.mark.parametrize("kind", ("fp8_block", "fp8_channel"))
@pytest.mark.parametrize("rows, columns", [(1, 1), (5, 128), (19, 131), (3, 1000), (2, 9000), (1, 16500)])
def test_quantise(rows, columns, kind, interpreted):
    """One part, several, and rows wider than a program holds; a row of zeros, and one out of proportion."""
    x = torch.randn(rows, columns, dtype=torch.bfloat16)
    x[0] = 0
    x[-1, columns // 2] = 1e6
    for dtype in (torch.float8_e4m3fn, *[torch.float8_e4m3fnuz] * knows_fnuz()):
        got, _ = written(x, kind, dtype)
        assert FUSED_MOE.error(got, formats.get(kind).through(x, dtype)) <= 1e-6
    transposed, _ = written(x.mT.contiguous().mT, kind, torch.float8_e4m3fn)
    assert torch.equal(transposed, written(x, kind, torch.float8_e4m3fn)[0])


@marked
@pytest.mark.parametrize("kind", ("fp8_block", "fp8_channel"))
def test_quantise_stops_at_the_last_used_row(kind, interpreted):
    got, scales = written(torch.randn(20, 130), kind, torch.float8_e4m3fn, used=7)
    assert got[:7].isfinite().all() and got[7:].isnan().all() and scales[7:].isnan().all()


@marked
def test_decode(interpreted):
    cfg = config("decode", up_n=32, up_k=128, up_warps=4, down_n=16, down_k=128, down_warps=4)
    forms = [{"activation": "gelu"}, {"limit": 0.4}, {"gated": False, "activation": "relu2", "on_input": True}]
    for form in forms:
        args = fp8(cpu.biased(cpu.call(tokens=3, hidden=160, middle=136, **form)), "fp8_block")
        got = FUSED_MOE.launch(cfg, args, poison(FUSED_MOE.outputs(args)))
        assert FUSED_MOE.error(got, FUSED_MOE.reference(args)) <= 5e-3, form


@marked
@pytest.mark.parametrize("middle", [136, 96])
def test_decode_with_scales_of_gate_and_up_apart(middle, interpreted):
    args = cpu.apart(cpu.loud(cpu.call(tokens=2, hidden=160, middle=middle)), middle == 96)
    cfg = config("decode", up_n=32, up_k=128, up_warps=4, down_n=16, down_k=128, down_warps=4)
    got = FUSED_MOE.launch(cfg, args, poison(FUSED_MOE.outputs(args)))
    assert FUSED_MOE.error(got, FUSED_MOE.reference(args)) <= 5e-3


# --- what the space holds ---

DIMS = {"hidden": 2048, "intermediate": 768}
ODD = {"hidden": 131, "intermediate": 77, "unaligned": 1}
OTHER = {"activation": "swiglu_oai", "biased": 1, "on_input": 1}


def problem(arch="sm_90", kind="fp8_block", tokens=1024, experts=128, topk=8, dtype="bf16", **dims):
    device = by_arch(arch)
    dims = DIMS | dims | {"quant": kind}
    return Problem(op="fused_moe", vendor=device.vendor, arch=arch, units=device.units, tokens=tokens, experts=experts,
                   topk=topk, dtype=dtype, dims=tuple(dims.items()))  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 16, 64, 256, 1024, 4096, 16384])
def test_the_space_fits_and_suits_the_rows(arch, kind, tokens):
    device = by_arch(arch)
    for dims in ({}, {"intermediate": 832}, ODD, {"mapped": 1, "global": 256}):
        question = problem(arch, kind, tokens, **dims)
        space = gpu.space(question, device)
        assert 1 <= len(space) <= 16 and len(set(space)) == len(space)
        assert all(gpu.fits(question, c, device) == "" for c in space)
        assert all(0 < us < 1e6 for us in rank(FUSED_MOE, question, space, device).us)
    blocks = [gpu.space(problem(arch, kind, tokens), device)[0]["block"] for tokens in (1, tokens)]
    assert blocks[0] == 16 and blocks[1] == (128 if tokens >= 4096 else 64 if tokens == 1024 else 16)


def test_there_is_a_choice_at_the_sizes_of_serving():
    for kind in KINDS:
        for tokens in (1, 64, 1024, 16384):
            assert len(gpu.space(problem(kind=kind, tokens=tokens), KNOWN["h200"])) >= 6, (kind, tokens)


@pytest.mark.parametrize(
    "change, arch, words",
    [
        ({"block": 48}, "sm_90", "block is 16"),
        ({"group": 0}, "sm_90", "group at least 1"),
        ({"swap": 2}, "sm_90", "0 or 1"),
        ({"tma": 1}, "gfx942", "tma=1"),
        ({"up_n": 96}, "sm_90", "n=96"),
        ({"up_k": 64}, "sm_90", "k=64"),
        ({"up_n": 32, "fuse": 1}, "sm_90", "up_n=32"),
        ({"up_warps": 3}, "sm_90", "warps=3"),
        ({"up_warps": 32}, "sm_90", "warps=32"),
        ({"up_stages": 0}, "sm_90", "stages=0"),
        ({"block": 128, "up_n": 128}, "sm_90", "sums a thread"),
        ({"block": 32, "up_stages": 12}, "sm_90", "shared memory"),
        ({"down_stages": 8, "down_n": 128}, "gfx942", "shared memory"),
    ],
)
def test_what_cannot_run_is_refused(change, arch, words):
    device, question = by_arch(arch), problem(arch)
    good = tiles(16, up=(64, 128, 2, 4), down=(64, 128, 2, 4))
    assert gpu.fits(question, good, device) == ""
    assert words in gpu.fits(question, config("fp8_tiles", **dict(good.params) | change), device)


@pytest.mark.parametrize("middle, apart, allowed", [(64, 0, 0), (2880, 0, 0), (2880, 1, 1), (2848, 0, 1), (2912, 0, 1)])
def test_no_tile_asks_for_a_scale_past_the_last_one(middle, apart, allowed):
    """Where half of the last one has no columns: its rows of up would begin where the scales of all rows end."""
    question = problem(intermediate=middle, **({"apart": 1} if apart else {}))
    half, whole = (tiles(16, up=(n, 128, 2, 4), fuse=1) for n in (64, 128))
    why = gpu.fits(question, half, KNOWN["h200"])
    assert (not why if allowed else "past the last one" in why) and not gpu.fits(question, whole, KNOWN["h200"])
    first = (middle - 1) // 128 * 128 + 64  # column of the second half
    assert allowed == (bool(apart) or (middle + first) // 128 < -(-2 * middle // 128) or first < middle)


def test_what_the_problem_or_the_device_rules_out():
    h200, good = KNOWN["h200"], tiles()
    assert "quant=none" in gpu.fits(problem(kind=""), good, h200)
    assert "no fp8" in gpu.fits(problem(), good, h200.model_copy(update={"arch": "sm_80"}))
    assert "no fp8" in gpu.fits(problem("gfx942"), good, by_arch("gfx942").model_copy(update={"arch": "gfx90a"}))
    assert "fp8_channel" in gpu.fits(problem(kind="fp8_channel"), tiles(fuse=1), h200)
    assert "16 bytes" in gpu.fits(problem(**ODD), tiles(tma=1), h200)
    assert "single bytes" in gpu.fits(problem(**ODD), tiles(), h200)
    assert "launch_pdl" in gpu.fits(
        problem("gfx942"), gpu.tiles({"launch_pdl": 1}, 16, (64, 128, 2, 4), (64, 128, 2, 4)), by_arch("gfx942")
    )
    with pytest.raises(KeyError):
        gpu.fits(problem(), config("fp8_tiles", block=16), h200)


# --- compiled ---

SIZES = list(product(KINDS, (16, 4096)))
MATRIX_UNIT = {"sm_90": "wgmma.mma_async", "gfx942": "_fp8_fp8", "gfx950": "f8f6f4"}


def compiled(question, cfg, device):
    """What stands between the sort and the sum."""
    for source in FUSED_MOE.sources(question, cfg, device):
        if source.fn.__module__ != fp8_tile.__name__:
            continue
        found = compile_source(source, device)
        assert why_unfit(found, device) == "", f"{cfg}: {source.fn.__name__}"
        yield source, found


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("arch, kind, tokens", [
    (arch, *case) for number, arch in enumerate(ARCHS) for case in in_turn(SIZES, number, 1)
])  # fmt: skip
def test_some_candidates_compile_without_spills(arch, kind, tokens):
    if fnuz_fails(arch):
        pytest.skip(NO_FNUZ)
    device = by_arch(arch)
    for dims in drawn([{}, {"intermediate": 832} | OTHER, ODD | OTHER], 1):
        question = problem(arch, kind, tokens, **dims)
        space = gpu.space(question, device)
        for cfg in drawn([space[0], space[-1]], 1):
            names = []
            for source, found in compiled(question, cfg, device):
                names.append(source.fn.__name__)
                if names[-1] != "quantise":
                    prefix, panels = ("up", 2) if names[-1] == "up" else ("down", 1)
                    n, k, stages = (cfg[f"{prefix}_{name}"] for name in ("n", "k", "stages"))
                    assert found.shared_bytes <= gpu.shared(cfg["block"], n, k, stages, panels, device), (
                        f"{cfg}: {prefix}"
                    )
                    assert dims.get("unaligned") or MATRIX_UNIT[arch] in found.text, f"{cfg}: {prefix}"
            assert names == (["quantise", "up", "down"] if cfg["fuse"] else ["quantise", "up", "quantise", "down"])


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("arch", ARCHS)
def test_every_candidate_compiles_without_spills(arch):
    if fnuz_fails(arch):
        pytest.skip(NO_FNUZ)
    device, odd = by_arch(arch), {"intermediate": 832, "activation": "gelu", "biased": 1}
    questions = [
        problem(arch, kind, tokens, **dims)
        for tokens in (1, 128, 512, 1024, 16384)
        for kind in ("fp8_block", "fp8_channel")
        for dims in ({}, odd, odd | {"apart": 1}, OTHER, ODD)
    ]
    for question, cfg in drawn([(each, cfg) for each in questions for cfg in gpu.space(each, device)], 1):
        assert len(list(compiled(question, cfg, device))) == 4 - cfg["fuse"]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("dims", [{}, {"activation": "gelu", "biased": 1, "on_input": 1}])
def test_the_ring_compiles_within_its_registers(dims):
    question, device = problem(tokens=4096, **dims), KNOWN["h200"]
    space = ringed.space(question, device)
    assert len(space) == len(ringed.ORDERS) and not any(FUSED_MOE.fits(question, cfg, device) for cfg in space)
    sources = [each for each in FUSED_MOE.sources(question, space[0], device) if each.fn is fp8_ring.product]
    assert len(sources) == 2
    for number, source in enumerate(sources):
        found = compile_source(source, device)
        # three groups of warps share the registers: what an epilogue keeps over a tile may not fit
        assert why_unfit(found, device, spills=32 if dims else 4) == ""
        assert found.text.count("wgmma.mma_async") == 2 * 2 * 4  # groups, panels, 32 of 128 deep
        assert ("cp.async.cg" in found.text) == (number == 0), (
            "the first product gathers rows, the second takes its own"
        )
        assert found.text.count("fence.proxy.async") >= 2 * (number == 0)
        assert found.text.count("mbarrier.init") == 2 * space[0]["stages"] + 1
        before = found.text[: found.text.index("mbarrier.arrive.shared::cta.b64 _,")].splitlines()[-6:]
        assert any("bar.sync" in line for line in before), "a slot is handed back before every warp has read it"


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_tma_and_dependent_launch_are_in_the_machine_code():
    question, device = problem(), KNOWN["h200"]
    texts = [found.text for _, found in compiled(question, gpu.space(question, device)[0], device)]
    assert all("griddepcontrol.wait" in text and "griddepcontrol.launch_dependents" in text for text in texts)
    assert all("cp.async.bulk.tensor" in text and ".e4m3.e4m3" in text for text in (texts[1], texts[-1]))
    assert "cp.async.bulk" not in texts[0]


# --- on a GPU ---

GPU_PROBLEMS = [
    {"tokens": 1},
    {"tokens": 64, "experts": 16, "topk": 4, "hidden": 512, "intermediate": 384},
    {"tokens": 300, "experts": 8, "topk": 2, "hidden": 1024, "intermediate": 832, **OTHER},
    {"tokens": 2048, "experts": 8, "topk": 2, "hidden": 1024, "intermediate": 512},
    {"tokens": 100, "experts": 16, "topk": 4, **ODD, "activation": "gelu"},
    {"tokens": 6, "experts": 16, "topk": 6, "hidden": 512, "intermediate": 448, "activation": "relu2", "gated": 0},
    {"tokens": 900, "experts": 8, "topk": 2, "hidden": 512, "intermediate": 384, "gated": 0, "biased": 1},
    {"tokens": 900, "experts": 8, "topk": 2, "hidden": 512, "intermediate": 384, "activation": "silu_limited"},
    {
        "tokens": 500,
        "experts": 8,
        "topk": 2,
        "hidden": 512,
        "intermediate": 256,
        "mapped": 1,
        "global": 16,
        "dtype": "fp16",
    },
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", range(len(GPU_PROBLEMS)))
def test_every_candidate_on_a_gpu(which, kind):
    from moecache import routing
    from moecache.devices import Places

    device = Places().of_tensor(torch.empty(1, device="cuda")).device
    question = problem(device.arch, kind, **GPU_PROBLEMS[which]).model_copy(update={"units": device.units})
    ids = routing.draw("zipf", question.tokens, question.experts, question.topk, which).cuda()
    args = FUSED_MOE.inputs(question, ids, which)
    want = FUSED_MOE.reference(args)
    assert len({cfg.variant for cfg in FUSED_MOE.space(question, device)}) > (which == 0 and kind == "fp8_block")
    for cfg in FUSED_MOE.space(question, device):
        run = FUSED_MOE.bind(cfg, args, poison(FUSED_MOE.outputs(args)))
        for _ in range(3):  # the first one goes through Triton's JIT
            got = run(args, poison(FUSED_MOE.outputs(args)))
            torch.cuda.synchronize()
            assert FUSED_MOE.error(got, want) <= 5e-2, cfg.name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("name", cases())
def test_every_case_on_a_gpu(name):
    from moecache.devices import Places

    args = cases()[name]
    args = placed(args, "cuda")
    device = Places().of_tensor(args.w1).device
    if (args.w1.dtype == torch.float8_e4m3fnuz) != (device.arch == "gfx942"):
        pytest.skip("the other kind of fp8")
    question, want = FUSED_MOE.problem(args, device, ""), FUSED_MOE.reference(args)
    call = FUSED_MOE.side_by_side(args)
    for cfg in FUSED_MOE.space(question, device):
        run = FUSED_MOE.bind(cfg, call, poison(FUSED_MOE.outputs(args)))
        for _ in range(2):  # the first one goes through Triton's JIT
            got = run(call, poison(FUSED_MOE.outputs(args)))
            assert FUSED_MOE.error(got, want) <= 5e-2, cfg.name
