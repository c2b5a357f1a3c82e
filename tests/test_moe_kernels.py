"""The portable kernels of fused MoE and grouped GEMM in Triton's interpreter, against plain loops in float64."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from drawn import drawn, in_turn
from interpreting import marked, of_the_cpu_test, poison_workspaces, sort_in_torch
from placed import named

from moecache.kernels.fused_moe.op import FUSED_MOE, check
from moecache.kernels.grouped_gemm import gpu as grouped_gemm_gpu
from moecache.kernels.grouped_gemm.op import GROUPED_GEMM
from moecache.kernels.matrix import unaligned
from moecache.kernels.tensors import poison
from moecache.schemas.config import config
from moecache.schemas.errors import InvalidInput

KERNELS = Path(__file__).parent.parent / "kernels"
CLOSE = {torch.float16: 2e-3, torch.float32: 2e-6}


moe, gemm = of_the_cpu_test("fused_moe"), of_the_cpu_test("grouped_gemm")


@pytest.fixture
def poisoned(monkeypatch):
    """Workspaces full of NaN, and of integers that are no row."""
    poison_workspaces(monkeypatch)


@pytest.fixture
def sorted_by_torch(monkeypatch):
    sort_in_torch(monkeypatch)


# --- fused MoE ---


def tiles(block=16, up=(16, 16), down=(16, 16), variant="tiles", xcds=1, **more):
    """Tiles of (n, k) for both products."""
    params = {"block": block, "group": 1, "combine": "sum", "swap": 0, "tma": 0} | more
    for prefix, (n, k) in (("up", up), ("down", down)):
        params |= {f"{prefix}_n": n, f"{prefix}_k": k, f"{prefix}_stages": 2, f"{prefix}_warps": 4}
    return config(variant, {"xcds": xcds} if xcds > 1 else {}, **params)


def decode(up=(32, 64), down=(16, 64)):
    return config("decode", up_n=up[0], up_k=up[1], up_warps=4, down_n=down[0], down_k=down[1], down_warps=4)


TILES = {
    "plain": tiles(up=(16, 32)),
    "swapped": tiles(down=(32, 16), swap=1),
    "atomic": tiles(32, combine="atomic", group=8),
    "heights": tiles(32, variant="heights", low=16),
    "groups": tiles(group=2, programs=3, up=(32, 16)),
    "dies": tiles(xcds=8, group=8, swap=1),
    "atomic heights": tiles(64, variant="heights", low=16, combine="atomic", programs=3),
    "few programs": tiles(programs=3, swap=1, xcds=8),
}
DESCRIBED = {
    "descriptors": tiles(tma=1, down=(16, 32)),
    "swapped descriptors": tiles(tma=1, swap=1, up=(32, 32)),
    "described rows": tiles(64, tma=1),
    "described rows, heights": tiles(64, tma=1, variant="heights", low=16, combine="atomic"),
}


def beyond(args):
    """A map that names experts past those that are here."""
    count = len(args.w1) + 6
    ids = torch.randint(0, count, args.topk_ids.shape)
    return replace(args, topk_ids=ids, expert_map=torch.randperm(count).int(), num_experts=count)


def padded(args):
    """The same values with NaN behind every row and between the experts; every row starts on 16 bytes."""
    for name in ("hidden_states", "w1", "w2"):
        tensor = getattr(args, name)
        *outer, height, width = tensor.shape
        whole = torch.full((*outer, height + (2 if outer else 0), width + 8), float("nan"), dtype=tensor.dtype)
        args = replace(args, **{name: whole[..., :height, :width].copy_(tensor)})
    return args


def nameless(args):
    """Some ids name no expert; what weighs them is NaN."""
    ids = args.topk_ids.long()
    ids[1], ids[2, 1], ids[3, 0], ids[4, 1] = -1, args.num_experts, 2**40 + 1, -(2**33)
    bad = (ids < 0) | (ids >= args.num_experts)
    return replace(args, topk_ids=ids, topk_weights=args.topk_weights.masked_fill(bad, float("nan")))


def half(*args, **changes):
    return moe.call(*args, **{"dtype": torch.float16} | changes)


def single(*args, **changes):
    return moe.call(*args, **{"dtype": torch.float32} | changes)


def cases():
    """Fresh random calls over everything that the contract names."""
    return {
        "plain": half(),
        "fp32": single(),
        "gelu": half(activation="gelu"),
        "swiglu_oai": single(activation="swiglu_oai", alpha=1.3, limit=0.5),
        "gelu_tanh": single(activation="gelu_tanh"),
        "relu2": half(activation="relu2"),
        "limit": single(limit=0.4),
        "limit, biases": moe.biased(half(limit=0.4, on_input=True)),
        "silu, no gate": half(gated=False),
        "gelu, no gate": single(gated=False, activation="gelu"),
        "gelu_tanh, no gate": half(gated=False, activation="gelu_tanh", middle=40),
        "relu2, no gate, biases": moe.biased(single(gated=False, activation="relu2", middle=33)),
        "relu2, no gate, on input": moe.biased(half(gated=False, activation="relu2", on_input=True)),
        "biases": moe.biased(half()),
        "biases, swiglu_oai": moe.biased(single(activation="swiglu_oai")),
        "first bias": replace(moe.biased(half()), w2_bias=None),
        "second bias": replace(moe.biased(single()), w1_bias=None),
        "on input, biases": moe.biased(half(on_input=True)),
        "odd sizes": half(hidden=33, middle=100),
        "odd sizes, fp32": moe.biased(single(hidden=100, middle=33)),
        "one column": moe.biased(half(hidden=1, middle=1)),
        "no whole tiles": half(hidden=72, middle=40),
        "no whole tiles, fp32": moe.biased(single(hidden=44, middle=68)),
        "strided": moe.strided(half()),
        "padded": padded(half(hidden=40)),
        "padded, fp32": padded(moe.biased(single(middle=20))),
        "invalid ids": nameless(half()),
        "invalid ids, on input": nameless(single(on_input=True)),
        "nothing valid": half(ids=torch.full((4, 2), -1)),
        "one expert takes all": single(ids=torch.full((37, 1), 3)),
        "experts twice": half(ids=torch.randint(0, 2, (9, 4))),
        "one expert": half(tokens=17, experts=1, topk=1),
        "empty experts": single(experts=40, tokens=3),
        "no token": half(ids=torch.empty(0, 2, dtype=torch.int32)),
        "one token": half(tokens=1),
        "ten slots": half(experts=12, topk=10, tokens=6),
        "mapped": moe.mapped(half(tokens=17)),
        "mapped beyond": moe.biased(beyond(single(tokens=17))),
        "half weights": replace(single(), topk_weights=torch.rand(9, 2).half()),
        "transposed ids": half(ids=torch.randint(0, 5, (3, 9), dtype=torch.int32).T),
        "transposed rows": replace(half(), hidden_states=torch.randn(32, 9).half().T),
    }


def assert_right(args, cfg, what):
    given = {name: tensor.clone() for name, tensor in named(args).items() if name != "posted"}
    got = FUSED_MOE.launch(cfg, args, poison(FUSED_MOE.outputs(args)))
    assert FUSED_MOE.error(got, moe.model(args)) <= CLOSE[args.hidden_states.dtype], f"{what}: {cfg}"
    assert all(torch.equal(getattr(args, name).nan_to_num(), value.nan_to_num()) for name, value in given.items()), what


ALWAYS = [
    "fp32", "odd sizes", "strided", "invalid ids", "one expert takes all", "empty experts", "no token", "one token",
    "mapped",
]  # fmt: skip
NAMES = ALWAYS + drawn([name for name in cases() if name not in ALWAYS], 5)


@marked
@pytest.mark.parametrize("name", NAMES)
def test_fused_moe(name, poisoned, sorted_by_torch):
    args, number = cases()[name], list(cases()).index(name)
    check(args)
    chosen = [decode(), *in_turn(list(TILES.values()), number, 1)]
    if not unaligned(args.hidden_states, args.w1, args.w2):
        chosen += in_turn(list(DESCRIBED.values()), number, 1)
    for cfg in chosen:
        assert_right(args, cfg, name)


@marked
@pytest.mark.parametrize("name", [*TILES, *DESCRIBED])
def test_every_kind_of_tile(name, poisoned, sorted_by_torch):
    """Several blocks of one expert, the last of few rows, next to experts with few and with none."""
    ids = torch.cat([torch.full((70, 1), 1), torch.tensor([[0]] * 3 + [[3]] * 20)])[torch.randperm(93)]
    args = half(ids=ids.int(), experts=5) if len(name) % 2 else single(ids=ids.int(), experts=5)
    assert_right(args, (TILES | DESCRIBED)[name], name)


@marked
@pytest.mark.parametrize("cfg", [decode((16, 128), (16, 64)), decode((32, 64), (8, 256)), decode((4, 256), (64, 64))])
def test_every_kind_of_decode(cfg, poisoned):
    """Several steps of k, the last one cut off, and a number of slots that is no power of two."""
    assert_right(moe.biased(half(tokens=2, topk=3, hidden=150, middle=90)), cfg, "fp16")
    assert_right(nameless(single(tokens=5, hidden=64, middle=33)), cfg, "fp32")


@marked
@pytest.mark.parametrize(
    "name, which",
    [("mapped", "plain"), ("mapped beyond", "atomic"), ("empty experts", "atomic"), ("invalid ids", "plain")],
)
def test_with_the_sort(name, which, poisoned):
    args = cases()[name]
    posted = torch.full((1,), -77, dtype=torch.int32)
    assert_right(replace(args, posted=posted), TILES[which], name)
    assert int(posted) >= 0


@marked
@pytest.mark.parametrize("seed", range(6))
def test_any_call(seed, poisoned, sorted_by_torch):
    def draw(low, high):
        return int(torch.randint(low, high, ()))

    experts = draw(1, 41)
    make = (half, single)[seed % 2]
    form = moe.FORMS[draw(0, len(moe.FORMS))]
    args = make(draw(1, 14), experts, draw(1, min(experts, 10) + 1), draw(1, 71), draw(1, 71), **form)
    args = moe.mapped(args, max(11, experts)) if draw(0, 3) == 0 else args
    args = moe.biased(args) if draw(0, 2) else args
    args.on_input = bool(draw(0, 2))
    choices = [decode(), *TILES.values()]
    choices += [] if unaligned(args.hidden_states, args.w1, args.w2) else DESCRIBED.values()
    assert_right(args, choices[draw(0, len(choices))], [tuple(args.w1.shape), tuple(args.topk_ids.shape)])


# --- grouped GEMM ---


def tile(block=16, n=16, k=16, xcds=1, **more):
    params = {"block": block, "n": n, "k": k, "stages": 2, "warps": 4, "group": 1, "tma": 0, "swap": 0} | more
    return config("tile", {"xcds": xcds} if xcds > 1 else {}, **params)


TILE = [tile(k=32), tile(n=32, swap=1), tile(32, group=8, xcds=8), tile(programs=3, group=2)]
TILE_DESCRIBED = [tile(tma=1, n=32), tile(64, tma=1, swap=1)]


def as_half(args):
    return replace(args, a=args.a.half(), b=args.b.half()) if args.a.dtype == torch.bfloat16 else args


def strided_half(args):
    return gemm.strided(as_half(args))


def products():
    """The calls of the CPU test, bf16 of them as fp16, and rows off and on 16 bytes."""
    found = {name: args for name, args in gemm.cases().items() if "strided" not in name and args.b.stride(2) == 1}
    return {name: as_half(args) for name, args in found.items()} | {
        "strided": strided_half(gemm.call()),
        "strided, gathered": strided_half(gemm.call(gather=4)),
        "no whole tiles": as_half(gemm.call(hidden=72, columns=40, rest=3)),
        "int64, bias, rest, gathered": replace(
            as_half(gemm.call(bias=torch.randn(4, 24), rest=2, gather=3)), offsets=torch.tensor([1, 3, 3, 8, 10])
        ),
    }


def assert_product(args, cfg, what):
    got = GROUPED_GEMM.launch(cfg, args, poison(GROUPED_GEMM.outputs(args)))
    gemm.assert_right(args, got, gemm.model(args), CLOSE[args.a.dtype], f"{what}: {cfg}")


@marked
@pytest.mark.parametrize("name", products())
def test_grouped_gemm(name, poisoned):
    args, number = products()[name], list(products()).index(name)
    chosen = in_turn(TILE, number, 1)
    if not unaligned(args.a, args.b):
        chosen += in_turn(TILE_DESCRIBED, number, 1)
    for cfg in chosen:
        assert_product(args, cfg, name)


@marked
def test_grouped_gemm_lays_out_in_several_steps(poisoned, monkeypatch):
    monkeypatch.setattr(grouped_gemm_gpu, "LAID", 16)
    assert_product(as_half(gemm.call([3, 0, 70, 17], rest=5)), tile(32), "several steps")


@marked
def test_weights_whose_elements_are_apart_are_refused():
    args = half()
    turned = args.w2.mT.contiguous().mT
    for cfg in (decode(), tiles()):
        with pytest.raises(InvalidInput, match="last strides"):
            FUSED_MOE.launch(cfg, replace(args, w2=turned), FUSED_MOE.outputs(args))
    product = as_half(gemm.call())
    with pytest.raises(InvalidInput, match="last stride"):
        turned = product.b.mT.contiguous().mT
        GROUPED_GEMM.launch(tile(), replace(product, b=turned), GROUPED_GEMM.outputs(product))
