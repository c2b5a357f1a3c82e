"""What the tests of both engines share: shapes, a config that no engine would take, timings, layers of fp8."""

import logging
from typing import Any

import pytest
import torch

from moecache.integrations import tables
from moecache.schemas.config import Config
from moecache.schemas.device import KNOWN
from moecache.schemas.timing import Environment, Timing

MADE_UP = {
    "BLOCK_SIZE_M": 32, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 256, "GROUP_SIZE_M": 16, "num_warps": 8, "num_stages": 5,
}  # fmt: skip
SHAPES = (128, 1536, 2048), (128, 2048, 768)
DTYPES = [("", 0), ("fp8_w8a8", 0), ("fp8_w8a8", 128)]


def dims(tokens: int, dtype: str = "", block: int = 0, **more: Any) -> dict[str, Any]:
    """Of a problem with SHAPES."""
    return tables.dims(128, 768, tokens, 2048, 8, dtype=dtype, block_n=block, block_k=block, **more)


def timing(op: str, tokens: int, dtype: str = "", block: int = 0) -> Timing:
    """Of MADE_UP on an H200."""
    problem = tables.problem(op, KNOWN["h200"], dims(tokens, dtype, block), routing="a0e0")
    there = Environment(device_name="NVIDIA H200", triton="3.6.0")
    row = Config(variant=tables.VARIANT, params=tuple(MADE_UP.items()))
    return Timing(problem=problem, config=row, environment=there, median_us=9.0, mad_us=0.1, n=20)


def shape(block: int) -> list[int] | None:
    """A block of scales, as engines write it."""
    return [block, block] if block else None


def store(serving: Any, op: Any, tokens: int, dtype: str = "", block: int = 0) -> None:
    """MADE_UP as measured here."""
    place = serving.places.first()
    problem = op.problem(dims(tokens, dtype, block) | {"routing": "a0e0"}, place.device)
    row = timing(op.name, tokens, dtype, block)
    serving.lookup.put([row.model_copy(update={"problem": problem, "environment": place.environment})], place)
    serving.hot.clear()


def logged(engine: str, caplog: pytest.LogCaptureFixture) -> None:
    """Have what moecache says in an engine's log in `caplog`."""
    (log := logging.getLogger(f"{engine}.moecache")).addHandler(caplog.handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def drawn(tokens: int, experts: int = 4, topk: int = 2) -> torch.Tensor:
    """Experts of tokens."""
    return torch.stack([torch.randperm(experts)[:topk] for _ in range(tokens)]).int()


def fp8(experts: int = 4, hidden: int = 256, middle: int = 128, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """w1, w2, and scales of blocks of both."""
    kind, on = torch.float8_e4m3fn, {"device": device}
    sizes = [(experts, 2 * middle, hidden), (experts, hidden, middle)]
    weights = [torch.randn(size, **on).clamp(-8, 8).to(kind) for size in sizes]
    scales = [torch.rand(experts, -(-rows // 128), -(-columns // 128), **on) / 16 for _, rows, columns in sizes]
    return *weights, *scales


def wide(weights: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What they stand for."""
    whole = scales.repeat_interleave(128, 1).repeat_interleave(128, 2)
    return (weights.float() * whole[:, : weights.shape[1], : weights.shape[2]]).bfloat16()


def apart(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative error of a whole result."""
    return float((got - want).float().norm() / want.float().norm())
