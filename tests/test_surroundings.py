"""Calls in whatever surroundings torch offers: inference mode, autocast, other default dtypes and devices."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moecache
from moecache import feedback, routing
from moecache.dispatch import Dispatcher, using
from moecache.kernels.fused_moe.op import FUSED_MOE, call_args
from moecache.kernels.matrix import grouped_mm_works
from moecache.kernels.tensors import tensors
from moecache.schemas.errors import InvalidInput

MODEL = Path(__file__).parent.parent / "examples" / "models" / "qwen3-30b-a3b.json"
Layer = tuple[torch.Tensor, ...]
names = (f"surroundings{n}" for n in itertools.count())


def layer(tokens: int = 64, dtype: torch.dtype = torch.float32) -> Layer:
    rng = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float32, device="cpu")

    weights, ids = normal(tokens, 8).softmax(1).topk(2)
    return normal(tokens, 64).to(dtype), normal(8, 64, 64).to(dtype) / 8, normal(8, 64, 32).to(dtype) / 6, weights, ids


def reference(given: Layer) -> torch.Tensor:
    return FUSED_MOE.reference(call_args(*given))


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deepseek() -> Iterator[None]:
    """What DeepSeek's own script sets around generation."""
    with default_dtype(torch.bfloat16), torch.inference_mode(), torch.device("meta"):
        yield


AROUND: dict[str, Any] = {
    "inference": torch.inference_mode,
    "bf16": lambda: default_dtype(torch.bfloat16),
    "fp16": lambda: default_dtype(torch.float16),
    "fp64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "gradients": torch.enable_grad,
    "deepseek": deepseek,
}


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dispatcher]:
    """A dispatcher that tunes, and a process that has posted nothing yet."""
    monkeypatch.setattr(feedback, "_slabs", {})
    monkeypatch.setattr(feedback, "slots", {})
    with using(mode="tune", db=Path(":memory:"), path=(), budget=2.0) as serving:
        yield serving


@pytest.mark.parametrize("name", AROUND)
def test_a_first_call_measures_there_and_serves_everywhere(name: str, fresh: Dispatcher) -> None:
    given = layer()
    want, counts = reference(given), torch.bincount(given[4].flatten(), minlength=8).tolist()
    offsets = torch.tensor([0, 16, 32, 48, 64])
    rows = torch.cat([given[0][16 * e : 16 * e + 16] @ given[1][e].T for e in range(4)])
    for around in (AROUND[name], contextlib.nullcontext, AROUND[name]):
        with around():
            assert error(moecache.fused_moe(*given), want) < 1e-5
            assert moecache.moe_sort(given[4], 8, 16).counts.tolist() == counts
            assert error(moecache.grouped_gemm(given[0], given[1][:4], offsets), rows) < 1e-5
    timings = fresh.lookup.tiers.user.timings()
    assert {t.problem.op for t in timings} == {"fused_moe", "moe_sort", "grouped_gemm"}
    assert [(t.config.name, t.reason) for t in timings if t.status != "ok"] == []


@pytest.mark.parametrize("name", AROUND)
def test_every_candidate_and_the_reference_give_the_same_numbers(name: str) -> None:
    args = call_args(*layer())
    want = FUSED_MOE.reference(args)
    with using(mode="off") as serving, AROUND[name]():
        device = serving.places.of_tensor(None).device
        space = FUSED_MOE.space(FUSED_MOE.problem(args, device, "a0e0"), device)
        assert torch.equal(FUSED_MOE.reference(args), want)
        for config in space:
            assert error(FUSED_MOE.launch(config, args, FUSED_MOE.outputs(args)), want) < 1e-5, config.name
    assert len(space) > 2


