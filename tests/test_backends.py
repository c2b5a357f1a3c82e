"""Backends: every way a device can be absent, identity, events, capture state and graphs of each vendor.

HIP runs through the real hip-python against tests/fake_hip.c, compiled here; CUDA's absent states through the
real cuda-python, the rest through stand-ins and, on a GPU, for real.
"""

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from moecache.backends import cpu, cuda, hip, registry, torch_gpu
from moecache.schemas.device import KNOWN, Device, with_rates
from moecache.schemas.errors import DeviceError, InvalidInput, NoDevice

ROOT = Path(__file__).resolve().parents[1]


class Status(int):
    """A vendor's status code: an integer with a name."""

    name = "someError"


OK, FAILED = Status(0), Status(35)


def run_python(code: str, **env: str) -> Any:
    """What a fresh interpreter leaves in `answer`."""
    program = f"import json, os, sys\n{code}\nprint('ANSWER' + json.dumps(answer))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("ANSWER")[1])


def put_module(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    """`name` and its parents as fresh modules, the last one with these attributes."""
    parts = name.split(".")
    for i in range(len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[: i + 1]), ModuleType(parts[i]))
    for attribute, value in attributes.items():
        setattr(sys.modules[name], attribute, value)


@pytest.fixture
def blind_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that finds no GPU, whatever this machine has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# --- which backend serves this process


def test_importing_the_backends_loads_nothing_heavy() -> None:
    code = """
from moecache.backends import registry, cpu, cuda, hip, torch_gpu
[registry.load(name) for name in registry.BACKENDS]
answer = sorted({"torch", "triton", "cuda", "hip", "rocm"} & set(sys.modules))
"""
    assert run_python(code) == []


def test_bindings_without_a_device_are_one_clear_absence_and_cpu_serves() -> None:
    code = """
from moecache.backends.registry import detect, load
from moecache.schemas.errors import NoDevice
answer = {}
for name in ("cuda", "hip"):
    for method in ("count", "device", "driver"):
        try:
            getattr(load(name), method)()
        except NoDevice as error:
            answer[f"{name}.{method}"] = str(error)
answer["capturing"] = [load(name).capturing() for name in ("cuda", "hip")]
answer["detect"] = detect().name
"""
    answer = run_python(code, CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="", ROCR_VISIBLE_DEVICES="")
    assert answer.pop("capturing") == [False, False]
    assert answer.pop("detect") == "cpu"
    assert len(answer) == 6
    for where, reason in answer.items():
        vendor = "NVIDIA" if where.startswith("cuda") else "AMD"
        assert vendor in reason or "cannot be imported" in reason, (where, reason)


def test_detect_takes_the_first_backend_with_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(self: Any) -> int:
        raise NoDevice("absent")

    monkeypatch.setattr(cuda.CudaBackend, "count", absent)
    monkeypatch.setattr(hip.HipBackend, "count", lambda self: 2)
    assert registry.detect().name == "hip"
    monkeypatch.setattr(hip.HipBackend, "count", lambda self: 0)
    assert registry.detect().name == "cpu"


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(InvalidInput, match="'tpu' does not exist; allowed are cuda, hip, cpu"):
        registry.load("tpu")


# --- absence, vendor by vendor

GPU_BACKENDS = [cuda.CudaBackend, hip.HipBackend]


