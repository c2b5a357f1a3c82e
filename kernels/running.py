"""Runs a `Plan`. The first run goes through Triton's JIT, which compiles; the next ones launch what it compiled."""

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from operator import attrgetter, itemgetter
from typing import Any

import torch

from moecache.backends import registry
from moecache.kernels import handshake
from moecache.kernels.launch import SLOT, WORKSPACE, Box, Launch, Operand, Plan, operands
from moecache.kernels.matrix import NAMES, OF_NAME, steps
from moecache.kernels.tensors import tensors
from moecache.schemas.device import KNOWN, Device
from moecache.schemas.errors import InvalidInput


def described(tree: Any, name: str = "") -> Any:
    """A call or an output with an Operand in the place of each tensor."""
    if isinstance(tree, torch.Tensor):
        start = tree.data_ptr() if tree.device.type != "meta" else 0
        held = tree.untyped_storage().nbytes()
        if tree.dtype not in NAMES:
            raise InvalidInput(f"{name} is {tree.dtype}; allowed are {', '.join(map(str, NAMES))}")
        return Operand(name, NAMES[tree.dtype], tuple(tree.shape), steps(tree), 0, start % 16 == 0, held)
    if not is_dataclass(tree) or isinstance(tree, type):
        return tree
    prefix = f"{name}." if name else ""
    return replace(tree, **{f.name: described(getattr(tree, f.name), prefix + f.name) for f in fields(tree)})


def device_of(out: Any) -> Device:
    """The device of an output. Tensors that are on no GPU are those of Triton's interpreter, and of plans alone."""
    first = next(iter(tensors(out)))
    return registry.detect().device(first.get_device()) if first.is_cuda else KNOWN["h200"]


class Running:
    """A plan that can be called, on the device of its tensors and its current stream.

    Call it only with tensors of the shapes, strides, dtypes and alignments that the plan was made for.
    """

    def __init__(self, plan: Plan, starts: Sequence[str] = ()) -> None:
        """`starts` names the tensors whose addresses a call brings along in its attribute of that name, if it does."""
        self.plan = plan
        names = sorted({operand.name for launch in plan.launches for operand in operands(launch)})
        of_call = [name for name in names if name not in (WORKSPACE, SLOT) and not _is_out(name)]
        of_out = [name for name in names if _is_out(name)]
        self._slot, self._bytes = SLOT in names, plan.workspace
        self._of_call = _getter(of_call)
        self._of_out = _getter([name.removeprefix("out").removeprefix(".") for name in of_out])
        self._order = [*of_call, *of_out, *[WORKSPACE] * bool(plan.workspace), *[SLOT] * self._slot]
        self._without = Running(plan.without, starts) if plan.without else None
        self._direct: Callable[[Sequence[int]], None] | None = None
        known = not self._slot and not plan.zeroed and len(names) > 2 and {*of_call, *of_out} <= {*starts}
        self._starts = itemgetter(*(starts.index(name) for name in (*of_call, *of_out))) if known else None

    def __call__(self, call: Any, out: Any) -> Any:
        """Run it into `out`, and return that."""
        if self._direct is not None and self._starts is not None and call.starts:  # most hits
            memory = _memory(self._bytes)
            self._direct((*self._starts(call.starts), memory.data_ptr()))
            return out
        if not self.plan.launches:
            return out
        given = [*self._of_call(call), *self._of_out(out)]
        if self._bytes:
            given.append(torch.empty(self._bytes, dtype=torch.uint8, device=given[0].device))
        if self._slot:
            slot = handshake.slot(given[0].device)
            if slot is None and self._without is not None:
                return self._without(call, out)
            given.append(slot)
        if self.plan.zeroed:
            out.zero_()
        if self._direct is None:
            self._through_jit(given)
        else:
            self._direct([tensor.data_ptr() for tensor in given])
        return out

    def _through_jit(self, given: list[torch.Tensor]) -> None:
        named = dict(zip(self._order, given, strict=True))
        kernels = [_through_jit(launch, named) for launch in self.plan.launches]
        if given[0].is_cuda:
            self._direct = _direct()(self.plan.launches, kernels, self._order, given[0].get_device())


def _memory(nbytes: int) -> torch.Tensor:
    """Memory on the current GPU. Half of the time that `torch.empty` takes is reading its arguments."""
    return torch._C._dynamo.guards._empty_strided_cuda((nbytes,), (1,), torch.uint8)  # type: ignore[no-any-return]


def _is_out(name: str) -> bool:
    return name == "out" or name.startswith("out.")


def _getter(names: list[str]) -> Callable[[Any], tuple[Any, ...]]:
    """Reads attributes, dotted ones too; '' is the object itself."""
    if names == [""]:
        return lambda tree: (tree,)
    if len(names) == 1:
        get = attrgetter(names[0])
        return lambda tree: (get(tree),)
    return attrgetter(*names) if names else lambda tree: ()


@cache
def _direct() -> Callable[..., Callable[[Sequence[int]], None] | None]:
    """What makes direct launches of compiled kernels, on this machine."""
    from moecache.kernels import launchers

    return launchers.through_triton if torch.version.hip else launchers.through_driver


def _through_jit(launch: Launch, named: dict[str, torch.Tensor]) -> Any:
    args = {name: _value(value, named) for name, value in launch.named.items()}
    return launch.fn[launch.grid](**args, **(launch.options | launch.constexprs))


def _value(value: Any, named: dict[str, torch.Tensor]) -> Any:
    """A launch's argument as Triton takes it."""
    if isinstance(value, Box):
        base = _tensor(value.of, named)
        shape, strides, block = list(value.shape), list(value.strides), list(value.block)
        if value.layout is None:
            from triton.tools.tensor_descriptor import TensorDescriptor

            return TensorDescriptor(base, shape, strides, block)
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as Described

        return Described(base, shape, strides, block, value.layout)
    return _tensor(value, named) if isinstance(value, Operand) else value


def _tensor(operand: Operand, named: dict[str, torch.Tensor]) -> torch.Tensor:
    """A tensor that starts where the operand does; kernels ask no more of it."""
    whole = named[operand.name]
    dtype = OF_NAME[operand.dtype]
    if operand.name != WORKSPACE and not operand.offset and whole.dtype == dtype:
        return whole
    if operand.name == WORKSPACE:
        return whole[operand.offset :][: operand.numel() * operand.size].view(dtype)
    return whole.as_strided(operand.shape, operand.strides, whole.storage_offset() + operand.offset // operand.size)
