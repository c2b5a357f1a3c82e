"""How output reaches the reader: fitted to a terminal, complete and grep-able in a pipe, or as JSON."""

import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

GAP = 2  # blanks between columns
NARROWEST = 26  # a column that may wrap is not squeezed below this


@dataclass(frozen=True)
class Column:
    """One column. On a narrow terminal the one with the highest `drop` goes first; 0 always stays."""

    title: str
    right: bool = False
    wrap: bool = False
    drop: int = 0


@dataclass(frozen=True)
class Table:
    """Rows of text; `strong` are the numbers of the rows to stress on a terminal."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    strong: frozenset[int] = frozenset()

    def width(self, at: int) -> int:
        """Characters that column `at` takes."""
        return max([len(self.columns[at].title), *(len(row[at]) for row in self.rows)])


def terminal() -> bool:
    """Whether a person is looking. Nothing is fitted, shortened or coloured for anybody else."""
    return sys.stdout.isatty()


def counted(number: int, what: str) -> str:
    """`no files`, `1 file`, `2 files`."""
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def say(text: str = "") -> None:
    """Print. A reader that went away (`| head`) has what it wanted, so the rest is dropped."""
    _write(sys.stdout, text)


def note(text: str) -> None:
    """Print beside the output, on stderr."""
    _write(sys.stderr, text)


def _write(stream: TextIO, text: str) -> None:
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say_json(value: Any) -> None:
    """JSON, indented so that a person can read it too."""
    say(json.dumps(value, indent=2, ensure_ascii=False))


def say_facts(facts: Sequence[tuple[str, str]], indent: int = 0) -> None:
    """Names and values in two columns; on a terminal long values wrap within theirs."""
    width = max((len(name) for name, _ in facts), default=0) + GAP
    room = shutil.get_terminal_size().columns - indent - width if terminal() else sys.maxsize
    for name, value in facts:
        fitted = value if len(value) <= room else _wrapping(value)
        first, *rest = textwrap.wrap(fitted, max(room, NARROWEST), break_on_hyphens=False) or [""]
        lines = [f"{name:{width}}{first}".rstrip(), *(" " * width + line for line in rest)]
        say("\n".join(" " * indent + line for line in lines))


def say_heading(text: str) -> None:
    """A line above a table or facts."""
    if terminal():
        from rich.console import Console
        from rich.text import Text

        Console(highlight=False).print(Text(text, style="bold"))
    else:
        say(text)


def say_table(table: Table) -> None:
    """Through rich on a terminal, in plain aligned lines elsewhere."""
    if terminal():
        _rich(table)
    else:
        say("\n".join(plain(table)))


def say_sections(sections: Sequence[tuple[str, Table]]) -> None:
    """Tables under headings; a heading may be empty."""
    for number, (heading, table) in enumerate(sections):
        if number:
            say()
        if heading:
            say_heading(heading)
        say_table(table)


def plain(table: Table) -> list[str]:
    """Aligned lines, however wide, header first."""
    widths = [table.width(at) for at in range(len(table.columns))]
    lines = [[column.title for column in table.columns], *table.rows]
    return [
        (" " * GAP)
        .join(
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(line, widths, table.columns, strict=True)
        )
        .rstrip()
        for line in lines
    ]


def fitting(table: Table, width: int) -> list[int]:
    """The columns to show in `width` characters, in order."""
    kept = list(range(len(table.columns)))
    while sum(_least(table, at) + GAP for at in kept) - GAP > width:
        droppable = [at for at in kept if table.columns[at].drop]
        if not droppable:
            break
        kept.remove(max(droppable, key=lambda at: table.columns[at].drop))
    return kept


def _least(table: Table, at: int) -> int:
    return min(table.width(at), NARROWEST) if table.columns[at].wrap else table.width(at)


def _wrapping(cell: str) -> str:
    """A long config wraps where one of its parameters ends."""
    return re.sub(r",(?=\S)", ", ", cell)


def _rich(table: Table) -> None:
    from rich.console import Console
    from rich.table import Table as Grid
    from rich.text import Text

    console = Console(highlight=False)
    grid = Grid(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim")
    kept = fitting(table, console.width)
    for column in (table.columns[at] for at in kept):
        grid.add_column(
            column.title,
            justify="right" if column.right else "left",
            no_wrap=not column.wrap,
            overflow="fold",
        )
    for number, row in enumerate(table.rows):
        cells = [Text(_wrapping(row[at]) if table.columns[at].wrap else row[at]) for at in kept]
        grid.add_row(*cells, style="bold" if number in table.strong else None)
    console.print(grid)
