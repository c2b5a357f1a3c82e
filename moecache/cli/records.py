"""What `--json` prints: stored values, explanations and warm-ups as records, whose names are a promise."""

import json
from typing import TYPE_CHECKING, Any

from pydantic_core import to_jsonable_python

from moecache.schemas.prediction import Prediction
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Tier, Timing, Winner
from moecache.schemas.warm import WarmRow

if TYPE_CHECKING:
    from moecache.dispatch.explain import Explanation


def of_winner(winner: Winner, file: str, tier: Tier | None) -> dict[str, Any]:
    """A winner with its margin, file and tier, which is null where nobody asked for it."""
    return {**named(winner.problem), **_dumped(winner), "margin": winner.margin, "tier": tier, "file": file}


def of_prediction(row: Prediction, file: str) -> dict[str, Any]:
    """A prediction under the names of a winner, where nothing that only a measurement tells is anything but null."""
    unmeasured = dict.fromkeys([*Winner.model_fields, "margin"])
    return {**named(row.problem), **unmeasured, **row.model_dump(mode="json"), "tier": "predicted", "file": file}


def of_timing(timing: Timing, file: str) -> dict[str, Any]:
    """A timing with its file."""
    return {**named(timing.problem), **_dumped(timing), "file": file}


def of_explanation(found: "Explanation") -> dict[str, Any]:
    """An explanation; on a hit `nearest` is null and `differs` empty."""
    return {
        **named(found.problem),
        "choice": None if found.choice is None else found.choice.model_dump(mode="json"),
        "timings": [of_timing(timing, file) for timing, file in found.timings],
        "nearest": None if found.nearest is None else named(found.nearest),
        "differs": [difference._asdict() for difference in found.differs],
        "notes": list(found.notes),
    }


def of_warm_row(row: WarmRow) -> dict[str, Any]:
    """What one problem is served with after a warm-up; `measured` counts the candidates of this run."""
    fields: dict[str, Any] = to_jsonable_python(row, exclude={"problem", "noise"})
    return named(row.problem) | fields


def named(problem: Problem) -> dict[str, Any]:
    return {"id": problem.id, "key": problem.key}


def _dumped(value: Winner | Timing) -> dict[str, Any]:
    """By way of JSON text, which alone spells an infinite error; the environment with its id."""
    fields: dict[str, Any] = json.loads(value.model_dump_json())
    return fields | {"environment": {"id": value.environment.id, **fields["environment"]}}
