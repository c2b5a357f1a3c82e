"""What is compiled ahead is what a launch asks for: types, alignment, sizes of 1, 32-bit addresses, constants, options.

Nothing is compiled: a launch stops where Triton would begin to, and what it would compile is compared.
"""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from launching import ahead, differences, launches

from moecache import routing
from moecache.kernels import code, running
from moecache.kernels.formats import registry as formats
from moecache.kernels.formats.contract import Quant
from moecache.kernels.fused_moe.op import FUSED_MOE, call_args
from moecache.kernels.grouped_gemm.op import GROUPED_GEMM, ProductCall
from moecache.kernels.matrix import DTYPES
from moecache.kernels.sort.op import SORT, SortCall
from moecache.schemas.config import config
from moecache.schemas.device import by_arch

ARCHS = ("sm_90", "gfx942", "gfx950")


@pytest.fixture(params=ARCHS)
def device(request):
    return by_arch(request.param)


@pytest.fixture
def launched(monkeypatch, device):
    """What launches on that device, which is not there, would compile."""
    return launches(monkeypatch, device)


# --- calls ---


def rows(*shape, dtype, gap=0, apart=0, shift=0):
    """Not written to: memory that is only asked for."""
    *outer, height, width = shape
    whole = torch.empty(*outer, height + apart, width + gap + shift, dtype=dtype)
    return whole[..., :height, shift : shift + width]


def layer(device, tokens=64, experts=16, topk=4, hidden=1024, middle=512, dtype="bf16", ids="int32", mapped=0, biased=0,
          kind="", gap=0, apart=0, shift=0, bias="", router="float32", **more):  # fmt: skip
    wide, narrow = DTYPES[dtype], formats.get(kind, dtype).stored(device.arch)
    both = {"w1": (experts, middle * (1 + more.get("gated", True)), hidden), "w2": (experts, hidden, middle)}
    w1, w2 = (rows(*shape, dtype=narrow, gap=gap, apart=apart, shift=shift) for shape in both.values())
    given = {}
    if biased:
        given |= {f"{n}_bias": torch.empty(shape[:2], dtype=DTYPES[bias or dtype]) for n, shape in both.items()}
    if kind:
        given["quant"] = Quant(
            kind, *(torch.empty(len(w), *formats.get(kind).scale_shape(*w.shape[1:])) for w in (w1, w2)), apart=False
        )
    mapping = torch.empty(mapped, dtype=torch.int32) if mapped else None
    chosen = routing.draw("uniform", tokens, experts, topk).to(getattr(torch, ids))
    return call_args(
        rows(tokens, hidden, dtype=wide, gap=gap, shift=shift), w1, w2,
        torch.empty(tokens, topk, dtype=getattr(torch, router)), chosen, expert_map=mapping, **given, **more,
    )  # fmt: skip


def product(device, count=512, experts=16, hidden=1024, columns=512, dtype="bf16", ids="int32", gathered=0, biased=0,
            gap=0, apart=0, shift=0):  # fmt: skip
    kind = DTYPES[dtype]
    return ProductCall(
        rows(count, hidden, dtype=kind, gap=gap, shift=shift),
        rows(experts, columns, hidden, dtype=kind, gap=gap, apart=apart, shift=shift),
        torch.empty(experts + 1, dtype=getattr(torch, ids)),
        rows=torch.empty(4 * count, dtype=torch.int32) if gathered else None,
        bias=torch.empty(experts, columns, dtype=kind) if biased else None,
    )  # fmt: skip


def sorting(device, tokens=64, experts=64, topk=8, block=16, ids="int32", weighted=0, mapped=0, **more):
    chosen = routing.draw("uniform", tokens, experts, topk).to(getattr(torch, ids))
    weights = torch.empty(tokens, topk) if weighted else None
    mapping = torch.empty(experts, dtype=torch.int32) if mapped else None
    return SortCall(chosen, experts, block, topk_weights=weights, expert_map=mapping, **more)


