"""Writes docs/cli.md from the commands' help: `python docs/make_cli.py`; with `--check` it only compares."""

import inspect
import sys
from pathlib import Path
from typing import Any

from typer.models import ArgumentInfo, CommandInfo

from moecache.cli import app, files

PAGE = Path(__file__).with_name("cli.md")
HEAD = """# The command line

<!-- Made by docs/make_cli.py from the commands' help: change that, then run `python docs/make_cli.py` -->

`moecache` and `python -m moecache` are the same program. `moecache COMMAND --help` prints the text below.

{index}

**Exit codes**: an error is one line on stderr. A reader that goes away (`| head`) and closed streams change no exit
code.

| code | meaning |
|---|---|
| 0 | done |
| 1 | failed; or there is a finding (`verify`, `doctor`); or fields match nothing (`ls`, `export`, `report`) |
| 2 | wrong call |
| 130 | stopped with Ctrl-C |

**Output**: on a terminal, `ls` and `warm` print a table for each layer. In a pipe they print one with every column, and
a cell holds no blanks, so that `moecache ls | grep` and `awk` work. `--json` prints the same for programs. Times are in
µs.

**Files**: `report` and `verify` read every file that answers calls: the user's, those on `MOECACHE_PATH`, and those
inside the package. `ls` leaves out those inside the package. With `--db FILE` they read only that file. The other
commands work on the user's file: `MOECACHE_DB`, else `moecache/moecache.sqlite` below `$XDG_CACHE_HOME` or `~/.cache`.
"""


def render() -> str:
    """The page."""
    commands = {_name(each): each for group in (app, files.commands) for each in group.registered_commands}
    index = [f"- [`{name}`](#{name}): {_help(each).splitlines()[0]}" for name, each in commands.items()]
    head = HEAD.format(index="\n".join(index))
    return "\n".join([head, *(_section(name, each) for name, each in commands.items())])


def _name(command: CommandInfo) -> str:
    assert command.callback is not None
    return command.name or command.callback.__name__


def _help(command: CommandInfo) -> str:
    return inspect.cleandoc(command.callback.__doc__ or "")


def _section(name: str, command: CommandInfo) -> str:
    rows, usage = [], ["moecache", name]
    for parameter in inspect.signature(command.callback or _help, eval_str=True).parameters.values():
        (told,) = parameter.annotation.__metadata__
        required = parameter.default is parameter.empty
        if isinstance(told, ArgumentInfo):
            usage.append(str(told.metavar) if required else f"[{told.metavar}]")
        rows.append(f"| `{_flag(parameter, told)}` | {told.help} | {'' if required else _default(parameter)} |")
    table = ["| | | default |", "|---|---|---|", *rows, ""]
    example = f"Example: `{str(command.epilog).removeprefix('Example: ')}`"
    usage_block = ["```", " ".join([*usage, "[OPTIONS]"]), "```", ""]
    return "\n".join([f"## {name}", "", _help(command), "", *usage_block, *table, example, ""])


def _flag(parameter: inspect.Parameter, told: Any) -> str:
    if isinstance(told, ArgumentInfo):
        return str(told.metavar)
    given = [text for text in (told.default, *(told.param_decls or ())) if str(text).startswith("--")]
    flag = given[0] if given else f"--{parameter.name.replace('_', '-')}"  # typer takes the first for a default
    return f"{flag} {told.metavar or ''}".rstrip()


def _default(parameter: inspect.Parameter) -> str:
    return f"`{parameter.default}`" if parameter.default not in (None, False, "") else ""


def main(arguments: list[str]) -> int:
    """Write the page, or say whether it is stale."""
    page = render()
    if "--check" not in arguments:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
        print(f"{PAGE} is stale: run python docs/make_cli.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
