"""The Triton kernel of an engine as an op, the config that is served to it, and the hook by which the engine asks."""

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import product
from math import log2
from types import ModuleType
from typing import Any, NamedTuple

import torch

from moecache import feedback
from moecache.dispatch import dispatcher
from moecache.integrations import tables
from moecache.integrations.tables import VARIANT
from moecache.kernels import contract
from moecache.kernels import registry as ops
from moecache.kernels.shared_inputs import lent
from moecache.schemas.config import Config
from moecache.schemas.device import Device
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import Problem, bucket_name
from moecache.wrapping.sources import source_of
from moecache.wrapping.wrapped import WrappedOp

# What engines' own tuners try, beside what the engine would take and what tables name.
GRID = {
    "BLOCK_SIZE_M": (16, 32, 64, 128, 256),
    "BLOCK_SIZE_N": (32, 64, 128, 256),
    "BLOCK_SIZE_K": (64, 128, 256),
    "GROUP_SIZE_M": (1, 16, 32, 64),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5),
}
BYTES = {"": 2, "float32": 4}  # of an element of a tile; 1 in all other formats
Chooses = Callable[..., Any]  # try_get_optimal_moe_config
SORTS = "moe_align_block_size"  # the layer of moecache.ops.moe_align_block_size
RARE = ("block_shape", "per_channel_quant")
FIRST = ("w1_shape", "w2_shape", "top_k", "dtype", "M")  # its parameters, in every version so far


@dataclass(eq=False)
class EngineKernel(WrappedOp):
    """`fn` is the engine's function of a whole layer. Its default is what the engine would take, so only a config that
    is proved faster than that ever takes its place."""

    chooses: Chooses = field(kw_only=True)

    told = staticmethod(tables.told)

    def theirs(self, problem: Problem) -> Mapping[str, Any]:
        """What the engine would take."""
        experts, hidden, intermediate = problem.experts, problem.dim("hidden"), problem.dim("intermediate")
        w1, w2 = (experts, 2 * intermediate, hidden), (experts, hidden, intermediate)
        rare = {"per_channel_quant": True} if problem.dim("per_channel") else {}  # only SGLang's has such a parameter
        asked = w1, w2, problem.topk, problem.dtype or None, problem.tokens
        return dict(self.chooses(*asked, block_shape=tables.block(problem), **rare))

    def inputs(self, problem: Problem, topk_ids: torch.Tensor, seed: int) -> contract.Args:
        """Copies of the arguments of the call that asks; within `lending`, a call of a layer that is lent."""
        if (live := lent(problem, seed)) is None:
            return super().inputs(problem, topk_ids, seed)
        dtype, call = live
        rng = torch.Generator(topk_ids.device).manual_seed(seed)
        x = torch.randn(len(topk_ids), problem.dim("hidden"), generator=rng, device=rng.device).to(dtype)
        router = torch.rand(topk_ids.shape, generator=rng, device=rng.device) + 0.1
        return call(x, router / router.sum(1, keepdim=True), topk_ids)

    def bound(self, config: Config) -> Callable[..., Any]:
        """`fn` with this config."""
        return functools.partial(self.fn, config=dict(config.params))

    def space(self, problem: Problem, device: Device) -> list[Config]:
        """What the engine would take, then the grid, what is most like it first."""
        default = tables.config_of(self.theirs(problem))
        if default is None:
            raise InvalidInput(f"{self.name} takes no tiles for {problem.key}, so there is nothing to choose")
        return [default, *(each for each in _around(default) if not self.fits(problem, each, device))]

    def fits(self, problem: Problem, config: Config, device: Device) -> str:
        """Why the kernel cannot take it, or ''."""
        if why := tables.refused(config, problem.dim("block_k")):
            return why
        row: dict[str, Any] = dict(config.params)
        tile = row["BLOCK_SIZE_K"] * (row["BLOCK_SIZE_M"] + row["BLOCK_SIZE_N"]) * BYTES.get(problem.dtype, 1)
        stages = row.get("num_stages", 1) - (device.vendor == "amd")  # there one of them lies in registers
        if device.shared_bytes and tile * max(stages, 1) > device.shared_bytes:
            return f"{tile * stages} bytes of tiles, and the device has {device.shared_bytes}"
        return ""


def op(name: str, layer: Callable[..., Any], package: str, text: Any, chooses: Chooses) -> EngineKernel:
    """An engine's kernel.

    Args:
        name: of the op.
        layer: runs a whole layer.
        package: the module with `override_config` and `get_config`.
        text: the kernel; a change of its text retires its timings.
        chooses: the engine's own function that chooses a config.
    """

    @functools.wraps(layer)
    def run(*args: Any, config: Mapping[str, Any], **kwargs: Any) -> Any:
        engine = import_module(package)
        before = engine.get_config()
        try:
            with engine.override_config(dict(config)):
                return layer(*args, **kwargs)
        finally:  # it forgets what was forced before where the layer raises
            engine.override_config(before).__enter__()

    made = EngineKernel(name, source_of(text), run, given={}, right=layer, chooses=chooses)
    ops.register(made)
    return made


@functools.lru_cache(maxsize=256)
def _around(default: Config) -> Sequence[Config]:
    """The grid, by steps from a config. Whatever else the config has, all have."""
    row: dict[str, Any] = {"num_warps": 4, "num_stages": 3, **dict(default.params)}
    every = (row | dict(zip(GRID, values, strict=True)) for values in product(*GRID.values()))
    ordered = sorted(every, key=lambda other: sum(abs(log2(other[name] / max(row[name], 1))) for name in GRID))
    return [config for each in ordered if (config := Config(variant=VARIANT, params=tuple(each.items()))) != default]


