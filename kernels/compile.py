"""Compiles a Source for a named device, present or not, and reads what its machine code needs. Imports no torch: a
process that only compiles starts in a tenth of the time."""

import contextlib
import hashlib
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from moecache.kernels.contract import Source
from moecache.schemas.device import Device
from moecache.schemas.errors import InvalidInput


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs. Registers are 32 bits wide and counted per thread."""

    name: str
    arch: str
    registers: int  # on AMD the accumulation registers are part of it
    agprs: int  # accumulation registers; 0 on NVIDIA
    spills: int  # registers kept in memory; on NVIDIA the words of the stack, which Triton uses for nothing else
    scratch_bytes: int  # private memory per thread
    shared_bytes: int  # shared memory or LDS per block, as Triton asks for it at launch
    threads: int  # of one block
    key: str  # name of the entry in Triton's disk cache
    text: str = field(default="", repr=False)  # assembly: amdgcn or PTX


def target(device: Device) -> Any:
    """The GPUTarget of a device.

    Raises:
        InvalidInput: Triton has no target for it.
    """
    from triton.backends.compiler import GPUTarget

    if device.vendor == "amd" and device.arch.startswith("gfx"):
        return GPUTarget("hip", device.arch, device.wave)
    if device.vendor == "nvidia" and device.arch.removeprefix("sm_").isdigit():
        return GPUTarget("cuda", int(device.arch.removeprefix("sm_")), 32)
    raise InvalidInput(
        f"arch {device.arch!r} of vendor {device.vendor!r} is no Triton target; allowed are sm_NN and gfxNNN"
    )


def compile_source(source: Source, device: Device) -> Resources:
    """Compile for the device's architecture, or read the result from Triton's disk cache; with all its figures.

    A launch on that device with the same argument types, alignments and options finds the entry that this
    leaves there. An internal error of LLVM ends the process: moecache.tuning.compiling compiles what is untried.

    Raises:
        InvalidInput: an option, parameter or architecture that Triton does not know.
        Exception: whatever Triton or ptxas raises for a kernel that does not compile.
    """
    kernel, found = _compiled(source, device)
    text = kernel.asm["amdgcn" if device.vendor == "amd" else "ptx"]
    used = read_amdgcn(text) if device.vendor == "amd" else read_cubin(kernel.asm["cubin"])
    return replace(found, **used, text=text)


def prepare_launch(source: Source, device: Device) -> str:
    """Leave in Triton's disk cache all that a first launch would compile; why the device cannot run it, or ''.

    Raises as `compile_source` does.
    """
    kernel, found = _compiled(source, device)
    if why := why_unfit(found, device, spills=None):
        return why
    if device.vendor == "nvidia":
        from triton.backends.nvidia import driver

        if hasattr(driver, "make_launcher"):  # before Triton 3.7: C, compiled for every signature
            with contextlib.suppress(Exception):  # no libcuda or no compiler: the launch says so
                driver.CudaLauncher(kernel.src, kernel.metadata)
    return ""


def is_compiled(source: Source, device: Device) -> bool:
    """Whether Triton's disk cache holds the kernel; also where this Triton keeps it in another way."""
    from triton.compiler import compiler

    try:
        ast, where, given = asked(source, device)
        backend = compiler.make_backend(where)
        options = backend.parse_options(given | ast.parse_options())
        key = compiler.get_cache_key(ast, backend, options, env_vars=compiler.get_cache_invalidating_env_vars())
        kept = compiler.get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
        return f"{ast.name[:150]}.json" in (kept.get_group(f"{ast.name[:150]}.json") or {})
    except Exception:
        return True


def hash_triton() -> None:
    """Have Triton hash itself, which it does once a process, for a third of a second."""
    with contextlib.suppress(Exception):
        from triton.runtime.cache import triton_key

        triton_key()


def hash_kernels(fn: Any) -> None:
    """Have Triton hash the kernels of a function's module, and what they import of ours, in the order of their
    definition.

    Triton 3.6 keys a function by the constants of what it calls only where that was hashed before: a process that met
    the kernels in another order would not find what this one has compiled.
    """
    _hash_module(getattr(fn, "__module__", ""))


@cache
def _hash_module(name: str) -> None:
    for value in list(vars(sys.modules[name]).values()) if name in sys.modules else ():
        if hasattr(value, "cache_key") and hasattr(value, "fn"):
            if value.fn.__module__ == name:
                value.cache_key  # noqa: B018 - computed at its first reading
            elif value.fn.__module__.startswith("moecache."):
                _hash_module(value.fn.__module__)


def prepare_driver(device: Device) -> None:
    """Have Triton compile what it calls the driver with, which takes a second where its disk cache is empty."""
    if device.vendor == "nvidia":
        with contextlib.suppress(Exception):
            from triton.backends.nvidia.driver import CudaUtils

            CudaUtils()


def _compiled(source: Source, device: Device) -> tuple[Any, Resources]:
    """Triton's kernel, and its resources without registers and text."""
    from triton.compiler import compile

    ast, where, options = asked(source, device)
    kernel = compile(ast, target=where, options=options)
    meta = kernel.metadata
    unknown = dict.fromkeys(("registers", "agprs", "spills", "scratch_bytes"), 0)
    threads = meta.num_warps * where.warp_size
    return kernel, Resources(
        meta.name, device.arch, shared_bytes=meta.shared, threads=threads, key=kernel.hash, **unknown
    )


def asked(source: Source, device: Device) -> tuple[Any, Any, dict[str, Any]]:
    """(source, target, options) as Triton's compiler takes them."""
    where = target(device)
    options = _options(source, where)
    hash_kernels(source.fn)
    return (
        _ast(source.fn)(source.fn, _signature(source), source.constexprs, _attributes(source, where)),
        where,
        options,
    )


