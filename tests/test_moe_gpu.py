"""Fused MoE and grouped GEMM on a GPU: every candidate against the reference, in graphs, on streams, at limits of size.

`python tests/test_moe_gpu.py i n` compiles the i-th of n shares of the kernels that these tests launch: the tests begin
with one such process a core.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from placed import named

import moecache
from moecache import routing
from moecache.devices import Places
from moecache.kernels.fused_moe import op as fused_moe
from moecache.kernels.fused_moe.op import FUSED_MOE
from moecache.kernels.grouped_gemm import op as grouped_gemm
from moecache.kernels.grouped_gemm.op import GROUPED_GEMM
from moecache.kernels.matrix import DTYPES
from moecache.kernels.tensors import poison

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CLOSE = {"bf16": 1.0, "fp16": 0.25, "fp32": 1e-3}  # of the allowance in `wrong`


# --- calls ---


def rows(shape, dtype, device, std, gap=0, apart=0):
    """Normal values; NaN in a gap behind every row, and in rows between matrices."""
    *outer, height, width = shape
    whole = torch.full((*outer, height + apart, width + gap), float("nan"), dtype=dtype, device=device)
    return whole[..., :height, :width].normal_(0, std)


def mapping_of(experts, everywhere):
    """Local expert of every global one; those of other ranks are −1, or past the last one here."""
    mapping = torch.where(torch.rand(everywhere) < 0.3, experts, -1).int()
    mapping[torch.randperm(everywhere)[:experts]] = torch.randperm(experts).int()
    return mapping


@dataclass(frozen=True)
class Fused:
    """A call of fused MoE. `mapped`: experts over all ranks; `bad`: some ids name none, their weights are NaN; `gap`:
    elements behind each row; `apart`: rows behind each expert's."""

    tokens: int
    experts: int
    topk: int
    hidden: int
    middle: int
    dtype: str = "bf16"
    spread: str = "uniform"
    act: str = "silu"
    gated: bool = True
    limit: float | None = None
    biased: bool = False
    on_input: bool = False
    mapped: int = 0
    bad: bool = False
    gap: int = 0
    apart: int = 0
    op = FUSED_MOE

    def ids(self):
        everywhere = self.mapped or self.experts
        ids = routing.draw(self.spread, self.tokens, everywhere, self.topk, int(torch.randint(1 << 30, ())))
        if self.bad:
            strange = torch.tensor([-1, everywhere, -7, 2**40 + 1])[torch.randint(4, ids.shape)]
            ids = torch.where(torch.rand(ids.shape) < 0.3, strange, ids.long())
            ids[0] = -1
        return ids

    def args(self, device="cuda"):
        """Fresh values; on the device `meta` nothing but shapes and strides."""
        ids, dtype, both = self.ids(), DTYPES[self.dtype], (1 + self.gated) * self.middle
        weights = torch.rand(ids.shape) + 0.1
        weights = weights / weights.sum(1, keepdim=True)
        weights[(ids < 0) | (ids >= (self.mapped or self.experts))] = float("nan")
        bias1, bias2 = (rows((self.experts, n), dtype, device, 0.5) for n in (both, self.hidden))
        return fused_moe.call_args(
            rows((self.tokens, self.hidden), dtype, device, 1.0, self.gap),
            rows((self.experts, both, self.hidden), dtype, device, self.hidden**-0.5, self.gap, self.apart),
            rows((self.experts, self.hidden, self.middle), dtype, device, self.middle**-0.5, self.gap, self.apart),
            weights.to(device), ids.to(device), activation=self.act, gated=self.gated, limit=self.limit,
            on_input=self.on_input,
            w1_bias=bias1 if self.biased else None, w2_bias=bias2 if self.biased else None,
            expert_map=mapping_of(self.experts, self.mapped).to(device) if self.mapped else None,
        )  # fmt: skip


