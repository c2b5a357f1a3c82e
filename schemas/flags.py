"""Variables that change how code runs, and versions of packages. With these, one machine has several environments."""

import importlib.metadata
from collections.abc import Mapping
from functools import cache

# Each variable that changes how kernels are compiled or run, with its default; '' if any value changes something. Paths
# of tools and libraries are not here: containers set them, and they say nothing about speed.
_DEFAULTS = """
TRITON_INTERPRET=0 TRITON_DEBUG=0 TRITON_ENABLE_ASAN=0 TRITON_INSTRUMENTATION_MODE= TRITON_KERNEL_OVERRIDE=0
TRITON_OVERRIDE_ARCH= TRITON_DEFAULT_FP_FUSION=1 TRITON_FORCE_DISABLE_FP_FUSION=0 TRITON_F32_DEFAULT=
DISABLE_PTXAS_OPT=0 PTXAS_OPTIONS= DISABLE_LLVM_OPT=0 AMDGCN_USE_BUFFER_OPS=1 AMDGCN_USE_BUFFER_ATOMICS=1
AMDGCN_ANALYZE_SMALL_TENSOR_RANGE=0 AMDGCN_SCALARIZE_PACKED_FOPS=0 TRITON_HIP_USE_BLOCK_PINGPONG=
TRITON_HIP_USE_IN_THREAD_TRANSPOSE= TRITON_HIP_USE_ASYNC_COPY= CUDA_LAUNCH_BLOCKING=0 AMD_SERIALIZE_KERNEL=0
HIP_LAUNCH_BLOCKING=0 NVIDIA_TF32_OVERRIDE= TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0
"""
FLAGS = {name: default for name, _, default in (each.partition("=") for each in _DEFAULTS.split())}
_TRUE, _FALSE = ("1", "true", "yes", "on", "y"), ("0", "false", "no", "off", "n")


def flags_from(environ: Mapping[str, str]) -> str:
    """The FLAGS that do not have their defaults, as `TRITON_INTERPRET=1`, sorted by name; '' for none."""
    given = {name: _plain(environ.get(name, "")) for name in FLAGS}
    return " ".join(f"{name}={given[name]}" for name in sorted(given) if given[name] not in ("", FLAGS[name]))


@cache
def installed(package: str) -> str:
    """The version of a package; '' if it is not installed. Reads metadata, as importing Triton takes half a second."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _plain(text: str) -> str:
    text = " ".join(text.split())
    return "1" if text.lower() in _TRUE else "0" if text.lower() in _FALSE else text
