"""What the matrix ops share: dtypes by name, alignment of rows, random operands, errors, and what a CPU can do."""

from functools import lru_cache

import torch

from moecache.kernels.own_mode import own_mode
from moecache.schemas.config import Config
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import Problem

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
NAMES = {  # as Triton writes them
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64", torch.int32: "i32",
    torch.int64: "i64", torch.int8: "i8", torch.uint8: "u8", torch.int16: "i16", torch.bool: "i1",
    torch.float8_e4m3fn: "fp8e4nv", torch.float8_e4m3fnuz: "fp8e4b8", torch.float8_e5m2: "fp8e5",
}  # fmt: skip
OF_NAME = {name: dtype for dtype, name in NAMES.items()}
MAX_EXPERTS, MAX_TOPK = 1024, 32  # of a call
ID_DTYPES = (torch.int32, torch.int64)
MATH = ("native", "float32")  # in which `by_expert` multiplies on a CPU
TOLERANCE = {"bf16": 1e-2, "fp16": 1e-2, "fp32": 1e-4}  # relative Frobenius error that still counts as right

# What `warm` tunes on a CPU, at most: beyond, one problem would take minutes and gigabytes.
CPU_BYTES, CPU_FLOPS = 256 << 20, 2e9
TOO_MUCH = "more than 256 MB of weights or 2 GFLOP a call would take a CPU minutes each"


def until_summed(dtype: torch.dtype) -> torch.dtype:
    """What the rows of a product have until they are biased, weighed and summed: in float16 one of them may be inf of a
    result that fits. bfloat16 reaches as far as float32."""
    return torch.float32 if dtype == torch.float16 else dtype


def until_summed_name(dtype: str) -> str:
    """The same of dtypes by name."""
    return "fp32" if dtype == "fp16" else dtype


def math_of(config: Config, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which `by_expert` multiplies."""
    return torch.float32 if config["math"] == "float32" else until_summed(dtype)


def unfit_math(problem: Problem, config: Config) -> str:
    """Why `by_expert` does not multiply so, or ''."""
    if (math := config["math"]) not in MATH:
        return f"math={math}; allowed are {', '.join(MATH)}"
    anyway = math == "float32" and problem.dtype != "bf16"
    return f"math=float32 is what {problem.dtype} has anyway" if anyway else ""


def check_map(mapping: torch.Tensor, experts: int, device: torch.device) -> None:
    """Raise InvalidInput for an expert_map of another shape, dtype or device."""
    if mapping.shape != (experts,) or mapping.dtype not in ID_DTYPES or mapping.device != device:
        given = f"expert_map is {mapping.dtype} {list(mapping.shape)} on {mapping.device}"
        raise InvalidInput(f"{given}; allowed is int32 or int64 [{experts}] on {device}")


def steps(tensor: torch.Tensor) -> tuple[int, ...]:
    """Its strides. A dimension of one index has that of a contiguous tensor: nothing is read by it, and torch says
    contiguous whatever it is."""
    found, inner = list[int](), 1
    for size, step in zip(tensor.shape[::-1], tensor.stride()[::-1], strict=True):
        found.insert(0, inner if size == 1 else step)
        inner = size * found[0]
    return tuple(found)


def unaligned(*tensors: torch.Tensor) -> bool:
    """Whether a row of one of them does not start on 16 bytes, its elements are not side by side, or its matrices are
    not a whole number of rows apart."""
    for tensor in tensors:
        *outer, last = steps(tensor)
        if last != 1 or (len(outer) == 2 and (outer[1] == 0 or outer[0] % outer[1])):
            return True
        bits, size = tensor.data_ptr(), tensor.itemsize
        for stride in outer:
            bits |= stride * size
        if bits & 15:
            return True
    return False


def unaligned_sizes(columns: int, dtype: torch.dtype) -> bool:
    """Whether rows of that many elements, one after the other, do not all start on 16 bytes."""
    return columns * dtype.itemsize % 16 != 0


def gap(problem: Problem, *rows: tuple[int, torch.dtype]) -> int:
    """Elements behind each of these rows of a problem's tensors: one makes them start off 16 bytes where the problem
    says that they do and no size makes them."""
    return int(bool(problem.dim("unaligned")) and not any(unaligned_sizes(*row) for row in rows))


def random_rows(
    shape: tuple[int, ...], dtype: torch.dtype, scale: float, rng: torch.Generator, behind: int = 0
) -> torch.Tensor:
    """Normal values times `scale` on the generator's device, with so many elements behind each row."""
    *outer, columns = shape
    whole = torch.empty(*outer, columns + behind, dtype=dtype, device=rng.device)
    return whole.normal_(0.0, scale, generator=rng)[..., :columns]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """‖got − want‖ / ‖want‖, Frobenius; inf for non-finite values; 0.0 when both are empty or zero."""
    if got.shape != want.shape:
        return float("inf")
    exact = want.double() if want.dtype == torch.float64 else want.float()
    difference = torch.linalg.vector_norm(got.to(exact.dtype) - exact, dtype=torch.float64).item()
    size = torch.linalg.vector_norm(exact, dtype=torch.float64).item()
    if not (difference < float("inf") and size < float("inf")):  # also catches NaN
        return float("inf")
    if difference == 0:
        return 0.0
    return difference / size if size else float("inf")


def sensible_on_cpu(nbytes: float, flops: float) -> bool:
    """Whether tuning a problem with that many bytes of weights and operations a call is worth it on a CPU."""
    return nbytes <= CPU_BYTES and flops <= CPU_FLOPS


@lru_cache(maxsize=8)
@own_mode()
def grouped_mm_works(name: str) -> bool:
    """Whether torch's grouped product exists on this CPU for a dtype and is right, empty groups included."""
    if not hasattr(torch, "_grouped_mm"):
        return False
    dtype = DTYPES[name]
    a, b = torch.ones(5, 16, dtype=dtype), torch.ones(3, 8, 16, dtype=dtype)
    b[2] = 2
    try:
        got = torch._grouped_mm(a, b.transpose(1, 2), offs=torch.tensor([2, 2, 5], dtype=torch.int32))
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return got.dtype == dtype and got[:, 0].tolist() == [16, 16, 32, 32, 32]


def missing_grouped_mm(name: str) -> str:
    """Why torch's grouped product is none for a dtype on this CPU, or ''."""
    used = "fp32" if name == "fp16" else name
    return "" if grouped_mm_works(used) else f"this torch has no grouped product of {used} on a CPU"


def aligned_rows(rows: torch.Tensor) -> torch.Tensor:
    """The same rows, copied into a wider buffer unless each starts on 16 bytes."""
    if not unaligned(rows):
        return rows.as_strided(rows.shape, steps(rows))  # torch asks for aligned strides of one row, too
    step = 16 // rows.itemsize
    *outer, columns = rows.shape
    wide = torch.empty(*outer, -(-columns // step) * step, dtype=rows.dtype, device=rows.device)
    return wide[..., :columns].copy_(rows)


def grouped_mm(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """[R, N]: the rows of a [R, K] before ends[e] (and behind the group before) times b[e].T; b [E, N, K]."""
    if not a.shape[0]:
        return a.new_empty(0, b.shape[1])
    return torch._grouped_mm(aligned_rows(a), aligned_rows(b).transpose(1, 2), offs=ends.to(torch.int32))
