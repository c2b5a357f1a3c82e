"""Everything that a launch of fused MoE compiles, sort and sum included, was compiled ahead."""

import pytest
import torch

pytest.importorskip("triton")

from moecache import routing
from moecache.kernels import fused_moe_gpu
from moecache.kernels import op as ops
from moecache.kernels.compile import compile_source, prepare_launch, target
from moecache.kernels.fused_moe import FUSED_MOE, call_args
from moecache.kernels.fused_moe_fp8 import Quant
from moecache.kernels.op import Args
from moecache.schemas.device import by_arch

H200 = by_arch("sm_90")


class FakeDriver:
    """As much of a Triton driver as a compile-only launch asks for."""

    def __init__(self, gpu):
        self.get_current_target = lambda: gpu
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """Launches of a device that is not there: compiled, with what a real one hands over; name and key of each."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    run, keys = JITFunction.run, []

    def compiled(self, *args, grid, warmup, **kwargs):
        self.device_caches.clear()
        keys.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs).hash))
        self.device_caches.clear()

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    monkeypatch.setattr(JITFunction, "run", compiled)
    monkeypatch.setattr(driver, "_active", FakeDriver(target(H200)), raising=False)
    return keys


def call(tokens: int, experts: int, topk: int, hidden: int, middle: int, mapped: int = 0) -> Args:
    """A call without data."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    ids = routing.draw("uniform", tokens, experts, topk).to("meta")
    mapping = meta(mapped, dtype=torch.int32) if mapped else None
    return call_args(
        meta(tokens, hidden), meta(experts, 2 * middle, hidden), meta(experts, hidden, middle),
        meta(tokens, topk, dtype=torch.float32), ids, expert_map=mapping,
    )  # fmt: skip


@pytest.mark.parametrize(
    "sizes",
    [(1, 128, 8, 2048, 768), (64, 32, 4, 2880, 2880), (1024, 64, 8, 2048, 768), (64, 32, 4, 1024, 512, 128)],
    ids=["one token", "few rows", "many rows", "mapped"],
)
def test_all_that_is_launched_was_compiled_ahead(sizes: tuple[int, ...], launched: list[tuple[str, str]]) -> None:
    args = call(*sizes)
    problem = FUSED_MOE.problem(args, H200, "")
    by_kind = {(c.variant, dict(c.params).get("combine"), c.extra): c for c in FUSED_MOE.space(problem, H200)}
    for config in by_kind.values():
        launched.clear()
        fused_moe_gpu.launch(config, args, FUSED_MOE.outputs(args))
        ours = [(s.fn.__name__, compile_source(s, H200).key) for s in ops.kernels(FUSED_MOE, problem, config, H200)]
        assert sorted(ours) == sorted(launched), config


def test_fp8_quantises_with_kernels_that_were_compiled_ahead(launched: list[tuple[str, str]]) -> None:
    experts, topk, hidden, middle, tokens = 16, 4, 1024, 512, 512
    args = call(tokens, experts, topk, hidden, middle)

    def scales(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device="meta")

    quant = Quant("fp8_block", scales(experts, 2 * middle // 128, hidden // 128),
                  scales(experts, hidden // 128, middle // 128))  # fmt: skip
    args |= {"quant": quant} | {name: args[name].to(torch.float8_e4m3fn) for name in ("w1", "w2")}
    problem = FUSED_MOE.problem(args, H200, "")
    by_variant = {c.variant: c for c in reversed(FUSED_MOE.space(problem, H200))}
    assert set(by_variant) == {"fp8_tiles", "fp8_ring"}
    for config in by_variant.values():
        launched.clear()
        FUSED_MOE.launch(config, args, FUSED_MOE.outputs(args))
        ours = [(s.fn.__name__, compile_source(s, H200).key) for s in ops.kernels(FUSED_MOE, problem, config, H200)]
        missed = {name for name, _ in set(launched) - set(ours)}
        assert missed <= ({"product"} if config.variant == "fp8_ring" else set()), config  # pairs are specialised there


def test_a_plain_op_has_its_own_kernels_alone() -> None:
    sort = ops.get("moe_sort")
    problem, _ = sort.problems(_layer(), [64], H200)
    config = sort.space(problem, H200)[0]
    assert ops.kernels(sort, problem, config, H200) == sort.sources(problem, config, H200)


def test_preparing_a_launch_says_what_does_not_fit(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sort = ops.get("moe_sort")
    problem, _ = sort.problems(_layer(), [64], H200)
    source = sort.sources(problem, sort.space(problem, H200)[0], H200)[0]
    assert prepare_launch(source, H200) == "" and any(tmp_path.rglob("*.cubin"))
    assert "threads" in prepare_launch(source, H200.model_copy(update={"max_threads": 32}))


def _layer():
    from moecache.schemas.layer import Layer

    return Layer(model="", experts=64, global_experts=64, topk=8, hidden=1024, intermediate=512)
