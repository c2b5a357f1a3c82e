"""What a person calls a layer, a routing bucket and a device, as far as a problem tells."""

import re

from moecache.schemas.problem import Problem
from moecache.text import counted, units

# (experts, top-k, hidden, intermediate) as published; of two models with the same layer both are named.
MODELS: dict[tuple[int, int, int, int], str] = {
    (8, 2, 4096, 14336): "Mixtral-8x7B",
    (64, 8, 2048, 1024): "OLMoE-1B-7B",
    (128, 4, 2880, 2880): "gpt-oss-120b",
    (128, 8, 2048, 768): "Qwen3-30B-A3B",
    (128, 8, 4096, 1408): "GLM-4.5-Air",
    (256, 8, 7168, 2048): "DeepSeek-V3",
    (384, 8, 7168, 2048): "Kimi-K2",
    (512, 10, 2048, 512): "Qwen3-Next-80B-A3B",
}
LAYERS = {"Mixtral-8x7B": 32, "OLMoE-1B-7B": 16, "gpt-oss-120b": 36, "Qwen3-30B-A3B": 48}  # MoE layers of each
LAYERS |= {"GLM-4.5-Air": 45, "DeepSeek-V3": 58, "Kimi-K2": 60, "Qwen3-Next-80B-A3B": 48}
PARTS = (1, 2, 4, 8, 16, 32, 64)  # tensor or expert parallelism
ACTIVE = ("most active", "half active", "few active")
EVEN = ("even", "uneven", "skewed", "hot")


def model(problem: Problem) -> str:
    """The published model with this layer, and how it is divided; '' for none."""
    p, sizes = problem, (problem.dim("hidden"), problem.dim("intermediate"))
    if p.op == "moe_sort":
        return ", ".join(name for shape, name in MODELS.items() if shape[:2] == (p.experts, p.topk))
    if p.op == "grouped_gemm":
        hidden, inner = (sizes[0], _half(sizes[1])) if p.dim("gathered") else (sizes[1], sizes[0])
        part = "gate and up" if p.dim("gathered") else "down"
        found = [_divided(p.experts, topk, hidden, inner) for topk in sorted({shape[1] for shape in MODELS})]
        return next((f"{name}, {part}" for name in found if name), "")
    return _divided(p.experts, p.topk, *sizes)


def layers(problem: Problem) -> int:
    """How many MoE layers the model of a layer has; 0 where no model is known, or several are meant."""
    named = model(problem)
    found = [name for name in LAYERS if named.startswith(name)] if named.count(",") <= ("gate" in named) else []
    return LAYERS[max(found, key=len)] if found else 0


def _half(size: object) -> object:
    return size // 2 if type(size) is int and size % 2 == 0 else None


def _divided(experts: int, topk: int, hidden: object, inner: object) -> str:
    """The undivided layer goes before a divided one, tensor parallelism before expert parallelism."""
    for tp in PARTS:
        for (whole, chosen, wide, deep), name in MODELS.items():
            if (experts, topk, hidden) == (whole, chosen, wide) and deep % tp == 0 and inner == deep // tp:
                return f"{name} TP {tp}" if tp > 1 else name
    for ep in PARTS[1:]:
        for (whole, chosen, wide, deep), name in MODELS.items():
            if (topk, hidden, inner) == (chosen, wide, deep) and whole % ep == 0 and experts == whole // ep:
                return f"{name} EP {ep}"
    return ""


def title(problem: Problem) -> str:
    """A layer in few words: the model, else its shape."""
    p, known = problem, model(problem)
    hidden, inner = p.dim("hidden"), p.dim("intermediate")
    shape = f"{counted(p.experts, 'expert')}, top-{p.topk}"
    if p.op == "moe_sort" or not (hidden and inner):
        return f"{p.op}, {shape}" + (f" ({known})" if known else "")
    kind = p.dim("quant", "") or p.dtype
    return ", ".join(filter(None, (p.op, known or f"{shape}, {hidden} × {inner}", str(kind))))


def product(device: str) -> str:
    """A device without its maker."""
    return re.sub(r"^(NVIDIA|AMD Instinct) ", "", device)


def shape(problem: Problem) -> str:
    """A layer in full, with its kind of device."""
    p = problem
    dims = [f"{name} {value}" for name, value in p.dims]
    told = (counted(p.experts, "expert"), f"top-{p.topk}", *dims, p.dtype, p.arch, units(p))
    return ", ".join(filter(None, told))


def routing(bucket: str) -> tuple[str, ...]:
    """A bucket in words: how many of the experts that could be are active, and how evenly those are loaded."""
    named = re.fullmatch(r"a([012])e([0-3])", bucket)
    if named is None:
        return ()
    active, uneven = int(named[1]), int(named[2])
    return ACTIVE[active], EVEN[max(0, uneven - active)]
