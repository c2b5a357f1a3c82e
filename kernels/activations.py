"""The activations of an MoE layer: what each is called, what it takes, and how a problem names it. Imports no torch.

A call says a name, whether experts have a gate, and perhaps a limit. Kernels, and the arguments that they are launched
with, know all of it by one word: the name, "_limited" behind it where gate and up are clamped though that is no part of
the activation, "_ungated" where experts have no gate.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from moecache.schemas.errors import InvalidInput
from moecache.schemas.layer import Layer
from moecache.schemas.problem import Problem

_LIMITED, _UNGATED = "_limited", "_ungated"


@dataclass(frozen=True)
class Activation:
    """What an activation takes beside gate and up.

    Attributes:
        ungated: whether experts without a gate may have it.
        clamped: whether it takes a limit where one is given.
        alpha, limit: defaults of what it always has.
    """

    ungated: bool = True
    clamped: bool = False
    alpha: float | None = None
    limit: float | None = None


ALPHA, LIMIT = 1.702, 7.0  # as in gpt-oss
LARGEST = 3.4028234663852886e38  # that float32 holds, in which kernels compute
ACTIVATIONS = {
    "silu": Activation(clamped=True),
    "gelu": Activation(),
    "gelu_tanh": Activation(),
    "relu2": Activation(),
    "swiglu_oai": Activation(ungated=False, alpha=ALPHA, limit=LIMIT),
}
WORDS = frozenset(
    name + end
    for name, takes in ACTIVATIONS.items()
    for end, there in (("", True), (_LIMITED, takes.clamped), (_UNGATED, takes.ungated))
    if there
)
NAMES = tuple(ACTIVATIONS)


@lru_cache(maxsize=256, typed=True)
def settled(activation: str, gated: bool, alpha: float | None, limit: float | None) -> tuple[str, float, float]:
    """(word, alpha, limit) of a call.

    Raises:
        InvalidInput: no such activation, or one that does not take what is given.
        TypeError: something that cannot be kept for the next call.
    """
    takes = ACTIVATIONS.get(activation) if isinstance(activation, str) else None
    if takes is None:
        raise InvalidInput(f"activation={activation!r}; allowed are {', '.join(NAMES)}")
    if not isinstance(gated, bool):
        raise InvalidInput(f"gated={gated!r}; allowed are True and False")
    if not gated and not takes.ungated:
        allowed = ", ".join(name for name, each in ACTIVATIONS.items() if each.ungated)
        raise InvalidInput(f"activation={activation!r} with gated=False: it needs a gate; allowed are {allowed}")
    if alpha is not None and takes.alpha is None:
        allowed = ", ".join(name for name, each in ACTIVATIONS.items() if each.alpha is not None)
        raise InvalidInput(f"alpha={alpha!r} with activation={activation!r}, which has none; {allowed} has")
    clamps = takes.limit is not None or (takes.clamped and gated)
    if limit is not None and not clamps:
        allowed = ", ".join(name for name, each in ACTIVATIONS.items() if each.clamped or each.limit is not None)
        raise InvalidInput(
            f"limit={limit!r} with activation={activation!r} and gated={gated}, which has none; "
            f"{allowed} with a gate take one"
        )
    end = _UNGATED if not gated else _LIMITED if takes.clamped and limit is not None else ""
    return activation + end, _number("alpha", alpha, takes.alpha), _number("limit", limit, takes.limit)


def _number(name: str, given: Any, own: float | None) -> float:
    if given is None:
        return own or 0.0  # which nobody reads
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 < given <= LARGEST:
        raise InvalidInput(f"{name}={given!r}; allowed are None and finite float32 numbers above 0")
    return float(given)


def panels(word: str) -> int:
    """Rows of w1 that one of its results needs: gate and up, or one. A product without an activation has one."""
    return 1 if not word or word.endswith("_ungated") else 2


def bare(word: str) -> str:
    """The word of what happens to the gate, or to the one that is there without it."""
    return word.removesuffix("_ungated")


def ungated(word: str) -> str:
    """The same without a gate; not every activation has it."""
    return word + _UNGATED


def dims_of(word: str) -> dict[str, Any]:
    """How a problem says it; nothing of gated silu."""
    gated = {} if panels(word) == 2 else {"gated": 0}
    return gated | ({} if bare(word) == "silu" else {"activation": bare(word)})


def word_of(problem: Problem) -> str:
    """What `dims_of` was made of."""
    word = str(problem.dim("activation", "silu"))
    return word if problem.dim("gated", 1) else ungated(word)


def call_of(word: str) -> dict[str, Any]:
    """Arguments of a call with this word; a limit that some of a few random numbers are past."""
    name = bare(word)
    limit = 2.0 if name.endswith(_LIMITED) else None
    return {"activation": name.removesuffix(_LIMITED), "gated": panels(word) == 2, "limit": limit}


def of_layer(layer: Layer) -> str:
    """The word of a model's layer; '' where no kernel has it."""
    try:
        return settled(layer.activation, layer.gated, None, layer.limit)[0]
    except InvalidInput:
        return ""
