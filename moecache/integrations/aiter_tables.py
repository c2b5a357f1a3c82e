"""The tables of AITER's tuned layers."""

import csv
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from moecache.integrations import tables
from moecache.schemas.config import Config
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import Problem, token_bucket
from moecache.schemas.timing import FROM, Environment, Timing

OP = "aiter.fused_moe"
ARCH = {"80": "gfx942", "304": "gfx942", "256": "gfx950"}  # by compute units, in tables that do not say it
_WORDS = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}
_DIMS = {
    "hidden": "model_dim",
    "intermediate": "inter_dim",
    "act": "act_type",
    "a": "q_dtype_a",
    "w": "q_dtype_w",
    "quant": "q_type",
    "gated": "use_g1u1",
    "on_input": "doweight_stage1",
}


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
        op=OP,
        vendor="amd",
        arch=arch,
        units=int(row["cu_num"]),
        tokens=token_bucket(int(row["token"])),
        experts=int(row["expert"]),
        topk=int(row["topk"]),
        dtype=_WORDS.get(row["dtype"], row["dtype"]),
        dims=tuple(dims.items()),
    )
    sizes = [(name, int(row[name])) for name in ("block_m", "ksplit")]
    kernels = [(name.replace("kernelName", "kernel"), row[name]) for name in ("kernelName1", "kernelName2")]
    stages = "one_stage" if row.get("run_1stage") == "1" else "two_stage"
    config = Config(variant=stages, params=(*sizes, *kernels))
    return tables.seed(problem, config, Environment(flags=f"{FROM}{source}"), f", with {float(row['us']):.1f} µs there")


def _value(text: str) -> int | str:
    """`ActivationType.Silu` as `Silu`, `1` as a number."""
    return int(text) if text.isdecimal() else text.rpartition(".")[2]
