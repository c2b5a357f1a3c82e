"""An interpreted AMD GPU: within `interpreted(arch)` each op's own launch runs unchanged, over CPU tensors.

Triton compiles what the launch asks for, as it would for the GPU; the assembly text then runs on the interpreter. The
binary that Triton makes of the text is not looked at.
"""

import ctypes
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
from interpreting import poison_workspaces
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from cdna import assembly
from cdna.assembly import Kernel
from cdna.library import Launch, Order, Region, Report, library
from moecache.kernels import running
from moecache.schemas.device import by_arch

MOST_STEPS = 400_000_000


@dataclass(frozen=True)
class Mode:
    """How waves run.

    Attributes:
        late: what is loaded or stored lands at the wait that counts it, not at once.
        resident: all workgroups at a time, not one after the other.
        quantum: at most so many instructions in a turn, of waves in random order; 0: each until a barrier, in order.
        seed: of that order.
        most_steps: instructions after which a launch is given up.
    """

    late: bool = False
    resident: bool = False
    quantum: int = 0
    seed: int = 1
    most_steps: int = MOST_STEPS


PLAIN, LATE, MIXED = Mode(), Mode(late=True), Mode(late=True, resident=True, quantum=25, seed=9)
MODES = {"plain": PLAIN, "late": LATE, "mixed": MIXED}


@dataclass(frozen=True)
class Work:
    """A launch: its kernel, grid and waves of a workgroup, LDS bytes, the arguments' values in order, and (address,
    bytes) of the memory behind them."""

    kernel: Kernel
    grid: Sequence[int]
    warps: int
    lds_bytes: int
    values: Sequence[int | float]
    memory: Sequence[tuple[int, int]]


@dataclass
class Log:
    """What is launched within `interpreted`.

    Attributes:
        mode: of the launches to come.
        peers: memory that kernels reach by addresses that they read, as that of other GPUs.
        names, kernels, each: of the launches so far; `each` has the instructions of all waves, 0 within `together`.
        wrong: what went wrong.
        waiting: launches that `together` holds back; None outside of it.
    """

    mode: Mode = PLAIN
    peers: Sequence[torch.Tensor] = ()
    names: list[str] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    each: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    waiting: list[Work] | None = None

    def clear(self) -> None:
        self.names, self.kernels, self.each, self.wrong = [], [], [], []

    @contextmanager
    def together(self) -> Iterator[None]:
        """What the block launches runs at its end, all at a time, as on GPUs that wait for each other."""
        self.waiting = []
        try:
            yield
            _, wrong = run(self.waiting, replace(self.mode, resident=True, quantum=self.mode.quantum or 500))
            self.wrong += [f"{self.names[-1]}: {wrong}"] if wrong else []
        finally:
            self.waiting = None

    def launch(self, work: Work, mode: Mode) -> None:
        self.names.append(work.kernel.name)
        self.kernels.append(work.kernel)
        work = replace(work, memory=[*work.memory, *map(region, self.peers)])
        if self.waiting is not None:
            self.each.append(0)
            self.waiting.append(work)
            return
        steps, wrong = run([work], mode)
        self.each.append(steps)
        self.wrong += [f"{work.kernel.name}: {wrong}"] if wrong else []


def region(tensor: torch.Tensor) -> tuple[int, int]:
    """(address, bytes) of a tensor's memory: of a part of a workspace its own, else the next part would be in reach."""
    if tensor.is_contiguous():
        return tensor.data_ptr(), tensor.nbytes
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def run(works: Sequence[Work], mode: Mode = PLAIN) -> tuple[int, str]:
    """(instructions of all waves, what went wrong) of launches that run together."""
    arguments = [_arguments(work) for work in works]
    regions = [each for work in works for each in work.memory]
    regions += [(ctypes.addressof(own), len(own)) for own in arguments]
    launches = (Launch * len(works))(*map(_described, works, arguments))
    order = Order(works[0].kernel.arch == "gfx950", mode.late, mode.resident, mode.quantum > 0, mode.quantum,
                  mode.seed, mode.most_steps)  # fmt: skip
    report = Report()
    library().run(launches, len(works), ctypes.byref(order), (Region * len(regions))(*regions), len(regions),
                  ctypes.byref(report))  # fmt: skip
    outside = f"{report.outside_lds} accesses outside of LDS" if report.outside_lds else ""
    return report.steps, report.text.decode() + outside


