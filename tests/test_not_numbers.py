"""NaN and inf in a token, and scales of experts that training never used: what comes of them, in that token alone, in
every variant and format."""

import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from drawn import drawn
from interpreting import INTERPRETED, knows_fnuz, marked, of_the_cpu_test
from placed import placed

from moecache.kernels.fused_moe.op import FUSED_MOE
from moecache.kernels.tensors import poison
from moecache.schemas.config import config
from moecache.schemas.device import Device

moe, tiled = of_the_cpu_test("fused_moe"), of_the_cpu_test("fused_moe_fp8_gpu")
interpreted = tiled.interpreted
CPU = Device(vendor="cpu", arch="x86_64", name="test", units=2)
NAN, INF = float("nan"), float("inf")
KINDS = ("", "fp8_block", "fp8_channel", "fp8_tensor")


def args_of(kind, tokens=9, hidden=160, middle=136, dtype=torch.bfloat16, fnuz=False, **more):
    """A layer of four experts and three slots a token, some of which name no expert; token 1 has no expert 0 or 1."""
    ids = torch.stack([torch.randperm(4)[:3] for _ in range(tokens)]).int()
    ids[0, 1], ids[1], ids[2] = -1, torch.tensor([3, 4, 2]), torch.tensor([0, 1, 2])
    args = moe.call(hidden=hidden, middle=middle, dtype=dtype, ids=ids, experts=4, **more)
    return tiled.fp8(args, kind, torch.float8_e4m3fnuz if fnuz else torch.float8_e4m3fn) if kind else args


ODD = [(slice(None), NAN), (slice(None), INF), (3, NAN), (3, INF), (3, -INF)]  # what of a token is no number
EVEN = [(slice(None), 0.0), (slice(None), 1e-40)]  # odd tokens whose results are finite


SCALES = [  # that training never used
    (("w1_scale", 1e-23), ("w2_scale", 0.0)),
    (("w1_scale", 0.0), ("w2_scale", 1e-23)),
]


def assert_alone(run, args, what, scales=SCALES):
    """`run(args)` keeps what is no number in the rows where it belongs, and nowhere else."""
    want, x = run(args), args.hidden_states.clone()
    assert want.isfinite().all(), what
    for row, (columns, value) in enumerate([*ODD, *EVEN], 2):
        x[row, columns] = value
    got = run(replace(args, hidden_states=x))
    kept = torch.ones(len(want), dtype=torch.bool, device=want.device)
    kept[2 : 2 + len(ODD) + len(EVEN)] = False
    assert torch.equal(got[kept], want[kept]), f"{what}: other tokens have changed"
    assert got[2 + len(ODD) :].isfinite().all(), f"{what}: zeros or denormals"
    for row, (columns, value) in enumerate(ODD, 2):
        assert not got[row].isfinite().any(), f"{what}: {value} in {columns} gave {got[row]}"
    for which, dead in chain.from_iterable(scales) if args.quant else ():
        scale = getattr(args.quant, which).clone()
        scale[0], scale[1] = NAN, dead
        got = run(replace(args, quant=replace(args.quant, **{which: scale})))
        hit, low = ((args.topk_ids == expert).any(1) for expert in (0, 1))
        assert hit.any() and not (hit | low).all()
        assert torch.equal(got[~(hit | low)], want[~(hit | low)]), f"{what}, {which}: tokens of other experts"
        assert got[~hit].isfinite().all(), f"{what}, {which} {dead}"
        assert not got[hit].isfinite().any(), f"{what}, {which}: NaN has become a number"


FORMS = [
    {}, {"activation": "swiglu_oai", "alpha": 1.702, "limit": 7.0}, {"activation": "gelu"}, {"on_input": True},
    {"limit": 3.0}, {"gated": False, "activation": "relu2"}, {"gated": False, "activation": "gelu_tanh"},
]  # fmt: skip


@pytest.mark.skipif(INTERPRETED, reason="the process of its own is for the kernels")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_on_a_cpu(kind, form):
    for dtype in (torch.bfloat16, torch.float16):
        args = args_of(kind, dtype=dtype, **form)
        for cfg in FUSED_MOE.space(FUSED_MOE.problem(args, CPU, ""), CPU):
            assert_alone(lambda given, c=cfg: FUSED_MOE.launch(c, given, FUSED_MOE.outputs(given)), args, cfg.name)


# --- the kernels, interpreted ---


def assert_launched_alone(cfg, args):
    def run(given):
        return FUSED_MOE.launch(cfg, given, poison(FUSED_MOE.outputs(given)))

    assert_alone(run, args, cfg.name, drawn(SCALES, 1))


def decode(down_n=16):
    return config("decode", up_n=32, up_k=128, up_warps=4, down_n=down_n, down_k=128, down_warps=4)


FOR_FP8 = drawn([*FORMS[:2], {"dtype": torch.float16}, *[{"fnuz": True}] * (not INTERPRETED or knows_fnuz())], 2)
FOR_DECODE = drawn([*FORMS[:2], {"dtype": torch.float16}], 1)
FOR_TILES = drawn([*FORMS[:2], *FORMS[-3:-1]], 2)


@marked
@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("form", FOR_FP8, ids=str)
def test_tiles_for_fp8(kind, form, interpreted):
    args = args_of(kind, hidden=48, middle=40, **form)
    for cfg in tiled.shapes(args)[:4:2]:
        assert_launched_alone(cfg, args)


@marked
@pytest.mark.parametrize("form", FOR_DECODE, ids=str)
@pytest.mark.parametrize("kind", KINDS[:2])
def test_decode(kind, form, interpreted):
    args = args_of(kind, hidden=48, middle=40, **{"dtype": torch.float16} | form)
    assert_launched_alone(decode(), args)


@marked
@pytest.mark.parametrize("form", FOR_TILES, ids=str)
def test_tiles(form, interpreted):
    args = args_of("", dtype=torch.float16, hidden=32, middle=40, **form)
    cfg = config("tiles", block=16, group=1, combine="sum", swap=0, tma=0, up_n=16, up_k=32, up_stages=2, up_warps=4,
                 down_n=16, down_k=16, down_stages=2, down_warps=4)  # fmt: skip
    assert_launched_alone(cfg, args)


# --- on a GPU ---

ON_GPU = [
    {"tokens": 9}, {"tokens": 9, "activation": "swiglu_oai", "alpha": 1.702, "limit": 7.0},
    {"tokens": 300, "hidden": 256, "middle": 128}, {"tokens": 300, "hidden": 256, "middle": 256, "on_input": True},
    {"tokens": 40, "hidden": 256, "middle": 96, "dtype": torch.float16}, {"tokens": 9, "limit": 3.0},
    {"tokens": 300, "hidden": 256, "middle": 384, "activation": "relu2", "gated": False},
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", range(len(ON_GPU)))
def test_every_candidate_on_a_gpu(which, kind):
    from moecache.devices import Places

    device = Places().of_tensor(torch.empty(1, device="cuda")).device
    args = placed(args_of(kind, fnuz=device.arch == "gfx942", **ON_GPU[which]), "cuda")
    for cfg in FUSED_MOE.space(FUSED_MOE.problem(args, device, ""), device):
        if dict(cfg.params).get("combine") != "atomic":  # whose sums differ from run to run
            assert_alone(lambda given, c=cfg: FUSED_MOE.launch(c, given, FUSED_MOE.outputs(given)), args, cfg.name)
