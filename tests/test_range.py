"""Results that fit their dtype though their parts do not: rows stay float32 until they are weighed and added up, and no
candidate is admitted that rounds them before."""

import pytest
import torch

import moecache
from moecache import routing
from moecache.backends.cpu import CpuBackend
from moecache.kernels.contract import EXTREME
from moecache.kernels.fused_moe.cpu import activate, local_experts
from moecache.kernels.fused_moe.op import FUSED_MOE, FusedMoe
from moecache.kernels.grouped_gemm.cpu import row_experts
from moecache.kernels.grouped_gemm.op import GROUPED_GEMM, GroupedGemm
from moecache.predict.work import Work
from moecache.schemas.config import config
from moecache.schemas.device import Device
from moecache.schemas.errors import MoecacheError
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Environment
from moecache.tuning.run import Budget
from moecache.tuning.tuner import tune

CPU = Device(vendor="cpu", arch="x86_64", name="test", units=2)
MOST = 65504.0  # of float16
VARIANTS = ("by_expert", "padded_bmm", "grouped_mm")


# --- what a call gives ---


def layer(tokens, x, gate, up, down, router, experts=8, topk=4, hidden=256, middle=512, **more):
    """A layer in float16 of constant values: every token has the same result."""
    both = torch.cat([torch.full((experts, middle, hidden), v) for v in (gate, up)], 1)
    ids = torch.stack([torch.randperm(experts)[:topk] for _ in range(tokens)]).int()
    router = torch.as_tensor(router, dtype=torch.float32).expand(tokens, topk).contiguous()
    rows, back = torch.full((tokens, hidden), x), torch.full((experts, hidden, middle), down)
    return (rows.half(), both.half(), back.half(), router, ids), more


def cases(tokens):
    large = torch.full((8, 256), -60000.0)
    return {
        "rows before they are weighed": (layer(tokens, 1.0, 0.05, 0.05, 1.0, 1e-3), 335.5),
        "weighed rows before their sum": (layer(tokens, 1.0, 0.05, 0.05, 1.0, [1.0, -1.0, 1e-3, 1e-3]), 167.7),
        "a product before its bias": (layer(tokens, 1.0, 0.05, 0.05, 1.0, [1.0], topk=1, w2_bias=large), 23845.0),
        "a weighed token": (
            layer(tokens, 6e4, 1e-3, 1e-3, 0.25, [4.0], 8, 1, 1, 4, apply_router_weight_on_input=True), 57650.0,
        ),
        "a gate that closes": (layer(tokens, 60.0, -6.0, 1.0, 1.0, 1.0), 0.0),
        "what comes of the activation": (layer(tokens, 4.0, 0.25, 2.0, 2e-4, 0.25), 53687.1),
    }  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 21])
@pytest.mark.parametrize("name", cases(1))
def test_a_result_that_fits_is_right_in_every_variant(name, tokens, tmp_path):
    (args, more), want = cases(tokens)[name]
    with moecache.using(db=tmp_path / "c.sqlite", path=(), mode="off"):
        for variant in VARIANTS:
            try:
                got = moecache.fused_moe(*args, variant=variant, **more)
            except MoecacheError as missing:  # torch of this machine has no such product
                assert variant == "grouped_mm", missing
                continue
            assert got.float() == pytest.approx(torch.full(got.shape, want), rel=2e-3, abs=1e-3), variant


@pytest.mark.parametrize("variant", ["by_expert", "grouped_mm"])
def test_a_product_before_its_bias(variant, tmp_path):
    a, b = torch.full((6, 64), 32.0).half(), torch.full((2, 24, 64), 40.0).half()  # 81920
    offsets, bias = torch.tensor([0, 4, 6], dtype=torch.int32), torch.full((2, 24), -60000.0).half()
    with moecache.using(db=tmp_path / "c.sqlite", path=(), mode="off"):
        try:
            got = moecache.grouped_gemm(a, b, offsets, bias=bias, variant=variant)
        except MoecacheError as missing:
            assert variant == "grouped_mm", missing
            return
    assert torch.equal(got, torch.full((6, 24), 81920.0 - 60000.0).half())


