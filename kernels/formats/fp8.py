"""fp8 weights and activations of the fused MoE in torch: the kinds, their scales, quantising and the way back."""

from dataclasses import dataclass

import torch

from moecache.kernels.agreed import BLOCK, FLOOR
from moecache.schemas.errors import InvalidInput

KINDS = ("fp8_block", "fp8_channel", "fp8_tensor")
DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
FMAX = {"fp8e4nv": 448.0, "fp8e4b8": 240.0}  # the largest values of these dtypes, by Triton's names


@dataclass(frozen=True, eq=False)
class Quant:
    """How fp8 weights are scaled: value = weight · scale. Activations are quantised on the way, with dynamic scales.

    Attributes:
        kind: `fp8_block` scales blocks of 128 × 128 weights and 128 columns of a token; `fp8_channel` rows of the
            weights and whole tokens; `fp8_tensor` whole experts and whole tokens.
        w1_scale: float32, [E, 2 · ⌈N/128⌉, ⌈K/128⌉] of gate and up that were quantised apart, as in checkpoints, or
            [E, ⌈2N/128⌉, ⌈K/128⌉] of both as one matrix; [E, 2N]; or [E]. Without a gate N stands for 2N.
        w2_scale: float32, [E, ⌈K/128⌉, ⌈N/128⌉], [E, K] or [E].
        apart: whether gate and up were quantised apart. The shape says so itself, unless N % 128 is above 64: then both
            shapes are the same, and this has to be given.
    """

    kind: str
    w1_scale: torch.Tensor
    w2_scale: torch.Tensor
    apart: bool | None = None


def scale_shape(kind: str, experts: int, rows: int, columns: int) -> tuple[int, ...]:
    """The shape of the scales of weights [experts, rows, columns]."""
    if kind == "fp8_block":
        return (experts, -(-rows // BLOCK), -(-columns // BLOCK))
    return (experts, rows) if kind == "fp8_channel" else (experts,)


def blocks_apart(quant: Quant | None, w1: torch.Tensor, w2: torch.Tensor) -> bool:
    """Whether gate and up have blocks of scales of their own, and that is another layout than blocks of both."""
    middle = w2.shape[2]
    if quant is None or not _odd(quant, w1, w2):
        return False
    return quant.w1_scale.shape[1:2] != (-(-2 * middle // BLOCK),) if quant.apart is None else quant.apart


def _odd(quant: Quant, w1: torch.Tensor, w2: torch.Tensor) -> bool:
    """Whether up's rows begin inside a block of the gate's."""
    return quant.kind == "fp8_block" and w2.shape[2] % BLOCK != 0 and w1.shape[1] != w2.shape[2]


def check_quant(quant: Quant, w1: torch.Tensor, w2: torch.Tensor) -> None:
    """Raise InvalidInput for an unknown kind, weights that are no fp8, or scales of a wrong shape, dtype or device."""
    if quant.kind not in KINDS:
        raise InvalidInput(f"quant.kind={quant.kind!r}; allowed are {', '.join(KINDS)}")
    if w1.dtype not in DTYPES:
        raise InvalidInput(f"w1 is {w1.dtype}; with quant, {' or '.join(map(str, DTYPES))} is allowed")
    for name, weights, scale in (("w1_scale", w1, quant.w1_scale), ("w2_scale", w2, quant.w2_scale)):
        one = scale_shape(quant.kind, *weights.shape)
        want = {one}
        if weights is w1 and _odd(quant, w1, w2):
            each = (one[0], 2 * -(-w2.shape[2] // BLOCK), one[2])
            want = {one, each} if quant.apart is None else {each if quant.apart else one}
            if quant.apart is None and one == each and scale.shape == one:
                raise InvalidInput(
                    f"quant.apart is not given, and N={w2.shape[2]} has scales {list(one)} either way; say apart=True "
                    "if gate and up were quantised apart, as in checkpoints, apart=False if as one matrix"
                )
        if scale.shape not in want or scale.dtype != torch.float32 or scale.device != w1.device:
            shapes = " or ".join(str(list(shape)) for shape in sorted(want))
            raise InvalidInput(
                f"quant.{name} is {scale.dtype} {list(scale.shape)} on {scale.device}; {quant.kind} wants "
                f"float32 {shapes} on {w1.device}{_hint(quant, w1, w2)}"
            )


def _hint(quant: Quant, w1: torch.Tensor, w2: torch.Tensor) -> str:
    """What may be wrong where a layer's N is no whole number of blocks."""
    middle = w2.shape[2]
    if quant.kind != "fp8_block" or not middle % BLOCK:
        return ""
    return (
        f"; N={middle} is no multiple of {BLOCK}: gate and up may have scales of both as one matrix or of each apart, "
        f"but those of a shard that begins inside a block fit neither: shard N by multiples of {BLOCK}, or quantise "
        "the shard anew"
    )


def dequantised(weights: torch.Tensor, scale: torch.Tensor, kind: str, apart: bool = False) -> torch.Tensor:
    """One expert's weights [R, C] in float32; `apart`: each half of the rows has blocks of its own."""
    if apart:
        halves = zip(weights.chunk(2), scale.chunk(2), strict=True)
        return torch.cat([dequantised(half, own, kind) for half, own in halves])
    if kind == "fp8_block":
        scale = scale.repeat_interleave(BLOCK, 0)[: weights.shape[0]]
        scale = scale.repeat_interleave(BLOCK, 1)[:, : weights.shape[1]]
    elif kind == "fp8_channel":
        scale = scale[:, None]
    return weights.float() * scale


def quantised(
    weights: torch.Tensor, kind: str, dtype: torch.dtype, apart: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """One expert's float weights [R, C] as (fp8 [R, C], scale): each part's largest value becomes fp8's largest.
    `apart`: each half of the rows has blocks of its own."""
    if apart:
        (gate, first), (up, second) = (quantised(half, kind, dtype) for half in weights.chunk(2))
        return torch.cat([gate.float(), up.float()]).to(dtype), torch.cat([first, second])
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
