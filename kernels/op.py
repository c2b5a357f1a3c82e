"""What a tunable operation says of itself, and the list of those that exist."""

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol, TypeVar

import torch

from moecache.kernels.compile import Source as Source
from moecache.schemas.config import Config
from moecache.schemas.device import Device
from moecache.schemas.errors import InvalidInput
from moecache.schemas.layer import Layer
from moecache.schemas.problem import Problem

Args = dict[str, Any]  # the arguments of one call, by name
T = TypeVar("T")

TESTED = ("sm_90",)  # architectures on which the tests have run every candidate of the built-in ops
EXTREME = -1  # the seed of inputs whose result fits their dtype and whose parts do not: see Op.inputs
LARGE = 512 << 20  # bytes of weights of which no cache keeps a part from one call to the next
SHELF_BYTES = 48 << 30  # weights held at a time within `sharing`, the last of them in any case


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


class Op(Protocol):
    """A tunable operation. Everything here is a pure function of its arguments, but for `launch`."""

    name: str
    source: str  # of a wrapped op what its caller says of its code, part of every key; '' of ours: see kernels/code.py

    def problems(self, layer: Layer, tokens: Sequence[int], device: Device) -> list[Problem]:
        """What `warm` tunes for a model's layer: one problem a token bucket, routing bucket left empty."""

    def left_out(self, layer: Layer, tokens: Sequence[int], device: Device) -> str:
        """What `problems` leaves out of a layer and why, in words for people; '' for nothing."""

    def space(self, problem: Problem, device: Device) -> list[Config]:
        """Every config worth considering, in a fixed order; the first is the static default. All of them fit."""

    def fits(self, problem: Problem, config: Config, device: Device) -> str:
        """Why this config cannot serve this problem on this device; '' when it can. Accepts any config, also one that a
        file made up: what no space makes, for whatever number of tokens, never fits."""

    def cost(self, problem: Problem, config: Config, device: Device) -> float:
        """Predicted microseconds from hardware constants alone."""

    def inputs(self, problem: Problem, topk_ids: torch.Tensor, seed: int) -> Args:
        """Fresh random arguments of this problem with the given routing, on the device of `topk_ids`.

        The seed EXTREME asks for large parts of a result that fits, so that a candidate shows that rounds them early.
        """

    def outputs(self, args: Args) -> Any:
        """Uninitialised outputs for `launch`: a tensor or a dataclass of tensors."""

    def launch(self, config: Config, args: Args, out: Any) -> Any:
        """Run one candidate on the current stream into `out`, which it returns. Never synchronises."""

    def reference(self, args: Args) -> Any:
        """The plain torch result, in higher precision where that matters."""

    def error(self, got: Any, want: Any) -> float:
        """Relative error of a result; 0.0 for exact, inf for wrong integers or non-finite values."""

    def tolerance(self, problem: Problem) -> float:
        """The largest error that still counts as right."""

    def sources(self, problem: Problem, config: Config, device: Device) -> list[Source]:
        """The Triton kernels that this config launches; empty for plain torch candidates."""


def kernels(op: Op, problem: Problem, config: Config, device: Device) -> list[Source]:
    """All that a launch of this config compiles: its own kernels, and those of other ops that the op's `companions`,
    a method that few have, names."""
    companions: Any = getattr(op, "companions", None)
    own = list(op.sources(problem, config, device))
    return own + list(companions(problem, config, device)) if companions else own


@lru_cache(maxsize=1024)
def _possible(
    every: Callable[[Problem, Device], Sequence[Config]], problem: Problem, device: Device
) -> dict[Config, str]:
    return {config: repr(config) for config in every(problem, device)}


def made_up(
    every: Callable[[Problem, Device], Sequence[Config]], problem: Problem, config: Config, device: Device
) -> str:
    """Why a config is none of `every(problem, device)`, to the type of each value, as True equals 1; '' when it is one.

    A file may name anything: what no space of the op makes was never compiled, checked or timed by anybody.
    """
    known = _possible(every, problem, device).get(config)
    return "" if known == repr(config) else f"{config.name} is in no search space of {problem.op}"


_shelf: OrderedDict[Hashable, tuple[int, Any]] | None = None  # the last used at the end


