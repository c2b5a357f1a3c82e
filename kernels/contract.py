"""What a tunable operation says of itself: the types that ops, tuner and dispatcher share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from moecache.schemas.config import Config
from moecache.schemas.device import Device
from moecache.schemas.layer import Layer
from moecache.schemas.problem import Problem

if TYPE_CHECKING:  # a process that only compiles starts without it
    import torch

Args = dict[str, Any]  # the arguments of one call, by name
EXTREME = -1  # the seed of inputs whose result fits their dtype and whose parts do not: see Op.inputs


@dataclass(frozen=True)
class Source:
    """One Triton kernel with everything that decides its machine code, so that it compiles without a device."""

    fn: Any  # the triton.jit function
    signature: dict[str, str]  # parameter -> "*i32", "i32", "constexpr", …
    constexprs: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)  # num_warps, num_stages, waves_per_eu, …
    aligned: tuple[str, ...] = ()  # parameters that are multiples of 16
    large: tuple[str, ...] = ()  # pointers into more than 2 GiB, which AMD cannot address with 32-bit offsets


class Op(Protocol):
    """A tunable operation. Everything here is a pure function of its arguments, but for `launch`.

    An op whose candidates are collectives, which all ranks must launch alike, has `collective = True`. It is served
    within `using(team=…)`. Its problems are made of what all ranks know: of no rank's own tokens or routing. Its
    candidates end by themselves where another rank does not come.
    """

    name: str
    source: str  # of a wrapped op what its caller says of its code, part of every key; '' of ours: see kernels/code.py

    def problems(self, layer: Layer, tokens: Sequence[int], device: Device) -> list[Problem]:
        """What `warm` tunes for a model's layer: one problem a token bucket, routing bucket left empty."""

    def left_out(self, layer: Layer, tokens: Sequence[int], device: Device) -> str:
        """What `problems` leaves out of a layer and why, in words for people; '' for nothing."""

    def space(self, problem: Problem, device: Device) -> list[Config]:
        """Every config worth considering, in a fixed order; the first is the static default. All of them fit."""

    def fits(self, problem: Problem, config: Config, device: Device) -> str:
        """Why this config cannot serve this problem on this device; '' when it can. Accepts any config, also one that a
        file made up: what no space makes, for whatever number of tokens, never fits."""

    def cost(self, problem: Problem, config: Config, device: Device) -> float:
        """Predicted microseconds from hardware constants alone."""

    def inputs(self, problem: Problem, topk_ids: "torch.Tensor", seed: int) -> Args:
        """Fresh random arguments of this problem with the given routing, on the device of `topk_ids`.

        The seed EXTREME asks for large parts of a result that fits, so that a candidate shows that rounds them early.
        """

    def outputs(self, args: Args) -> Any:
        """Uninitialised outputs for `launch`: a tensor or a dataclass of tensors."""

    def launch(self, config: Config, args: Args, out: Any) -> Any:
        """Run one candidate on the current stream into `out`, which it returns. Never synchronises."""

    def reference(self, args: Args) -> Any:
        """The plain torch result, in higher precision where that matters."""

    def error(self, got: Any, want: Any) -> float:
        """Relative error of a result; 0.0 for exact, inf for wrong integers or non-finite values."""

    def tolerance(self, problem: Problem) -> float:
        """The largest error that still counts as right."""

    def sources(self, problem: Problem, config: Config, device: Device) -> list[Source]:
        """The Triton kernels that this config launches; empty for plain torch candidates."""


def kernels(op: Op, problem: Problem, config: Config, device: Device) -> list[Source]:
    """All that a launch of this config compiles: its own kernels, and those of other ops that the op's `companions`,
    a method that few have, names."""
    companions: Any = getattr(op, "companions", None)
    own = list(op.sources(problem, config, device))
    return own + list(companions(problem, config, device)) if companions else own


@lru_cache(maxsize=1024)
def _possible(
    every: Callable[[Problem, Device], Sequence[Config]], problem: Problem, device: Device
) -> dict[Config, str]:
    return {config: repr(config) for config in every(problem, device)}


def made_up(
    every: Callable[[Problem, Device], Sequence[Config]], problem: Problem, config: Config, device: Device
) -> str:
    """Why a config is none of `every(problem, device)`, to the type of each value, as True equals 1; '' when it is one.

    A file may name anything: what no space of the op makes was never compiled, checked or timed by anybody.
    """
    known = _possible(every, problem, device).get(config)
    return "" if known == repr(config) else f"{config.name} is in no search space of {problem.op}"
