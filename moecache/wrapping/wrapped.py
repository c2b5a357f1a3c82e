"""A user's function as an op: problems, configs, runs on copies of a call's arguments, comparison."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError

from moecache.kernels import contract
from moecache.kernels.contract import Args, Bound, Source
from moecache.kernels.tensors import tensors
from moecache.predict.work import Work
from moecache.schemas.config import Config
from moecache.schemas.device import Device
from moecache.schemas.errors import InvalidInput, in_words, typed
from moecache.schemas.layer import Layer
from moecache.schemas.problem import Problem, token_bucket
from moecache.wrapping.sources import plain

Dims = Mapping[str, Any]  # what a key says of a call
Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and named arguments

NAMED = ("tokens", "experts", "topk", "dtype", "routing")  # fields of Problem; other names of a key are dims
WORDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
TOLERANCE = {"fp32": 1e-3, "fp64": 1e-8}  # of the largest element; TF32 keeps 10 bits
LOOSE = 2e-2  # 16 bits and less: bf16 rounds at 2^-9, and split sums add a few roundings


class Outputs(list[torch.Tensor]):
    """The tensors that a run writes in full, which may be poisoned. `mutated` may not: what is read and written is an
    input too."""

    def __init__(self, written: list[torch.Tensor], call: Call, mutated: list[torch.Tensor]) -> None:
        super().__init__(written)
        self.call, self.mutated = call, mutated
        self.result: Any = None

    def compared(self) -> list[torch.Tensor]:
        """Every tensor that has to be right."""
        return [*tensors(self.result), *self.mutated, *self]


@dataclass(eq=False)
class WrappedOp:
    """A function of the user as an `Op`. `call` holds the arguments of the call that is being tuned, `mode`
    makes the mode of torch that it had: there the function does what it does for its caller."""

    name: str
    source: str
    fn: Callable[..., Any]
    given: dict[Config, Any]
    apply: Callable[..., Any] | None = None
    right: Callable[..., Any] | None = None
    allowed: float | None = None
    may: Callable[[Problem, Config, Device], str | bool] | None = None
    predicted: Callable[[Problem, Config, Device], float] | None = None
    mutates: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    soft_dims: tuple[str, ...] = ()
    call: Call | None = None
    mode: Callable[[], AbstractContextManager[Any]] = nullcontext

    def bound(self, config: Config) -> Callable[..., Any]:
        """`fn` with this config, to be called with a call's own arguments."""
        given, fn, apply = self.given[config], self.fn, self.apply
        if apply is None:
            return functools.partial(fn, config=given)
        return lambda *args, **kwargs: apply(fn, given, args, kwargs)

    def problem(self, dims: Dims, device: Device) -> Problem:
        """The problem of a key on a device."""
        values: dict[str, Any] = {
            name: WORDS.get(value, str(value).removeprefix("torch.")) if isinstance(value, torch.dtype) else value
            for name, value in dims.items()
        }
        fields = {name: values.pop(name) for name in NAMED if name in values}
        try:
            tokens = typed("tokens", fields.get("tokens", 0), int)
            fields |= {"tokens": token_bucket(tokens) if tokens > 0 else tokens}
            fields = {"experts": 1, "topk": 1} | fields | {"source": self.source, "dims": tuple(values.items())}
            return Problem(op=self.name, vendor=device.vendor, arch=device.arch, units=device.units, **fields)
        except (ValidationError, InvalidInput, TypeError) as error:
            raise InvalidInput(f"key of op {self.name!r} gave {dict(dims)!r}: {in_words(error)}") from None

    def problems(self, layer: Layer, tokens: Sequence[int], device: Device) -> list[Problem]:
        """None: a wrapped op is warmed by calling it."""
        return []

    def left_out(self, layer: Layer, tokens: Sequence[int], device: Device) -> str:
        """All: it is not known how a layer calls it."""
        return "a wrapped op is warmed by calling it in mode tune"

    def space(self, problem: Problem, device: Device) -> list[Config]:
        """The configs that fit, in the order in which they were given."""
        return [config for config in self.given if not self.fits(problem, config, device)]

    def fits(self, problem: Problem, config: Config, device: Device) -> str:
        """Why not, or ''."""
        if contract.made_up(self._every, problem, config, device):
            return f"{config.name} is none of the {len(self.given)} configs of {self.name}"
        verdict = True if self.may is None else self.may(problem, config, device)
        return verdict if isinstance(verdict, str) else "" if verdict else f"fits() refuses {config.name}"

    def _every(self, problem: Problem, device: Device) -> list[Config]:
        return list(self.given)

    def work(self, problem: Problem, config: Config, device: Device) -> Work:
        """The user's prediction in µs; infinite where there is none."""
        return Work(us=math.inf if self.predicted is None else self.predicted(problem, config, device))

    def inputs(self, problem: Problem, topk_ids: torch.Tensor, seed: int) -> Args:
        """Copies of the arguments of the call that asks."""
        if self.call is None:
            raise InvalidInput(f"op {self.name!r} can only be tuned in a call: call it, in mode=tune")
        return clone(self.call, {})

    def outputs(self, args: Args) -> Outputs:
        """Fresh copies of what a run writes, in the place of those arguments."""
        copies: dict[int, torch.Tensor] = {}
        mutated = [clone(self._argument(args, name), copies) for name in self.mutates]
        written = [clone(self._argument(args, name), copies) for name in self.writes]
        call = changed(args, lambda tensor: copies.get(id(tensor), tensor))
        return Outputs(written, call, mutated)

    def _argument(self, args: Args, name: str) -> torch.Tensor:
        """The tensor that was passed for a parameter of `fn`."""
        names = [p for p in inspect.signature(plain(self.fn)).parameters if p != "config"]
        positional, named = args
        at = names.index(name) if name in names else len(positional)
        value = positional[at] if at < len(positional) else named.get(name)
        if not isinstance(value, torch.Tensor):
            raise InvalidInput(f"op {self.name!r} writes argument {name!r}, which is no tensor: {value!r}")
        return value

    def bind(self, config: Config, args: Args, out: Outputs) -> Bound:
        """Runs `fn` with a config on the arguments in its outputs."""
        fn = self.bound(config)

        def run(args: Args, out: Outputs) -> Outputs:
            positional, named = out.call
            with self.mode():
                out.result = fn(*positional, **named)
            return out

        return run

    def reference(self, args: Args) -> Outputs:
        """The right result, copied: `fn` may return a buffer that it uses again."""
        out = self.outputs(args)
        positional, named = out.call
        right = self.right or self.bound(next(iter(self.given)))
        with self.mode():
            out.result = clone(right(*positional, **named), {})
        if not out.compared() and out.result is None:
            raise InvalidInput(f"op {self.name!r} returns nothing to check: name what it writes in writes=")
        return out

    def error(self, got: Outputs, want: Outputs) -> float:
        """Largest error of any tensor, relative to its largest element; inf where equality is missing."""
        a, b = got.compared(), want.compared()
        if len(a) != len(b) or (not b and got.result != want.result):
            return math.inf
        return max((_error(x, y) for x, y in zip(a, b, strict=True)), default=0.0)

    def tolerance(self, problem: Problem) -> float:
        """The user's, else by the dtype of the key."""
        return TOLERANCE.get(problem.dtype, LOOSE) if self.allowed is None else self.allowed

    def sources(self, problem: Problem, config: Config, device: Device) -> list[Source]:
        """Unknown, so nothing is compiled ahead."""
        return []


