"""The settings of a process: mode, strictness, files, budget. They come from the environment, when first needed."""

import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

from moecache.schemas.errors import InvalidInput

Mode = Literal["tune", "replay", "off"]
MODES: tuple[Mode, ...] = get_args(Mode)
LEVELS = ("", "info", "debug")
MEMORY = Path(":memory:")  # MOECACHE_DB=:memory: keeps what is measured for this process alone
PREBUILT = Path(__file__).parent / "prebuilt"  # the last tier: files inside the wheel

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
SWITCHES = ("strict", "isolate", "debug", "kernels", "tune")
_FLAGS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class File:
    """A cache file and why it is read: the user's own, on MOECACHE_PATH, or inside the package."""

    path: Path
    role: Literal["user", "path", "prebuilt"]


def default_path() -> Path:
    """Where a user's cache file lies: below $XDG_CACHE_HOME, if that is an absolute path, else below ~/.cache.

    If no home is known, the path keeps its `~`, and no file of such a name is opened.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():
        cache = Path("~/.cache")
        with suppress(RuntimeError):
            cache = cache.expanduser()
    return cache / "moecache" / "moecache.sqlite"


@dataclass(frozen=True)
class Settings:
    """Settings of one dispatcher.

    Attributes:
        mode: `tune` measures at the first encounter; `replay` never measures and never writes; `off` serves
            every op's static default and opens no file.
        strict: serve only measured choices; anything else raises NotTuned.
        db: the user's file; None means `default_path()`, `:memory:` no file.
        path: read-only cache files, asked in this order after the user's file.
        budget: seconds from the beginning of a call in which it may tune; 0 never tunes in a call. A problem for which
            this time is too short is noted as wanted; `moecache warm --wanted` takes its time and measures it.
        debug: check the values in tensors in every call outside a capture. Each such call waits for the device, and
            none is a hit. Without it values are checked at the first encounter, in mode `tune`.
        isolate: compile candidates for GPUs in subprocesses. On a GPU of an architecture where the tests have not run
            the candidates of built-in ops, also run these first in a subprocess.
        kernels: an engine that finds our plugin runs our kernels too, for the layers that they can run.
        tune: an engine that finds our plugin measures before it serves, in its own warm-up.
        tune_budget: seconds that this may take.
        tune_gib: memory of a GPU that this may take, in GiB, beside what the engine has.
        log: `info` prints on stderr what each problem is served with, why and from which file; `debug` prints every
            timing too; '' leaves both to the logger `moecache`.
    """

    mode: Mode = "tune"
    strict: bool = False
    db: Path | None = None
    path: tuple[Path, ...] = ()
    budget: float = 1.5
    isolate: bool = True
    debug: bool = False
    kernels: bool = False
    tune: bool = False
    tune_budget: float = 300.0
    tune_gib: float = 2.0
    log: Literal["", "info", "debug"] = ""

    def __post_init__(self) -> None:
        for name, words in (("mode", MODES), ("log", LEVELS)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in words:
                raise InvalidInput(
                    f"{name}={value!r:.200} is not allowed; allowed are {', '.join(filter(None, words))}"
                )
        for name in SWITCHES:
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise InvalidInput(f"{name}={value!r:.200} is not allowed; allowed are True and False")
        for name in ("budget", "tune_budget"):
            object.__setattr__(self, name, seconds(getattr(self, name)))
        if not (type(self.tune_gib) in (int, float) and 0 < self.tune_gib < math.inf):
            raise InvalidInput(f"tune_gib={self.tune_gib!r:.200} is not allowed; allowed are numbers above 0")
        object.__setattr__(self, "db", None if self.db is None else _path("db", self.db))
        given = self.path if isinstance(self.path, Sequence) and not isinstance(self.path, str) else (self.path,)
        object.__setattr__(self, "path", tuple(_path("path", each) for each in given))

    def user_file(self) -> Path | None:
        """The only file that is written; None if everything stays in memory."""
        path = self.db or default_path()
        return None if path == MEMORY else path

    def shipped(self) -> list[Path]:
        """The read-only tiers: `path`, then the files inside the package."""
        return [*self.path, *sorted(PREBUILT.glob("*.sqlite"))]

    def files(self) -> list[File]:
        """Every file that answers calls, in the order in which they are asked."""
        user = self.user_file()
        behind = [File(path, "prebuilt" if path.parent == PREBUILT else "path") for path in self.shipped()]
        return [*([File(user, "user")] if user else []), *behind]


def _path(name: str, value: object) -> Path:
    if not isinstance(value, str | os.PathLike):
        raise InvalidInput(f"{name}={value!r:.200} is no path; allowed are a text and a pathlib.Path")
    return Path(value)


def seconds(budget: float | str) -> float:
    """A budget, as a number of seconds or a text.

    Raises:
        InvalidInput: it is neither, not finite, or below 0.
    """
    found = duration(budget) if isinstance(budget, str) else budget
    number = isinstance(found, int | float) and not isinstance(found, bool)
    if not number or not (math.isfinite(found) and found >= 0):
        raise InvalidInput(f"budget={budget!r:.200}; allowed are seconds from 0 on, or a text like 500ms, 60s or 1m30s")
    return found


def duration(text: str) -> float:
    """Seconds of `500ms`, `60s`, `2m`, `1h`, `1m30s`; a bare number means seconds.

    Raises:
        InvalidInput: anything else.
    """
    plain = text.strip().lower()
    if re.fullmatch(r"\d+(\.\d+)?", plain):
        return float(plain)
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h)", plain)
    if not parts or "".join(number + unit for number, unit in parts) != plain:
        raise InvalidInput(f"{text!r} is no duration; write for example 500ms, 60s, 2m, 1m30s or 1h")
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


def settings_from(environ: Mapping[str, str]) -> Settings:
    """Settings from MOECACHE_MODE, _STRICT, _DB, _PATH, _BUDGET, _ISOLATE, _DEBUG, _KERNELS, _TUNE, _TUNE_BUDGET,
    _TUNE_GIB, _LOG; unset or empty is the default.

    Warns of any other variable that begins with MOECACHE_.

    Raises:
        InvalidInput: a malformed value; the message names the variable and what is allowed.
    """
    for told in unknown(environ):
        warnings.warn(told, RuntimeWarning, stacklevel=2)
    given: dict[str, Any] = {}
    for name in Settings.__dataclass_fields__:
        text = environ.get(f"MOECACHE_{name.upper()}", "").strip()
        try:
            given |= {name: _PARSE.get(name, str)(text)} if text else {}
            Settings(**given)
        except InvalidInput as error:
            raise InvalidInput(f"MOECACHE_{name.upper()}={text!r}: {error}") from None
    return Settings(**given)


def unknown(environ: Mapping[str, str]) -> list[str]:
    """Warnings of variables that begin with MOECACHE_ but are not ours, so nobody reads them."""
    known = [name.upper() for name in Settings.__dataclass_fields__]
    told = []
    for name in sorted(name for name in environ if name.startswith("MOECACHE_") and name[9:] not in known):
        near = get_close_matches(name[9:], known, 1)
        advice = f"is MOECACHE_{near[0]} meant?" if near else f"known are MOECACHE_{', _'.join(known)}"
        told.append(f"{name} is no variable of moecache, so it is ignored; {advice}")
    return told


def _file(text: str) -> Path:
    """A path. `~user` stays if nobody knows that home; opening the file then says so, once."""
    with suppress(RuntimeError):
        return Path(text).expanduser()
    return Path(text)


def _files(text: str) -> tuple[Path, ...]:
    return tuple(_file(part) for part in text.split(os.pathsep) if part)


def _flag(text: str) -> bool:
    if text.lower() not in _FLAGS:
        raise InvalidInput("write 1 or 0")
    return _FLAGS[text.lower()]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InvalidInput("write a number, like 2 or 0.5") from None


_PARSE: dict[str, Callable[[str], Any]] = {"db": _file, "path": _files, "tune_gib": _number, "log": str.lower}
_PARSE |= {"budget": duration, "tune_budget": duration, **dict.fromkeys(SWITCHES, _flag)}