@pytest.mark.parametrize("name", AROUND)
def test_draws_and_inputs_are_those_of_plain_surroundings(name: str) -> None:
    generators = ("uniform", "zipf", "dir2", "hot1")
    plain = [routing.draw(generator, 512, 64, 8) for generator in generators]
    bucket = routing.draw_bucket("a1e2", 256, 64, 8)
    args, problem = call_args(*layer()), None
    with using(mode="off") as serving, AROUND[name]():
        drawn = [routing.draw(generator, 512, 64, 8) for generator in generators]
        assert torch.equal(routing.draw_bucket("a1e2", 256, 64, 8), bucket)
        problem = FUSED_MOE.problem(args, serving.places.of_tensor(None).device, "a0e0")
        inputs = FUSED_MOE.inputs(problem, args.topk_ids, 3)
    assert all(torch.equal(a, b) for a, b in zip(drawn, plain, strict=True))
    again = FUSED_MOE.inputs(problem, args.topk_ids, 3)
    for a, b in zip(tensors(inputs), tensors(again), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("name", ["deepseek"])
def test_a_warm_up_measures_there(name: str, fresh: Dispatcher) -> None:
    with AROUND[name]():
        rows = moecache.warmup(MODEL, tokens=[1], routing=["uniform", "dir2"], ops=["moe_sort"])
    assert {row.tier for row in rows} == {"measured"}
    assert {t.status for t in fresh.lookup.tiers.user.timings()} == {"ok"}


@pytest.mark.parametrize("name", ["inference", "autocast", "deepseek"])
def test_a_wrapped_function_is_tuned_in_the_mode_of_its_caller(name: str, fresh: Dispatcher) -> None:
    modes = []

    def scaled(x: torch.Tensor, y: torch.Tensor, *, config: dict[str, int]) -> torch.Tensor:
        made = torch.empty(())  # in the caller's dtype, on its device
        product = x[:4, :4] @ x[:4, :4]
        modes.append((torch.is_inference_mode_enabled(), made.device.type, made.dtype, product.dtype))
        y.add_(x)
        return torch.cat([part * 2 for part in x.split(config["rows"])])

    call = moecache.wrap(
        scaled, op=next(names), configs=[{"rows": 8}, {"rows": 64}], mutates=["y"], version="1",
        key=lambda x, y: {"tokens": x.shape[0], "dtype": x.dtype},
    )  # fmt: skip
    x, y = torch.ones(64, 8), torch.zeros(64, 8)
    with AROUND[name]():
        assert torch.equal(call(x, y), 2 * x)
    assert torch.equal(y, x) and len(set(modes)) == 1
    assert {t.status for t in fresh.lookup.tiers.user.timings()} == {"ok"}
    assert torch.equal(call(x, y), 2 * x) and torch.equal(y, 2 * x)


@pytest.mark.parametrize("name", AROUND)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_what_torch_can_do_is_asked_away_from_the_surroundings_of_the_first_call(name: str, dtype: str) -> None:
    grouped_mm_works.cache_clear()
    plain = grouped_mm_works(dtype)
    grouped_mm_works.cache_clear()
    with AROUND[name]():
        assert grouped_mm_works(dtype) == plain


def test_results_of_a_layer_that_trains_carry_no_graph(fresh: Dispatcher) -> None:
    x, w1, w2, weights, ids = layer()
    want = reference((x, w1, w2, weights, ids))
    taught = (x.clone().requires_grad_(), w1.clone().requires_grad_(), w2, weights.clone().requires_grad_(), ids)
    for _ in range(2):
        got = moecache.fused_moe(*taught)
        assert error(got, want) < 1e-5 and not got.requires_grad and not got.is_inference()
        weighted = moecache.moe_sort(ids, 8, 16, topk_weights=taught[3]).sorted_weights
        assert weighted is not None and not weighted.requires_grad


def test_draws_leave_the_random_numbers_of_the_caller_alone() -> None:
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    routing.draw("dir2", 64, 16, 2)
    assert torch.equal(torch.rand(3), want)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_tensors_without_memory_are_refused_and_leave_nothing_behind(fresh: Dispatcher) -> None:
    given = layer()
    with pytest.raises(InvalidInput, match="meta"):
        moecache.moe_sort(given[4].to("meta"), 8, 16)
    with pytest.raises(InvalidInput, match="meta"):
        moecache.fused_moe(*(tensor.to("meta") for tensor in given), out=torch.empty(64, 64))
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode, pytest.raises((InvalidInput, RuntimeError)):
        moecache.moe_sort(mode.from_tensor(given[4]), 8, 16)
    with pytest.raises((InvalidInput, RuntimeError)):
        torch.vmap(lambda ids: moecache.moe_sort(ids, 8, 16).counts)(given[4][None].repeat(2, 1, 1))
    assert fresh.lookup.tiers.user.timings() == []
    assert int(moecache.moe_sort(given[4], 8, 16).counts.sum()) == 128
