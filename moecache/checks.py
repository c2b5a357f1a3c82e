"""What is checked of a call's arguments away from the hit: types, and values where they may be read.

Also, of a call that gives `out`, that it shares no memory with what is read.
"""

import typing
import warnings
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Any

import torch

from moecache.kernels.contract import Args
from moecache.kernels.tensors import tensors
from moecache.schemas.errors import InvalidInput

WORDS = {torch.Tensor: "a tensor", int: "an int", float: "a float", bool: "a bool", str: "a str", NoneType: "None"}
WORDS |= {torch.dtype: "a torch.dtype", Hashable: "something hashable"}


# --- types ---


def types(fn: Callable[..., Any], given: Mapping[str, Any], within: str = "") -> None:
    """Raise InvalidInput for what is `given` for a parameter of `fn` and is not of its type; fields of a dataclass too.

    A bool is no int here, though Python counts it as one, and an int will do for a float. A tensor has strides, and
    dimensions where a call must have it.
    """
    for name, kind in typing.get_type_hints(fn).items():
        if name in given and name != "return":
            kinds = typing.get_args(kind) if isinstance(kind, UnionType) else (kind,)
            value = given[name]
            flat = kinds == (torch.Tensor,) and isinstance(value, torch.Tensor) and not value.dim()
            if flat or not any(_is(value, each) for each in kinds):
                raise InvalidInput(_refusal(within + name, value, kinds)) from None
            if hasattr(value, "__dataclass_fields__"):
                types(type(value), {f.name: getattr(value, f.name) for f in fields(value)}, f"{within}{name}.")


def _is(value: Any, kind: Any) -> bool:
    if kind is Hashable:
        try:
            hash(value)
        except TypeError:
            return False
        return True
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    if typing.get_origin(kind) is Callable:
        return callable(value)
    if typing.get_origin(kind) is Sequence:
        listed = isinstance(value, Collection) and not isinstance(value, str | bytes | torch.Tensor)
        return listed and all(_is(each, typing.get_args(kind)[0]) for each in value)
    return isinstance(value, kind) and (kind is not torch.Tensor or value.layout is torch.strided)


def _word(kind: Any) -> str:
    if typing.get_origin(kind) is Sequence:
        return f"a list, each of it {_word(typing.get_args(kind)[0])}"
    return "a function" if typing.get_origin(kind) is Callable else WORDS.get(kind, kind.__name__)


def _refusal(name: str, value: Any, kinds: tuple[Any, ...]) -> str:
    what = repr(value) if type(value) in (int, float, bool, str, list, tuple, dict, NoneType) else ""
    what = what if 0 < len(what) <= 60 else f"of type {type(value).__module__}.{type(value).__qualname__}"
    allowed = " or ".join(_word(kind) for kind in kinds)
    hint = ""
    if isinstance(value, torch.Tensor) and torch.Tensor in kinds:
        what, hint = f"{value.layout} of {value.dim()} dimensions", " that is torch.strided and has dimensions"
    if torch.Tensor in kinds and isinstance(value, list | tuple):
        hint = ": make one with torch.tensor(…)"
    elif torch.Tensor in kinds and type(value).__module__ == "numpy":
        hint = ": make one with torch.from_numpy(…)"
    return f"{name} is {what}; allowed is {allowed}{hint}"


# --- values ---


def routed(args: Args) -> None:
    """Raise InvalidInput for ids past the last expert, and for a map or mask that is none. Waits for the device.

    Ids below 0 take no part, which is how engines fill up.
    """
    ids, mapping, count = args.topk_ids, args.expert_map, args.num_experts
    mask, limit = getattr(args, "expert_mask", None), getattr(args, "num_tokens", None)
    if mapping is not None:
        mapped(args)
    if limit is not None and int(limit) * ids.shape[1] >= 1 << 31:
        raise InvalidInput(
            f"num_tokens is {int(limit)}; allowed are counts below {(1 << 31) // ids.shape[1]}, 2^31 / K"
        )
    ids = ids.cpu() if limit is None else ids.cpu()[: max(0, int(limit))]
    largest = int(ids.max()) if ids.numel() else -1
    if largest >= count:
        said = f"num_experts={count}" if mapping is None else f"the {'map' if mask is None else 'mask'} of {count}"
        raise InvalidInput(
            f"topk_ids names expert {largest}; allowed are 0 to {count - 1}, as {said} says, and −1 for slots that "
            f"take no part. A shared expert behind the routed ones counts too, in num_experts and in the map"
        )


def mapped(args: Args) -> None:
    """Raise InvalidInput for a map or mask that is none. Waits."""
    if (mask := getattr(args, "expert_mask", None)) is not None:
        _check_mask(mask.cpu())
    else:
        _check_map(args.expert_map.cpu(), len(args.w1) if hasattr(args, "w1") else args.num_experts)