@dataclass(frozen=True)
class Grouped:
    """A call of the grouped GEMM: `rest` rows before and behind those of the experts, gathered from `source` rows."""

    rows: int
    experts: int
    hidden: int
    middle: int
    dtype: str = "bf16"
    spread: str = "uniform"
    biased: bool = False
    source: int = 0
    rest: int = 0
    gap: int = 0
    wide: bool = False
    op = GROUPED_GEMM

    def args(self, device="cuda"):
        ids = routing.draw(self.spread, self.rows, self.experts, 1, int(torch.randint(1 << 30, ())))
        dtype = DTYPES[self.dtype]
        ids = ids[ids != 0] if self.experts > 2 else ids  # an empty group
        counts = torch.bincount(ids.reshape(-1).long(), minlength=self.experts)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]) + self.rest
        size = int(offsets[-1]) + self.rest
        listed = torch.randint(self.source, (size,), dtype=torch.int32) if self.source else None
        return grouped_gemm.ProductCall(
            rows((self.source or size, self.hidden), dtype, device, 1.0, self.gap),
            rows((self.experts, self.middle, self.hidden), dtype, device, self.hidden**-0.5, self.gap),
            (offsets if self.wide else offsets.int()).to(device), rows=listed if listed is None else listed.to(device),
            bias=rows((self.experts, self.middle), dtype, device, 0.5) if self.biased else None,
        )  # fmt: skip


QWEN, OSS, TINY, ODD = (128, 8, 2048, 768), (32, 2, 2880, 2880), (8, 8, 256, 128), (8, 2, 100, 33)
CLAMPED, HALF = {"act": "swiglu_oai", "biased": True}, {"dtype": "fp16", "act": "gelu", "on_input": True}
NEMOTRON, BARE = (16, 6, 2688, 464), {"act": "relu2", "gated": False, "biased": True}
CASES = [
    Fused(1, *QWEN), Fused(3, *QWEN, spread="zipf", bad=True), Fused(16, *QWEN, spread="zipf"),
    Fused(100, *QWEN, spread="hot1"), Fused(1024, *QWEN), Fused(5000, *QWEN, spread="zipf"),
    Fused(1024, *QWEN, spread="hot1", bad=True), Fused(2, 8, 8, 7168, 256), Fused(100, 8, 8, 7168, 256),
    Fused(1024, 8, 8, 7168, 256, spread="zipf"), Fused(16, 512, 10, 256, 128, spread="zipf"),
    Fused(1024, 512, 10, 256, 128), Fused(1, *OSS, **CLAMPED), Fused(16, *OSS, **CLAMPED, spread="zipf"),
    Fused(1000, *OSS, **CLAMPED), Fused(16, 3, 1, 256, 128, **HALF), Fused(48, 1, 1, 256, 128, **HALF),
    Fused(1024, 8, 1, 256, 128, **HALF, spread="zipf"), Fused(2, 16, 8, 2048, 768, mapped=128, biased=True),
    Fused(16, 16, 8, 2048, 768, mapped=128), Fused(1024, 16, 8, 2048, 768, mapped=128, bad=True),
    Fused(16, *TINY, gap=16, apart=5), Fused(1024, *TINY, gap=16, apart=5), Fused(64, *TINY, bad=True),
    Fused(16, *TINY, gap=3), Fused(200, *TINY, gap=8), Fused(4, 8, 8, 200, 136),
    Fused(300, 8, 8, 200, 136, biased=True), Fused(1, *ODD),
    Fused(16, *ODD, bad=True), Fused(1000, *ODD, biased=True, act="gelu", on_input=True),
    Fused(16, 8, 2, 1, 1, biased=True), Fused(3, 3, 2, 256, 128, "fp32"), Fused(100, *ODD, "fp32", biased=True),
    Fused(500, 8, 2, 256, 128, "fp32", mapped=20), Fused(4, *NEMOTRON, **BARE), Fused(64, *NEMOTRON, **BARE),
    Fused(900, *NEMOTRON, **BARE, spread="zipf", bad=True), Fused(700, 8, 2, 512, 256, gated=False, on_input=True),
    Fused(20, *ODD, "fp32", gated=False, act="gelu_tanh"), Fused(16, *TINY, "fp16", gated=False, act="gelu"),
    Fused(3, *TINY, limit=0.4), Fused(40, *TINY, limit=0.4, biased=True), Fused(600, *TINY, "fp16", limit=0.4),
    Fused(500, *TINY, act="gelu_tanh"), Fused(500, *TINY, act="relu2", biased=True),
]  # fmt: skip
GROUPS = [
    Grouped(1, 1, 256, 128), Grouped(16, 128, 2048, 768, spread="zipf"), Grouped(100, 8, 256, 128, spread="hot1"),
    Grouped(5000, 8, 2048, 768, biased=True, rest=7), Grouped(3000, 128, 768, 2048, spread="zipf", rest=30),
    Grouped(512, 8, 7168, 256, source=64), Grouped(4000, 512, 256, 128, source=500, rest=5, wide=True),
    Grouped(1024, 8, 2880, 2880, biased=True), Grouped(300, 3, 100, 33, biased=True, source=40, rest=3),
    Grouped(20, 3, 100, 33, gap=3), Grouped(2000, 8, 256, 128, "fp16", gap=16), Grouped(300, 8, 200, 136, rest=1),
    Grouped(90, 8, 100, 33, "fp32", source=9), Grouped(300, 40, 1, 1, biased=True),
]  # fmt: skip
SMALL = [Fused(8, 16, 8, 256, 128), Fused(256, 16, 8, 256, 128)]
MANY = [
    Fused(131072, 8, 2, 64, 32), Fused(131072, 8, 8, 4096, 32), Fused(131072, 8, 8, 64, 4096),
    Fused(64, 512, 8, 2048, 2048),
]  # fmt: skip
ROWS = [Grouped(131072, 8, 64, 16, rest=1), Grouped(1 << 20, 8, 64, 4096, source=100)]