def _arguments(work: Work) -> Any:
    """The bytes that a kernel finds its arguments in."""
    kernel, grid = work.kernel, _three(work.grid)
    found = (ctypes.c_uint8 * kernel.arguments_bytes)()
    hidden = {f"hidden_block_count_{axis}": n for axis, n in zip("xyz", grid, strict=True)}
    hidden |= {"hidden_group_size_x": work.warps * 64, "hidden_group_size_y": 1, "hidden_group_size_z": 1}
    values = iter(work.values)
    for offset, size, kind in kernel.arguments:
        value = hidden.get(kind, 0) if kind.startswith("hidden") else next(values, 0)  # the last ones are Triton's own
        single = isinstance(value, float)
        data = struct.pack("<f", value) if single else value.to_bytes(size, "little", signed=value < 0)
        found[offset : offset + size] = data
    return found


def _three(grid: Sequence[int]) -> list[int]:
    return [*grid, 1, 1][:3]


def _described(work: Work, arguments: Any) -> Launch:
    k = work.kernel
    return Launch(
        ctypes.addressof(k.code), len(k.code), k.registers, (ctypes.c_uint32 * 3)(*_three(work.grid)), work.warps * 64,
        work.lds_bytes, ctypes.addressof(arguments), k.arguments_at, k.preloaded, k.first_word, k.group_at,
        (ctypes.c_uint32 * 3)(*k.group_numbers),
    )  # fmt: skip


@cache
def read(text: str, arch: str) -> Kernel:
    """The kernel in an assembly text, which is read once."""
    return assembly.read(text, arch)


class _Driver:
    """What Triton asks of a GPU's driver before it compiles."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("hip", self.arch, 64)

    def get_current_device(self) -> str:
        return self.arch  # a key: what is compiled for another device stays apart

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def interpreted(arch: str) -> Iterator[Log]:
    """Within the block Triton's launches run on the interpreter, and ops plan them for that GPU.

    New memory is poison: what an earlier launch left there would be right by chance.
    """
    log, compile_only, device = Log(), JITFunction.run, by_arch(arch)

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = compile_only(self, *args, grid=grid, warmup=True, **options)
        mode = log.mode
        if options.get("launch_cooperative_grid"):
            mode = replace(mode, resident=True, quantum=mode.quantum or 500)
        log.launch(_work(self, compiled, args, options, grid, arch), mode)
        return compiled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", launch)
        patch.setattr(driver, "_active", _Driver(arch), raising=False)
        patch.setattr(running, "device_of", lambda out: device)
        poison_workspaces(patch)
        yield log


def _work(fn: Any, compiled: Any, args: Sequence[Any], options: dict[str, Any], grid: Any, arch: str) -> Work:
    """What a launch asks for, of what Triton has compiled for it."""
    bound = dict(zip(fn.arg_names, args, strict=False)) | options
    values, memory = list[int | float](), []
    for name in fn.arg_names:
        kind, value = compiled.src.signature[name], bound.get(name)
        if kind == "constexpr":
            continue
        if isinstance(value, torch.Tensor):
            memory.append(region(value))
            value = value.data_ptr()
        values.append(float(value) if kind == "fp32" else int(value))
    grid = grid(bound) if callable(grid) else grid
    needs = compiled.metadata
    return Work(read(compiled.asm["amdgcn"], arch), grid, needs.num_warps, needs.shared, values, memory)
