"""The tensors of a call: by name, and on another device."""

from dataclasses import fields, is_dataclass, replace

import torch


def named(call):
    """Name -> tensor, of the fields of a call that are one."""
    found = {field.name: getattr(call, field.name) for field in fields(call)}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def placed(call, device):
    """The same call there, its scales included."""
    if isinstance(call, torch.Tensor):
        return call.to(device)
    if not is_dataclass(call):
        return call
    return replace(call, **{field.name: placed(getattr(call, field.name), device) for field in fields(call)})
