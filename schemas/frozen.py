"""The base of all values here, and the kinds of value of which keys and names are made."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer


class Frozen(BaseModel):
    """A value that never changes. Unknown fields are ignored: a later version may have written them."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    def __copy__(self) -> "Frozen":
        """Without what a `cached_property` made: `model_copy` changes fields of the copy."""
        copied = super().__copy__()
        for name in copied.__dict__.keys() - type(self).model_fields.keys():
            del copied.__dict__[name]
        return copied


Vendor = Literal["nvidia", "amd", "cpu"]
Value = int | str | bool  # no floats: a key must compare exactly
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:+\-]*$")]

_WORD = re.compile(r"^[A-Za-z0-9_.:+\-]*$")


def as_word(value: Value) -> str:
    """One value as it stands in a key: text without spaces or '=', and booleans as 0 and 1."""
    text = str(int(value)) if isinstance(value, bool) else str(value)
    if not _WORD.fullmatch(text):  # match() would let a trailing newline through
        raise ValueError(f"{text!r} cannot stand in a key: allowed are letters, digits and _ . : + -")
    return text


def _named_values(value: Any) -> tuple[tuple[str, Value], ...]:
    """A mapping or a sequence of pairs, as pairs sorted by name. No name comes twice."""
    try:
        pairs = [(str(name), item) for name, item in (value.items() if isinstance(value, dict) else value)]
    except TypeError:
        raise ValueError(f"{value!r} is neither a mapping nor a sequence of (name, value) pairs") from None
    for name, item in pairs:
        if isinstance(item, float):  # pydantic would take 8.0 for 8
            raise ValueError(f"{name}={item!r} is a float; allowed are whole numbers, text and booleans")
        as_word(name), as_word(item)
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError(f"one name is given twice: {pairs}")
    return tuple(sorted(pairs, key=lambda pair: pair[0]))


NamedValues = Annotated[
    tuple[tuple[str, Value], ...],
    BeforeValidator(_named_values),
    PlainSerializer(dict, return_type=dict[str, Value]),
]