def _ast(fn: Any) -> Any:
    """The class of source that a jit function is: Triton's, or Gluon's."""
    from triton.compiler import ASTSource

    if getattr(fn, "is_gluon", lambda: False)():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource
    return ASTSource


def why_unfit(resources: Resources, device: Device, *, spills: int | None = 0) -> str:
    """Why this kernel cannot run on the device, or would spill registers to memory; '' when neither.

    Triton checks none of this when it compiles. `spills` is the number of spilled registers that is still
    accepted; None accepts any, for they only cost time.
    """
    r = resources
    if device.shared_bytes and r.shared_bytes > device.shared_bytes:
        return f"{r.name} needs {r.shared_bytes} B of shared memory, {device.arch} has {device.shared_bytes} B"
    if r.threads > device.max_threads:
        return f"{r.name} needs {r.threads} threads, {device.arch} allows {device.max_threads} per block"
    if spills is not None and (r.spills > spills or r.scratch_bytes > 4 * spills):
        return f"{r.name} spills {r.spills} registers ({r.scratch_bytes} B of scratch), allowed are {spills}"
    return ""


def read_amdgcn(text: str) -> dict[str, int]:
    """Register figures from the metadata of an amdgcn assembly text; the largest of several kernels."""

    def figure(name: str) -> int:
        found = re.findall(rf"^\s*-?\s*\.{name}:\s*(\d+)", text, re.MULTILINE)
        if not found:
            raise RuntimeError(f"the amdgcn text has no .{name}")
        return max(map(int, found))

    return {
        "registers": figure("vgpr_count"),
        "agprs": figure("agpr_count"),
        "spills": figure("vgpr_spill_count"),
        "scratch_bytes": figure("private_segment_fixed_size"),
    }


def read_cubin(cubin: bytes) -> dict[str, int]:
    """Register figures of a cubin, read with the cuobjdump that Triton brings."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
        text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if not found:
        raise RuntimeError(f"cuobjdump reported no registers: {text[:200]!r}")
    registers, stack, local = (max(column) for column in zip(*[map(int, row) for row in found], strict=True))
    return {
        "registers": registers,
        "agprs": 0,
        "spills": (stack + local) // 4,
        "scratch_bytes": stack + local,
    }


def _signature(source: Source) -> dict[str, str]:
    """Types in the order of the kernel's parameters.

    Raises:
        InvalidInput: parameters missing or unknown, or a constexpr without a value.
    """
    names = getattr(source.fn, "arg_names", None)
    if names is None:
        raise InvalidInput(f"{source.fn!r} is no triton.jit function; compiling wants one, and TRITON_INTERPRET unset")
    if set(names) != set(source.signature):
        wrong = sorted(set(names) ^ set(source.signature))
        raise InvalidInput(f"signature of {source.fn.__name__} must name exactly {names}; missing or unknown: {wrong}")
    constexprs = {name for name, kind in source.signature.items() if kind == "constexpr"}
    if constexprs != set(source.constexprs):
        wrong = sorted(constexprs ^ set(source.constexprs))
        raise InvalidInput(f"constexprs of {source.fn.__name__} must have values, and only they; wrong are {wrong}")
    return {name: source.signature[name] for name in names}


def _attributes(source: Source, where: Any) -> dict[tuple[int], list[list[Any]]]:
    """What Triton's JIT derives from the arguments, entry for entry: the disk cache's key holds it as text.

    Integers and pointers have an entry, empty when nothing is known of them; floats, descriptors and
    parameters marked do_not_specialize have none. Constexprs have an empty one; before Triton 3.7 only text
    had, and was read for letters.
    """
    from triton import __version__, knobs
    from triton.compiler import make_backend

    parse = make_backend(where).parse_attr
    old = tuple(map(int, __version__.split(".")[:2])) < (3, 7)
    small = where.backend == "hip" and knobs.amd.use_buffer_ops
    known: dict[tuple[int], list[list[Any]]] = {}
    for i, param in enumerate(source.fn.params):
        kind = source.signature[param.name]
        pointer = kind.startswith("*")
        if kind == "constexpr":
            letters = source.constexprs[param.name] if old else ""
        elif param.do_not_specialize or not (pointer or re.fullmatch(r"[iu](8|16|32|64)", kind)):
            letters = None
        else:
            aligned = param.name in source.aligned and not param.do_not_specialize_on_alignment
            letters = "D" * aligned + "S" * (pointer and small and param.name not in source.large)
        if isinstance(letters, str):
            known[(i,)] = parse(letters)
    return known


def _options(source: Source, where: Any) -> dict[str, Any]:
    """The options as a launch hands them to the compiler.

    Raises:
        InvalidInput: an option that Triton does not know; it would be dropped in silence.
    """
    from triton import knobs
    from triton.compiler import make_backend

    options = dict(source.options)
    options["debug"] = bool(options.get("debug", source.fn.debug) or knobs.runtime.debug)
    for name in (
        "instrumentation_mode",
        "fpsan_homomorphic_casts",
    ):  # the JIT adds those that its version has
        if hasattr(knobs.compilation, name):
            options[name] = getattr(knobs.compilation, name)
    parsed = dict(make_backend(where).parse_options(options).__dict__)
    unknown = sorted(set(source.options) - set(parsed))
    if unknown:
        raise InvalidInput(
            f"options {unknown} are unknown to Triton for {where.arch}; it knows {', '.join(sorted(parsed))}"
        )
    return parsed