def device():
    return Places().of_tensor(torch.empty(1, device="cuda")).device


def space(case, args):
    return case.op.space(case.op.problem(args, device(), ""), device())


def one_each(configs):
    """The best candidate of each variant, with atomic sums and with dependent launches apart."""
    seen = {}
    for cfg in configs:
        seen.setdefault((cfg.variant, dict(cfg.params).get("combine"), bool(cfg.extra)), cfg)
    return list(seen.values())


# --- compiled ahead ---


def compile_share(which, of):
    """Compile the kernels whose launches have a hash of this share, and launch nothing."""
    from triton.runtime.jit import JITFunction

    run, seen = JITFunction.run, set()

    def kind(x):
        if isinstance(x, torch.Tensor):
            return x.dtype, x.data_ptr() % 16
        if hasattr(x, "block_shape"):
            return x.base.dtype, str(x.block_shape)
        return (x == 1, x % 16 == 0, x >= 1 << 31) if isinstance(x, int) else type(x)

    def compiled(self, *, grid, warmup, **given):
        constants = {p.name for p in self.params if p.is_constexpr} | (given.keys() - {p.name for p in self.params})
        kinds = {n: x if n in constants else kind(x) for n, x in given.items()}
        name = f"{self.__name__} {kinds}"
        if name not in seen and crc32(name.encode()) % of == which:
            run(self, grid=grid, warmup=True, **given)
        seen.add(name)

    JITFunction.run = compiled
    for case in [*CASES, *GROUPS, *SMALL, *MANY, *ROWS]:
        args = case.args("meta")
        for cfg in space(case, args):
            try:
                case.op.launch(cfg, args, case.op.outputs(args))
            except Exception as wrong:  # the tests say what is wrong with it
                print(case, cfg.name, repr(wrong)[:500])
    return seen


@pytest.fixture(scope="module", autouse=True)
def compiled():
    share = min(16, os.cpu_count() or 1)
    here = {"cwd": Path(__file__).parent.parent, "env": {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}}
    for process in [subprocess.Popen([sys.executable, __file__, str(i), str(share)], **here) for i in range(share)]:
        process.wait()


# --- what is right ---


def wrong(got, want, dtype):
    """How many elements are off by more than rounding explains; in rows of zeros none may be."""
    few = want.shape[1] < 16  # so few can all be small by chance
    typical = want.pow(2).mean((0, 1) if few else 1, keepdim=True).sqrt()
    allowed = CLOSE[dtype] * (0.1 * typical + 0.02 * want.abs())
    return int((~((got.to(want.dtype) - want).abs() <= allowed)).sum())


