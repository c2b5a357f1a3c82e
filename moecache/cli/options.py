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
from moecache.kernels.formats.registry import KINDS
from moecache.schemas.errors import InvalidInput, MoecacheError
from moecache.schemas.warm import MOST_TOKENS
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
        told, code = _line(error), 1
    except SystemExit as left:  # typer's, when the reader of its help went away
        if isinstance(left.__context__, BrokenPipeError):
            return 0
        raise
    except OSError as error:
        if error.filename is None:  # what typer prints
            show.drop(sys.stdout)
        told, code = f"{error.filename or 'input or output'}: {error.strerror or error}", 1
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except MemoryError as error:
        told, code = f"out of memory: {_line(error)}", 1
    except WrongCall as error:
        command = getattr(getattr(error, "ctx", None), "command_path", "moecache")
        told = f"{_line(error.format_message()).replace('Value error, ', '').rstrip('.')}; see {command} --help"
        code = 2
    show.note(f"moecache: {told}")
    return code


def _line(text: object) -> str:
    return " ".join(str(text).split())


app = typer.Typer(
    cls=Program,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog="Example: moecache warm config.json && moecache ls",
)


# --- what is given, as values; what cannot be one is a wrong call ---


def whole(text: str | int) -> int:
    """A whole number; typer's own message does not name what it was given."""
    if not re.fullmatch(r"\d+", str(text), re.ASCII):
        raise InvalidInput(f"{text!r} is no whole number")
    if int(text) > LARGEST:
        raise InvalidInput(f"{text} is too large; at most {LARGEST} is allowed")
    return int(text)


def words(text: str) -> list[str]:
    """`a, b` as a list."""
    if found := [word.strip() for word in text.split(",") if word.strip()]:
        return found
    raise InvalidInput(f"{text!r} names nothing; write for example uniform,zipf")


def _numbers(text: str) -> list[int]:
    found = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() for word in found):
        raise InvalidInput(f"{text!r} is no list of whole numbers; write for example 1,16,256")
    if outside := [word for word in found if len(word) > 20 or not 1 <= int(word) <= MOST_TOKENS]:
        raise InvalidInput(f"{outside[0]} is not allowed; from 1 to {MOST_TOKENS} is")
    return [int(word) for word in found]


def option(name: str, metavar: str, help: str, parser: Callable[[str], Any] | None = None) -> Any:
    return typer.Option(f"--{name}", metavar=metavar, help=help, parser=parser)


# --- options of several commands ---

Db = Annotated[Path | None, option("db", "FILE", "The cache file; default: MOECACHE_DB, else the user's.")]
Alone = Annotated[Path | None, option("db", "FILE", "Only this file; default: all files that answer calls.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

OfOp = Annotated[Any, option("op", "NAMES", "Only these ops, like moe_sort.", words)]
Fields = Annotated[
    list[str] | None,
    typer.Argument(metavar="FIELD=VALUES…", help="Only these problems, like arch=sm_90 tokens=16,256."),
]

# A model's layers and their calls.
CONFIG = "A model's config.json, the folder with it, or sizes: experts=8,topk=2,hidden=4096,intermediate=14336."
Config = Annotated[str | None, typer.Argument(metavar="CONFIG", help=CONFIG)]
Tokens = Annotated[Any, option("tokens", "NUMBERS", "Token counts of a call, like 1,16,256.", _numbers)]
ROUTINGS = "uniform, zipf, hot1 or dirX, like dir2; dirX makes one in X experts effective."
Routing = Annotated[Any, option("routing", "NAMES", ROUTINGS, words)]
Tp = Annotated[int, option("tp", "N", "Number of tensor-parallel ranks.", whole)]
Ep = Annotated[int, option("ep", "N", "Number of expert-parallel ranks.", whole)]
DTYPES = f"bf16, fp16, {', '.join(dict.fromkeys(KINDS.values()))}, or {', '.join(KINDS)}; default: the model's."
Dtype = Annotated[str | None, option("dtype", "NAME", DTYPES)]


def only_read(chosen: Settings) -> Settings:
    """The same with the user's file among those that are only read: it is neither made nor put aside."""
    file = chosen.user_file()
    there = (file,) if file is not None and file.exists() else ()
    return replace(chosen, db=Path(":memory:"), path=(*there, *chosen.path))


def settings(db: Path | None = None) -> Settings:
    """The settings of the environment; `--db` stands above them."""
    found = settings_from(os.environ)
    return replace(found, db=db) if db else found


def measuring(db: Path | None = None) -> Settings:
    """The same.

    Raises:
        InvalidInput: they forbid to measure.
    """
    if (chosen := settings(db)).mode != "tune":
        raise InvalidInput(f"MOECACHE_MODE={chosen.mode} forbids to measure; set it to tune, or unset it")
    return chosen
