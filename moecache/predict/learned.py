"""What timings taught, as it is kept in files: fitted parameters, and what they left over at the timed calls."""

import gzip
from functools import cache
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import ConfigDict, Field, ValidationError

from moecache.predict.parameters import VERSION, Parameters
from moecache.predict.products import candidates
from moecache.predict.work import Cell, Work
from moecache.schemas.frozen import Frozen

SHIPPED = Path(__file__).parent / "learned"  # ARCH.json.gz, made by benchmarks/learned.py
DIGITS = 4  # of a leftover, a natural logarithm
MOST = 2048  # calls or configs: the model compares each with each. What ships has 318 and 115

Place = Annotated[float, Field(ge=-1e3, le=1e3)]
Leftover = Annotated[float, Field(ge=-20, le=20)]


class Learned(Frozen):
    """Versioned by its parameters."""

    model_config = ConfigDict(allow_inf_nan=False)

    op: str
    layer: str = Field(default="", description="see `layer_of`; '' for several")
    about: dict[str, str] = Field(default={}, description="device, time, what was timed")
    parameters: Parameters
    works: list[Work] = Field(min_length=1, max_length=MOST, description="of the timed configs")
    calls: list[tuple[Place, Place, Place]] = Field(min_length=1, max_length=MOST, description="where timed calls lie")
    leftovers: list[list[Leftover]] = Field(description="[calls, works]")


def layer_of(cell: Cell) -> str:
    """The layer of a call as text: experts, hidden, intermediate; "/1" behind it without a gate."""
    return f"{len(cell.counts)}x{cell.hidden}x{cell.intermediate}{'' if cell.gated else '/1'}"


def parse(text: str) -> Learned | None:
    """What a file holds, a stranger's too; None if it is of another version of the model, or not sound."""
    try:
        found = Learned.model_validate_json(text)
        if found.parameters.version != VERSION or np.shape(found.leftovers) != (len(found.calls), len(found.works)):
            return None
        candidates(found.works)
    except (ValidationError, ValueError, KeyError, TypeError, OverflowError, ZeroDivisionError):
        return None
    return found


@cache
def shipped(arch: str) -> Learned | None:
    """What the package brings for an architecture."""
    path = SHIPPED / f"{arch}.json.gz"
    return parse(gzip.decompress(path.read_bytes()).decode()) if path.exists() else None
