"""fp8 weights and activations of the fused MoE in torch: the kinds, their scales, quantising and the way back."""

from dataclasses import dataclass

import torch

from moecache.kernels.agreed import BLOCK, FLOOR
from moecache.schemas.errors import InvalidInput

KINDS = ("fp8_block", "fp8_channel", "fp8_tensor")
DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


@dataclass(frozen=True, eq=False)
class Quant:
    """How fp8 weights are scaled: value = weight · scale. Activations are quantised on the way, with dynamic scales.

    Attributes:
        kind: `fp8_block` scales blocks of 128 × 128 weights and 128 columns of a token; `fp8_channel` rows of the
            weights and whole tokens; `fp8_tensor` whole experts and whole tokens.
        w1_scale: float32, [E, ⌈2N/128⌉, ⌈K/128⌉], [E, 2N] or [E].
        w2_scale: float32, [E, ⌈K/128⌉, ⌈N/128⌉], [E, K] or [E].
    """

    kind: str
    w1_scale: torch.Tensor
    w2_scale: torch.Tensor


def scale_shape(kind: str, experts: int, rows: int, columns: int) -> tuple[int, ...]:
    """The shape of the scales of weights [experts, rows, columns]."""
    if kind == "fp8_block":
        return (experts, -(-rows // BLOCK), -(-columns // BLOCK))
    return (experts, rows) if kind == "fp8_channel" else (experts,)


def check_quant(quant: Quant, w1: torch.Tensor, w2: torch.Tensor) -> None:
    """Raise InvalidInput for an unknown kind, weights that are no fp8, or scales of a wrong shape, dtype or device."""
    if quant.kind not in KINDS:
        raise InvalidInput(f"quant.kind={quant.kind!r}; allowed are {', '.join(KINDS)}")
    if w1.dtype not in DTYPES:
        raise InvalidInput(f"w1 is {w1.dtype}; with quant, {' or '.join(map(str, DTYPES))} is allowed")
    for name, weights, scale in (("w1_scale", w1, quant.w1_scale), ("w2_scale", w2, quant.w2_scale)):
        want = scale_shape(quant.kind, *weights.shape)
        if scale.shape != want or scale.dtype != torch.float32 or scale.device != w1.device:
            raise InvalidInput(
                f"quant.{name} is {scale.dtype} {list(scale.shape)} on {scale.device}; {quant.kind} wants "
                f"float32 {list(want)} on {w1.device}"
            )


def dequantised(weights: torch.Tensor, scale: torch.Tensor, kind: str) -> torch.Tensor:
    """One expert's weights [R, C] in float32."""
    if kind == "fp8_block":
        scale = scale.repeat_interleave(BLOCK, 0)[: weights.shape[0]]
        scale = scale.repeat_interleave(BLOCK, 1)[:, : weights.shape[1]]
    elif kind == "fp8_channel":
        scale = scale[:, None]
    return weights.float() * scale


def quantised(weights: torch.Tensor, kind: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """One expert's float weights [R, C] as (fp8 [R, C], scale): each part's largest value becomes fp8's largest."""
    size, top = weights.abs(), torch.finfo(dtype).max
    rows, columns = weights.shape
    if kind == "fp8_block":
        size = torch.nn.functional.pad(size, (0, -columns % BLOCK, 0, -rows % BLOCK))
        size = size.view(size.shape[0] // BLOCK, BLOCK, size.shape[1] // BLOCK, BLOCK).amax((1, 3))
    else:
        size = size.amax(1) if kind == "fp8_channel" else size.amax()
    scale = size.clamp_min(FLOOR) / top
    ones = dequantised(torch.ones_like(weights), scale, kind)
    return (weights / ones).clamp(-top, top).to(dtype), scale


def through_fp8(rows: torch.Tensor, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """Activations [R, C] after quantising and back, in float32: scales per row, or per row and 128 columns."""
    columns, top = rows.shape[1], torch.finfo(dtype).max
    width = BLOCK if kind == "fp8_block" else columns
    parts = torch.nn.functional.pad(rows.float(), (0, -columns % width))
    parts = parts.view(rows.shape[0], parts.shape[1] // width, width)
    scale = parts.abs().amax(2, keepdim=True).clamp_min(FLOOR) / top
    back = (parts / scale).clamp(-top, top).to(dtype).float() * scale
    return back.view(rows.shape[0], -1)[:, :columns] if rows.shape[0] else rows.float()
