"""The types that ops, tuner and dispatcher share: what a tunable operation must offer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from moecache.predict.work import Work
from moecache.schemas.config import Config
from moecache.schemas.device import Device
from moecache.schemas.layer import Layer
from moecache.schemas.problem import Problem

if TYPE_CHECKING:  # a process that only compiles starts without it
    import torch

Args = Any  # the arguments of one call: a LayerCall, a SortCall, a ProductCall, or what a wrapped function takes
Bound = Callable[[Args, Any], Any]  # runs a config for calls that lie alike in memory: (arguments, outputs) -> outputs
TESTED = ("sm_90",)  # architectures on which the tests have run every candidate of the built-in ops
EXTREME = -1  # a seed: the result fits its dtype, and parts of its sums do not; see Op.inputs


@dataclass(frozen=True)
class Source:
    """One Triton kernel with all that decides its machine code. So it compiles without a device."""

    fn: Any  # the triton.jit function
    signature: dict[str, str]  # parameter -> "*i32", "i32", "constexpr", …
    constexprs: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)  # num_warps, num_stages, waves_per_eu, …
    aligned: tuple[str, ...] = ()  # parameters that are multiples of 16
    large: tuple[str, ...] = ()  # pointers into more than 2 GiB, which AMD cannot address with 32-bit offsets


class Op(Protocol):
    """A tunable operation. Every member is a pure function of its arguments; what `bind` gives is run.

    The candidates of an op may be collectives: all ranks must launch the same one. Such an op has `collective = True`
    and is served within `using(team=…)`. Its problems hold only what all ranks know, and nothing of one rank's own
    tokens or routing. Its candidates end by themselves if another rank does not come.
    """

    name: str
    source: str  # for a wrapped op: what its caller says of its code, part of every key; '' for ours, see code.py

    def problems(self, layer: Layer, tokens: Sequence[int], device: Device) -> list[Problem]:
        """What `warm` tunes for a layer of a model: one problem for each token bucket, with an empty routing bucket."""

    def left_out(self, layer: Layer, tokens: Sequence[int], device: Device) -> str:
        """What `problems` leaves out of a layer and why, in words for people; '' for nothing."""

    def space(self, problem: Problem, device: Device) -> list[Config]:
        """Every config worth considering, in a fixed order; the first is the static default. All of them fit."""

    def fits(self, problem: Problem, config: Config, device: Device) -> str:
        """Why this config cannot serve this problem on this device; '' if it can.

        It accepts any config, also one that a file made up. A config that no space makes, for any number of tokens,
        never fits.
        """

    def work(self, problem: Problem, config: Config, device: Device) -> Work:
        """What a config makes the device do for a problem; `moecache.predict` says how long that takes."""

    def inputs(self, problem: Problem, topk_ids: "torch.Tensor", seed: int) -> Args:
        """Fresh random arguments of this problem, on the device of `topk_ids`.

        Args:
            topk_ids: [tokens, top-k], the routing.
            seed: of the random values. With EXTREME the result fits its dtype but parts of its sums do not, so that a
                candidate that rounds those early gives a wrong result.
        """

    def outputs(self, args: Args) -> Any:
        """Uninitialised outputs for `launch`: a tensor or a dataclass of tensors."""

    def bind(self, config: Config, args: Args, out: Any) -> Bound:
        """What runs one candidate for this call, and for every other one whose tensors lie alike in memory.

        It is called with arguments and outputs, runs on the current stream, writes into the outputs and returns them.
        It never synchronises.
        """

    def reference(self, args: Args) -> Any:
        """The plain torch result, in higher precision where that matters."""

    def error(self, got: Any, want: Any) -> float:
        """Relative error of a result: 0.0 if it is exact, inf for wrong integers or non-finite values."""

    def tolerance(self, problem: Problem) -> float:
        """The largest error that still counts as right."""

    def sources(self, problem: Problem, config: Config, device: Device) -> list[Source]:
        """All Triton kernels that a call with this config launches; none for plain torch candidates."""


def failing(error: Exception) -> Bound:
    """What stands for a config that cannot be bound: it raises the reason."""

    def run(args: Args, out: Any) -> NoReturn:
        raise error

    return run


@lru_cache(maxsize=1024)
def _possible(
    every: Callable[[Problem, Device], Sequence[Config]], problem: Problem, device: Device
) -> dict[Config, str]:
    return {config: repr(config) for config in every(problem, device)}


def made_up(
    every: Callable[[Problem, Device], Sequence[Config]], problem: Problem, config: Config, device: Device
) -> str:
    """Why a config is none of `every(problem, device)`; '' if it is one. The types of values count, as True equals 1.

    A file may name any config. Nobody has compiled, checked or timed one that no space of the op makes.
    """
    known = _possible(every, problem, device).get(config)
    return "" if known == repr(config) else f"{config.name} is in no search space of {problem.op}"