# --- copies of arguments, so that tuning never touches the caller's tensors ---


def clone(tree: Any, copies: dict[int, torch.Tensor]) -> Any:
    """A copy of every tensor in tuples, lists and dicts, one passed twice copied once; the rest is shared.

    `copies` collects id of the original -> copy.
    """

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = clone_tensor(tensor)
        return copies[id(tensor)]

    return changed(tree, copied)


def changed(tree: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same tree with every tensor in its tuples, lists and dicts changed."""
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {name: changed(item, change) for name, item in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(changed(item, change) for item in tree)
    return tree


def clone_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, gaps and 16-byte alignment: kernels are specialised on all three."""
    tensor = tensor.detach()
    if not tensor.numel() or tensor.layout != torch.strided:
        return tensor.clone()
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    shift = tensor.data_ptr() % 16 // tensor.element_size()
    whole = torch.empty(shift + span, dtype=tensor.dtype, device=tensor.device)
    whole[shift:].copy_(tensor.as_strided((span,), (1,)))
    return whole[shift:].as_strided(tensor.shape, tensor.stride())


# --- comparison ---


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    if got.shape != want.shape or got.dtype != want.dtype:
        return math.inf
    if not want.is_floating_point():
        return 0.0 if torch.equal(got, want) else math.inf
    wide = torch.promote_types(want.dtype, torch.float32)
    a, b = got.to(wide), want.to(wide)
    odd = ~(torch.isfinite(a) & torch.isfinite(b))
    if not torch.equal(a[odd].nan_to_num(nan=0.5), b[odd].nan_to_num(nan=0.5)):
        return math.inf
    a, b = a[~odd], b[~odd]
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) if b.numel() else 0.0