# --- what the tuner admits ---


def slots(args, dtype, early):
    """A layer as plain loops, with what `early` names rounded to `dtype` on the way."""

    def step(name, value):
        return value.to(dtype).float() if name == early else value

    total = torch.zeros(args.hidden_states.shape)
    expert = local_experts(args)
    for token in range(len(total)):
        for slot, e in enumerate(expert[token].tolist()):
            if e < 0:
                continue
            x, weight = args.hidden_states[token].float(), args.topk_weights[token, slot].float()
            both = step("first_product", args.w1[e].float() @ x)
            both = both * weight if args.on_input else both
            both = both if args.w1_bias is None else both + args.w1_bias[e].float()
            row = step("row", args.w2[e].float() @ activate(args, both))
            row = row if args.w2_bias is None else row + args.w2_bias[e].float()
            total[token] += step("weighed_row", row if args.on_input else row * weight)
    return total


class Loops:
    """Adds candidates that compute in a loop of their own to an op."""

    def fits(self, problem, config, device):
        return "" if config.variant == "loop" else super().fits(problem, config, device)

    def work(self, problem, config, device):
        return Work(us=1.0)

    def sources(self, problem, config, device):
        return []

    def bind(self, config, args, out):
        if config.variant != "loop":
            return super().bind(config, args, out)
        return lambda args, out: out.copy_(self.loop(config, args))


class Early(Loops, FusedMoe):
    """Candidates that round early, beside one that does not."""

    name = "early"

    def __init__(self, *early):
        self.early = early

    def space(self, problem, device):
        return [config("by_expert", math="native"), *(config("loop", early=name, to=to) for name, to in self.early)]

    def loop(self, config, args):
        return slots(args, getattr(torch, config["to"]), config["early"])


class EarlyProduct(Loops, GroupedGemm):
    """The same for one product: a part of the columns, or the product before its bias, is rounded."""

    name = "early_product"

    def space(self, problem, device):
        return [config("by_expert", math="native"), *(config("loop", early=name) for name in ("half", "product"))]

    def loop(self, config, args):
        expert, half = row_experts(args)[:, 0].clamp_min(0), args.a.shape[1] // 2
        a = args.a if args.rows is None else args.a[args.rows.long()]
        first, second = (
            torch.einsum("rk,rnk->rn", a[:, part].float(), args.b[expert][..., part].float())
            for part in (slice(0, half), slice(half, None))
        )
        whole = first.half() + second.half() if config["early"] == "half" else (first + second).half()
        bias = 0 if args.bias is None else args.bias[expert].float()
        return whole.float() + bias


def problem(op, dtype, tokens=16, experts=4, topk=4, hidden=64, middle=96, **dims):
    dims = {"hidden": hidden, "intermediate": middle} | dims
    return Problem(op=op.name, vendor="cpu", arch="x86_64", units=2, tokens=tokens, experts=experts, topk=topk,
                   dtype=dtype, dims=tuple(dims.items()), source=op.source)  # fmt: skip


def verdicts(op, question):
    ids = routing.draw("uniform", question.tokens, question.experts, question.topk)
    backend = CpuBackend()
    done = tune(op, question, ids, backend, backend.device(), Environment(), budget=Budget(seconds=5))
    return {t.config.name: t.status for t in done.timings}


@pytest.mark.parametrize(
    "dtype, dims, early",
    [
        ("fp16", {}, ("row", "float16")), ("fp16", {}, ("weighed_row", "float16")),
        ("fp16", {"biased": 1, "activation": "swiglu_oai"}, ("row", "float16")),
        ("fp16", {"activation": "gelu", "mapped": 1, "global": 6}, ("weighed_row", "float16")),
        ("fp16", {"on_input": 1}, ("first_product", "float16")), ("bf16", {}, ("row", "float16")),
        ("fp32", {}, ("row", "float16")),
    ],
)  # fmt: skip
def test_a_candidate_that_rounds_early_is_wrong(dtype, dims, early):
    op = Early(early, ("nothing", "float32"))
    found = verdicts(op, problem(op, dtype, **dims))
    default, bad, good = (cfg.name for cfg in op.space(None, None))
    assert found == {default: "ok", bad: "wrong", good: "ok"}


