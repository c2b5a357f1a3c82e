"""Launches compiled kernels with addresses in the place of tensors: what is left of a launch when all else is known.

`through_driver` packs the parameters once and calls cuLaunchKernelEx. `through_triton` calls the launcher that Triton
made for the kernel, on any vendor. Both give None for kernels that they cannot launch; Triton's JIT does then.
benchmarks/results/h200/host.json says what each costs.
"""

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from moecache.kernels.launch import Box, Launch, Operand

Direct = Callable[[Sequence[int]], None]  # launches, given where each tensor starts
CELLS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "fp32": "f", "fp64": "d"}  # as struct packs them
CELLS |= {"u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q"}
TMA_TYPES = {1: 0, "fp16": 6, "fp32": 7, "bf16": 9}  # of CUtensorMapDataType; single bytes are uint8
TMA_BYTES, MAPS = 128, 4096  # of a tensor map; how many of one descriptor are kept
PDL, COOPERATIVE = 6, 2  # of CUlaunchAttributeID


# --- Triton's launcher ---


def through_triton(
    launches: Sequence[Launch], kernels: Sequence[Any], order: Sequence[str], device: int
) -> Direct | None:
    """Call each kernel's own launcher. `order` names the tensors whose addresses a call is given."""
    if any(not hasattr(kernel, "packed_metadata") for kernel in kernels):
        return None
    if any(isinstance(value, Box) for launch in launches for value in launch.args):
        return None
    stream_of = torch._C._cuda_getCurrentRawStream
    steps = [_step(launch, kernel, order) for launch, kernel in zip(launches, kernels, strict=True)]

    def run(starts: Sequence[int]) -> None:
        stream = stream_of(device)
        for call, grid, function, packed, args in steps:
            at = [starts[a] + b if pointer else b for pointer, a, b in args]
            call(*grid, stream, function, packed, None, None, None, *at)

    return run


def _step(launch: Launch, kernel: Any, order: Sequence[str]) -> tuple[Any, ...]:
    """(launcher, grid, function, metadata, by parameter (is an address, its tensor's number, offset or value))."""
    values, args = launch.constexprs | launch.named, []
    for name in launch.fn.arg_names:
        value = values[name]
        pointer = isinstance(value, Operand)
        args.append((pointer, order.index(value.name) if pointer else 0, value.offset if pointer else value))
    return kernel.run, (*launch.grid, 1, 1)[:3], kernel.function, kernel.packed_metadata, args


# --- the driver ---


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class _Config(ctypes.Structure):
    _fields_ = [(f"{kind}{axis}", ctypes.c_uint) for kind in ("grid", "block") for axis in "xyz"]
    _fields_ += [("shared", ctypes.c_uint), ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p)]
    _fields_ += [("count", ctypes.c_uint)]


