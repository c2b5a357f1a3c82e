"""The exchange format: timings as JSON, which people can read, check and mail."""

import hashlib
import json
import math
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, GetJsonSchemaHandler, TypeAdapter, ValidationError
from pydantic.json_schema import JsonSchemaValue

from moecache.schemas.errors import InvalidInput, in_words, typed
from moecache.schemas.frozen import Frozen
from moecache.schemas.timing import Environment, Timing

Model = TypeVar("Model", bound=BaseModel)

VERSION = 1  # additions do not change it; of a file of a later version, the rows that are understood are read


class Row(Timing):
    """A timing as it stands in the file. It names its environment by id, as a thousand rows share a handful of them."""

    environment: str  # type: ignore[assignment]
    key: str = Field(default="", description="the problem's key; a row that has another is left out")


class _AsRows:
    """What the JSON Schema says of timings."""

    @classmethod
    def __get_pydantic_json_schema__(cls, _: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(TypeAdapter(tuple[Row, ...]).core_schema)


class Exchange(Frozen):
    """Timings, and the environments that they name. In the file the timings are `Row`s."""

    format: Literal["moecache"] = "moecache"
    version: int = Field(default=VERSION, ge=1)
    created: str = Field(default="", description="UTC, ISO 8601")
    sha256: str = Field(default="", description="of environments and timings as canonical JSON; '' = unchecked")
    environments: dict[str, Environment] = Field(default_factory=dict)
    timings: Annotated[tuple[Timing, ...], _AsRows] = ()

    _skipped: int = 0

    @property
    def skipped(self) -> int:
        """Number of rows that were left out on loading, as only a later moecache understands them."""
        return self._skipped


def pack(timings: Iterable[Timing]) -> Exchange:
    """An export of these timings, made now."""
    timings = tuple(timings)
    environments = {t.environment.id: t.environment for t in timings}
    exchange = Exchange(
        created=datetime.now(UTC).isoformat(timespec="seconds"), environments=environments, timings=timings
    )
    return exchange.model_copy(update={"sha256": _digest(*_content(exchange))})


def dump(exchange: Exchange) -> str:
    """The text of the file: one environment or timing on each line, so that version control shows what changed."""
    environments, rows = _content(exchange)
    head = {"format": exchange.format, "version": exchange.version, "created": exchange.created}
    lines = [f"  {json.dumps(k)}: {json.dumps(v)}," for k, v in (head | {"sha256": exchange.sha256}).items()]
    named = ",\n".join(f"    {json.dumps(id)}: {json.dumps(value)}" for id, value in environments.items())
    listed = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    lists = [f'  "environments": {{\n{named}\n  }},', f'  "timings": [\n{listed}\n  ]']
    return "\n".join(["{", *lines, *lists, "}\n"])


def load(text: str | bytes) -> Exchange:
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
    known = {id: _valid(Environment, value, f"environments[{id!r}]", strict=True) for id, value in environments.items()}
    timings = []
    for number, row in enumerate(rows):
        try:
            timing = _valid(Timing, _expanded(row, known), f"timings[{number}]", strict=True)
            typed(f"timings[{number}].key", row.get("key", ""), str)
        except InvalidInput:
            if not later:
                raise
            continue
        if row.get("key", timing.problem.key) == timing.problem.key:
            timings.append(timing)
    exchange = _valid(Exchange, {**raw, "environments": known, "timings": timings}, "this export")
    exchange._skipped = len(rows) - len(timings)
    return exchange


def _content(exchange: Exchange) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Environments and rows as plain JSON values, defaults left out."""
    environments = {
        id: environment.model_dump(mode="json", exclude_defaults=True)
        for id, environment in sorted(exchange.environments.items())
    }
    rows = []
    for timing in exchange.timings:
        # by way of JSON text, which alone spells an infinite error "Infinity"
        row = json.loads(timing.model_dump_json(exclude_defaults=True, exclude={"environment"}))
        rows.append({"key": timing.problem.key, "environment": timing.environment.id, **row})
    return environments, rows


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


def _valid(model: type[Model], value: Any, where: str, strict: bool = False) -> Model:
    """`strict`: no text for a number, no number for a truth value."""
    try:
        return model.model_validate(value, strict=strict)
    except ValidationError as error:
        raise InvalidInput(f"{where} is malformed at {in_words(error, 'its top')}") from None
