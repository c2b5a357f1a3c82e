"""How output reaches the reader: fitted to a terminal, complete and grep-able in a pipe, or as JSON."""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO, TypeVar

from moecache import text
from moecache.schemas.errors import printable
from moecache.text import GAP, Facts, Section, Table
from moecache.text import counted as counted

T = TypeVar("T")


def terminal() -> bool:
    """Whether a person is looking. Nothing is fitted, shortened or coloured for anybody else."""
    return sys.stdout.isatty()


def say(line: str = "") -> None:
    """Print one line. A reader that went away (`| head`) has what it wanted, so the rest is dropped."""
    _write(sys.stdout, printable(line))


def apart(parts: Iterable[T]) -> Iterator[T]:
    """These, with an empty line before each but the first."""
    for number, part in enumerate(parts):
        if number:
            say()
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


def _print(console: Any, shown: Any) -> None:
    with console.capture() as lines:
        console.print(shown)
    _write(sys.stdout, lines.get().removesuffix("\n"))


def say_json(value: Any) -> None:
    """JSON, indented so that a person can read it too; what is not printable stands in it escaped."""
    lines = json.dumps(value, indent=2, ensure_ascii=False)
    _write(sys.stdout, "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in lines))


def say_facts(facts: Facts, indent: int = 0) -> None:
    """Names and values in two columns; on a terminal long values wrap within theirs."""
    width = shutil.get_terminal_size().columns if terminal() else sys.maxsize
    for line in text.facts(facts, indent, width):
        say(line)


def say_heading(heading: str) -> None:
    """A line above a table or facts."""
    if terminal():
        from rich.console import Console
        from rich.text import Text

        _print(Console(highlight=False), Text(printable(heading), style="bold"))
    else:
        say(heading)


def say_table(table: Table) -> None:
    """Through rich on a terminal, row by row where that is too narrow; in plain aligned lines elsewhere."""
    if not terminal():
        _write(sys.stdout, "\n".join(text.plain(table)))
        return
    from rich.console import Console

    console = Console(highlight=False)
    fitted = text.fitting(table, console.width)
    if fitted.least() <= console.width:
        _print(console, _grid(fitted))
        return
    kept = table.only([at for at, column in enumerate(table.columns) if not column.drop])
    for row in apart(kept.rows):
        say_facts([(column.title, cell) for column, cell in zip(kept.columns, row, strict=True)])


def say_sections(sections: Sequence[Section]) -> None:
    """Tables under headings; a heading may be empty."""
    for heading, table in apart(sections):
        if heading:
            say_heading(heading)
        say_table(table)


def _grid(table: Table) -> Any:
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim")
    for column in table.columns:
        justify: Any = "right" if column.right else "left"
        least = min(column.least, table.width(table.columns.index(column))) if column.wrap else None
        grid.add_column(column.title, justify=justify, no_wrap=not column.wrap, overflow="fold", min_width=least)
    for number, row in enumerate(table.rows):
        cells = [
            Text(text.wrapping(cell) if column.wrap else cell) for cell, column in zip(row, table.columns, strict=True)
        ]
        grid.add_row(*cells, style="bold" if number in table.strong else None)
    return grid
