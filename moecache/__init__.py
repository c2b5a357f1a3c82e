"""Finds, remembers and ships the fastest Mixture-of-Experts kernels. Nothing heavy is imported before first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moecache.forks import Lock
from moecache.version import __version__ as __version__

if TYPE_CHECKING:
    from moecache.dispatch import using
    from moecache.ops import Quant, fused_moe, grouped_gemm, moe_sort
    from moecache.schemas.errors import InvalidInput, MoecacheError, NotTuned
    from moecache.warmup import warmup
    from moecache.wrapping import wrap

__all__ = ["InvalidInput", "MoecacheError", "NotTuned", "Quant", "fused_moe", "grouped_gemm", "moe_sort"]
__all__ += ["using", "warmup", "wrap"]

_HOME = {"InvalidInput": "schemas.errors", "MoecacheError": "schemas.errors", "NotTuned": "schemas.errors"}
_HOME |= dict.fromkeys(("Quant", "fused_moe", "grouped_gemm", "moe_sort"), "ops")
_HOME |= {"using": "dispatch", "warmup": "warmup", "wrap": "wrapping"}


_importing = Lock(awaited=True)  # a child that is forked while a thread imports would wait for that module for ever

if not TYPE_CHECKING:  # a type checker would let any name pass

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'moecache' has no attribute {name!r}; it has {', '.join(__all__)}")
        with _importing:
            value = getattr(import_module(f"moecache.{_HOME[name]}"), name)
        globals()[name] = value  # replaces the submodule of the same name, too, which the import has set
        return value


def __dir__() -> list[str]:
    """The public names, loaded or not, and what Python itself asks for."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
