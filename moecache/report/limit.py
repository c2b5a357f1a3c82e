"""The time that a layer cannot do without: to move its bytes or to do its FLOPs, the larger, at the known rates."""

import re

from moecache.kernels.formats import registry as formats
from moecache.predict.rates import floor_us
from moecache.predict.work import BYTES, Work
from moecache.schemas.device import KNOWN, Device, by_arch
from moecache.schemas.problem import Problem

MATRICES = {"fused_moe": 3, "grouped_gemm": 1}  # hidden x intermediate that an expert has; one less without a gate
HIGHEST = 1 << 40  # no dimension is larger: a file may hold any number


def limit_us(problem: Problem, device_name: str = "") -> float | None:
    """µs; None for another op, for an unknown or divided device, and where the dims do not tell.

    Counted are weights of active experts, read once, rows in and rows out: caches may keep the rest.
    """
    device, p = _device(problem, device_name), problem
    element, hidden, inner, quant = BYTES.get(p.dtype), p.dim("hidden"), p.dim("intermediate"), p.dim("quant", "")
    sizes = (hidden, inner, p.tokens, p.experts, p.topk)
    if device is None or element is None or p.op not in MATRICES or p.dim("mapped"):
        return None
    if quant not in ("", *formats.KINDS) or not all(type(size) is int and 0 < size < HIGHEST for size in sizes):
        return None
    weights = (MATRICES[p.op] - (p.dim("gated", 1) == 0)) * hidden * inner
    form = formats.get(str(quant)) if quant else None  # loads torch
    moved = active_experts(p) * weights * (form.nbytes if form else element) + _rows(p, hidden, inner) * element
    kind = form.peak if form else "bf16" if element == 2 else p.dtype
    known = kind in dict(device.peak_tflops)
    flops = ((kind, 2.0 * p.tokens * p.topk * weights),) if known else ()
    return floor_us(Work(nbytes=float(moved), flops=flops), device)


def is_close(problem: Problem) -> bool:
    """Whether the limit is near what any call of the bucket needs: most experts are active. Else it may be less."""
    return problem.routing.startswith("a0")


def active_experts(problem: Problem) -> float:
    """As many as balanced routing makes active on average; in a bucket with fewer, the fewest that it may have."""
    choices, named = min(problem.topk, problem.experts), re.fullmatch(r"a([012])e[0-3]", problem.routing)
    reachable = min(problem.experts, problem.tokens * problem.topk)
    level = int(named[1]) if named else 2
    fewest = max(choices, (0 if level == 2 else reachable * (2 - level) // 3 + 1))
    balanced = problem.experts * (1 - (1 - choices / problem.experts) ** problem.tokens)
    return max(fewest, balanced) if level == 0 else fewest


def _rows(problem: Problem, hidden: int, inner: int) -> int:
    """Elements of the rows in and out. Gathered rows may be few ones repeated, so those do not count."""
    if problem.op == "fused_moe":
        return 2 * problem.tokens * hidden
    return problem.tokens * (inner + (0 if problem.dim("gathered") else hidden))


def _device(problem: Problem, name: str) -> Device | None:
    """The known device of that name, else the one that stands for the architecture; whole, as a part has less."""
    named = (each for each in KNOWN.values() if each.arch == problem.arch and name.startswith(each.name))
    device = next(named, None) or by_arch(problem.arch)
    whole = device is not None and (device.vendor, device.units) == (problem.vendor, problem.units)
    return device if whole and device is not None and device.bandwidth_gbs else None