def put_runtime(monkeypatch: pytest.MonkeyPatch, backend: type, count: Callable[[], Any]) -> None:
    """A binding whose count call is `count`."""
    if backend is cuda.CudaBackend:
        put_module(monkeypatch, "cuda.bindings", runtime=SimpleNamespace(cudaGetDeviceCount=count))
    else:
        put_module(monkeypatch, "hip", hip=SimpleNamespace(hipGetDeviceCount=count))


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_absent_package(backend: type, monkeypatch: pytest.MonkeyPatch, blind_torch: None) -> None:
    for package in ("cuda.bindings", "cuda", "hip", "rocm", "rocm.bindings"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(NoDevice, match=r"-python cannot be imported .*; install moecache\[(cuda|rocm)\]"):
        backend().count()


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_failed_status_is_seen_before_the_value(
    backend: type, monkeypatch: pytest.MonkeyPatch, blind_torch: None
) -> None:
    put_runtime(monkeypatch, backend, lambda: (FAILED, 32729))  # the value is uninitialised memory
    with pytest.raises(NoDevice, match=r"answered someError \(35\)"):
        backend().count()


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("count", [0, None])
def test_no_device_behind_a_success(
    backend: type, count: int | None, monkeypatch: pytest.MonkeyPatch, blind_torch: None
) -> None:
    put_runtime(monkeypatch, backend, lambda: (OK, count))
    with pytest.raises(NoDevice, match="driver shows no device"):
        backend().count()


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("error", [RuntimeError("failed to dlopen"), ValueError("7777 is no status")])
def test_a_raising_binding_is_an_absence(
    backend: type, error: Exception, monkeypatch: pytest.MonkeyPatch, blind_torch: None
) -> None:
    def count() -> Any:
        raise error

    put_runtime(monkeypatch, backend, count)
    with pytest.raises(NoDevice, match=str(error)):
        backend().count()


def test_check_gives_the_value_or_raises() -> None:
    for check in (cuda.check, hip.check):
        assert check((OK, 7)) == 7
        assert check((OK,)) is None
        with pytest.raises(DeviceError, match=r"someError \(35\)"):
            check((FAILED, 7))
        with pytest.raises(DeviceError):
            check((FAILED,))


@pytest.mark.parametrize("name", ["cuda", "hip"])
def test_torch_of_another_build_cannot_use_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = "cuda" if name == "hip" else "hip"
    for build, wanted in ((other, f"is a '{other}' build"), ("cpu", "is a 'cpu' build")):
        monkeypatch.setattr(torch_gpu, "build", lambda build=build: build)
        with pytest.raises(NoDevice, match=wanted):
            torch_gpu.count(name)


def test_build_of_torch(monkeypatch: pytest.MonkeyPatch, blind_torch: None) -> None:
    for versions, wanted in (((None, None), "cpu"), (("13.0", None), "cuda"), ((None, "6.4"), "hip")):
        monkeypatch.setattr(torch.version, "cuda", versions[0])
        monkeypatch.setattr(torch.version, "hip", versions[1])
        assert torch_gpu.build() == wanted
        assert not torch_gpu.sees(wanted)
    with pytest.raises(NoDevice, match="finds none"):
        torch_gpu.count("hip")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(NoDevice, match="torch cannot be imported"):
        torch_gpu.build()


# --- torch in place of a binding


class FakeTorchEvent:
    """torch.cuda.Event with a clock that moves 1.5 ms a reading."""

    now = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeTorchEvent.now += 1.5
        self.at = FakeTorchEvent.now

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        if not hasattr(end, "at"):
            raise ValueError("Both events must be recorded")
        return float(end.at - self.at)


@pytest.mark.parametrize(("name", "fails"), [("cuda", cuda), ("hip", hip)])
def test_torch_stands_in_for_a_failing_binding(name: str, fails: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_runtime() -> Any:
        raise NoDevice("no usable driver")

    asked: list[int] = []

    def get_device_properties(index: int) -> Any:
        asked.append(index)
        if index:
            raise AssertionError("Invalid device id")
        return SimpleNamespace(
            name="NVIDIA H200" if name == "cuda" else "AMD Instinct MI300X",
            gcnArchName="gfx942:sramecc+:xnack-",
            major=9,
            minor=0,
            multi_processor_count=132 if name == "cuda" else 304,
            warp_size=32 if name == "cuda" else 64,
            shared_memory_per_block=49152 if name == "cuda" else 65536,
            shared_memory_per_block_optin=232448 if name == "cuda" else 65536,
            max_threads_per_multi_processor=2048,
            total_memory=(141 if name == "cuda" else 192) << 30,
        )

    monkeypatch.setattr(fails, "load_runtime", load_runtime)
    monkeypatch.setattr(torch_gpu, "build", lambda: name)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", get_device_properties)
    monkeypatch.setattr(torch.cuda, "Event", FakeTorchEvent)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    backend = registry.load(name)
    assert backend.count() == 3
    device = backend.device()
    wanted = ("sm_90", 132, 1, 232448, 64, 4440) if name == "cuda" else ("gfx942", 304, 8, 65536, 32, 5300)
    assert wanted == (
        device.arch,
        device.units,
        device.xcds,
        device.shared_bytes,
        device.waves_per_unit,
        device.bandwidth_gbs,
    )
    with pytest.raises(NoDevice, match="device 1 cannot be read: Invalid device id"):
        backend.device(1)
    assert asked == [0, 1]
    assert "torch" in backend.driver()
    assert backend.capturing() is True
    start, end, never = backend.event(), backend.event(), backend.event()
    start.record(), end.record()
    assert end.done()
    assert start.elapsed_us(end) == 1500.0
    with pytest.raises(DeviceError, match="Both events must be recorded"):
        start.elapsed_us(never)


# --- CUDA through a stand-in for cuda.bindings.runtime


def h200_properties(**changes: Any) -> SimpleNamespace:
    fields: dict[str, Any] = {
        "name": b"NVIDIA H200\0",
        "major": 9,
        "minor": 0,
        "multiProcessorCount": 132,
        "warpSize": 32,
        "sharedMemPerBlockOptin": 232448,
        "maxThreadsPerBlock": 1024,
        "maxThreadsPerMultiProcessor": 2048,
        "l2CacheSize": 60 << 20,
        "totalGlobalMem": 150754820096,
        "memoryBusWidth": 6144,
    }
    return SimpleNamespace(**fields | changes)


def fake_cuda(prop: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(
        cudaGetDeviceProperties=lambda index: (OK, prop) if index == 0 else (Status(101), None),
        cudaDeviceGetAttribute=lambda attribute, index: (OK, {13: 1980000, 36: 3201000}[attribute]),
        cudaDeviceAttr=SimpleNamespace(cudaDevAttrClockRate=13, cudaDevAttrMemoryClockRate=36),
        cudaDriverGetVersion=lambda: (OK, 12080),
    )


def test_cuda_identity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda, "load_runtime", lambda: fake_cuda(h200_properties()))
    backend = cuda.CudaBackend()
    assert backend.device() == KNOWN["h200"].model_copy(
        update={
            "memory_bytes": 150754820096,
            "rates_from": KNOWN["h200"].rates_from + " (NVIDIA H200)",
        }
    )
    with pytest.raises(NoDevice, match=r"CUDA device 4 cannot be read: .*\(101\)"):
        backend.device(4)
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\nGCC 12\n")
    monkeypatch.setattr(cuda, "DRIVER_FILE", version)
    assert backend.driver() == "580.95.05 (CUDA 12.8)"
    monkeypatch.setattr(cuda, "DRIVER_FILE", tmp_path / "absent")
    assert backend.driver() == "NVIDIA (CUDA 12.8)"


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_capture_state(backend: type, monkeypatch: pytest.MonkeyPatch) -> None:
    def implicit() -> bool:
        raise RuntimeError("operation would make the legacy stream depend on a capturing blocking stream")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: pytest.fail("no stream exists yet"))
    assert backend().capturing() is False
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for answer, wanted in ((lambda: False, False), (lambda: True, True), (implicit, True)):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", answer)
        assert backend().capturing() is wanted


# --- rates that no driver reports


def test_rates_of_a_known_product_under_another_name() -> None:
    amd = {"vendor": "amd", "arch": "gfx942", "name": "AMD Radeon Graphics", "units": 304}
    for key in ("mi300x", "mi325x"):  # only the memory tells them apart
        device = with_rates(Device(**amd, memory_bytes=KNOWN[key].memory_bytes - (1 << 30)), bus_gbs=1.0)
        assert device.bandwidth_gbs == KNOWN[key].bandwidth_gbs
        assert device.rates_from == f"table: vendor datasheet ({KNOWN[key].name})"
        assert (device.l2_bytes, device.llc_bytes) == (4 << 20, 256 << 20)
    for clock, key in ((2200, "mi350x"), (2400, "mi355x")):  # only the clock does
        known = KNOWN[key]
        device = Device(**amd | {"arch": "gfx950", "units": 256}, memory_bytes=288 << 30, clock_mhz=clock)
        assert with_rates(device).peak_tflops == known.peak_tflops


@pytest.mark.parametrize(
    ("name", "units", "memory", "bus", "bandwidth", "bf16", "source"),
    [
        ("NVIDIA H200 MIG 1g.18gb", 16, 18, 4915.2, 538.2, 84.1, "its share, 16 of 132"),
        ("NVIDIA H100 PCIe", 114, 80, 2039.0, 2039.0, 587.3, "memory clock and bus width"),
        ("NVIDIA GH200 480GB", 132, 96, 4022.8, 4022.8, 694.0, "memory clock and bus width"),
        ("NVIDIA GH200 480GB", 132, 96, 0.0, 4440.0, 694.0, "its share"),
    ],
)
def test_rates_derived_from_a_relative(
    name: str, units: int, memory: int, bus: float, bandwidth: float, bf16: float, source: str
) -> None:
    device = Device(vendor="nvidia", arch="sm_90", name=name, units=units, memory_bytes=memory << 30, clock_mhz=1980)
    filled = with_rates(device, bus)
    assert filled.bandwidth_gbs == pytest.approx(bandwidth, abs=0.1)
    assert dict(filled.peak_tflops)["bf16"] == pytest.approx(bf16, abs=0.1)
    assert filled.rates_from.startswith("derived: ") and source in filled.rates_from


def test_rates_of_an_unknown_architecture() -> None:
    device = Device(vendor="nvidia", arch="sm_80", name="NVIDIA A100-SXM4-80GB", units=108, clock_mhz=1410)
    filled = with_rates(device, 2039.0)
    assert (filled.bandwidth_gbs, filled.peak_tflops) == (2039.0, ())
    assert filled.rates_from == "derived: memory clock and bus width; dense rates unknown"
    assert with_rates(device).rates_from == "unknown"


# --- HIP: XCDs, both signatures


@pytest.mark.parametrize(
    ("arch", "units", "xcds"),
    [
        ("gfx942", 304, 8),
        ("gfx942", 228, 6),
        ("gfx942", 152, 4),
        ("gfx942", 76, 2),
        ("gfx942", 38, 1),
        ("gfx942", 80, 4),
        ("gfx942", 20, 1),
        ("gfx950", 256, 8),
        ("gfx950", 128, 4),
        ("gfx950", 32, 1),
        ("gfx942", 37, 1),
        ("gfx90a", 104, 1),
    ],
)
def test_xcds_derived_from_the_cu_count(arch: str, units: int, xcds: int) -> None:
    assert hip.xcds_from_units(arch, units) == xcds


def test_both_signatures_of_get_device_properties() -> None:
    fields = dict.fromkeys(hip.OF_TORCH, 0)

    def fill(prop: Any, device: int) -> Any:  # 6.4
        vars(prop).update(fields | {"multiProcessorCount": 300 + device})
        return (OK,)

    def give(device: int) -> Any:  # 10.0
        return OK, SimpleNamespace(**fields | {"multiProcessorCount": 300 + device})

    for function in (fill, give):
        module = SimpleNamespace(
            hipGetDeviceProperties=function, hipDeviceProp_t=SimpleNamespace, hipDeviceAttribute_t=object()
        )
        prop = hip.properties(module, 4)
        assert (prop.multiProcessorCount, prop.xcds) == (304, 0)


def test_cuda_links_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._C import _distributed_c10d as distributed

    backend, found = cuda.CudaBackend(), SimpleNamespace(matrix=[[0, 18], [18, 0], [0, 0]])
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: b == 1)
    assert [backend.link(0, 1), backend.link(0, 2)] == ["peer", "none"], "this torch counts no NVLinks"
    monkeypatch.setattr(distributed, "_detect_dma_connectivity", lambda kind, link: found)
    assert [backend.link(0, 1), backend.link(2, 1)] == ["nvlink18", "pcie"]


