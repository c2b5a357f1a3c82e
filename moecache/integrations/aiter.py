"""AITER: its layer as an op."""

from collections.abc import Callable
from importlib import import_module
from itertools import product
from typing import Any

from moecache.wrapping import Wrapped
from moecache.wrapping import wrap as wrapped

# The first is what AITER takes: rows of a tile from its table, and the sort that it thinks best.
CHOICES = [{"block_size_M": rows, "policy": policy} for rows, policy in product((0, 32, 64, 128), (0, 1, 2))]


def wrap() -> Wrapped[Any]:
    """`aiter.fused_moe.fused_moe` with tile heights and a sort that are measured at the first call of a size, in mode
    tune. The first five arguments may be given by place; all others by name."""
    layer = import_module("aiter.fused_moe").fused_moe
    made: Wrapped[Any] = wrapped(layer, op="aiter.layer", configs=CHOICES, key=_key, apply=_run)
    return made


def _key(
    hidden_states: Any, w1: Any, w2: Any, topk_weight: Any, topk_ids: Any, *, expert_mask: Any = None, **named: Any
) -> dict[str, Any]:
    enums = {name: str(named[name]) for name in ("activation", "quant_type") if name in named}
    return enums | {
        "tokens": hidden_states.shape[0], "experts": w1.shape[0], "topk": topk_ids.shape[1],
        "dtype": hidden_states.dtype, "weights": w1.dtype, "hidden": w2.shape[1], "intermediate": w2.shape[2],
        "rows": w1.shape[1], "masked": expert_mask is not None, "on_input": bool(named.get("doweight_stage1")),
    }  # fmt: skip


def _run(layer: Callable[..., Any], choice: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    rows = {"block_size_M": choice["block_size_M"]} if choice["block_size_M"] else {}
    return layer(*args, **kwargs, **rows, moe_sorting_dispatch_policy=choice["policy"])
