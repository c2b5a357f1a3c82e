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

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from cdna import assembly
from cdna.assembly import Kernel
from cdna.library import Launch, Region, Report, library
from moecache.kernels import moe_chain, sort_space
from moecache.kernels.op import poison
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
    """

    late: bool = False
    resident: bool = False
    quantum: int = 0
    seed: int = 1
    most_steps: int = MOST_STEPS


PLAIN, LATE, MIXED = Mode(), Mode(late=True), Mode(late=True, resident=True, quantum=25, seed=9)
MODES = {"plain": PLAIN, "late": LATE, "mixed": MIXED}


@dataclass(frozen=True)
class Ran:
    """One launch: its kernel, Triton's hash of it, the instructions of all waves, and what went wrong."""

    kernel: Kernel
    hash: str
    steps: int
    wrong: str = ""

    @property
    def name(self) -> str:
        return self.kernel.name


@dataclass
class Log:
    """The launches within `interpreted`, the last at the end."""

    mode: Mode = PLAIN
    launches: list[Ran] = field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        return [f"{ran.name}: {ran.wrong}" for ran in self.launches if ran.wrong]

    @property
    def names(self) -> list[str]:
        return [ran.name for ran in self.launches]


def run(
    kernel: Kernel, grid: Sequence[int], warps: int, lds_bytes: int, values: Sequence[Any],
    memory: Sequence[tuple[int, int]], mode: Mode = PLAIN,
) -> tuple[int, str]:  # fmt: skip
    """(instructions of all waves, what went wrong) of one launch.

    Args:
        values: of the kernel's arguments in order: int for integers and addresses, float for float32.
        memory: (address, bytes) of all that it may touch.
    """
    grid = [*grid, 1, 1][:3]
    arguments = (ctypes.c_uint8 * (kernel.arguments_bytes + 64))()
    at = ctypes.addressof(arguments)
    hidden = {f"hidden_block_count_{axis}": n for axis, n in zip("xyz", grid, strict=True)}
    hidden |= {"hidden_group_size_x": warps * 64, "hidden_group_size_y": 1, "hidden_group_size_z": 1}
    given = iter(values)
    for offset, size, kind in kernel.arguments:
        value = hidden.get(kind, 0) if kind.startswith("hidden") else next(given, 0)  # two last ones are Triton's own
        data = (
            struct.pack("<f", value) if isinstance(value, float) else value.to_bytes(size, "little", signed=value < 0)
        )
        ctypes.memmove(at + offset, data, size)
    regions = [*memory, (at, kernel.arguments_bytes)]
    how = Launch(
        (ctypes.c_uint32 * 3)(*grid), warps * 64, lds_bytes, at, kernel.arguments_at, kernel.preloaded,
        kernel.first_word, kernel.group_at, (ctypes.c_uint32 * 3)(*kernel.group_numbers), kernel.arch == "gfx950",
        mode.late, mode.resident, mode.quantum > 0, mode.quantum, mode.seed, mode.most_steps,
    )  # fmt: skip
    report = Report()
    library().run(kernel.code, len(kernel.code), ctypes.byref(how), (Region * len(regions))(*regions), len(regions),
                  ctypes.byref(report))  # fmt: skip
    outside = f"{report.outside_lds} accesses outside of LDS" if report.outside_lds else ""
    return report.steps, report.text.decode() + outside


def region(tensor: torch.Tensor) -> tuple[int, int]:
    """(address, bytes) of a tensor's memory."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


@cache
def _kernel(text: str, arch: str) -> Kernel:
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
    """Within the block Triton's launches run on the interpreter, and rows are sorted as on that GPU.

    New memory is poison: what an earlier launch left there would be right by chance.
    """
    log, compile_only, before, empty = Log(), JITFunction.run, driver._active, torch.empty
    device = by_arch(arch)

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = compile_only(self, *args, grid=grid, warmup=True, **options)
        log.launches.append(_launched(self, compiled, args, options, grid, log.mode, arch))
        return compiled

    def sorting(tokens: int, topk: int, experts: int, block: int, mapped: bool, index: int, pdl: bool) -> Any:
        return sort_space.of_layer(device, tokens, topk, experts, block, mapped=mapped, early=pdl)[1]

    def poisoned(*args: Any, **options: Any) -> torch.Tensor:
        return poison(empty(*args, **options))

    kept = moe_chain._sort_config
    JITFunction.run, driver._active, moe_chain._sort_config, torch.empty = launch, _Driver(arch), sorting, poisoned
    try:
        yield log
    finally:
        JITFunction.run, driver._active, moe_chain._sort_config, torch.empty = compile_only, before, kept, empty


def _launched(
    fn: Any, compiled: Any, args: tuple[Any, ...], options: dict[str, Any], grid: Any, mode: Mode, arch: str
) -> Ran:
    """Run what Triton has compiled for a launch."""
    kernel = _kernel(compiled.asm["amdgcn"], arch)
    bound = dict(zip(fn.arg_names, args, strict=False)) | options
    values: list[Any] = []
    memory = []
    for name in fn.arg_names:
        kind, value = compiled.src.signature[name], bound.get(name)
        if kind == "constexpr":
            continue
        if isinstance(value, torch.Tensor):
            memory.append(region(value))
            value = value.data_ptr()
        values.append(float(value) if kind == "fp32" else int(value))
    if options.get("launch_cooperative_grid"):
        mode = replace(mode, resident=True, quantum=mode.quantum or 500)
    steps, wrong = run(
        kernel,
        grid(bound) if callable(grid) else grid,
        compiled.metadata.num_warps,
        compiled.metadata.shared,
        values,
        memory,
        mode,
    )
    return Ran(kernel, compiled.hash, steps, wrong)
