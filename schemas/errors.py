"""The errors that moecache raises. Every message names the value and what is allowed, on one printable line."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

LISTED = 4  # a message has at most so many findings of one value


def printable(value: object) -> str:
    """The value as one line in which nothing is hidden.

    A character that is not printable becomes U+FFFD: terminal escapes, marks that turn the order of text or take no
    room, halves of surrogate pairs. Line ends and other blanks become a space. Use it for all that a file says, as its
    writer may be a stranger.
    """
    text = str(value)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)


class MoecacheError(Exception):
    """Base of all errors of this library. The text is always one printable line."""

    def __str__(self) -> str:
        return printable(super().__str__())


class InvalidInput(MoecacheError, ValueError):
    """An argument, option, file or environment variable has a value that is not allowed."""


class NoDevice(MoecacheError, RuntimeError):
    """A backend was asked for, but its driver, package or device is absent."""


class DeviceError(MoecacheError, RuntimeError):
    """A call into a vendor's runtime failed."""


class DeviceLost(DeviceError):
    """A call hangs on the device, or broke its context. This process cannot use the device any more.

    `timings` holds all that the tuner knew until then, with the failure of the candidate that did it. Store them.
    """

    timings: tuple[object, ...] = ()


class StoreError(MoecacheError, OSError):
    """A cache file cannot be read or written, or is not a cache file."""


class TeamLost(MoecacheError, RuntimeError):
    """Ranks that must agree cannot any more: one died, hangs, raised, or is at another step. The message says which."""


class RanksDiffer(MoecacheError, RuntimeError):
    """Ranks that must serve the same configs would not. The message says which rank has what."""


class NotTuned(MoecacheError, LookupError):
    """In strict mode a problem has no measured choice."""


def typed(name: str, value: Any, *kinds: type) -> Any:
    """The value, if it is of one of these types. True does not count as a whole number.

    Raises:
        InvalidInput: it is of none of them; the message names it.
    """
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise InvalidInput(f"{name} is {value!r:.200}; allowed is {' or '.join(kind.__name__ for kind in kinds)}")
    return value


def each_typed(name: str, values: Any, *kinds: type) -> list[Any]:
    """The values as a list, if all are of one of these types.

    Raises:
        InvalidInput: they are no sequence, or one of them is of another type; the message names its place.
    """
    try:
        listed = [values] if isinstance(values, str | bytes) else list(values)
    except TypeError:
        listed = [values]
        name = f"{name}, which is no sequence:"
    return [
        typed(f"{name}[{number}]" if len(listed) > 1 else name, value, *kinds) for number, value in enumerate(listed)
    ]


def in_words(error: "ValidationError | ValueError | TypeError", top: str = "") -> str:
    """What pydantic found, as `field: what is wrong`, in our words, and any other error in its own; `top` names the
    whole value."""
    if not hasattr(error, "errors"):
        return str(error)
    found = dict.fromkeys(_found(each["loc"] or (top,), each["input"], each["msg"]) for each in error.errors())
    told = [f"{where}: {what}" if where else what for where, what in found]
    return "; ".join(told[:LISTED]) + (f" (and {len(told) - LISTED} more)" if len(told) > LISTED else "")


def _found(place: tuple[int | str, ...], given: object, said: str) -> tuple[str, str]:
    """One finding. A value that fits no type of a union has one finding for each type; they are one here."""
    if place[-1] in ("int", "str", "bool"):
        return ".".join(map(str, place[:-1])), f"{given!r} is neither int, str nor bool"
    said = said.removeprefix("Value error, ")
    rest = said.removeprefix("Input should be ")
    return ".".join(map(str, place)), said if rest == said else f"{given!r:.200} is not allowed; allowed is {rest}"