@contextmanager
def sharing() -> Iterator[None]:
    """Within the block `inputs` may give weights that an earlier call made; the outermost block holds them.

    They must not be written to.
    """
    global _shelf
    outermost, _shelf = _shelf is None, OrderedDict() if _shelf is None else _shelf
    try:
        yield
    finally:
        if outermost:
            _shelf = None


def forget_shared() -> None:
    """Make weights anew from here on, as somebody may have written to them."""
    if _shelf is not None:
        _shelf.clear()


def shared(nbytes: int, seed: int, key: Hashable, make: Callable[[int], T]) -> T:
    """`make(seed)`, or within `sharing` what it gave for this key before: tensors of about `nbytes` bytes.

    Of what no cache holds, one seed is enough: calls that name other experts find them as cold.
    """
    if _shelf is None:
        return make(seed)
    seed = seed if nbytes < LARGE else 0
    held = _shelf.pop((key, seed), None)
    size = nbytes + sum(each for each, _ in _shelf.values())
    while held is None and _shelf and size > SHELF_BYTES:
        size -= _shelf.popitem(last=False)[1][0]
    found: T = make(seed) if held is None else held[1]
    _shelf[key, seed] = (nbytes, found)
    return found


def _forget_in_child() -> None:
    """A forked child does not inherit the block of a thread that it does not have."""
    global _shelf
    _shelf = None


os.register_at_fork(after_in_child=_forget_in_child)


def tensors(tree: Any) -> Iterable[torch.Tensor]:
    """The tensors in an output: a tensor, a sequence, a mapping or a dataclass of them."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from tensors(item)
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from tensors(item)
    elif hasattr(tree, "__dataclass_fields__"):
        for name in tree.__dataclass_fields__:
            yield from tensors(getattr(tree, name))


def poison(tree: Any) -> Any:
    """Fill every tensor of an output with a value that no kernel writes, so that what is not written shows."""
    for tensor in tensors(tree):
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
        else:
            tensor.fill_(torch.iinfo(tensor.dtype).min + 77 if tensor.dtype != torch.bool else 1)
    return tree


def _sort() -> Op:
    from moecache.kernels.sort import SORT

    return SORT


def _fused_moe() -> Op:
    from moecache.kernels.fused_moe import FUSED_MOE

    return FUSED_MOE


def _grouped_gemm() -> Op:
    from moecache.kernels.grouped_gemm import GROUPED_GEMM

    return GROUPED_GEMM


_BUILT_IN: dict[str, Callable[[], Op]] = {"moe_sort": _sort, "fused_moe": _fused_moe, "grouped_gemm": _grouped_gemm}
_wrapped: dict[str, Op] = {}


_ALTERNATING = {"fused_moe": "moecache.kernels.moe_alternatives"}


def alternating(name: str) -> Any:
    """The module that puts two configs of an op into one captured call (`kind`, `launch`, `sources`); None where an op
    has none. It is no member of an op, as it changes no config and no timing."""
    return import_module(_ALTERNATING[name]) if name in _ALTERNATING else None


def names() -> list[str]:
    """Built-in ops first, then the wrapped ones."""
    return [*_BUILT_IN, *_wrapped]


def built_in(name: str) -> bool:
    """Whether any process with this library knows the op by its name alone."""
    return name in _BUILT_IN


def unaskable(problem: Problem) -> str:
    """Why nobody here can say what fits a problem; '' when the op can."""
    if problem.op not in names():
        return f"this process does not know op {problem.op!r}"
    if built_in(problem.op) and problem.vendor != "cpu" and find_spec("triton") is None:
        return "Triton is not installed here, without which nothing is known of kernels for GPUs"
    return ""


def get(name: str) -> Op:
    """The op of that name; imports its kernels.

    Raises:
        InvalidInput: no such op; the message lists those that exist.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]()
    if name in _wrapped:
        return _wrapped[name]
    raise InvalidInput(f"no op named {name!r}; this process knows {', '.join(names())}")


def register(op: Op) -> None:
    """Add a wrapped op.

    Raises:
        InvalidInput: the name belongs to a built-in op.
    """
    if op.name in _BUILT_IN:
        raise InvalidInput(f"op name {op.name!r} is taken by a built-in op; choose another")
    _wrapped[op.name] = op