CALLS = {
    "plain": (FUSED_MOE, layer, {}),
    "one token": (FUSED_MOE, layer, {"tokens": 1}),
    "one expert": (FUSED_MOE, layer, {"experts": 1, "topk": 1}),
    "many rows": (FUSED_MOE, layer, {"tokens": 4096}),
    "odd tokens": (FUSED_MOE, layer, {"tokens": 1000}),
    "fp16": (FUSED_MOE, layer, {"dtype": "fp16"}),
    "fp32": (FUSED_MOE, layer, {"dtype": "fp32"}),
    "biased": (FUSED_MOE, layer, {"biased": 1, "activation": "swiglu_oai"}),
    "mapped": (FUSED_MOE, layer, {"mapped": 64}),
    "mapped, few pairs": (FUSED_MOE, layer, {"mapped": 64, "tokens": 4}),
    "on input": (FUSED_MOE, layer, {"on_input": True}),
    "on input, few pairs": (FUSED_MOE, layer, {"on_input": True, "tokens": 4}),
    "2880": (FUSED_MOE, layer, {"hidden": 2880, "middle": 2880, "experts": 32}),
    "odd sizes": (FUSED_MOE, layer, {"hidden": 1000, "middle": 360}),
    "odder sizes": (FUSED_MOE, layer, {"hidden": 1016, "middle": 344}),
    "unaligned sizes": (FUSED_MOE, layer, {"hidden": 101, "middle": 33}),
    "unaligned sizes, few pairs": (FUSED_MOE, layer, {"hidden": 101, "middle": 33, "tokens": 4}),
    "unaligned rows": (FUSED_MOE, layer, {"gap": 1}),
    "padded rows": (FUSED_MOE, layer, {"gap": 128}),
    "past 2 GiB": (FUSED_MOE, layer, {"experts": 128, "hidden": 2880, "middle": 2880}),
    "past 2 GiB, few pairs": (FUSED_MOE, layer, {"experts": 128, "hidden": 2880, "middle": 2880, "tokens": 4}),
    "w1 past 2 GiB": (FUSED_MOE, layer, {"experts": 80, "hidden": 2880, "middle": 2880}),
    "w1 alone at 2 GiB": (FUSED_MOE, layer, {"experts": 128, "hidden": 2048, "middle": 2048}),
    "tokens past 2 GiB": (FUSED_MOE, layer, {"tokens": 131072, "hidden": 8192, "middle": 256, "experts": 8, "topk": 2}),
    "partial past 2 GiB": (FUSED_MOE, layer, {"tokens": 32768, "hidden": 7168, "middle": 256, "topk": 8}),
    "rows past 2 GiB": (FUSED_MOE, layer, {"tokens": 65536, "hidden": 512, "middle": 4096, "topk": 8}),
    "fp8 block": (FUSED_MOE, layer, {"kind": "fp8_block"}),
    "fp8 block, few pairs": (FUSED_MOE, layer, {"kind": "fp8_block", "tokens": 4}),
    "fp8 block, odd": (FUSED_MOE, layer, {"kind": "fp8_block", "hidden": 1072, "middle": 336}),
    "fp8 block, biased": (FUSED_MOE, layer, {"kind": "fp8_block", "biased": 1, "tokens": 512}),
    "fp8 block, mapped": (FUSED_MOE, layer, {"kind": "fp8_block", "mapped": 32, "tokens": 512}),
    "fp8 block, on input": (FUSED_MOE, layer, {"kind": "fp8_block", "on_input": True, "tokens": 512}),
    "fp8 block, past 2 GiB": (FUSED_MOE, layer, {"kind": "fp8_block", "experts": 256, "hidden": 2048, "middle": 3072}),
    "fp8 channel": (FUSED_MOE, layer, {"kind": "fp8_channel"}),
    "fp8 tensor": (FUSED_MOE, layer, {"kind": "fp8_tensor", "tokens": 1000}),
    "fp8 channel, unaligned": (FUSED_MOE, layer, {"kind": "fp8_channel", "hidden": 1000, "middle": 360}),
    "fp8 block, unaligned": (FUSED_MOE, layer, {"kind": "fp8_block", "gap": 1}),
    "product": (GROUPED_GEMM, product, {}),
    "odd pairs": (FUSED_MOE, layer, {"tokens": 1001, "topk": 3}),
    "fp8 block, odd pairs": (FUSED_MOE, layer, {"kind": "fp8_block", "tokens": 1001, "topk": 3}),
    "one slot": (FUSED_MOE, layer, {"topk": 1}),
    "narrow": (FUSED_MOE, layer, {"hidden": 16, "middle": 8}),
    "half unaligned": (FUSED_MOE, layer, {"hidden": 101, "middle": 512}),
    "clamped": (FUSED_MOE, layer, {"limit": 7.0}),
    "ungated": (FUSED_MOE, layer, {"activation": "relu2", "gated": False}),
    "ungated, few pairs": (FUSED_MOE, layer, {"activation": "relu2", "gated": False, "tokens": 4}),
    "ungated, fp8": (FUSED_MOE, layer, {"activation": "relu2", "gated": False, "kind": "fp8_block", "tokens": 512}),
    "ungated, past 2 GiB": (FUSED_MOE, layer, {"activation": "relu2", "gated": False, "experts": 160, "hidden": 2880,
                                               "middle": 2880}),
    "gelu": (FUSED_MOE, layer, {"activation": "gelu"}),
    "product, gathered": (GROUPED_GEMM, product, {"gathered": 1, "biased": 1}),
    "product, one expert": (GROUPED_GEMM, product, {"experts": 1}),
    "product, one row": (GROUPED_GEMM, product, {"count": 1}),
    "product, odd rows": (GROUPED_GEMM, product, {"count": 1000}),
    "product, fp32": (GROUPED_GEMM, product, {"dtype": "fp32"}),
    "product, odd sizes": (GROUPED_GEMM, product, {"hidden": 1000, "columns": 360}),
    "product, unaligned": (GROUPED_GEMM, product, {"hidden": 101, "columns": 33}),
    "product, unaligned rows": (GROUPED_GEMM, product, {"gap": 1}),
    "product, past 2 GiB": (GROUPED_GEMM, product, {"experts": 128, "hidden": 2880, "columns": 5760}),
    "product, one column": (GROUPED_GEMM, product, {"columns": 1}),
    "sort": (SORT, sorting, {}),
    "sort, one token": (SORT, sorting, {"tokens": 1}),
    "sort, one slot": (SORT, sorting, {"topk": 1}),
    "sort, int64": (SORT, sorting, {"ids": "int64"}),
    "sort, many": (SORT, sorting, {"tokens": 16384}),
    "sort, many, odd": (SORT, sorting, {"tokens": 10001, "experts": 60, "topk": 6}),
    "sort, weighted": (SORT, sorting, {"weighted": 1, "tokens": 512}),
    "sort, mapped": (SORT, sorting, {"mapped": 1, "tokens": 512}),
}  # fmt: skip