@cache
def _driver() -> Any:
    """libcuda with the types of what is called here; None where it has not all of it."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        cuda.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
        cuda.cuFuncGetParamInfo.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p]
        matrix = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, *[ctypes.c_void_p] * 5]
        cuda.cuTensorMapEncodeTiled.argtypes = [*matrix, *[ctypes.c_int] * 4]
        return cuda
    except (OSError, AttributeError):
        return None


def _raise(code: int) -> None:
    text = ctypes.c_char_p()
    _driver().cuGetErrorString(code, ctypes.byref(text))
    raise RuntimeError(f"CUDA error {code}: {(text.value or b'unknown').decode()}")


def through_driver(
    launches: Sequence[Launch], kernels: Sequence[Any], order: Sequence[str], device: int
) -> Direct | None:
    """Call cuLaunchKernelEx with parameters that are packed once, but for addresses.

    What a compiled kernel takes is no public contract of Triton. So what is packed is compared with the sizes of the
    parameters that the driver knows of; where they differ, Triton's own launcher is called.
    """
    if any(not hasattr(kernel, "packed_metadata") for kernel in kernels):
        return None
    if _driver() is None:
        return through_triton(launches, kernels, order, device)
    forms = [_Form.of(launch, kernel, order) for launch, kernel in zip(launches, kernels, strict=True)]
    known = [form for form in forms if form is not None]
    if len(known) < len(forms):
        return through_triton(launches, kernels, order, device)
    return _Driven(known, device)


class _Form:
    """The parameters of one kernel as bytes."""

    def __init__(self, launch: Launch, kernel: Any) -> None:
        self.function = kernel.function
        self.grid, self.threads = (*launch.grid, 1, 1)[:3], 32 * kernel.metadata.num_warps
        self.shared = kernel.metadata.shared
        self.cells: list[tuple[str, Any]] = []  # (format, value), ("P", (tensor, offset)) or ("T", Map)
        self.attributes = [(PDL, 1)] * bool(getattr(kernel.metadata, "launch_pdl", False))
        self.attributes += [(COOPERATIVE, 1)] * bool(getattr(kernel.metadata, "launch_cooperative_grid", False))

    @classmethod
    def of(cls, launch: Launch, kernel: Any, order: Sequence[str]) -> "_Form | None":
        meta = kernel.metadata
        if getattr(meta, "num_ctas", 1) != 1 or meta.global_scratch_size or getattr(meta, "profile_scratch_size", 0):
            return None
        form, kinds = cls(launch, kernel), list(kernel.src.signature.values())
        described = iter(getattr(meta, "tensordesc_meta", None) or ())
        values = launch.named
        for name, kind in zip(launch.fn.arg_names, kinds, strict=True):
            if kind == "constexpr":  # a 1 may have become one
                continue
            value = values[name]
            if isinstance(value, Box):
                found = next(described, None)
                if found is None:
                    return None
                form.cells.append(("T", _Map(value, found, order.index(value.of.name))))
                form.cells += [("i", size) for size in value.shape] + [("q", step) for step in value.strides]
            elif isinstance(value, Operand):
                form.cells.append(("P", (order.index(value.name), value.offset)))
            elif kind in CELLS:
                form.cells.append((CELLS[kind], value))
            else:
                return None
        form.cells += [("Q", 0), ("Q", 0)]  # scratch memory of the kernel and of a profiler: none
        sizes = [TMA_BYTES if cell == "T" else struct.calcsize("Q" if cell == "P" else cell) for cell, _ in form.cells]
        return form if sizes == _sizes(kernel.function) else None


def _sizes(function: int) -> list[int]:
    """Bytes of each parameter of a loaded kernel."""
    offset, size, found = ctypes.c_size_t(), ctypes.c_size_t(), list[int]()
    while not _driver().cuFuncGetParamInfo(function, len(found), ctypes.byref(offset), ctypes.byref(size)):
        found.append(size.value)
    return found


class _Map:
    """Tensor maps of one descriptor, by the address that they begin at."""

    def __init__(self, box: Box, meta: dict[str, Any], tensor: int) -> None:
        self.box, self.tensor, self.offset = box, tensor, box.of.offset
        self.block, self.swizzle = meta["block_size"], meta["swizzle"]
        self.made: dict[int, tuple[int, Any]] = {}

    def at(self, address: int) -> int:
        """Where the map for a matrix at that address lies. It says nothing but address, shape and strides, so it is as
        good for other weights there."""
        made = self.made.get(address)
        if made is None:
            if len(self.made) >= MAPS:
                self.made.clear()
            made = self.made[address] = self._encode(address)
        return made[0]

    def _encode(self, address: int) -> tuple[int, Any]:
        box, rank, size = self.box, len(self.box.shape), self.box.of.size
        memory = ctypes.create_string_buffer(TMA_BYTES + 64)
        start = -(-ctypes.addressof(memory) // 64) * 64
        shape = (ctypes.c_uint64 * rank)(*reversed(box.shape))
        steps = (ctypes.c_uint64 * rank)(*(size * step for step in reversed(box.strides[:-1])))
        block = (ctypes.c_uint32 * rank)(*reversed(self.block))
        ones = (ctypes.c_uint32 * rank)(*[1] * rank)
        kind = TMA_TYPES[1 if size == 1 else box.of.dtype]
        promotion = 2  # to 128 bytes in the second-level cache, as Triton's own maps
        sizes = [ctypes.addressof(each) for each in (shape, steps, block, ones)]
        options = 0, self.swizzle, promotion, 0  # not interleaved; what lies outside is 0
        code = _driver().cuTensorMapEncodeTiled(start, kind, rank, address, *sizes, *options)
        if code:
            _raise(code)
        return start, memory


class _Driven:
    """Kernels with their packed parameters, in launch order."""

    def __init__(self, forms: Sequence[_Form], device: int) -> None:
        self._forms, self._device = forms, device
        places = {at: None for form in forms for cell, at in form.cells if cell == "P"}
        self._places = list(places)  # (tensor, offset): each is packed once, whoever reads it
        self._pack = struct.Struct(f"{len(places)}Q").pack_into
        self._free: dict[int, list[_Table]] = {}
        self._launch, self._stream_of = _driver().cuLaunchKernelEx, torch._C._cuda_getCurrentRawStream

    def __call__(self, starts: Sequence[int]) -> None:
        stream = self._stream_of(self._device)
        free = self._free.get(stream)
        if free is None:
            free = self._free[stream] = []
        try:
            table = free.pop()  # no two threads share one
        except IndexError:
            table = _Table(self._forms, self._places, stream)
        self._pack(table.memory, 0, *[starts[tensor] + offset for tensor, offset in self._places])
        for parameters, index, of in table.maps:
            parameters[index] = of.at(starts[of.tensor] + of.offset)
        launch = self._launch
        for config, function, parameters in table.launches:
            if code := launch(config, function, parameters, None):
                _raise(code)
        free.append(table)


class _Table:
    """Memory that the driver reads parameters from, for one launch at a time on one stream."""

    def __init__(self, forms: Sequence[_Form], places: Sequence[tuple[int, int]], stream: int) -> None:
        self.memory = ctypes.create_string_buffer(8 * (len(places) + sum(len(form.cells) for form in forms)))
        self.maps: list[tuple[Any, int, _Map]] = []
        self.launches: list[tuple[int, int, int]] = []
        self._kept: list[Any] = []  # what addresses point into
        start, at = ctypes.addressof(self.memory), 8 * len(places)
        for form in forms:
            parameters = (ctypes.c_void_p * len(form.cells))()
            for index, (cell, value) in enumerate(form.cells):
                if cell == "T":
                    self.maps.append((parameters, index, value))
                elif cell == "P":
                    parameters[index] = start + 8 * places.index(value)
                else:
                    struct.pack_into(cell, self.memory, at, value)
                    parameters[index] = start + at
                    at += 8
            attributes = (_Attribute * max(1, len(form.attributes)))()
            for i, (number, value) in enumerate(form.attributes):
                attributes[i].id, attributes[i].value[0] = number, value
            many = ctypes.addressof(attributes), len(form.attributes)
            config = _Config(*form.grid, form.threads, 1, 1, form.shared, stream, *many)
            self._kept += [parameters, attributes, config]
            self.launches.append((ctypes.addressof(config), form.function, ctypes.addressof(parameters)))
