"""What a format of weights says: how they are stored and scaled, and how torch computes with them."""

from dataclasses import dataclass
from typing import Any

import torch

from moecache.schemas.errors import InvalidInput


@dataclass(frozen=True, eq=False)
class Quant:
    """How quantised weights are scaled: value = weight · scale. With fp8, activations are quantised on the way.

    Attributes:
        kind: name of the format. `fp8_block` scales blocks of 128 × 128 weights and 128 columns of a token;
            `fp8_channel` rows of the weights and whole tokens; `fp8_tensor` whole experts and whole tokens.
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


@dataclass(frozen=True)
class Format:
    """How weights are stored. This class alone is that of weights without scales; others override what has scales.

    Attributes:
        name: `kind` of Quant, and `quant` of a problem; '' without scales.
        dtypes: of the stored weights.
        tolerance: the largest relative error of a layer that still counts as right.
        peak: what the rate of such products is called in `Device.peak_tflops`.
        packed: weights in one stored element.
        block: rows of weights with a scale in common, counted from the first row; 1 where blocks of rows do not matter.
        scale_dtype: of the scales.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    tolerance: float
    peak: str
    packed: int = 1
    block: int = 1
    scale_dtype: torch.dtype = torch.float32

    def stored(self, arch: str) -> torch.dtype:
        """The dtype of the weights that an architecture computes with."""
        return self.dtypes[0]

    @property
    def nbytes(self) -> float:
        """Bytes of a weight, without its share of a scale."""
        return self.dtypes[0].itemsize / self.packed

    def row(self, columns: int, arch: str) -> tuple[int, torch.dtype]:
        """(stored elements of a row of that many weights, their dtype)."""
        return columns // self.packed, self.stored(arch)

    # --- what a format with scales says; all of one expert ---

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """The shape of the scales of [rows, columns] weights."""
        raise NotImplementedError

    def quantise(self, weights: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Float weights [R, C] as (stored weights, scales)."""
        raise NotImplementedError

    def dequantise(self, weights: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Stored weights as [R, C] in float32."""
        raise NotImplementedError

    def through(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Activations [R, C] as weights stored in `dtype` are multiplied with: quantised and back, in float32, if they
        are quantised on the way."""
        return rows.float()

    # --- what follows from that ---

    def two_layouts(self, middle: int, gated: bool) -> bool:
        """Whether up's rows would begin inside a block of the gate's, so that scales of both lie in one of two ways."""
        return gated and middle % self.block != 0

    def odd(self, w1: Any, w2: Any) -> bool:
        """`two_layouts` of these weights."""
        middle = w2.shape[2] * self.packed
        return self.two_layouts(middle, w1.shape[1] != middle)

    def apart(self, quant: Quant, w1: Any, w2: Any) -> bool:
        """Whether gate and up have blocks of scales of their own, and that is another layout than blocks of both."""
        if not self.odd(w1, w2):
            return False
        blocks = -(-2 * w2.shape[2] * self.packed // self.block)
        return quant.w1_scale.shape[1:2] != (blocks,) if quant.apart is None else quant.apart

    def check(self, quant: Quant, w1: torch.Tensor, w2: torch.Tensor) -> None:
        """Raise InvalidInput for weights of another dtype, or scales of a wrong shape, dtype or device. Every call pays
        for it."""
        if w1.dtype not in self.dtypes:
            allowed = " or ".join(map(str, self.dtypes))
            raise InvalidInput(f"w1 is {w1.dtype}; with quant, {allowed} is allowed for {self.name}")
        for name, weights, scale in (("w1_scale", w1, quant.w1_scale), ("w2_scale", w2, quant.w2_scale)):
            experts, rows, stored = weights.shape
            one, odd = (experts, *self.scale_shape(rows, stored * self.packed)), weights is w1 and self.odd(w1, w2)
            if not odd and scale.shape == one and scale.dtype == self.scale_dtype and scale.device == w1.device:
                continue
            want = {one}
            if odd:
                middle = w2.shape[2] * self.packed
                each = (experts, 2 * -(-middle // self.block), *one[2:])
                want = {one, each} if quant.apart is None else {each if quant.apart else one}
                if quant.apart is None and one == each and scale.shape == one:
                    raise InvalidInput(
                        f"quant.apart is not given, and N={middle} has scales {list(one)} either way; say apart=True "
                        "if gate and up were quantised apart, as in checkpoints, apart=False if as one matrix"
                    )
            if scale.shape not in want or scale.dtype != self.scale_dtype or scale.device != w1.device:
                shapes = " or ".join(str(list(shape)) for shape in sorted(want))
                wanted = f"{str(self.scale_dtype).removeprefix('torch.')} {shapes} on {w1.device}"
                raise InvalidInput(
                    f"quant.{name} is {scale.dtype} {list(scale.shape)} on {scale.device}; {self.name} wants "
                    f"{wanted}{self._hint(w2.shape[2] * self.packed)}"
                )

    def _hint(self, middle: int) -> str:
        """What may be wrong where a layer's N is no whole number of blocks."""
        if not middle % self.block:
            return ""
        return (
            f"; N={middle} is no multiple of {self.block}: gate and up may have scales of both as one matrix or of "
            "each apart, but those of a shard that begins inside a block fit neither: shard N by multiples of "
            f"{self.block}, or quantise the shard anew"
        )

    def quantised(
        self, weights: torch.Tensor, dtype: torch.dtype, apart: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One expert's float weights as (stored weights, scales). `apart`: each half of the rows has its own blocks."""
        stored, scales = zip(*(self.quantise(half, dtype) for half in weights.chunk(1 + apart)), strict=True)
        return torch.cat([half.view(torch.uint8) for half in stored]).view(dtype), torch.cat(
            scales
        ) if apart else scales[0]

    def dequantised(self, weights: torch.Tensor, scale: torch.Tensor, apart: bool = False) -> torch.Tensor:
        """The way back, in float32."""
        if not apart:
            return self.dequantise(weights, scale)
        return torch.cat([self.dequantise(*half) for half in zip(weights.chunk(2), scale.chunk(2), strict=True)])