def sample(op, problem, device):
    """One config of every kind of machine code: variant, switches, compiler options."""
    kinds = {}
    for cfg in op.space(problem, device):
        flags = {n: v for n, v in cfg.params if n in ("combine", "tma", "swap", "fuse", "scan", "fused", "parts")}
        kinds.setdefault((cfg.variant, *flags.items(), cfg.extra), cfg)
    return list(kinds.values())


# What a problem does not say of a call: op, call, how, and the parameters of which another kernel may be asked.
IDS = {"IDS", "MAP", "EXPERT_MAP", "BIAS", "WS"}  # a parameter that is not used gets the ids
UNSAID = {
    "int64 ids": (FUSED_MOE, layer, {"ids": "int64"}, IDS),
    "int64 ids, one token": (FUSED_MOE, layer, {"ids": "int64", "tokens": 1}, IDS),
    "bf16 router": (FUSED_MOE, layer, {"router": "bfloat16"}, {"WEIGHTS"}),
    "biased in fp32": (FUSED_MOE, layer, {"biased": 1, "bias": "fp32"}, {"BIAS"}),
    "padded by eight": (FUSED_MOE, layer, {"gap": 8}, {"x_row", "a_row", "w_row"}),
    "rows between experts": (FUSED_MOE, layer, {"apart": 5}, {"rows", "w_expert"}),
    "unaligned start": (FUSED_MOE, layer, {"gap": 7, "shift": 1}, {"X", "A", "AT", "W", "x_row", "a_row", "w_row"}),
    "padded": (FUSED_MOE, layer, {"gap": 128}, set()),
    "product, int64": (GROUPED_GEMM, product, {"ids": "int64"}, {"OFFSETS"}),
    "product, unaligned start": (GROUPED_GEMM, product, {"gap": 7, "shift": 1}, {"A", "AT", "W", "a_row", "w_row"}),
}  # fmt: skip


