"""Copies of a call's arguments, so that tuning never touches the caller's tensors."""

from collections.abc import Mapping
from typing import Any

import torch


def clone(tree: Any, copies: dict[int, Any]) -> Any:
    """A copy of every tensor in tuples, lists and dicts, one passed twice copied once; the rest is shared.

    `copies` collects id of the original -> copy.
    """
    if isinstance(tree, torch.Tensor):
        if id(tree) not in copies:
            copies[id(tree)] = clone_tensor(tree)
        return copies[id(tree)]
    if isinstance(tree, dict):
        return {name: clone(item, copies) for name, item in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(clone(item, copies) for item in tree)
    return tree


def replaced(tree: Any, copies: Mapping[int, Any]) -> Any:
    """The same tree with the tensors that `copies` names exchanged."""
    if isinstance(tree, dict):
        return {name: replaced(item, copies) for name, item in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(replaced(item, copies) for item in tree)
    return copies.get(id(tree), tree)


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
