"""Grouped GEMM on the CPU: every variant against a plain loop over rows, its checks, problems and hot path."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moecache
from moecache import routing
from moecache.kernels.grouped_gemm.op import GROUPED_GEMM, ProductCall, check
from moecache.kernels.matrix import DTYPES, grouped_mm, grouped_mm_works
from moecache.kernels.tensors import poison
from moecache.predict.ranking import rank
from moecache.schemas.config import config
from moecache.schemas.device import KNOWN, Device
from moecache.schemas.errors import InvalidInput
from moecache.schemas.layer import Layer
from moecache.schemas.problem import problem_from_key
from moecache.warmup import warmup

CPU = Device(vendor="cpu", arch="x86_64", name="test", units=2)


def model(args):
    """[R, N] float64, one row at a time; None for rows that belong to no expert."""
    offsets, rows = args.offsets.tolist(), args.rows
    found = [None] * (len(args.a) if rows is None else len(rows))
    for expert in range(len(offsets) - 1):
        for row in range(offsets[expert], offsets[expert + 1]):
            a = args.a[row if rows is None else rows[row]].double()
            found[row] = args.b[expert].double() @ a
            if args.bias is not None:
                found[row] = found[row] + args.bias[expert].double()
    return found


def call(counts=(3, 0, 5, 1), hidden=32, columns=24, dtype=torch.bfloat16, rest=0, gather=0, **changes):
    """Fresh random arguments: rows of each expert, `rest` rows behind them, gathered from `gather` rows if not 0."""
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    size = sum(counts) + rest
    rows = torch.randint(gather, (size,), dtype=torch.int32) if gather else None
    a = torch.randn(gather or size, hidden).to(dtype)
    b = (torch.randn(len(counts), columns, hidden) * hidden**-0.5).to(dtype)
    return replace(ProductCall(a, b, offsets, rows=rows), **changes)


def strided(args):
    """The same values with a gap behind every row."""
    wide = {}
    for name in ("a", "b"):
        tensor = getattr(args, name)
        whole = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan")).to(tensor.dtype)
        wide[name] = whole[..., :-3].copy_(tensor)
    return replace(args, **wide)


def cases():
    """Fresh random calls over everything that the contract names."""
    return {
        "plain": call(),
        "fp16": call(dtype=torch.float16),
        "fp32": call(dtype=torch.float32),
        "int64 offsets": call(offsets=torch.tensor([0, 3, 3, 8, 9])),
        "first row is no expert's": call(offsets=torch.tensor([2, 3, 3, 8, 9])),
        "gathered": call(gather=4),
        "gathered, fp32": call(dtype=torch.float32, gather=20),
        "rest": call(rest=4),
        "rest, gathered": call(rest=4, gather=3),
        "bias": call(bias=torch.randn(4, 24).bfloat16()),
        "bias, float32, rest": call(bias=torch.randn(4, 24), rest=2, gather=5),
        "odd sizes": call(hidden=33, columns=100),
        "odd sizes, fp32": call(hidden=100, columns=33, dtype=torch.float32),
        "one column": call(hidden=1, columns=1),
        "strided": strided(call()),
        "strided, gathered": strided(call(gather=4)),
        "transposed weights": call(b=torch.randn(4, 32, 24).bfloat16().mT * 0.2),
        "one expert": call([7]),
        "one expert takes all": call([0, 0, 40, 0]),
        "no row": call([0, 0]),
        "all rest": call([0, 0], rest=3),
        "one row": call([0, 1, 0]),
        "many experts": call([k % 3 for k in range(60)]),
    }


def assert_right(args, got, want, tolerance, what=""):
    mine = [row for row, values in enumerate(want) if values is not None]
    rest = [row for row, values in enumerate(want) if values is None]
    assert got[rest].isnan().all(), f"{what} wrote rows of no expert"
    if mine:
        exact = torch.stack([want[row] for row in mine])
        assert (got[mine].double() - exact).norm() <= tolerance * max(exact.norm(), 1e-3), what


def run(cfg, args):
    return GROUPED_GEMM.launch(cfg, args, poison(GROUPED_GEMM.outputs(args)))


@pytest.mark.parametrize("name", cases())
def test_every_variant_and_the_reference(name):
    args = cases()[name]
    check(args)
    want, problem = model(args), GROUPED_GEMM.problem(args, CPU, "")
    reference = GROUPED_GEMM.reference(args)
    assert_right(args, reference, want, 1e-5, "reference")
    for cfg in GROUPED_GEMM.space(problem, CPU):
        got = run(cfg, args)
        assert_right(args, got, want, GROUPED_GEMM.tolerance(problem), f"{name}: {cfg}")
        assert GROUPED_GEMM.error(got, reference) <= GROUPED_GEMM.tolerance(problem)


def test_the_cases_reach_every_variant():
    spaces = [GROUPED_GEMM.space(GROUPED_GEMM.problem(args, CPU, ""), CPU) for args in cases().values()]
    expected = {"by_expert"} | ({"grouped_mm"} if any(map(grouped_mm_works, DTYPES)) else set())
    assert {c.variant for space in spaces for c in space} == expected


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(1, 40), st.integers(1, 40), st.integers(0, 5),
    st.integers(0, 12), st.booleans(), st.sampled_from(sorted(DTYPES)), st.integers(0, 2**31),
)  # fmt: skip
def test_any_call(counts, hidden, columns, rest, gather, bias, dtype, seed):
    torch.manual_seed(seed)
    args = call(counts, hidden, columns, DTYPES[dtype], rest, gather)
    args = replace(args, bias=torch.randn(len(counts), columns)) if bias else args
    space = GROUPED_GEMM.space(GROUPED_GEMM.problem(args, CPU, ""), CPU)
    want = model(args)
    got = run(space[seed % len(space)], args)
    for row, values in enumerate(want):  # few numbers can cancel: each row's error against what was added up
        if values is None:
            assert got[row].isnan().all()
        else:
            a = args.a[row if args.rows is None else args.rows[row]].double()
            assert (got[row].double() - values).norm() <= 1e-2 * (a.norm() + values.norm() + 0.1)


@pytest.mark.skipif(not grouped_mm_works("bf16"), reason="this torch has no grouped product on a CPU")
def test_rows_off_16_bytes_go_into_the_grouped_product_by_a_copy():
    a, b = torch.randn(6, 41).bfloat16()[:, 1:], torch.randn(3, 8, 40).bfloat16()
    got = grouped_mm(a, b, torch.tensor([2, 2, 6]))
    want = torch.cat([a[:2].float() @ b[0].float().T, a[2:].float() @ b[2].float().T])
    assert (got.float() - want).norm() < 1e-2 * want.norm()


def test_error_leaves_out_rows_of_no_expert():
    args = call(rest=2)
    want = GROUPED_GEMM.reference(args)
    got = run(config("by_expert", math="native"), args)
    assert got[-2:].isnan().all() and GROUPED_GEMM.error(got, want) < 1e-2
    got[0, 0] = float("nan")
    assert GROUPED_GEMM.error(got, want) == math.inf
    assert GROUPED_GEMM.error(got[1:], want) == math.inf


@pytest.mark.parametrize(
    "change, words",
    [
        ({"a": torch.zeros(9)}, "a is torch.float32 [9]"),
        ({"a": torch.zeros(9, 32).double()}, "float64"),
        ({"a": torch.zeros(9, 0).bfloat16()}, "a is torch.bfloat16 [9, 0]"),
        ({"b": torch.zeros(4, 24, 31).bfloat16()}, "[experts, columns, 32]"),
        ({"b": torch.zeros(4, 24, 32)}, "b is torch.float32"),
        ({"b": torch.zeros(0, 24, 32).bfloat16()}, "0 experts"),
        ({"b": torch.zeros(1025, 1, 32).bfloat16()}, "1025 experts"),
        ({"b": torch.zeros(4, 24, 32, device="meta").bfloat16()}, "a is on cpu"),
        ({"offsets": torch.zeros(4, dtype=torch.int32)}, "allowed is int32 or int64 [5]"),
        ({"offsets": torch.zeros(5)}, "offsets is torch.float32"),
        ({"rows": torch.zeros(4)}, "rows is torch.float32"),
        ({"rows": torch.zeros(4, dtype=torch.int64)}, "rows is torch.int64"),
        ({"rows": torch.zeros(4, 1, dtype=torch.int32)}, "rows is torch.int32 [4, 1]"),
        ({"rows": torch.zeros(4, dtype=torch.int32, device="meta")}, "a is on cpu"),
        ({"bias": torch.zeros(4, 32)}, "bias is torch.float32 [4, 32]"),
        ({"bias": torch.zeros(4, 24, dtype=torch.int32)}, "bias is torch.int32"),
    ],
)
def test_bad_input_names_the_value(change, words):
    with pytest.raises(InvalidInput) as error:
        check(call(**change))
    assert words in str(error.value)


def key_of(args):
    return GROUPED_GEMM.problem(args, CPU, "a0e0").key


def test_the_key_holds_what_changes_the_answer():
    plain = "op=grouped_gemm vendor=cpu arch=x86_64 units=2 tokens=16 experts=4 topk=1 routing=a0e0 dtype=bf16"
    assert key_of(call()) == f"{plain} dims.hidden=32 dims.intermediate=24"
    changed = {
        "dims.gathered=1": call(gather=4),
        "dims.biased=1": call(bias=torch.zeros(4, 24)),
        "dims.unaligned=1": strided(call()),
        "dims.intermediate=8": call(columns=8),
        "dtype=fp32": call(dtype=torch.float32),
        "tokens=32": call(rest=10),
    }
    for part, other in changed.items():
        assert f" {part} " in f"{key_of(other)} " and f" {part} " not in f"{key_of(call())} "


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("dims", [{}, {"gathered": 1}, {"biased": 1}, {"unaligned": 1, "gathered": 1, "biased": 1}])
def test_inputs_are_of_their_problem(dtype, dims):
    asked = problem_from_key(key_of(call([4] * 6, dtype=DTYPES[dtype], rest=8)))
    asked = asked.model_copy(update={"dims": tuple(sorted((dict(asked.dims) | dims).items()))})
    ids = torch.tensor([[0]] * 20 + [[5]] * 9 + [[-1]] * 3)
    args = GROUPED_GEMM.inputs(asked, ids, 1)
    check(args)
    assert key_of(args) == asked.key and args.offsets.tolist() == [0, 20, 20, 20, 20, 20, 29]
    assert GROUPED_GEMM.choices(args).reshape(-1).tolist() == [0] * 20 + [5] * 9 + [-1] * 3
    assert torch.equal(args.a, GROUPED_GEMM.inputs(asked, ids, 1).a)
    assert not torch.equal(args.a, GROUPED_GEMM.inputs(asked, ids, 2).a)
    if dims.get("gathered"):
        assert len(args.rows) == 32 and int(args.rows.max()) < len(args.a) < 32


def test_choices_name_the_expert_of_every_row():
    args = call([2, 0, 3], rest=1, offsets=torch.tensor([1, 3, 3, 5]))
    assert GROUPED_GEMM.choices(args).tolist() == [[-1], [0], [0], [2], [2], [-1]]


def test_fits_refuses_what_no_variant_can_run():
    plain, odd, fp32 = (
        GROUPED_GEMM.problem(args, CPU, "") for args in (call(), strided(call()), call(dtype=torch.float32))
    )
    for problem, bad, word in [
        (plain, config("by_expert", math="fp8"), "math=fp8"),
        (plain, config("by_expert"), "no config"),
        (fp32, config("by_expert", math="float32"), "anyway"),
        (odd, config("grouped_mm"), "16 bytes"),
        (plain, config("padded_bmm", experts=4), "does not run on a CPU"),
    ]:
        assert word in GROUPED_GEMM.fits(problem, bad, CPU), bad
    for problem in (plain, odd, fp32):
        space = GROUPED_GEMM.space(problem, CPU)
        assert space and all(0 < us < 1e9 for us in rank(GROUPED_GEMM, problem, space, CPU).us)
    assert GROUPED_GEMM.sources(plain, config("grouped_mm"), CPU) == []


SMALL = Layer(model="m", experts=4, global_experts=4, topk=2, hidden=64, intermediate=32)


def test_problems_of_a_layer_are_its_two_products():
    first, second = GROUPED_GEMM.problems(SMALL, [8], CPU)
    assert first.key == GROUPED_GEMM.problem(call([4] * 4, 64, 64, gather=8), CPU, "").key
    assert second.key == GROUPED_GEMM.problem(call([4] * 4, 32, 64), CPU, "").key
    odd = SMALL.model_copy(update={"hidden": 33})
    assert [p.dim("unaligned") for p in GROUPED_GEMM.problems(odd, [8], CPU)] == [1, 0]
    rank = SMALL.model_copy(update={"global_experts": 32})
    assert {p.tokens for p in GROUPED_GEMM.problems(rank, [64], CPU)} == {16}  # 64 · 2 rows, of which an eighth is here
    plain = SMALL.model_copy(update={"gated": False})
    assert [p.dim("intermediate") for p in GROUPED_GEMM.problems(plain, [8], CPU)] == [32, 64]
    large = Layer(model="m", experts=128, global_experts=128, topk=8, hidden=2048, intermediate=768)
    assert GROUPED_GEMM.problems(large, [1, 16], CPU) == []
    assert [p.tokens for p in GROUPED_GEMM.problems(large, [1, 16], KNOWN["h200"])] == [8, 128] * 2
    assert GROUPED_GEMM.problems(large.model_copy(update={"dtype": "fp8"}), [1], KNOWN["h200"]) == []
    assert "no kernels for fp8" in GROUPED_GEMM.left_out(large.model_copy(update={"dtype": "fp8"}), [1], KNOWN["h200"])
    assert GROUPED_GEMM.left_out(large, [1, 16], CPU).startswith("tokens 1, 16: more than 256 MB")
    assert GROUPED_GEMM.left_out(large, [1, 16], KNOWN["h200"]) == GROUPED_GEMM.left_out(SMALL, [8], CPU) == ""


# --- the public function ---


def public(args, **more):
    return moecache.grouped_gemm(args.a, args.b, args.offsets, rows=args.rows, bias=args.bias, **more)


@pytest.fixture
def serving(tmp_path):
    with moecache.using(db=tmp_path / "cache.sqlite", path=(), mode="off", strict=False) as active:
        yield active


@pytest.mark.parametrize("name", cases())
def test_the_public_function(name, serving):
    args = cases()[name]
    out = torch.full_like(GROUPED_GEMM.outputs(args), float("nan"))
    assert public(args, out=out, layer=name) is out
    assert_right(args, out, model(args), 1e-2)
    again = public(args, layer=name)
    mine = ~out.isnan()
    assert again.shape == out.shape and torch.equal(again[mine], out[mine])


def test_a_hit_opens_nothing_and_asks_nobody(serving, monkeypatch):
    args = call()
    public(args, layer="hit"), public(args, layer="hit")
    monkeypatch.setattr(type(serving), "choose", lambda *a, **k: pytest.fail("a hit asked the policy"))
    monkeypatch.setattr(routing, "histogram", lambda *a, **k: pytest.fail("a hit read the routing back"))
    assert_right(args, public(args, layer="hit"), model(args), 1e-2)


def test_what_makes_another_problem_is_no_hit(serving):
    public(call(), layer="first")
    others = [call(gather=4), call(bias=torch.zeros(4, 24)), strided(call()), call(dtype=torch.float16), call(rest=20),
              call(columns=16), call(hidden=16), call([9])]  # fmt: skip
    for number, other in enumerate(others):
        before = set(serving.hot)
        public(other, layer=number)
        assert len(set(serving.hot) - before) == 1, number


def test_bad_output_is_refused(serving):
    args = call()
    for out in (torch.empty(9, 25, dtype=torch.bfloat16), torch.empty(9, 24), torch.empty(24, 9).bfloat16().T):
        with pytest.raises(InvalidInput, match="out is"):
            public(args, out=out)
    square = call(columns=32)
    with pytest.raises(InvalidInput, match="overlap"):
        public(square, out=square.a)


@pytest.mark.parametrize("more", [{}, {"gather": 4}, {"rest": 3}])
def test_first_call_tunes_and_the_second_is_a_hit(tmp_path, more):
    args = call([4, 4, 4, 1], **more)
    with moecache.using(db=tmp_path / "c.sqlite", path=(), mode="tune", budget=30.0) as active:
        got = public(args, layer=f"tunes{more}")
        bucket = routing.bucket([4, 4, 4, 1])
        problem = GROUPED_GEMM.problem(args, active.places.of_tensor(None).device, bucket)
        assert active.peek(GROUPED_GEMM, problem).tier == "measured"
        timings = [t for t, _ in active.lookup.timings(problem)]
        assert {t.status for t in timings} == {"ok"} and len(timings) >= 2
        want = model(args)
        assert all((got[r].double() - v).norm() < 0.05 * v.norm() for r, v in enumerate(want) if v is not None)
        public(args, layer=f"tunes{more}")
        assert [t.measured_at for t, _ in active.lookup.timings(problem)] == [t.measured_at for t in timings]


def test_a_variant_can_be_asked_for(serving):
    public(call(), variant="by_expert")
    assert {served.what.variant for served in serving.hot.values()} == {"by_expert"}
    with pytest.raises(InvalidInput, match="'padded_bmm'"):
        public(call(), variant="padded_bmm")


def test_warm_up_covers_the_op(tmp_path):
    with moecache.using(db=tmp_path / "c.sqlite", path=(), mode="tune", budget=0.5, strict=True):
        rows = warmup(SMALL, tokens=[8], routing=["uniform"], ops=["grouped_gemm"])
        assert [(r.tier, r.measured >= 2) for r in rows] == [("measured", True)] * 2
        public(call([4] * 4, 32, 64), layer="warmed")  # strict: this call asks what was measured