def missed(op, args, device, launched):
    """For each config: what its launches ask for that is compiled otherwise ahead. The plan of a call says it all."""
    problem, out = op.problem(args, device, ""), op.outputs(args)
    call = running.described(op.side_by_side(args)), running.described(out, "out")
    for cfg in sample(op, problem, device):
        launched.clear()
        op.launch(cfg, args, out)
        assert not differences(launched, ahead(op.plan(cfg, *call, device).sources(), device)), cfg.name
        yield cfg.name, differences(launched, ahead(op.sources(problem, cfg, device), device))


@pytest.mark.parametrize("name", UNSAID)
def test_what_a_problem_does_not_say_is_all_that_differs(name, device, launched):
    op, make, how, may = UNSAID[name]
    for cfg, found in missed(op, make(device, **how), device, launched):
        assert {parameter for _, parameter, _ in found} <= may, (cfg, found)


@pytest.mark.parametrize("name", CALLS)
def test_every_launch_was_compiled_ahead(name, device, launched):
    op, make, how = CALLS[name]
    found = {each: cfg for cfg, some in missed(op, make(device, **how), device, launched) for each in some}
    assert launched and not found


def test_the_sizes_of_a_bucket_share_their_kernels(device, launched):
    """Another number of tokens or rows must not compile in the middle of serving."""
    knobs = [{}, {"launch_pdl": 1}] if device.vendor == "nvidia" else [{}]
    parts = {"n": 64, "k": 64, "stages": 2, "warps": 4}
    both = {f"{prefix}_{name}": value for prefix in ("up", "down") for name, value in parts.items()}
    shared = {"block": 16, "group": 1, "swap": 0, "tma": 0}
    for extra in knobs:
        for op, calls, tile, kernels in (
            (FUSED_MOE, [layer(device, tokens=t, topk=2, hidden=256, middle=128) for t in (33, 40, 47, 48, 64)],
             config("tiles", extra, combine="sum", **shared, **both), {"up", "down", "combine"}),
            (GROUPED_GEMM, [product(device, count=c, hidden=256, columns=128) for c in (1, 33, 40, 47, 48, 64)],
             config("tile", extra, **shared, **parts), {"down", "lay_out"}),
        ):  # fmt: skip
            found = []
            for args in calls:
                launched.clear()
                op.launch(tile, args, op.outputs(args))
                found.append([each for each in launched if each[0] in kernels])
            assert {each[0] for each in found[0]} == kernels and all(each == found[0] for each in found)


@pytest.mark.parametrize("name", CALLS)
def test_all_that_is_compiled_is_in_the_code_of_its_variant(name, device):
    op, make, how = CALLS[name]
    problem = op.problem(make(device, **how), device, "")
    for cfg in sample(op, problem, device):
        fns = {f"{s.fn.__module__}:{s.fn.__name__}" for s in op.sources(problem, cfg, device)}
        assert fns and fns <= code.reached(op.name, cfg.variant), cfg.name
