"""The tensors of an output or of arguments, whatever holds them."""

from collections.abc import Iterable
from typing import Any

import torch


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