def assert_right(case, got, want, what):
    """Rows that are NaN in `want` belong to nobody: they must be as poisoned."""
    rest = want.isnan().all(1)
    bad = wrong(got[~rest], want[~rest], case.dtype)
    assert not bad, f"{bad} of {want.numel()} elements are wrong: {what}"
    assert case.op.error(got, want) <= {"bf16": 1e-2, "fp16": 2e-3, "fp32": 2e-5}[case.dtype], what
    assert got[rest].isnan().all(), f"wrote rows of nobody: {what}"


def poisoned(tensor):
    """A workspace without a number: not in floats of 16 and 32 bits, and as integers it names no row."""
    if tensor.dtype == torch.uint8:
        tensor.view(torch.int32).fill_(-0x8001)  # FFFF7FFF
        return tensor
    return poison(tensor)


class Poisoned:
    """Stands for torch.empty: every tensor comes poisoned. Once the calls of a launch are known they are made ahead: a
    kernel that fills a workspace between two others would keep apart what otherwise overlaps."""

    def __init__(self):
        self.empty, self.calls, self.ready = torch.empty, [], []

    def __call__(self, *args, **kwargs):
        if not self.ready:
            self.calls.append((args, kwargs))
            return poisoned(self.empty(*args, **kwargs))
        tensor = self.ready.pop(0)
        assert tensor.shape == self.empty(*args, **kwargs | {"device": "meta"}).shape
        return tensor

    def prepare(self):
        self.ready = [poisoned(self.empty(*args, **kwargs)) for args, kwargs in self.calls]
        torch.cuda.synchronize()


def runs(case, cfg, args, monkeypatch, count=5):
    """Results of several launches into poisoned outputs with poisoned workspaces: the first goes through Triton's JIT,
    the others do not."""
    outs, empty = [poison(case.op.outputs(args)) for _ in range(count)], Poisoned()
    args = case.op.side_by_side(args)
    run = case.op.bind(cfg, args, outs[0])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        for number, out in enumerate(outs):
            if number:
                empty.prepare()
            run(args, out)
    torch.cuda.synchronize()
    return outs