# --- HIP through the real hip-python and a stub of its library


@pytest.fixture(scope="module")
def rocm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Runs code in an interpreter whose libamdhip64.so is the stub, with a torch dressed as a ROCm build."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not any(map(importlib.util.find_spec, ("hip", "rocm"))):
        pytest.skip("needs a C compiler and hip-python")
    folder = tmp_path_factory.mktemp("rocm")
    library = folder / "libamdhip64.so"
    source = Path(__file__).with_name("fake_hip.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source], check=True)
    dress = """
import torch
from moecache.backends.registry import detect, load
from moecache.schemas.errors import DeviceError, NoDevice
torch.version.hip, torch.version.cuda = "6.4.43484", None
torch.cuda.is_available = torch.cuda.is_initialized = lambda: True
torch.cuda.device_count = lambda: 1
def reason(call, *args):
    try:
        return call(*args)
    except (NoDevice, DeviceError) as error:
        return f"{type(error).__name__}: {error}"
"""
    path = f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    return lambda code, **env: run_python(dress + code, LD_LIBRARY_PATH=path, **env)


def test_hip_identity_through_the_stub(rocm: Callable[..., Any]) -> None:
    code = """
answer = []
for arch in ("gfx942", "gfx950"):
    os.environ["FAKE_HIP_ARCH"] = arch
    backend = detect()
    device = backend.device()
    answer.append({
        "name": backend.name, "count": backend.count(), "driver": backend.driver(),
        "device": device.model_dump(mode="json"), "absent": reason(backend.device, 7),
    })
"""
    first, second = rocm(code)
    the_stub_is(first, "gfx942", "mi300x", 304, 65536)
    the_stub_is(second, "gfx950", "mi355x", 256, 163840)


def the_stub_is(answer: dict[str, Any], arch: str, key: str, units: int, lds: int) -> None:
    assert (answer["name"], answer["count"]) == ("hip", 1)
    assert answer["driver"].endswith("(HIP 6.4.43483)")
    known, device = KNOWN[key], Device(**answer["device"])
    assert (device.vendor, device.arch, device.name) == ("amd", arch, known.name)
    assert (device.units, device.xcds, device.wave, device.shared_bytes) == (units, 8, 64, lds)
    assert (device.max_threads, device.waves_per_unit) == (1024, 32)
    assert (device.l2_bytes, device.llc_bytes) == (4 << 20, 256 << 20)
    assert device.clock_mhz == known.clock_mhz
    assert device.memory_bytes == pytest.approx(known.memory_bytes, rel=0.01)
    assert (device.bandwidth_gbs, device.peak_tflops) == (known.bandwidth_gbs, known.peak_tflops)
    assert device.rates_from == f"table: vendor datasheet ({known.name})"
    assert "NoDevice: HIP device 7 cannot be read" in answer["absent"]


def test_hip_links_through_the_stub(rocm: Callable[..., Any]) -> None:
    code = """
os.environ["FAKE_HIP_ARCH"], answer = "gfx950", []
torch.cuda.can_device_access_peer = lambda a, b: b == 9
for kind in ("4", "2", "3"):
    os.environ["FAKE_HIP_LINK"] = kind
    answer.append(load("hip").link(0, 1))
answer.append(load("hip").link(0, 9))
"""
    assert rocm(code) == ["xgmi1", "pcie", "none", "peer"]


def test_hip_partitions_and_absences_through_the_stub(rocm: Callable[..., Any]) -> None:
    code = """
os.environ["FAKE_HIP_ARCH"] = "gfx942"
answer = {"parts": {}}
for name, units, xccs in (
    ("AMD Instinct MI300X", "38", "1"), ("AMD Instinct MI300X", "152", "0"),
    ("AMD Instinct MI308X", "80", "0"), ("AMD Instinct MI308X", "80", "4"),
):
    os.environ |= {"FAKE_HIP_NAME": name, "FAKE_HIP_UNITS": units, "FAKE_HIP_XCCS": xccs}
    device = load("hip").device()
    found = [device.units, device.xcds, device.bandwidth_gbs, device.rates_from[:7]]
    answer["parts"][f"{units}/{xccs}"] = found
torch.version.hip = None
answer["cpu torch"] = [reason(load("hip").count), detect().name, load("hip").device().arch]
torch.version.hip = "6.4.43484"
torch.cuda.is_available = lambda: False
answer["blind torch"] = reason(load("hip").count)
os.environ["FAKE_HIP_ARCH"] = "none"
answer["no device"] = reason(load("hip").count)
answer["detect"] = detect().name
"""
    answer = rocm(code)
    share = round(5300 * 38 / 304, 1)
    assert answer["parts"] == {
        "38/1": [38, 1, share, "derived"],
        "152/0": [152, 4, 2650.0, "derived"],
        "80/0": [80, 4, 5324.8, "derived"],
        "80/4": [80, 4, 5324.8, "derived"],
    }
    reason, detected, arch = answer["cpu torch"]
    assert "is a 'cpu' build and cannot run kernels on it" in reason
    assert (detected, arch) == ("cpu", "gfx942")  # the identity can be read all the same
    assert "finds none" in answer["blind torch"]
    assert answer["no device"] == ("NoDevice: no usable AMD driver: the HIP runtime answered hipErrorNoDevice (100)")
    assert answer["detect"] == "cpu"


# --- graphs, with torch.cuda replaced by a recorder


class FakeCuda:
    """torch.cuda's streams and graphs: what is launched inside a capture is not run but kept."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.capture: list[Callable[[], object]] | None = None
        self.broken = False

    def launch(self, work: Callable[[], object]) -> None:
        work() if self.capture is None else self.capture.append(work)

    def synchronise(self) -> None:
        if self.capture is not None:
            self.broken = True
            raise RuntimeError("operation not permitted when stream is capturing")

    def graph(self) -> Any:
        return FakeGraph(self)


class FakeGraph:
    def __init__(self, device: FakeCuda) -> None:
        self.device = device

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        self.device.log.append("begin")
        self.device.capture = []

    def capture_end(self) -> None:
        self.work, self.device.capture = self.device.capture or [], None
        self.device.log.append("end")
        if self.device.broken:
            self.device.broken = False
            raise RuntimeError("operation failed due to a previous error during capture")
        if not self.work:
            warnings.warn("The CUDA Graph is empty.", stacklevel=1)

    def replay(self) -> None:
        for work in self.work:
            work()

    def reset(self) -> None:
        self.device.log.append("reset")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    fake = FakeCuda()
    caller = SimpleNamespace(wait_stream=lambda other: fake.log.append("caller waits"))
    side = SimpleNamespace(wait_stream=lambda other: fake.log.append("side waits"), synchronize=lambda: None)
    replacements = {
        "current_stream": lambda: caller,
        "Stream": lambda: side,
        "stream": lambda entered: warnings.catch_warnings(),  # any context manager
        "CUDAGraph": fake.graph,
        "graph_pool_handle": lambda: (0, 1),
        "current_device": lambda: 0,
    }
    for name, value in replacements.items():
        monkeypatch.setattr(torch.cuda, name, value)
    pool = {"_cuda_endAllocateToPool": "end pool", "_cuda_releasePool": "release pool"}
    for name, entry in pool.items():
        monkeypatch.setattr(torch._C, name, lambda device, pool, entry=entry: fake.log.append(entry), raising=False)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: fake.launch(lambda: None))
    monkeypatch.setattr(torch_gpu.TorchGpu, "capturing", lambda self: fake.capture is not None)
    monkeypatch.setattr(torch_gpu, "_refused", [])
    yield fake
    assert fake.capture is None


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_graph_warms_up_once_and_replays(backend: type, device: FakeCuda) -> None:
    ran: list[int] = []
    replay = backend().graph(lambda: device.launch(lambda: ran.append(1)))
    assert len(ran) == 1 and replay is not None
    replay(), replay()
    assert len(ran) == 3
    assert device.log == ["side waits", "begin", "end", "caller waits"]


def test_graph_keeps_the_call_alive(device: FakeCuda) -> None:
    class Call:
        def __call__(self) -> None:
            device.launch(lambda: None)

    call = Call()
    kept = weakref.ref(call)
    replay = torch_gpu.TorchGpu().graph(call)
    del call
    assert kept() is not None
    del replay
    assert kept() is None


def test_graph_refused_leaves_torch_usable(device: FakeCuda) -> None:
    assert torch_gpu.TorchGpu().graph(device.synchronise) is None
    undone = ["reset", "end pool", "release pool", "begin", "end"]
    assert device.log == ["side waits", "begin", "end", *undone, "caller waits"]
    assert len(torch_gpu._refused) == 1


def test_graph_of_nothing_is_refused(device: FakeCuda) -> None:
    assert torch_gpu.TorchGpu().graph(lambda: None) is None
    assert device.log == ["side waits", "begin", "end", "caller waits"]


def test_graph_raises_what_the_warm_up_raises(device: FakeCuda) -> None:
    with pytest.raises(ZeroDivisionError):
        torch_gpu.TorchGpu().graph(lambda: 1 // 0)
    assert device.log == ["side waits", "caller waits"]


def test_graph_inside_a_capture_is_refused(device: FakeCuda) -> None:
    device.capture = []
    assert torch_gpu.TorchGpu().graph(lambda: pytest.fail("must not run")) is None
    device.capture = None


# --- CPU


def test_cpu_events_measure_a_sleep() -> None:
    backend = cpu.CpuBackend()
    start, end = backend.event(), backend.event()
    with pytest.raises(DeviceError, match="never recorded"):
        start.elapsed_us(end)
    start.record()
    time.sleep(0.02)
    end.record()
    backend.synchronize()
    assert start.done() and end.done()
    assert start.elapsed_us(end) >= 19_900


def test_cpu_device() -> None:
    backend = cpu.CpuBackend()
    device = backend.device()
    assert (backend.name, backend.count(), backend.driver()) == ("cpu", 1, platform.system())
    assert (device.vendor, device.arch) == ("cpu", platform.machine())
    assert device.units == len(os.sched_getaffinity(0))
    assert device.name
    assert device.llc_bytes == 0 or device.llc_bytes >= device.l2_bytes
    assert 0 < device.memory_bytes <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert (device.bandwidth_gbs, device.rates_from) == (0, "unknown")
    assert backend.capturing() is False
    assert backend.graph(lambda: pytest.fail("must not run")) is None
    with pytest.raises(NoDevice, match="CPU device 1 does not exist"):
        backend.device(1)


def test_cpu_facts_from_the_system_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for i, (level, size) in enumerate([("1", "48K"), ("1", "32K"), ("2", "2M"), ("3", "98304K")]):
        folder = tmp_path / "cache" / f"index{i}"
        folder.mkdir(parents=True)
        for name, value in (("level", level), ("size", size)):
            (folder / name).write_text(value + "\n")
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A Fast One\ncpu MHz\t\t: 2599.998\n")
    (tmp_path / "limit").write_text("4194304\n")
    monkeypatch.setattr(cpu, "CACHES", tmp_path / "cache")
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(cpu, "MEMORY_LIMIT", tmp_path / "limit")
    monkeypatch.setattr(cpu, "MAX_CLOCK", tmp_path / "clock")
    device = cpu.CpuBackend().device()
    assert (device.l2_bytes, device.llc_bytes) == (2 << 20, 96 << 20)
    assert (device.name, device.clock_mhz, device.memory_bytes) == ("A Fast One", 2599, 4194304)
    (tmp_path / "clock").write_text("3900000\n")
    assert cpu.clock() == 3900
    for name in ("CACHES", "CPUINFO", "MEMORY_LIMIT", "MAX_CLOCK"):
        monkeypatch.setattr(cpu, name, tmp_path / "absent")
    device = cpu.CpuBackend().device()
    assert (device.l2_bytes, device.llc_bytes, device.clock_mhz) == (0, 0, 0)
    assert device.name and device.memory_bytes > 4194304


# --- on a GPU


@pytest.fixture
def gpu() -> cuda.CudaBackend:
    if torch.version.cuda is None or not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    torch.cuda.synchronize()
    return cuda.CudaBackend()


@pytest.mark.gpu
def test_gpu_identity(gpu: cuda.CudaBackend) -> None:
    device = gpu.device()
    if "H200" not in device.name:
        pytest.skip(f"figures of an H200; this is {device.name}")
    assert registry.detect().name == "cuda"
    assert gpu.count() == torch.cuda.device_count()
    assert (device.vendor, device.arch, device.units, device.xcds) == ("nvidia", "sm_90", 132, 1)
    assert (device.shared_bytes, device.wave, device.max_threads) == (232448, 32, 1024)
    assert device.waves_per_unit == 64
    assert device.l2_bytes == device.llc_bytes >= 50 << 20
    assert device.memory_bytes == torch.cuda.get_device_properties(0).total_memory
    assert 1000 < device.clock_mhz < 2500
    assert (device.bandwidth_gbs, device.rates_from[:8]) == (4440, "measured")
    assert "(CUDA " in gpu.driver()
    by_torch = cuda.describe(torch_gpu.properties(0, cuda.OF_TORCH))
    same = {"arch", "name", "units", "wave", "shared_bytes", "waves_per_unit", "l2_bytes", "memory_bytes"}
    assert by_torch.model_dump(include=same) == device.model_dump(include=same)
    with pytest.raises(NoDevice, match="cannot be read"):
        gpu.device(64)


@pytest.mark.gpu
def test_gpu_events_agree_with_torch(gpu: cuda.CudaBackend) -> None:
    outer = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start, end = gpu.event(), gpu.event()
    outer[0].record()
    start.record()
    torch.cuda._sleep(40_000_000)  # about 20 ms
    end.record()
    outer[1].record()
    assert end.done() is False
    gpu.synchronize()
    assert end.done() is True
    assert start.elapsed_us(end) == pytest.approx(outer[0].elapsed_time(outer[1]) * 1e3, rel=0.01)
    assert start.elapsed_us(end) > 5_000


@pytest.mark.gpu
def test_gpu_events_follow_the_current_stream(gpu: cuda.CudaBackend) -> None:
    side = torch.cuda.Stream()
    here, there = gpu.event(), gpu.event()
    with torch.cuda.stream(side):
        torch.cuda._sleep(400_000_000)  # about 200 ms
        there.record()
    here.record()
    gpu.synchronize()  # the caller's stream, not the side stream
    assert (here.done(), there.done()) == (True, False)
    side.synchronize()
    assert there.done()


@pytest.mark.gpu
def test_gpu_capture_state(gpu: cuda.CudaBackend) -> None:
    x = torch.zeros(8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    assert gpu.capturing() is False
    with torch.cuda.graph(graph):
        inside = gpu.capturing()
        inner = gpu.graph(lambda: x.add_(1))
        x.add_(1)
    assert (inside, inner) == (True, None)
    assert gpu.capturing() is False
    graph.replay()
    assert x.tolist() == [1.0] * 8


@pytest.mark.gpu
def test_gpu_capture_of_another_stream_is_seen_on_the_default_one(gpu: cuda.CudaBackend) -> None:
    """Work there would spoil it, where the other stream waits for the default one; and asking must not."""
    from cuda.bindings import runtime

    x, graph = torch.zeros(8, device="cuda"), torch.cuda.CUDAGraph()
    _, handle = runtime.cudaStreamCreate()  # blocking, unlike torch's own
    with torch.cuda.stream(torch.cuda.ExternalStream(int(handle))):
        x.add_(1)
        torch.cuda.synchronize()
        graph.capture_begin(capture_error_mode="thread_local")
        x.add_(1)
        with torch.cuda.stream(torch.cuda.default_stream()):
            seen = gpu.capturing()
        graph.capture_end()
    assert seen is True and gpu.capturing() is False
    graph.replay()
    torch.cuda.synchronize()
    assert x.tolist() == [2.0] * 8


@pytest.mark.gpu
def test_gpu_graph_replays(gpu: cuda.CudaBackend) -> None:
    x = torch.zeros(8, device="cuda")
    replay = gpu.graph(lambda: x.add_(1))
    assert replay is not None
    assert x.tolist() == [1.0] * 8  # the warm-up; the capture itself runs nothing
    for _ in range(3):
        replay()
    assert x.tolist() == [4.0] * 8
    assert gpu.graph(lambda: None) is None


@pytest.mark.gpu
def test_gpu_refused_graph_leaves_torch_usable(gpu: cuda.CudaBackend) -> None:
    x = torch.ones(8, device="cuda")
    before = torch.cuda.current_stream()
    for _ in range(2):
        assert gpu.graph(lambda: (x * 2).sum().item()) is None  # .item() synchronises: not allowed in a capture
    assert torch.cuda.current_stream() == before
    assert gpu.capturing() is False
    assert 0 <= float(torch.rand(4, device="cuda").max()) < 1  # the generator does not believe in a capture
    held = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    del held
    torch.cuda.empty_cache()
    replay = gpu.graph(lambda: x.mul_(2))
    assert replay is not None
    replay()
    torch.cuda.synchronize()
    assert x.tolist() == [4.0] * 8
