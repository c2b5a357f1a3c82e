"""What joins the devices of ranks: a winner on NVLink says nothing about PCIe."""

import socket
from functools import partial

import torch

from moecache.backends import registry
from moecache.team import Team


def links(team: Team, device: torch.device) -> str:
    """Every kind of link that two of the ranks have, as `Backend.link` names them, joined by '+': the same on all.

    Also `device` where two ranks share one, `unseen` where a rank does not see the device of another, as on another
    host, `none` for one rank, and `cpu`.
    """
    if device.type == "cpu" or team.size == 1:
        return "cpu" if device.type == "cpu" else "none"
    name = partial(_name, socket.gethostname())
    seen = {name(index): index for index in range(torch.cuda.device_count())}
    own = torch.cuda.current_device() if device.index is None else device.index
    every = team.gather("devices", name(own))
    backend = registry.load("hip" if torch.version.hip else "cuda")
    found = {
        "device" if each == name(own) else backend.link(own, seen[each]) if each in seen else "unseen"
        for rank, each in enumerate(every)
        if rank != team.rank
    }
    return "+".join(sorted({kind for each in team.gather("links", sorted(found)) for kind in each}))


def _name(host: str, index: int) -> str:
    """A device, as processes that do not see the same ones name it."""
    return f"{host} {getattr(torch.cuda.get_device_properties(index), 'uuid', index)}"
