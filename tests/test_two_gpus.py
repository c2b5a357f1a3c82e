"""A call belongs to the device and stream of its tensors, whatever device is current; mixed devices are refused.

The tests on GPUs keep every stream that must not be used asleep: what is launched there, or read too early, is wrong.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from toy import Toy, ToyClock

import moecache
from moecache import devices
from moecache.backends.cpu import CpuBackend
from moecache.dispatch import Dispatcher, using
from moecache.schemas.device import Device
from moecache.schemas.errors import InvalidInput
from moecache.settings import Settings

one_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
two_gpus = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
SLEEP = 400_000_000  # cycles: some 200 ms


def marked(marks):
    def mark(test):
        for each in marks:
            test = each(test)
        return test

    return mark


@pytest.fixture
def fresh() -> Iterator[Dispatcher]:
    with using(db=Path(":memory:"), mode="tune", strict=False, budget=1.0) as active:
        yield active


def layer(tokens=256, experts=16, topk=4, hidden=256, middle=128, seed=0):
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    weights, ids = normal(tokens, experts).softmax(1).topk(topk)
    w1, w2 = normal(experts, 2 * middle, hidden) / hidden**0.5, normal(experts, hidden, middle) / middle**0.5
    return [normal(tokens, hidden).bfloat16(), w1.bfloat16(), w2.bfloat16(), weights, ids.int()]


def moved(tensors, device):
    return [tensor.to(device) for tensor in tensors]


def error(got, want):
    return float((got.float() - want.float()).norm() / want.float().norm())


def asleep(device):
    with torch.cuda.device(device):
        torch.cuda._sleep(SLEEP)


# --- on a CPU: devices that only say that they are there ---


class TwoDevices(CpuBackend):
    """Two of the CPU. `now` is the current one; that in `recording` captures a graph."""

    def __init__(self) -> None:
        self.now, self.recording, self.asked = 0, -1, []

    def device(self, index: int = 0) -> Device:
        return super().device(0)

    @contextmanager
    def current(self, index: int) -> Iterator[None]:
        before, self.now = self.now, index
        try:
            yield
        finally:
            self.now = before

    def capturing(self) -> bool:
        self.asked.append(self.now)
        return self.now == self.recording


def test_whether_a_graph_is_captured_is_asked_of_the_device_of_the_call(tmp_path) -> None:
    toy, backend = Toy(), TwoDevices()
    backend.recording = 1
    serving = Dispatcher(Settings(db=tmp_path / "cache.sqlite", budget=5.0), backend, ToyClock(toy))
    there = serving.choose(toy, toy.problem(), index=1)
    assert there.tier != "measured" and "captured" in there.reason
    assert backend.asked == [1] and backend.now == 0
    here = serving.choose(toy, toy.problem(), index=0)
    assert here.tier == "measured" and backend.now == 0
    serving.close()


class There(torch.Tensor):
    """A tensor that says it is on device 1."""

    def get_device(self) -> int:
        return 1


@pytest.fixture
def entered(monkeypatch) -> list[int]:
    """Devices that were made current, one after the other; device 0 is at first."""
    found: list[int] = []
    now = [0]

    @contextmanager
    def device(index):
        before, now[0] = now[0], index
        found.append(index)
        yield
        now[0] = before

    monkeypatch.setattr(devices, "several", True)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: now[0], raising=False)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return found


def test_a_call_makes_the_device_of_its_tensors_current(fresh, entered) -> None:
    ids = torch.randint(8, (16, 2)).int()
    want = moecache.moe_sort(ids, 8, 16)
    assert not entered  # tensors of the CPU want no device
    for _ in range(2):  # first encounter and hit
        got = moecache.moe_sort(ids.as_subclass(There), 8, 16, layer="there")
        assert torch.equal(got.sorted_token_ids, want.sorted_token_ids)
    assert entered == [1, 1]


def test_a_wrapped_op_makes_the_device_of_its_tensors_current(fresh, entered) -> None:
    seen = []

    def double(x, *, by, config):
        seen.append(torch._C._cuda_getDevice())
        return 2 * x

    fast = moecache.wrap(double, op="double_there", configs=[{"rows": 1}], key=lambda x, by: {"tokens": x.shape[0]})
    fast(torch.ones(4, 4).as_subclass(There), by=torch.ones(1))  # a tensor of the CPU beside it is no other GPU
    assert entered == [1] and set(seen) == {1}


def test_a_wrapped_op_refuses_tensors_of_two_gpus(fresh, entered) -> None:
    class Elsewhere(torch.Tensor):
        def get_device(self) -> int:
            return 2

    fast = moecache.wrap(
        lambda x, y, config: x, op="mixed", configs=[{"rows": 1}], key=lambda x, y: {"tokens": len(x)}, version="1"
    )
    here, there = torch.ones(4).as_subclass(There), torch.ones(4).as_subclass(Elsewhere)
    fast(here, here)
    with pytest.raises(InvalidInput, match="cuda:1 and cuda:2"):
        fast(here, there)
    with pytest.raises(InvalidInput, match="cuda:1 and cuda:2"):
        fast(here, y=there)


def test_the_sort_refuses_tensors_of_two_devices(fresh) -> None:
    ids, elsewhere = torch.randint(8, (16, 2)).int(), torch.device("meta")
    for name, other in (
        ("topk_weights", torch.ones(16, 2, device=elsewhere)),
        ("expert_map", torch.zeros(8, dtype=torch.int32, device=elsewhere)),
        ("num_tokens", torch.zeros(1, dtype=torch.int32, device=elsewhere)),
    ):
        with pytest.raises(InvalidInput, match=f"{name}.*meta"):
            moecache.moe_sort(ids, 8, 16, **{name: other})


# --- on one GPU ---


@marked(one_gpu)
def test_two_threads_with_streams_of_their_own_share_a_layer(fresh) -> None:
    x, w1, w2, w, ids = moved(layer(512, 64, 8, 1024, 512), "cuda")
    calls = {"even": ids, "hot": torch.zeros_like(ids) + torch.arange(8, device="cuda").int()}
    want = {name: moecache.fused_moe(x, w1, w2, w, i) for name, i in calls.items()}
    torch.cuda.synchronize()
    bad: list[str] = []

    def work(name):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(100):
                y = moecache.fused_moe(x, w1, w2, w, calls[name], layer="model.layers.3")
                if not error(y, want[name]) < 0.01:
                    bad.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not bad


# --- on two GPUs, the first of which is current and asleep ---


def calls_on(device):
    """Every op on tensors of a device: name -> (call, its result on the CPU)."""
    x, w1, w2, w, ids = layer()
    offsets = torch.tensor([0, *range(16, 257, 16)], dtype=torch.int32)
    cpu = (x, w1, w2, w, ids, offsets)
    there = moved(cpu, device)

    def of(op):
        with using(db=Path(":memory:"), mode="replay"):
            return op(*cpu), lambda: op(*there)

    return {
        "fused_moe": of(lambda x, w1, w2, w, ids, offsets: moecache.fused_moe(x, w1, w2, w, ids)),
        "grouped_gemm": of(lambda x, w1, w2, w, ids, offsets: moecache.grouped_gemm(x, w1, offsets)),
        "moe_sort": of(lambda x, w1, w2, w, ids, offsets: moecache.moe_sort(ids, 16, 32).sorted_token_ids),
    }


@marked(two_gpus)
@pytest.mark.parametrize("name", ["fused_moe", "grouped_gemm", "moe_sort"])
def test_a_call_on_the_other_gpu_is_ready_when_its_stream_is(fresh, name) -> None:
    torch.cuda.set_device(0)
    want, call = calls_on("cuda:1")[name]
    for _ in range(3):  # the first encounter, with its tuning, then hits
        asleep(0)
        got = call().cpu()
        assert error(got, want) < 0.02 and torch.cuda.current_device() == 0
        torch.cuda.synchronize(0)


@marked(two_gpus)
def test_a_call_on_the_other_gpu_waits_for_its_inputs(fresh) -> None:
    torch.cuda.set_device(0)
    tensors = layer()
    want = moecache.fused_moe(*tensors)
    x, *rest = moved(tensors, "cuda:1")
    late = torch.full_like(x, float("nan"))
    for _ in range(2):
        late.fill_(float("nan"))
        moecache.fused_moe(late, *rest)  # tuned by now
        torch.cuda.synchronize(1)
        asleep(1)
        late.copy_(x)
        assert error(moecache.fused_moe(late, *rest).cpu(), want) < 0.02


@marked(two_gpus)
def test_a_stream_of_the_other_gpu_is_used(fresh) -> None:
    torch.cuda.set_device(0)
    want, call = calls_on("cuda:1")["fused_moe"]
    call()
    stream = torch.cuda.Stream("cuda:1")
    torch.cuda.synchronize(1)
    with torch.cuda.stream(stream), torch.cuda.device(0):
        asleep(0)
        got = call()
        host = torch.empty(got.shape, dtype=got.dtype, pin_memory=True)
        host.copy_(got, non_blocking=True)
        stream.synchronize()
    assert error(host, want) < 0.02


@marked(two_gpus)
def test_a_wrapped_op_runs_on_the_device_of_its_tensors(fresh) -> None:
    torch.cuda.set_device(0)
    at = []

    def double(x, *, config):
        at.append((torch.cuda.current_device(), torch.cuda.current_stream().device.index))
        return 2 * x

    fast = moecache.wrap(double, op="double_elsewhere", configs=[{"rows": 1}, {"rows": 2}], key=lambda x: {"n": len(x)})
    x = torch.ones(64, 64, device="cuda:1")
    for _ in range(2):
        assert fast(x).cpu().sum() == 2 * 64 * 64
    assert set(at) == {(1, 1)} and torch.cuda.current_device() == 0
    with pytest.raises(InvalidInput, match="cuda:0 and cuda:1"):
        moecache.wrap(
            lambda x, y, config: x, op="mixed_gpus", configs=[{"rows": 1}], key=lambda x, y: {"n": len(x)}, version="1"
        )(x.to("cuda:0"), x)


@marked(two_gpus)
def test_a_graph_of_the_other_gpu_is_captured_while_the_first_is_current(fresh) -> None:
    torch.cuda.set_device(0)
    want, call = calls_on("cuda:1")["fused_moe"]
    call()
    torch.cuda.synchronize(1)
    stream, graph = torch.cuda.Stream("cuda:1"), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        with torch.cuda.device(0):
            got = call()
        graph.capture_end()
    asleep(0)
    with torch.cuda.device(1):
        graph.replay()
    assert error(got.cpu(), want) < 0.02


@marked(two_gpus)
def test_each_gpu_posts_the_routing_of_its_calls(fresh) -> None:
    torch.cuda.set_device(0)
    ids = layer(512, 64, 8)[-1]
    hot = torch.zeros_like(ids) + torch.arange(8).int()
    for device in ("cuda:1", "cuda:0"):
        posted = []
        for chosen in (ids, hot):
            result = moecache.moe_sort(chosen.to(device), 64, 16, layer="posted")
            result.counts.cpu()
            posted.append(int(result.posted))
        assert posted[0] != posted[1] and min(posted) >= 0, device


@marked(two_gpus)
def test_tensors_of_two_gpus_are_refused(fresh) -> None:
    here = moved(layer(), "cuda:0")
    x, w1, w2 = here[:3]
    moecache.fused_moe(*here)
    for at in range(5):
        mixed = [tensor.to("cuda:1") if i == at else tensor for i, tensor in enumerate(here)]
        with pytest.raises(InvalidInput):
            moecache.fused_moe(*mixed)
    for extra in ("w1_bias", "w2_bias", "expert_map", "out"):
        given = {"w1_bias": w1[:, :, 0], "w2_bias": w2[:, :, 0], "expert_map": torch.arange(16).int(), "out": x}[extra]
        with pytest.raises(InvalidInput):
            moecache.fused_moe(*here, **{extra: given.to("cuda:1")})
    offsets = torch.arange(17, device="cuda:1", dtype=torch.int32)
    with pytest.raises(InvalidInput):
        moecache.grouped_gemm(x, w1, offsets)
    with pytest.raises(InvalidInput):
        moecache.grouped_gemm(x, w1, offsets.to("cuda:0"), rows=torch.zeros(16, dtype=torch.int32, device="cuda:1"))
    with pytest.raises(InvalidInput):
        moecache.grouped_gemm(x, w1, offsets.to("cuda:0"), bias=w1[:, :, 0].to("cuda:1"))
