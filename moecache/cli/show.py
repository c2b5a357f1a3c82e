"""How output reaches the reader: lines and JSON on stdout, notes on stderr."""

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, TypeVar

from moecache.schemas.errors import printable
from moecache.schemas.problem import Problem

T = TypeVar("T")


def say(*lines: str) -> None:
    """Print lines. A reader that went away (`| head`) has what it wanted, so the rest is dropped."""
    _write(sys.stdout, "\n".join(map(printable, lines)))


def apart(parts: Iterable[T]) -> Iterator[T]:
    """These, with an empty line before each but the first."""
    for number, part in enumerate(parts):
        if number:
            say("")
        yield part


def note(line: str) -> None:
    """Print one line beside the output, on stderr."""
    _write(sys.stderr, printable(line))


def _write(stream: TextIO, line: str) -> None:
    try:
        print(line, file=stream, flush=True)
    except OSError as error:
        drop(stream)
        if stream is sys.stdout and not isinstance(error, BrokenPipeError):
            raise


def drop(stream: TextIO) -> None:
    """Let what is still to be written there go nowhere, so that Python's end is quiet."""
    with contextlib.suppress(OSError, ValueError):  # one without a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say_json(value: Any) -> None:
    """JSON, indented so that a person can read it too; what is not printable stands in it escaped."""
    lines = json.dumps(value, indent=2, ensure_ascii=False)
    _write(sys.stdout, "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in lines))


def record(row: Any, file: str) -> dict[str, Any]:
    """A winner, prediction or timing as JSON, with the id and key of its problem."""
    fields: dict[str, Any] = json.loads(row.model_dump_json())  # which alone spells an infinite error
    if "environment" in fields:
        fields["environment"]["id"] = row.environment.id
    return named(row.problem) | fields | {"file": file}


def named(problem: Problem) -> dict[str, Any]:
    return {"id": problem.id, "key": problem.key}
