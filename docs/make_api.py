"""Writes docs/api.md from the docstrings of the public names: `python docs/make_api.py`; `--check` only compares."""

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import moecache
import moecache.ops
from moecache.dispatch import Dispatcher, dispatcher
from moecache.dispatch.explain import Explanation
from moecache.schemas.errors import DeviceError, DeviceLost, RanksDiffer, StoreError, TeamLost
from moecache.schemas.timing import Choice
from moecache.schemas.warm import WarmRow
from moecache.settings import Settings
from moecache.team import Team
from moecache.wrapping import Wrapped

PAGE = Path(__file__).with_name("api.md")
HEAD = """# The Python API

<!-- Made by docs/make_api.py from docstrings: change those, then run `python docs/make_api.py` -->

`import moecache` loads neither torch nor Triton; the first use of a name does. Every error is a `MoecacheError`.
"""
MODULES = re.compile(r"\b(?:collections\.abc|typing|pathlib|moecache(?:\.\w+)*)\.(?=[A-Z])")
WIDE = 90
ELSEWHERE = {  # public things that the package itself does not name, and the members that users need
    "moecache.ops.moe_align_block_size": (moecache.ops.moe_align_block_size, ()),
    "moecache.ops.moe_sorting": (moecache.ops.moe_sorting, ()),
    "moecache.dispatch.dispatcher": (dispatcher, ()),
    "moecache.dispatch.Dispatcher": (Dispatcher, ("explain", "measure", "wanted", "flush", "digest", "reload")),
    "moecache.team.Team": (Team, ("of", "gather", "barrier", "agree", "broadcast", "same", "staying")),
    "moecache.wrapping.Wrapped": (Wrapped, ("problem", "explain")),
    "moecache.settings.Settings": (Settings, ()),
    "moecache.schemas.warm.WarmRow": (WarmRow, ()),
    "moecache.schemas.timing.Choice": (Choice, ()),
    "moecache.dispatch.explain.Explanation": (Explanation, ()),
    "moecache.schemas.errors.DeviceError": (DeviceError, ()),
    "moecache.schemas.errors.DeviceLost": (DeviceLost, ()),
    "moecache.schemas.errors.RanksDiffer": (RanksDiffer, ()),
    "moecache.schemas.errors.StoreError": (StoreError, ()),
    "moecache.schemas.errors.TeamLost": (TeamLost, ()),
}


def render() -> str:
    """The page."""
    public = {f"moecache.{name}": (getattr(moecache, name), ()) for name in moecache.__all__}
    every = {**public, **ELSEWHERE}
    index = [f"- [`{name}`](#{_anchor(name)}): {_doc(what).splitlines()[0]}" for name, (what, _) in every.items()]
    parts = [_section(name, what, members) for name, (what, members) in every.items()]
    return "\n".join([HEAD, *index, "", *parts])


def _anchor(name: str) -> str:
    return name.replace(".", "").lower()


def _doc(what: Any) -> str:
    return inspect.getdoc(what) or ""


def _section(name: str, what: Any, members: tuple[str, ...]) -> str:
    parts = [f"## {name}", "", *_shown(name.rpartition(".")[2], what)]
    for member in members:
        parts += [f"**`{member}`**", "", *_shown(member, getattr(what, member))]
    return "\n".join(parts)


def _shown(name: str, what: Any) -> list[str]:
    """The signature of what is called, and what its docstring says."""
    if isinstance(what, type) and issubclass(what, Exception):
        called = []
    elif fields := getattr(what, "model_fields", None) or getattr(what, "__dataclass_fields__", None):
        called = ["```py", f"{name}: {', '.join(fields)}", "```", ""]
    else:
        called = ["```py", f"{name}{_signature(what)}", "```", ""]
    return [*called, "```text", _doc(what), "```", ""]


def _signature(what: Any) -> str:
    """One argument a line where it is long; names without the modules that they come from."""
    found = inspect.signature(what)
    kept = [each for each in found.parameters.values() if each.name != "self"]
    text = str(found.replace(parameters=kept))
    if len(text) >= WIDE:
        lines, keyword = [], False
        for each in kept:
            if each.kind is each.KEYWORD_ONLY and not keyword:
                lines.append("    *,")
                keyword = True
            lines.append(f"    {each},")
        back = inspect.formatannotation(found.return_annotation)
        text = "\n".join(["(", *lines, f") -> {back}"])
    return re.sub(r"(?<=[:>] )'([^']*)'", r"\1", MODULES.sub("", text))


def main(arguments: list[str]) -> int:
    """Write the page, or say whether it is stale."""
    page = render()
    if "--check" not in arguments:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
        print(f"{PAGE} is stale: run python docs/make_api.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
