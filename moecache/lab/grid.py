"""Grid files: timings of many configs over calls with known routing, as benchmarks/grid.py writes them; may be .gz."""

import gzip
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator

from moecache.kernels.gemm.work import KERNELS, layer, vectors
from moecache.predict.products import Array, Candidates, candidates
from moecache.predict.work import Cell, Tile, Work
from moecache.schemas.config import Config, config
from moecache.schemas.device import Device
from moecache.schemas.errors import InvalidInput, in_words
from moecache.schemas.frozen import Frozen

Of = Literal["moe", "gemm1"]
Times = list[float | None]
VLLM = {
    "m": "BLOCK_SIZE_M",
    "n": "BLOCK_SIZE_N",
    "k": "BLOCK_SIZE_K",
    "group": "GROUP_SIZE_M",
    "warps": "num_warps",
    "stages": "num_stages",
}  # what its kernel calls the sizes of a tile
UNIFORM = "uniform"  # the routing that tables are tuned on


class Row(Frozen):
    """One call: its shapes, its rows per expert, and the µs of every config (null: it did not run)."""

    shape: str = Field(description="name of the model")
    E: int = Field(ge=1)
    topk: int = Field(ge=1)
    hidden: int = Field(ge=1)
    inter: int = Field(ge=1)
    T: int = Field(ge=1)
    routing: str
    counts: list[int]
    moe_us: Times = Field(default_factory=list)
    gemm1_us: Times = Field(default_factory=list)
    moe_us_again: Times = Field(default=[], description="a second, independent run: tells the noise")
    gemm1_us_again: Times = Field(default_factory=list)

    @model_validator(mode="after")
    def _agrees(self) -> "Row":
        if len(self.counts) != self.E or min(self.counts) < 0 or not 0 < sum(self.counts) <= self.T * self.topk:
            told = f"{len(self.counts)} counts that add up to {sum(self.counts)}"
            raise ValueError(f"{told}; allowed are E={self.E} that add up to 1 to T·topk={self.T * self.topk}")
        return self


class Head(Frozen):
    """What was timed where."""

    about: str = ""
    op: str = ""
    dtype: str = "bf16"
    device: Device


class Grid(Frozen):
    """A grid file."""

    about: Head
    configs: list[dict[str, Any]] = Field(min_length=1, description="a Config, or the bare parameters of one")
    rows: list[Row] = Field(min_length=1)


@dataclass(frozen=True)
class Timings:
    """What a grid says of one quantity. Arrays are [rows, configs] µs, NaN where a config did not run."""

    device: Device
    op: str
    configs: tuple[Config, ...]
    cells: tuple[Cell, ...]
    among: Candidates
    us: Array
    again: Array | None
    models: tuple[str, ...]
    routings: tuple[str, ...]

    def part(self, rows: Any) -> "Timings":
        """The rows with these numbers."""
        at = [int(row) for row in rows]
        return replace(
            self,
            us=self.us[at],
            again=None if self.again is None else self.again[at],
            cells=tuple(self.cells[i] for i in at),
            models=tuple(self.models[i] for i in at),
            routings=tuple(self.routings[i] for i in at),
        )


def read(path: Path, of: Of = "moe") -> Timings:
    """The timings of whole layers, or of their first GEMM.

    Raises:
        InvalidInput: the file is no grid, or holds no such timings; the message says which row and why.
    """
    grid = _load(path)
    column = f"{of}_us"
    lengths = {len(getattr(row, column)) for row in grid.rows}
    if lengths != {len(grid.configs)}:
        have = ", ".join(str(length) for length in sorted(lengths))
        raise InvalidInput(f"{path}: rows have {have} values of {column}; allowed is one a config, {len(grid.configs)}")
    us = np.array([getattr(row, column) for row in grid.rows], dtype=float)
    again = [getattr(row, f"{column}_again") for row in grid.rows]
    for row, times in zip(grid.rows, us, strict=True):
        if not np.isfinite(times).any() or np.nanmin(times) <= 0:
            raise InvalidInput(
                f"{path}: {row.shape} T={row.T} {row.routing}: {column} wants a time, and all above 0 µs"
            )
    try:
        configs = tuple(_config(knobs, grid.about.op) for knobs in grid.configs)
        return Timings(
            device=grid.about.device,
            op=grid.about.op,
            configs=configs,
            cells=tuple(_cell(row, grid.about.dtype, of) for row in grid.rows),
            among=candidates([work_of(each) for each in configs]),
            us=us,
            again=np.array(again, dtype=float) if all(len(each) == len(grid.configs) for each in again) else None,
            models=tuple(row.shape for row in grid.rows),
            routings=tuple(row.routing for row in grid.rows),
        )
    except (ValidationError, InvalidInput) as error:
        raise InvalidInput(f"{path}: {in_words(error)}") from None


def _load(path: Path) -> Grid:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return Grid.model_validate(json.loads(raw))
    except (json.JSONDecodeError, UnicodeDecodeError, gzip.BadGzipFile, EOFError, RecursionError) as error:
        raise InvalidInput(f"{path} is no JSON: {error}") from None
    except ValidationError as error:
        raise InvalidInput(f"{path} is no grid: {in_words(error, 'the file')}") from None


def _cell(row: Row, dtype: str, of: Of) -> Cell:
    return Cell(row.hidden, row.inter, row.T, tuple(row.counts), dtype, whole=of == "moe")


def _config(knobs: dict[str, Any], op: str) -> Config:
    return Config.model_validate(knobs) if "variant" in knobs else config(op or "kernel", **knobs)


def work_of(config: Config) -> Work:
    """What a config makes a device do: of ours as the op says, else of vLLM's kernel, which leaves the activation to a
    launch of its own.

    Raises:
        InvalidInput: the config names no tile.
    """
    if config.variant == "decode":
        return vectors(config)
    if config.variant in KERNELS:
        return layer(config)
    known = dict(config.params)
    sizes = {field: int(known[name]) for field, name in VLLM.items() if name in known}
    if not {"n", "k"} <= sizes.keys():
        raise InvalidInput(
            f"{config.name} names no tile: wanted are its columns ({VLLM['n']}) and its depth ({VLLM['k']})"
        )
    tile = Tile("plain", **{"m": 1} | sizes)
    return Work(tile, tile, launches=3, row_hidden=1, row_inner=3, token_hidden=1)
