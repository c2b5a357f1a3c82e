"""What all commands share: the program, common options, and what is printed for an error."""

import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moecache.cli import show
from moecache.schemas.errors import InvalidInput, MoecacheError
from moecache.settings import Settings, settings_from

INTERRUPTED = 130
LARGEST = (1 << 63) - 1  # that a cache file can hold
# what typer raises for a wrong call: the class has moved from click into typer
WrongCall: Any = typer.BadParameter.__base__


class Program(TyperGroup):
    """All commands. An error is one line on stderr; the exit code is 1 for a failure, 2 for a wrong call."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        given = list(sys.argv[1:] if args is None else args) or ["--help"]
        run, options = super().main, {**options, "standalone_mode": False}
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: show.note(f"moecache: {_line(message)}")
            warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch is complete without
            sys.exit(_exit_code(lambda: run(given, *rest, **options)))


def _exit_code(run: Callable[[], Any]) -> int:
    try:
        return int(run() or 0)
    except MoecacheError as error:
        show.note(f"moecache: {_line(error)}")
        return 1
    except SystemExit as left:  # typer's, when the reader of its help went away
        if isinstance(left.__context__, BrokenPipeError):
            return 0
        raise
    except OSError as error:
        if error.filename is None:  # what typer prints
            show.drop(sys.stdout)
        show.note(f"moecache: {error.filename or 'input or output'}: {error.strerror or error}")
        return 1
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except MemoryError as error:
        show.note(f"moecache: out of memory: {_line(error)}")
        return 1
    except WrongCall as error:
        command = getattr(getattr(error, "ctx", None), "command_path", "moecache")
        show.note(
            f"moecache: {_line(error.format_message()).replace('Value error, ', '').rstrip('.')}; see {command} --help"
        )
        return 2


def _line(text: object) -> str:
    return " ".join(str(text).split())


app = typer.Typer(
    cls=Program,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog="Example: moecache warm config.json && moecache ls",
)


def whole(text: str | int) -> int:
    """A whole number; typer's own message does not name what it was given."""
    if not re.fullmatch(r"\d+", str(text), re.ASCII):
        raise typer.BadParameter(f"{text!r} is no whole number")
    if int(text) > LARGEST:
        raise typer.BadParameter(f"{text} is too large; at most {LARGEST} is allowed")
    return int(text)


def text(name: str, metavar: str, help: str) -> Any:
    return typer.Option(f"--{name}", metavar=metavar, help=help)


Db = Annotated[Path | None, text("db", "FILE", "The cache file; default: MOECACHE_DB, else the user's.")]
Alone = Annotated[Path | None, text("db", "FILE", "Only this file; default: all files that answer calls.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

OfOp = Annotated[str, text("op", "NAMES", "Only these ops, like moe_sort.")]
OfArch = Annotated[str, text("arch", "NAMES", "Only these architectures, like sm_90,gfx942.")]
OfTokens = Annotated[str, text("tokens", "NUMBERS", "Only these numbers of tokens, like 16,256.")]
OfExperts = Annotated[str, text("experts", "NUMBERS", "Only these numbers of experts.")]
OfRouting = Annotated[str, text("routing", "NAMES", "Only these routing buckets, like a0e1; zipf stands for its own.")]
OfEnvironment = Annotated[str, text("environment", "IDS", "Only from these environments.")]

Tokens = Annotated[str, text("tokens", "NUMBERS", "Token counts of a call, like 1,16,256.")]
Routing = Annotated[
    str, text("routing", "NAMES", "uniform, zipf, hot1 or dirX, like dir2; dirX makes one in X experts effective.")
]
Tp = Annotated[int, typer.Option("--tp", parser=whole, metavar="N", help="Number of tensor-parallel ranks.")]
Ep = Annotated[int, typer.Option("--ep", parser=whole, metavar="N", help="Number of expert-parallel ranks.")]
Dtype = Annotated[
    str | None, text("dtype", "NAME", "bf16, fp16, fp8, or fp8_block, fp8_channel, fp8_tensor; default: the model's.")
]


def settings(db: Path | None = None) -> Settings:
    """The settings of the environment; `--db` stands above them."""
    found = settings_from(os.environ)
    return replace(found, db=db) if db else found


def words(text: str) -> list[str]:
    """`a, b` as a list."""
    return [word.strip() for word in text.split(",") if word.strip()]


def names(text: str, option: str) -> list[str]:
    """As `words`, where there must be one.

    Raises:
        typer.BadParameter: there is none.
    """
    if not words(text):
        raise typer.BadParameter(f"{text!r} names nothing; write for example uniform,zipf", param_hint=option)
    return words(text)


def numbers(text: str, option: str, least: int = 0, most: int = LARGEST) -> list[int]:
    """`1,16` as a list.

    Raises:
        typer.BadParameter: anything else.
    """
    found = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() for word in found):
        wrong = f"{text!r} is no list of whole numbers; write for example 1,16,256"
        raise typer.BadParameter(wrong, param_hint=option)
    outside = [word for word in found if len(word) > 20 or not least <= int(word) <= most]
    if outside:
        raise typer.BadParameter(f"{outside[0]} is not allowed; from {least} to {most} is", param_hint=option)
    return [int(word) for word in found]


def filters(**texts: str) -> dict[str, Any]:
    """Filters of the store from the texts of options; those not given are left out."""
    numeric = ("tokens", "experts")
    return {
        name: numbers(text, f"--{name}") if name in numeric else words(text) for name, text in texts.items() if text
    }


def checked(option: str, parse: Callable[[str], Any], text: str) -> Any:
    """The value of an option; what `parse` refuses is a wrong call."""
    try:
        return parse(text)
    except InvalidInput as error:
        raise typer.BadParameter(str(error), param_hint=option) from None