def marks(args):
    """Sums over the bits of every input."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {name: int(t.view(bits[t.itemsize]).sum(dtype=torch.int64)) for name, t in named(args).items()}


def check_all(case, configs, args, want, monkeypatch):
    before = marks(args)
    for cfg in configs:
        outs = runs(case, cfg, args, monkeypatch)
        assert_right(case, outs[0], want, cfg.name)
        for out in outs[1:]:
            if dict(cfg.params).get("combine") == "atomic":
                assert_right(case, out, want, cfg.name)
            else:
                assert torch.equal(out.nan_to_num(), outs[0].nan_to_num()), f"not the same twice: {cfg.name}"
        assert marks(args) == before, f"changed its inputs: {cfg.name}"


# --- tests ---


@pytest.mark.parametrize("case", [*CASES, *GROUPS, *SMALL], ids=str)
def test_every_candidate(case, monkeypatch):
    args = case.args()
    configs = space(case, args)
    assert configs
    check_all(case, configs, args, case.op.reference(args), monkeypatch)


@pytest.mark.parametrize("case", [*SMALL, GROUPS[2], GROUPS[5]], ids=str)
def test_one_of_each_variant(case):
    """Few launches, for compute-sanitizer: `make sanitize`."""
    args = case.args()
    want = case.op.reference(args)
    for cfg in one_each(space(case, args)):
        assert_right(case, case.op.launch(cfg, args, poison(case.op.outputs(args))), want, cfg.name)


def test_no_token_and_no_row():
    for case in (Fused(0, 8, 2, 256, 128), Grouped(0, 2, 256, 128)):
        args = case.args()
        for cfg in space(case, args):
            assert case.op.launch(cfg, args, case.op.outputs(args)).shape[0] == 0
    torch.cuda.synchronize()


def test_deterministic_algorithms_have_no_atomic_sums(monkeypatch):
    case = Fused(1000, 8, 8, 256, 128)
    args = case.args()
    want = case.op.reference(args)
    assert any(c["combine"] == "atomic" for c in space(case, args))
    torch.use_deterministic_algorithms(True)
    try:
        configs = space(case, args)
        assert configs and not any(c["combine"] == "atomic" for c in configs)
        check_all(case, one_each(configs), args, want, monkeypatch)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_a_thousand_replays_follow_changing_inputs(case):
    args = case.args()
    for cfg in one_each(space(case, args)):
        out = case.op.outputs(args)
        run = case.op.bind(cfg, args, out)
        run(args, out)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(3):  # neighbours in a chain must not disturb each other
                run(args, out)
        spreads = ("uniform", "zipf", "hot1", "dir2")
        for step in range(1000):
            if step % 50 == 0:
                fresh = replace(case, spread=spreads[step // 50 % 4]).args()
                for name in ("hidden_states", "topk_ids", "topk_weights", "w1", "w2"):
                    getattr(args, name).copy_(getattr(fresh, name))
                poison(out)
            graph.replay()
            if step % 50 in (0, 49):
                assert_right(case, out, case.op.reference(args), f"replay {step}: {cfg.name}")


def test_several_streams_at_once():
    case, streams = SMALL[1], [torch.cuda.Stream() for _ in range(4)]
    calls = [case.args() for _ in streams]
    wants = [case.op.reference(args) for args in calls]
    for cfg in one_each(space(case, calls[0])):
        outs, run = [], case.op.bind(cfg, calls[0], case.op.outputs(calls[0]))
        torch.cuda.synchronize()
        for _ in range(30):
            for stream, args in zip(streams, calls, strict=True):
                with torch.cuda.stream(stream):
                    outs.append(run(args, poison(case.op.outputs(args))))
        torch.cuda.synchronize()
        for number, out in enumerate(outs):
            assert_right(case, out, wants[number % 4], f"stream {number % 4}: {cfg.name}")


def some_tokens(args):
    """The same call for the first, the last and some other tokens, and which these are."""
    count = len(args.topk_ids)
    chosen = torch.cat([torch.tensor([0, 1, count - 1]), torch.randint(count, (200,))]).cuda()
    names = ("hidden_states", "topk_ids", "topk_weights")
    return replace(args, **{name: getattr(args, name)[chosen] for name in names}), chosen


@pytest.mark.parametrize("case", MANY, ids=str)
def test_past_32_bits(case):
    """131072 tokens; more than 2³¹ elements of partial sums, of the intermediate, and of weights."""
    args = case.args()
    few, chosen = some_tokens(args)
    want = case.op.reference(few)
    for cfg in one_each(space(case, args)):
        out = case.op.launch(cfg, args, poison(case.op.outputs(args)))
        assert_right(case, out[chosen], want, cfg.name)
        assert out.isfinite().all(), cfg.name


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_rows_past_32_bits(case):
    args = case.args()
    want = case.op.reference(args) if case.middle < 64 else None
    for cfg in space(case, args):
        out = case.op.launch(cfg, args, poison(case.op.outputs(args)))
        if want is not None:
            assert_right(case, out, want, cfg.name)
            continue
        ends = args.offsets.tolist()
        for expert in (1, case.experts - 1):
            part = slice(max(ends[expert], ends[expert + 1] - 300), ends[expert + 1])
            exact = args.a[args.rows[part].long()].float() @ args.b[expert].float().T
            assert_right(case, out[part], exact, cfg.name)
        assert out.isfinite().all(), cfg.name


def test_public_path_tunes_every_candidate(tmp_path):
    case = SMALL[1]
    args = case.args()
    names = ("hidden_states", "w1", "w2", "topk_weights", "topk_ids")
    want = case.op.reference(args)
    with moecache.using(db=tmp_path / "cache.sqlite", path=(), mode="tune", budget=10.0) as serving:
        for _ in range(3):
            assert_right(case, moecache.fused_moe(*(getattr(args, n) for n in names), layer="gpu"), want, "public")
        bucket = routing.bucket(routing.histogram(args.topk_ids, case.experts))
        problem = case.op.problem(args, device(), bucket)
        assert serving.peek(case.op, problem).tier == "measured"
        timings: Iterator = (t for t, _ in serving.lookup.timings(problem))
        assert not [t for t in timings if t.status != "ok"]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = moecache.fused_moe(*(getattr(args, n) for n in names), layer="gpu")
        args.topk_ids.copy_(case.ids())
        graph.replay()
        assert_right(case, out, case.op.reference(args), "public, captured")


if __name__ == "__main__":
    compile_share(int(sys.argv[1]), int(sys.argv[2]))
