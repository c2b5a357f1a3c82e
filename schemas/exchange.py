"""The exchange format: timings as JSON, which people can read, check and mail."""

import hashlib
import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, Field, ValidationError

from moecache.schemas.errors import InvalidInput, in_words, typed
from moecache.schemas.frozen import Frozen
from moecache.schemas.timing import Environment, Timing

Model = TypeVar("Model", bound=BaseModel)

VERSION = 1  # additions do not change it; of a file of a later version, the rows that are understood are read


class Row(Timing):
    """A timing as it stands in the file. It names its environment by id, as a thousand rows share a handful of them."""

    environment: str  # type: ignore[assignment]
    key: str = Field(default="", description="the problem's key; a row that has another is left out")


class Exchange(Frozen):
    """A file: timings, and the environments that they name."""

    format: Literal["moecache"] = "moecache"
    version: int = Field(default=VERSION, ge=1)
    created: str = Field(default="", description="UTC, ISO 8601")
    sha256: str = Field(default="", description="of environments and timings as canonical JSON; '' = unchecked")
    environments: dict[str, Environment] = Field(default_factory=dict)
    timings: tuple[Row, ...] = ()


class Loaded(NamedTuple):
    """What a file says. `skipped` counts the rows that were left out, as only a later moecache understands them."""

    timings: list[Timing]
    skipped: int


def dump(timings: Sequence[Timing], created: str = "") -> str:
    """The text of a file: one environment or timing on each line, so that version control shows what changed."""
    there = {t.environment.id: t.environment for t in timings}
    environments = {id: there[id].model_dump(mode="json", exclude_defaults=True) for id in sorted(there)}
    # by way of JSON text, which alone spells an infinite error "Infinity"
    plain = (json.loads(t.model_dump_json(exclude_defaults=True, exclude={"environment"})) for t in timings)
    named = ({"key": t.problem.key, "environment": t.environment.id} for t in timings)
    rows = [name | values for name, values in zip(named, plain, strict=True)]
    created = created or datetime.now(UTC).isoformat(timespec="seconds")
    head = {"format": "moecache", "version": VERSION, "created": created, "sha256": _digest(environments, rows)}
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    told = ",\n".join(f"    {json.dumps(id)}: {json.dumps(value)}" for id, value in environments.items())
    listed = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    lists = [f'  "environments": {{\n{told}\n  }},', f'  "timings": [\n{listed}\n  ]']
    return "\n".join(["{", *lines, *lists, "}\n"])


def load(text: str | bytes) -> Loaded:
    """What a file says. Unknown fields are ignored. A row is left out if this version builds another key from its
    problem: then the problem has a field that this version does not know.

    Raises:
        InvalidInput: it is no JSON, or has another format; it does not match its sha256; a row is malformed.
    """
    raw = _parsed(text)
    later = _version(raw) > VERSION
    environments, rows = raw.get("environments", {}), raw.get("timings", [])
    if not isinstance(environments, dict) or not isinstance(rows, list):
        raise InvalidInput("this export is malformed: `environments` must be an object and `timings` a list")
    if raw.get("sha256") and raw["sha256"] != _digest(environments, rows):
        raise InvalidInput(
            "this export does not match its sha256: it was cut short or changed on the way; fetch it again,"
            " or remove the sha256 if you changed it on purpose"
        )
    known = {id: _valid(Environment, value, f"environments[{id!r}]") for id, value in environments.items()}
    timings = []
    for number, row in enumerate(rows):
        try:
            timing = _valid(Timing, _expanded(row, known), f"timings[{number}]")
            typed(f"timings[{number}].key", row.get("key", ""), str)
        except InvalidInput:
            if not later:
                raise
            continue
        if row.get("key", timing.problem.key) == timing.problem.key:
            timings.append(timing)
    return Loaded(timings, len(rows) - len(timings))


def _digest(environments: dict[str, Any], rows: list[Any]) -> str:
    content = {"environments": environments, "timings": rows}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _parsed(text: str | bytes) -> dict[str, Any]:
    typed("the export", text, str, bytes)
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"this is no export of moecache: no JSON ({error})") from None
    if not isinstance(raw, dict) or raw.get("format") != "moecache":
        raise InvalidInput('this is no export of moecache: it has no "format": "moecache"')
    return raw


def _version(raw: dict[str, Any]) -> int:
    version = raw.get("version")
    if type(version) is not int or version < 1:
        raise InvalidInput(f"this export has version {version!r}; versions are whole numbers from 1 on")
    return version


def _expanded(row: Any, environments: dict[str, Environment]) -> Any:
    """A row with its environment in place of the id, and infinity in place of its name."""
    if isinstance(row, dict) and isinstance(row.get("environment"), str):
        row = {**row, "environment": environments.get(row["environment"])}
    return {**row, "error": math.inf} if isinstance(row, dict) and row.get("error") == "Infinity" else row


def _valid(model: type[Model], value: Any, where: str) -> Model:
    """Strictly: no text for a number, no number for a truth value."""
    try:
        return model.model_validate(value, strict=True)
    except ValidationError as error:
        raise InvalidInput(f"{where} is malformed at {in_words(error, 'its top')}") from None
