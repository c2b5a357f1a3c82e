"""fp8 weights, scaled by blocks, rows or experts; tokens and what lies between the products go through fp8 too."""

from dataclasses import dataclass

import torch

from moecache.kernels.agreed import BLOCK, FLOOR
from moecache.kernels.formats.contract import Format

FMAX = {"fp8e4nv": 448.0, "fp8e4b8": 240.0}  # the largest values of these dtypes, by Triton's names


@dataclass(frozen=True)
class Fp8(Format):
    """Each part's largest value becomes fp8's largest.

    Attributes:
        dims: of an expert's scales: blocks of rows and of columns, rows, or none.
    """

    dims: int = 0

    def stored(self, arch: str) -> torch.dtype:
        """gfx942 has another fp8 than the others."""
        return self.dtypes[arch == "gfx942"]

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """[rows / 128, columns / 128], [rows] or []."""
        return (-(-rows // BLOCK), -(-columns // BLOCK)) if self.dims == 2 else (rows,) if self.dims else ()

    def quantise(self, weights: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """[R, C] in fp8, float32 scales."""
        (rows, columns), top = weights.shape, torch.finfo(dtype).max
        high, wide = ((rows, columns), (1, columns), (BLOCK, BLOCK))[self.dims]
        size = torch.nn.functional.pad(weights.abs(), (0, -columns % wide, 0, -rows % high))
        size = size.view(size.shape[0] // high, high, size.shape[1] // wide, wide).amax((1, 3))
        scale = (size.clamp_min(FLOOR) / top).view(self.scale_shape(rows, columns))
        ones = self.dequantise(torch.ones_like(weights), scale)
        return (weights / ones).clamp(-top, top).to(dtype), scale

    def dequantise(self, weights: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """[R, C] in float32."""
        if self.dims == 2:
            scale = scale.repeat_interleave(BLOCK, 0)[: weights.shape[0]]
            scale = scale.repeat_interleave(BLOCK, 1)[:, : weights.shape[1]]
        return weights.float() * (scale[:, None] if self.dims == 1 else scale)

    def through(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Quantised and back: scales of whole rows, or of a row and 128 columns."""
        columns, top = rows.shape[1], torch.finfo(dtype).max
        width = BLOCK if self.dims == 2 else columns
        parts = torch.nn.functional.pad(rows.float(), (0, -columns % width))
        parts = parts.view(rows.shape[0], parts.shape[1] // width, width)
        scale = parts.abs().amax(2, keepdim=True).clamp_min(FLOOR) / top
        back = (parts / scale).clamp(-top, top).to(dtype).float() * scale
        return back.view(rows.shape[0], -1)[:, :columns] if rows.shape[0] else rows.float()


def _fp8(name: str, dims: int, block: int = 1) -> Fp8:
    """Tolerance: another order of summation moves an activation to the next fp8 value."""
    dtypes = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
    return Fp8(name, dtypes, tolerance=5e-2, peak="fp8", block=block, dims=dims)


FORMATS = {each.name: each for each in (_fp8("fp8_block", 2, BLOCK), _fp8("fp8_channel", 1), _fp8("fp8_tensor", 0))}
