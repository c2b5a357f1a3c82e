"""The formats of weights that exist, by name. Only this file imports them, and only those that are asked for."""

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from moecache.schemas.errors import InvalidInput

if TYPE_CHECKING:  # names are read where torch is not loaded
    from moecache.kernels.formats.contract import Format

# Name of a format with scales -> what a layer's dtype calls such weights, which is the file here that has it among its
# FORMATS. The first name of a file is meant where a layer says no more.
KINDS = {"fp8_block": "fp8", "fp8_channel": "fp8", "fp8_tensor": "fp8"}


def usual(dtype: str) -> str:
    """The format of a layer's dtype that names no kind; '' for weights without scales, and unknown ones."""
    return next((kind for kind, word in KINDS.items() if word == dtype), "")


@cache
def get(kind: str, dtype: str = "bf16") -> "Format":
    """The format of that name; '' is that of weights without scales, in the dtype of the tokens.

    Raises:
        InvalidInput: there is no such format; the message lists those that exist.
    """
    if kind and kind not in KINDS:
        raise InvalidInput(f"quant.kind={kind!r}; allowed are {', '.join(KINDS)}")
    module = import_module(f"moecache.kernels.formats.{KINDS[kind] if kind else 'plain'}")
    found: Format = module.FORMATS[kind or dtype]
    return found
