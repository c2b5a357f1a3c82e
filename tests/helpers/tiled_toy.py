"""An op on the CPU with the configs of our fused MoE, whose candidates take the time that a known model says."""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch

from moecache.backends.cpu import CpuBackend
from moecache.kernels.contract import Args, Bound, Source
from moecache.kernels.gemm.work import layer
from moecache.predict.calls import cell
from moecache.predict.model import times
from moecache.predict.parameters import Parameters, zero_shot
from moecache.predict.products import candidates
from moecache.predict.work import Work
from moecache.schemas.config import Config, config
from moecache.schemas.device import Device
from moecache.schemas.layer import Layer
from moecache.schemas.problem import Problem

DEVICE = Device(
    vendor="cpu", arch="toy", name="a toy", units=16, shared_bytes=200_000, l2_bytes=1 << 22, llc_bytes=1 << 10,
    clock_mhz=1000, bandwidth_gbs=2000, peak_tflops=(("bf16", 8.0),), launch_us=1.0,
)  # fmt: skip
LAYER = Layer(model="tiny", experts=16, global_experts=16, topk=2, hidden=1024, intermediate=512)


def _config(variant: str, block: int, n: int, k: int, stages: int, **more: Any) -> Config:
    sizes = {f"{half}_{name}": value for half in ("up", "down")
             for name, value in (("n", n), ("k", k), ("stages", stages), ("warps", 4))}  # fmt: skip
    return config(variant, block=block, combine="sum", **{"group": 1, "swap": 0} | more | sizes)


SPACE = [
    _config(variant, block, n, k, stages, **more)
    for variant, more in (("tiles", {}), ("ring", {"programs": 16, "tma": 1}))
    for block in (16, 64, 128)
    for n, k, stages in ((64, 64, 3), (64, 128, 2), (128, 64, 4))
]


@cache
def _took(problem: Problem, counts: tuple[int, ...], chosen: Config) -> float:
    return float(times(truth(), DEVICE, [cell(problem, counts)], candidates([layer(chosen)]))[0, 0])


def truth() -> Parameters:
    """Unlike what the constants say, rings wait long for their loads, and tiles of few rows multiply slowly."""
    p = zero_shot(DEVICE)
    ring = p.kernels["ring"].model_copy(update={"latency_us": 2.0, "tall": 0.3})
    tile = p.kernels["tile"].model_copy(update={"small": 0.25, "slice_us": 0.4})
    return p.model_copy(update={"kernels": p.kernels | {"ring": ring, "tile": tile}})


class TiledToy:
    """Adds one. It calls itself fused_moe, whose times the cost model knows."""

    name, source = "fused_moe", "toy"

    def __init__(self) -> None:
        self.last = 0.0

    def problems(self, layer: Layer, tokens: Sequence[int], device: Device) -> list[Problem]:
        sizes = {"hidden": layer.hidden, "intermediate": layer.intermediate}
        fields: dict[str, Any] = {"op": self.name, "vendor": device.vendor, "arch": device.arch, "units": device.units,
                                  "experts": layer.experts, "topk": layer.topk, "dtype": "bf16"}  # fmt: skip
        return [Problem(tokens=count, dims=tuple(sizes.items()), source=self.source, **fields) for count in tokens]

    def left_out(self, layer: Layer, tokens: Sequence[int], device: Device) -> str:
        return ""

    def space(self, problem: Problem, device: Device) -> list[Config]:
        return SPACE

    def fits(self, problem: Problem, config: Config, device: Device) -> str:
        return "" if config in SPACE else f"{config.name} does not exist"

    def work(self, problem: Problem, config: Config, device: Device) -> Work:
        return layer(config)

    def took(self, problem: Problem, counts: Sequence[int], chosen: Config) -> float:
        """The true time of a call."""
        return _took(problem, tuple(counts), chosen)

    def inputs(self, problem: Problem, topk_ids: torch.Tensor, seed: int) -> Args:
        return {"x": torch.arange(8.0) + seed, "ids": topk_ids, "problem": problem}

    def outputs(self, args: Args) -> torch.Tensor:
        return torch.empty_like(args["x"])

    def bind(self, config: Config, args: Args, out: torch.Tensor) -> Bound:
        return partial(self.launch, config)

    def launch(self, config: Config, args: Args, out: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(args["ids"].reshape(-1).to(torch.int64), minlength=args["problem"].experts)
        self.last = self.took(args["problem"], counts.tolist(), config)
        return torch.add(args["x"], 1, out=out)

    def reference(self, args: Args) -> torch.Tensor:
        return args["x"] + 1

    def error(self, got: torch.Tensor, want: torch.Tensor) -> float:
        return float((got - want).abs().max())

    def tolerance(self, problem: Problem) -> float:
        return 0.0

    def sources(self, problem: Problem, config: Config, device: Device) -> list[Source]:
        return []


class TiledClock:
    """Says what the toy's last launch took."""

    def __init__(self, toy: TiledToy) -> None:
        self._toy = toy

    def copies(self, set_bytes: int) -> int:
        return 1

    def prepare(self, calls: Sequence[Any]) -> Any:
        def sample() -> float:
            calls[0]()
            return self._toy.last

        return sample


class ToyBackend(CpuBackend):
    """A machine with the toy device."""

    def device(self, index: int = 0) -> Device:
        return DEVICE
