"""The types of a kernel's parameters, as a launch with given sizes asks for them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moecache.kernels.contract import Source


def signature_of(fn: Any, constexprs: Mapping[str, Any], special: Mapping[str, str]) -> dict[str, str]:
    """Types of a jit function's parameters by name: `special` ones, else pointers to int32 in capitals (one letter is
    a size) and int32 sizes and strides."""

    def kind(name: str) -> str:
        if name in constexprs:
            return "constexpr"
        return special.get(name, "*i32" if name.isupper() and len(name) > 1 else "i32")

    return {name: kind(name) for name in fn.arg_names}


def sized(source: Source, values: Mapping[str, int], held: Mapping[str, int]) -> Source:
    """A source as a launch asks for it, which makes a constant of a 1, and marks what 16 divides, integers of 64 bits
    and memory past 2 GiB.

    Args:
        values: of integers by parameter; names that the kernel has not are passed over.
        held: bytes of the memory that a pointer points into.
    """
    free = {p.name for p in getattr(source.fn, "params", ()) if p.do_not_specialize}
    signature, constexprs, aligned = dict(source.signature), dict(source.constexprs), list(source.aligned)
    for name, value in values.items():
        if not signature.get(name, "").startswith("i"):
            continue
        if value == 1 and name not in free:
            signature[name], constexprs[name] = "constexpr", 1
            continue
        signature[name] = "i32" if value < 1 << 31 else "i64"
        aligned += [name] if value % 16 == 0 and name not in free else []
    large = tuple(name for name, size in held.items() if size >= 1 << 31 and signature.get(name, "").startswith("*"))
    return replace(source, signature=signature, constexprs=constexprs, aligned=tuple(aligned), large=large)