class Asked(NamedTuple):
    """What an engine asks of its kernel, as far as the answer depends on it; tokens as their bucket."""

    w1: Sequence[int]
    w2: Sequence[int]
    topk: int
    dtype: str | None
    tokens: int
    block: tuple[int, int] | None
    per_channel: bool = False

    def dims(self) -> dict[str, Any]:
        """The same as a problem's."""
        sizes, (block_n, block_k) = (self.w2[0], self.w2[2], self.tokens, self.w1[2], self.topk), self.block or (0, 0)
        blocks = {"block_n": block_n, "block_k": block_k}
        return tables.dims(*sizes, dtype=self.dtype or "", per_channel=self.per_channel, **blocks)


def served(op: EngineKernel, asked: Asked) -> dict[str, Any]:
    """The row that serves a question: that of a config which was measured on such a device, for the routing that our
    sort posted, else for any; empty where there is none. Measures, compiles and writes nothing, and waits for nothing.
    """
    active, posted = dispatcher(), _posted(asked) if feedback.slots else feedback.ANY
    key = (posted, "", op.name, asked)
    row: dict[str, Any] | None = active.hot.get(key)
    if row is None:
        place, row = active.places.first(torch.cuda.current_device() if torch.cuda.is_available() else 0), {}
        for routing in (*([bucket_name(posted)] if posted >= 0 else []), ""):
            problem = op.problem({**asked.dims(), "routing": routing}, place.device)
            choice = active.stored(op, problem, index=place.index) if active.settings.mode != "off" else None
            if choice is not None:
                row = dict(choice.config.params)
                break
        active.hot[key] = row
    return row


def _posted(asked: Asked) -> int:
    """The routing bucket of the last sort of such a call, in the place of the engine's sort; ANY where none was."""
    number = torch.cuda.current_device() if torch.cuda.is_initialized() else -1  # type: ignore[no-untyped-call]
    device = torch.device("cpu") if number < 0 else torch.device("cuda", number)
    slot = feedback.slots.get((SORTS, asked.tokens, asked.w2[0], device))
    return feedback.ANY if slot is None else feedback.read(slot, number)


def chooser(
    original: Chooses, op: EngineKernel, forced: Callable[[], Any], fixed: Callable[[], bool], wide: str = ""
) -> Chooses:
    """The engine's function that chooses a config, with ours where there is one.

    Args:
        forced: the config that the engine forces, now.
        fixed: whether results must not depend on the config, in this process.
        wide: the parameter that asks for a second row, for the down projection; the first then serves both.

    Raises:
        InvalidInput: it has other parameters than we know.
    """
    names = list(inspect.signature(original).parameters)
    if tuple(names[: len(FIRST)]) != FIRST or "block_shape" not in names:
        raise InvalidInput(f"try_get_optimal_moe_config({', '.join(names)}) is not known")
    at = {name: names.index(name) - len(FIRST) if name in names else len(names) for name in (*RARE, wide)}

    def given(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return kwargs[name] if name in kwargs else args[at[name]] if at[name] < len(args) else None

    @functools.wraps(original)
    def choose(w1_shape: Any, w2_shape: Any, top_k: int, dtype: str | None, M: int, *args: Any, **kwargs: Any) -> Any:
        try:
            if forced() is None and not fixed():
                block, channel = given("block_shape", args, kwargs), given("per_channel_quant", args, kwargs)
                tokens = 1 << (M - 1).bit_length() if M > 0 else 0
                asked = Asked(w1_shape, w2_shape, top_k, dtype, tokens, block and tuple(block), bool(channel))
                if row := served(op, asked):
                    return (dict(row), (None, None)) if wide and given(wide, args, kwargs) else dict(row)
        except Exception as error:  # a server goes on with what the engine takes
            if op.name not in _said:
                _said.add(op.name)
                told = "moecache cannot choose, so the engine does: %s: %s"
                logger(op.name).warning(told, type(error).__name__, error)
        return original(w1_shape, w2_shape, top_k, dtype, M, *args, **kwargs)

    choose.moecache = op  # type: ignore[attr-defined]
    return choose


_said: set[str] = set()  # ops for which it was said that one cannot choose


def logger(name: str) -> logging.Logger:
    """Below the engine's own logger, so that its settings hold: `vllm.moecache`."""
    return logging.getLogger(f"{name.partition('.')[0]}.moecache")


def rebound(old: Any, new: Any) -> None:
    """Put `new` where modules have `old` under any name, as some import it by name."""
    for module in list(sys.modules.values()):
        for name, value in list(vars(module).items()) if isinstance(module, ModuleType) else ():
            if value is old:
                setattr(module, name, new)


def quietly(name: str, install: Callable[[], str]) -> None:
    """Install a plugin. It never raises, and says once what it did: a server must start whatever we do.

    Args:
        name: of the engine.
        install: does it, and says what it did; '' for nothing that was not said.
    """
    try:
        if dispatcher().settings.mode == "off":
            return
        if said := install():
            logger(name).info("moecache %s; MOECACHE_MODE=off turns it off", said)
    except Exception as error:
        logger(name).warning("moecache does nothing here: %s: %s", type(error).__name__, error)
