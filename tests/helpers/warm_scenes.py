"""Ranks of an engine that warm up together: each has its own layers and its own cache file."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import LONG, SHORT

from moecache.dispatch import using
from moecache.dispatch.serving import Dispatcher
from moecache.integrations import layers, warming
from moecache.kernels.fused_moe.op import FUSED_MOE

HOW: dict[str, Any] = {"activation": "silu", "gated": True, "w1_bias": None, "w2_bias": None}


def call(tokens: int, layer: int = 0, experts: int = 4) -> torch.Tensor:
    """A layer of an engine, which runs on our kernels."""
    rng = torch.Generator().manual_seed(layer)
    w1, w2 = torch.randn(experts, 96, 32, generator=rng), torch.randn(experts, 32, 48, generator=rng)
    live = LAYERS.setdefault((layer, experts), (w1, w2))
    ids = torch.stack([torch.randperm(experts, generator=rng)[:2] for _ in range(tokens)])
    x, router = torch.randn(tokens, 32, generator=rng), torch.rand(tokens, 2, generator=rng)
    return layers.fused(x, *live, router, ids, on_input=False, layer=layer, **HOW)


LAYERS: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}


def known(serving: Dispatcher) -> dict[str, str]:
    """What is measured, by problem."""
    rows = serving.lookup.known(FUSED_MOE.name, serving.places.first()).values()
    return {winner.problem.key: winner.config.name for winner, _, _ in rows}


def warmed(rank: int, size: int, folder: str = "", fails: bool = False, absent: int = -1) -> Any:
    """What a rank knows after it, and how many timings it took."""
    measured, measure = [], Dispatcher.measure

    def counted(self: Dispatcher, *args: Any, **kwargs: Any) -> Any:
        measured.append(1)
        if fails:
            raise KeyError("a bug")
        return measure(self, *args, **kwargs)

    Dispatcher.measure = counted  # type: ignore[method-assign]
    warming.TIMEOUT = SHORT if absent >= 0 else LONG
    with using(db=Path(folder) / f"{rank}.sqlite", tune=True, tune_budget=60.0) as serving:
        warming.begin("engine", serving, lambda: None)
        call(8, experts=4 + 4 * rank)
        if rank != absent:
            warming.warm("engine", lambda: dist.group.WORLD)
        out = call(8, experts=4 + 4 * rank)
        return [known(serving), len(measured), serving.settings.mode, bool(out.isfinite().all())]


def together(rank: int, size: int) -> Any:
    """Rank 1 has another layer, which rank 0 measures too."""
    return warmed(rank, size, folder=_folder())


def failing(rank: int, size: int) -> Any:
    """Rank 0 meets a bug of ours."""
    return warmed(rank, size, folder=_folder(), fails=True)


def one_away(rank: int, size: int) -> Any:
    """Rank 1 never comes."""
    return warmed(rank, size, folder=_folder(), absent=1)


def _folder() -> str:
    import os

    return os.environ["FOLDER"]
