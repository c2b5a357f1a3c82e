"""AITER: what its tuned tables name, and its layer as an op."""

import csv
from collections.abc import Callable, Mapping
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moecache.integrations import tables
from moecache.schemas.config import Config
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import Problem, token_bucket
from moecache.schemas.timing import FROM, Environment, Timing
from moecache.wrapping import Wrapped
from moecache.wrapping import wrap as wrapped

OP = "aiter.fused_moe"
ARCH = {"80": "gfx942", "304": "gfx942", "256": "gfx950"}  # by compute units, in tables that do not say it
_WORDS = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}
_DIMS = {
    "hidden": "model_dim", "intermediate": "inter_dim", "act": "act_type", "a": "q_dtype_a", "w": "q_dtype_w",
    "quant": "q_type", "gated": "use_g1u1", "on_input": "doweight_stage1",
}  # fmt: skip


def seeds(path: Path | None) -> tuple[list[Timing], int]:
    """What its CSV files of tuned layers name, and how many of their rows are of unknown devices or configs.

    Raises:
        InvalidInput: AITER is not installed and there is no path, or a file is no such table.
    """
    files, source = tables.found("aiter", path, "configs", "*tuned_fmoe*.csv")
    rows: dict[tuple[str, str], Timing] = {}
    others = 0
    for file in (file for file in files if "untuned" not in file.name):
        with file.open(newline="", encoding="utf-8") as opened:
            table = csv.DictReader(opened)
            if missing := {*_DIMS.values(), "cu_num", "token", "expert", "topk", "dtype"} - {*(table.fieldnames or ())}:
                raise InvalidInput(f"{file}: this is no table of tuned layers: it has no {', '.join(sorted(missing))}")
            for row in table:
                try:
                    timing = _seed(row, source)
                except (ValidationError, ValueError, TypeError, KeyError):
                    others += 1
                else:
                    rows[timing.problem.key, timing.config.name] = timing
    return list(rows.values()), others


def _seed(row: Mapping[str, str], source: str) -> Timing:
    arch = row.get("gfx") or ARCH[row["cu_num"]]
    dims = {name: _value(row[column]) for name, column in _DIMS.items()}
    problem = Problem(
        op=OP, vendor="amd", arch=arch, units=int(row["cu_num"]), tokens=token_bucket(int(row["token"])),
        experts=int(row["expert"]), topk=int(row["topk"]), dtype=_WORDS.get(row["dtype"], row["dtype"]),
        dims=tuple(dims.items()),
    )  # fmt: skip
    sizes = [(name, int(row[name])) for name in ("block_m", "ksplit")]
    kernels = [(name.replace("kernelName", "kernel"), row[name]) for name in ("kernelName1", "kernelName2")]
    stages = "one_stage" if row.get("run_1stage") == "1" else "two_stage"
    config = Config(variant=stages, params=(*sizes, *kernels))
    return tables.seed(problem, config, Environment(flags=f"{FROM}{source}"), f", with {float(row['us']):.1f} µs there")


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


def _value(text: str) -> int | str:
    """`ActivationType.Silu` as `Silu`, `1` as a number."""
    return int(text) if text.isdecimal() else text.rpartition(".")[2]