def _check_map(mapping: torch.Tensor, experts: int) -> None:
    local = mapping[mapping >= 0]
    names, counts = torch.unique(local, return_counts=True)
    if len(names) and int(counts.max()) > 1:
        twice = int(names[counts.argmax()])
        hint = "it must give every global expert its local number, −1 for those of other ranks"
        if bool(((mapping == 0) | (mapping == 1)).all()):
            hint = "it looks like a 0/1 mask; torch.where(mask != 0, mask.cumsum(0) - 1, -1) makes a map of it"
        raise InvalidInput(f"expert_map gives local expert {twice} to {int(counts.max())} global ones: {hint}")
    if len(names) and int(names[-1]) >= experts:
        raise InvalidInput(f"expert_map names local expert {int(names[-1])}; allowed are −1 and 0 to {experts - 1}")


def _check_mask(mask: torch.Tensor) -> None:
    odd = mask[(mask != 0) & (mask != 1)]
    if odd.numel():
        raise InvalidInput(
            f"expert_mask holds {odd[0].item()}; allowed are 0 and 1, or bools. If it is a map of global to local "
            f"experts, expert_mask=(map >= 0).int() is its mask"
        )


def grouped(args: Args) -> None:
    """Raise InvalidInput for offsets that fall or end behind the product, and for rows that `a` lacks. Waits."""
    offsets, rows, count = args.offsets.cpu(), args.rows, args.a.shape[0]
    most = count if rows is None else len(rows)
    falls = (offsets[1:] < offsets[:-1]).nonzero()
    if len(falls):
        at = int(falls[0])
        raise InvalidInput(
            f"offsets[{at + 1}]={int(offsets[at + 1])} is below offsets[{at}]={int(offsets[at])}: they rise"
        )
    first, last = int(offsets[0]), int(offsets[-1])
    if first < 0 or last > most:
        raise InvalidInput(f"offsets are {first} to {last}; allowed are 0 to {most}, the rows of the product")
    if rows is None or first == last:
        return
    low, high = (int(value) for value in rows[first:last].cpu().aminmax())
    if low < 0 or high >= count:
        raise InvalidInput(f"rows are {low} to {high}; allowed are 0 to {count - 1}, rows of a")


# --- memory ---


def apart(out: torch.Tensor, args: Args, *every: torch.Tensor) -> None:
    """Raise InvalidInput where `out`, a matrix, shares memory with a tensor of the call, or with itself.

    By the bytes from the first element to the last. What lies between each other there is told apart if it is two
    matrices with one distance between rows, as columns or every second row of one buffer are. `every`, if it names all
    tensors of the call, settles most calls in half a microsecond.
    """
    if not out.numel() or (every and out.is_contiguous() and _clear(out, every)):
        return
    low, high = _span(out)
    if out.stride(0) < out.shape[1] and len(out) > 1:
        raise InvalidInput(f"out has rows of {out.shape[1]} elements {out.stride(0)} apart: they share memory")
    for name, value in ((f.name, getattr(args, f.name)) for f in fields(args)):
        for each in tensors(value) if name != "posted" else ():
            if not (each.data_ptr() < high and low < _span(each)[1]) or _between(out, each):
                continue
            raise InvalidInput(
                f"out shares memory with {name}; allowed is a tensor that does not overlap any input, or columns or "
                f"rows of one buffer that lie beside those of the input"
            )


def _clear(out: torch.Tensor, every: tuple[torch.Tensor, ...]) -> bool:
    """Whether the tensors are contiguous, or begin behind `out`, and apart from it."""
    low = out.data_ptr()
    high = low + out.nbytes
    for each in every:
        at = each.data_ptr()
        if at < high and (at + each.nbytes > low or not each.is_contiguous()):
            return False
    return True


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte, and the one behind the last."""
    low = tensor.data_ptr()
    if not tensor.numel():
        return low, low
    far = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return low, low + (far + 1) * tensor.itemsize


def _between(out: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the rows of one matrix lie in the gaps between those of another."""
    if other.dim() != 2 or other.stride(1) != 1:
        return False
    step, wide = out.stride(0) * out.itemsize, out.shape[1] * out.itemsize
    if step != other.stride(0) * other.itemsize or step <= wide:
        return False
    behind = (other.data_ptr() - out.data_ptr()) % step
    return wide <= behind and behind + other.shape[1] * other.itemsize <= step


# --- gradients ---


@cache
def warn_of_gradients() -> None:
    """Say, once in a process, that a result has no gradient where one is asked for."""
    warnings.warn("ops of moecache have no gradient: call them under torch.no_grad()", RuntimeWarning, stacklevel=4)