@pytest.mark.parametrize("dims", [{"topk": 1}, {"topk": 3}, {"tokens": 1}, {"middle": 8}])
def test_it_is_wrong_at_any_size(dims):
    op = Early(("row", "float16"))
    question = problem(op, "fp16", **dims)
    assert sorted(verdicts(op, question).values()) == ["ok", "wrong"]


@pytest.mark.parametrize(
    "dims, wrong", [({}, "half"), ({"gathered": 1}, "half"), ({"biased": 1}, "product"), ({"hidden": 7}, "half")]
)
def test_a_product_that_rounds_early_is_wrong(dims, wrong):
    op = EarlyProduct()
    question = problem(op, "fp16", 64, topk=1, **dims)
    found = verdicts(op, question)
    assert found[config("loop", early=wrong).name] == "wrong"
    assert found[config("by_expert", math="native").name] == "ok"


SIZES = [(16, 8, 4, 64, 64), (64, 16, 1, 128, 96), (32, 8, 3, 40, 8), (64, 4, 2, 16, 1), (5, 2, 2, 1, 1)]
KINDS = [{}, {"activation": "gelu"}, {"activation": "swiglu_oai", "biased": 1}, {"on_input": 1, "biased": 1},
         {"quant": "fp8_block"}, {"quant": "fp8_channel", "on_input": 1}, {"mapped": 1, "global": 20},
         {"activation": "relu2"}, {"activation": "relu2", "gated": 0}, {"gated": 0}, {"activation": "silu_limited"},
         {"activation": "relu2", "quant": "fp8_block"}]  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_extreme_inputs_have_results_that_fit_and_pass(dtype, size):
    tokens, experts, topk, hidden, middle = size
    for kind in KINDS:
        kind = kind | ({"unaligned": 1} if hidden % 8 or middle % 8 else {})
        asked = problem(FUSED_MOE, dtype, tokens, experts, topk, hidden, middle, **kind)
        args = FUSED_MOE.inputs(asked, routing.draw("zipf", tokens, experts, topk, 1), EXTREME)
        want = FUSED_MOE.reference(args)
        assert float(want.abs().max()) < MOST, kind
        for cfg in FUSED_MOE.space(asked, CPU):
            got = FUSED_MOE.launch(cfg, args, FUSED_MOE.outputs(args))
            assert FUSED_MOE.error(got, want) <= FUSED_MOE.tolerance(asked), (kind, cfg.name)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("sizes", [(64, 8, 128, 64), (100, 3, 1, 5), (33, 4, 7, 9)])
def test_extreme_products_fit_and_pass(dtype, sizes):
    rows, experts, hidden, columns = sizes
    for kind in ({}, {"biased": 1}, {"gathered": 1}):
        kind = kind | ({"unaligned": 1} if hidden % 8 else {})
        asked = problem(GROUPED_GEMM, dtype, rows, experts, 1, hidden, columns, **kind)
        args = GROUPED_GEMM.inputs(asked, routing.draw("zipf", rows, experts, 1, 1), EXTREME)
        want = GROUPED_GEMM.reference(args)
        assert dtype != "fp16" or float(want.nan_to_num().abs().max()) < MOST, kind
        for cfg in GROUPED_GEMM.space(asked, CPU):
            got = GROUPED_GEMM.launch(cfg, args, GROUPED_GEMM.outputs(args))
            assert GROUPED_GEMM.error(got, want) <= GROUPED_GEMM.tolerance(asked), (kind, cfg.name)
