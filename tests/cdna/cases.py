"""What is run on the interpreter: a line for each case, and how it is run.

A case names a call and what the config has that serves it; the config comes from the search space of the device, so a
case cannot outlive what is offered. A new body gets its line here, and `always` if it is a new variant or kernel.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cdna.device import MODES, Log, interpreted
from moecache.kernels import registry as ops
from moecache.kernels.contract import EXTREME, Args
from moecache.kernels.tensors import poison, tensors
from moecache.schemas.config import Config
from moecache.schemas.device import Device, by_arch
from moecache.schemas.problem import Problem

ARCHS = ("gfx942", "gfx950")
EXECUTED = 0.85  # share of a kernel's instructions
AROUND = ("oneshot", "count", "scan", "place", "combine")  # what sorts rows for products, and adds them up
OFF = 10  # times the tolerance: how far one element may be off, in units of the root mean square


@dataclass(frozen=True)
class Case:
    """One call and the config that serves it.

    Attributes:
        name, op: of the case, and of the op.
        config: what the config has: variant, parameters, knobs. The first one of the space that has all of it is taken.
        tokens, experts, topk, dtype, dims: of the problem. Products are deep enough for each loop to be gone through.
        change: what becomes of the arguments. seed: of Op.inputs.
        archs: where the space has such a config. always: never left to the draw.
    """

    name: str
    op: str
    config: Mapping[str, Any]
    tokens: int = 33
    experts: int = 8
    topk: int = 2
    dtype: str = "bf16"
    dims: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[Args], Args] = lambda args: args
    seed: int = 0
    archs: Sequence[str] = ARCHS
    always: bool = False


def fused(name: str, variant: str, tokens: int = 33, **more: Any) -> Case:
    dims = {"hidden": 512, "intermediate": 768 if variant == "decode" else 384}
    return _case(name, "fused_moe", variant, tokens, dims, more)


def grouped(name: str, tokens: int = 33, **more: Any) -> Case:
    return _case(name, "grouped_gemm", "tile", tokens, {"hidden": 512, "intermediate": 384}, {"topk": 1, **more})


def sort(name: str, variant: str, tokens: int = 33, **more: Any) -> Case:
    return _case(name, "moe_sort", variant, tokens, {"block_m": 16}, {"dtype": "int32", **more})


FIELDS = set(Case.__dataclass_fields__)


def _case(name: str, op: str, variant: str, tokens: int, dims: dict[str, Any], more: dict[str, Any]) -> Case:
    """What is no field of a case belongs to the config."""
    own = {key: value for key, value in more.items() if key in FIELDS}
    config = {"variant": variant} | {key: value for key, value in more.items() if key not in FIELDS}
    return Case(name, op, config, tokens, **own | {"dims": dims | dict(own.get("dims", {}))})


def changed(**new: Any) -> Callable[[Args], Args]:
    """Other arguments; functions of all arguments are called with them."""
    return lambda args: replace(args, **{key: value(args) if callable(value) else value for key, value in new.items()})


def _nowhere(args: Args) -> torch.Tensor:
    return torch.full_like(args.topk_ids, -1)


def _transposed(args: Args) -> torch.Tensor:
    return args.topk_ids.t().contiguous().t()


def _sliced(name: str) -> Callable[[Args], torch.Tensor]:
    """The same values as a part of a wider tensor."""

    def part(args: Args) -> torch.Tensor:
        given = getattr(args, name)
        wide = torch.full((*given.shape[:-1], given.shape[-1] + 64), float("nan"), dtype=given.dtype)
        wide[..., : given.shape[-1]] = given
        return wide[..., : given.shape[-1]]

    return part


def _twice(args: Args) -> torch.Tensor:
    return torch.full_like(args.topk_ids, 3)


def _far_apart(args: Args) -> Args:
    """Weights past 2 GiB, which 32-bit offsets do not reach; of few experts, as the others are never touched."""
    experts, hidden, middle = 1024, 1024, 512
    rng = torch.Generator().manual_seed(0)
    ids = torch.tensor([[experts - 1, 1], [experts - 2, experts - 1], [5, experts - 3]], dtype=torch.int32)
    w1, w2 = (torch.empty(experts, *shape, dtype=torch.bfloat16) for shape in ((2 * middle, hidden), (hidden, middle)))
    for expert in ids.unique().tolist():
        for w in (w1, w2):
            w[expert] = torch.randn(w.shape[1:], generator=rng) * w.shape[2] ** -0.5
    x = torch.randn(3, hidden, generator=rng).bfloat16()
    weights = torch.rand(3, 2, generator=rng)
    return replace(args, **{"hidden_states": x, "w1": w1, "w2": w2, "topk_ids": ids, "topk_weights": weights,
                   "num_experts": experts})  # fmt: skip


def _every_other(args: Args) -> torch.Tensor:
    experts = torch.arange(args.num_experts, dtype=torch.int32)
    return torch.where(experts % 2 == 0, experts // 2, -1)


NONKDIM = {"matrix_instr_nonkdim": 16}
MAPPED: dict[str, Any] = {"mapped": 1, "global": 16}
OAI: dict[str, Any] = {"activation": "swiglu_oai", "biased": 1}
ODD: dict[str, Any] = {"hidden": 100, "intermediate": 33, "biased": 1}
BLOCKS: dict[str, Any] = {"quant": "fp8_block"}
CASES = [
    # --- sorting
    sort("one launch", "oneshot", num_warps=4, always=True),
    sort("one launch, 8 warps, int64, weights", "oneshot", 5, num_warps=8, dtype="int64", dims={"weighted": 1}),
    sort("one token", "oneshot", 1),
    sort("three launches", "multiphase", 130, scan=1, step=32, always=True),
    sort("three launches, 64 experts, weights", "multiphase", 130, scan=1, step=128, experts=64, dims={"weighted": 1}),
    sort("two launches", "multiphase", scan=0, fused=0, always=True),
    sort("handshake", "multiphase", 130, scan=0, fused=1, step=32, always=True),
    sort("handshake, 8 warps, blocks of 64", "multiphase", 300, fused=1, step=128, num_warps=8, dims={"block_m": 64}),
    sort("two launches, 256 experts", "multiphase", 130, scan=0, fused=0, experts=256, topk=8),
    sort("512 experts, top 10", "multiphase", 130, fused=0, experts=512, topk=10),
    sort("a map, 64 experts", "multiphase", experts=64, fused=1, dims={"mapped": 1, "block_m": 64}),
    sort("masked ones kept", "oneshot", change=changed(expert_map=_every_other, keep_masked=True)),
    sort("packed", "multiphase", scan=0, fused=0, dims={"weighted": 1}, change=changed(packed=True)),
    sort("fewer tokens than rows", "oneshot", change=changed(num_tokens=torch.tensor([20], dtype=torch.int32))),
    sort("ids of nobody", "multiphase", fused=1, change=changed(topk_ids=_nowhere)),
    # --- decode
    fused("decode", "decode", 5, down_k=256, always=True),
    fused("decode, one token", "decode", 1, up_n=16),
    fused("decode, fp16, transposed ids", "decode", 5, up_n=8, dtype="fp16", change=changed(topk_ids=_transposed)),
    fused("decode, fp32", "decode", 5, up_n=4, dtype="fp32"),
    fused("decode, swiglu_oai, biases", "decode", 5, up_n=1, dims=OAI | {"hidden": 1024}),
    fused("decode, gelu_tanh, weights on the input", "decode", 5, dims={"activation": "gelu_tanh", "on_input": 1}),
    fused("decode, a map", "decode", 5, dims=MAPPED),
    fused("decode, relu2 without a gate", "decode", 5, dims={"activation": "relu2", "gated": 0}),
    fused("decode, odd sizes", "decode", 2, dims=ODD),
    fused("decode, fp8", "decode", 5, down_k=256, dims=BLOCKS, always=True),
    fused("decode, 32 experts, top 8", "decode", 3, experts=32, topk=8, dims={"intermediate": 128}),
    fused("decode, ids of nobody", "decode", 5, change=changed(topk_ids=_nowhere)),
    fused("decode, weights past 2 GiB", "decode", 3, change=_far_apart),
    # --- tiles: each height, each knob, each activation
    fused("tiles of 16", "tiles", block=16, up_k=128, always=True),
    fused("tiles of 16, k of 64", "tiles", block=16, up_k=64, change=changed(topk_ids=lambda a: _transposed(a).long())),
    fused("tiles of 32", "tiles", 40, experts=4, block=32),
    fused("tiles of 64", "tiles", 130, experts=4, block=64, group=1),
    fused("tiles of 64, groups", "tiles", 130, experts=4, block=64, group=8),
    fused("tiles of 64, products of 16", "tiles", 130, experts=4, block=64, **NONKDIM, always=True),
    fused("tiles of 64, waves_per_eu", "tiles", 130, experts=4, block=64, waves_per_eu=2),
    fused("tiles of 64, kpack", "tiles", 130, experts=4, block=64, kpack=2, archs=("gfx942",)),
    fused("tiles of 128", "tiles", 200, experts=2, block=128, up_k=64),
    fused("tiles of 128, k of 32", "tiles", 200, experts=2, block=128, up_k=32),
    fused("tiles of 128, products of 16", "tiles", 200, experts=2, block=128, **NONKDIM),
    fused("two heights", "heights", 130, experts=4, always=True),
    fused("tiles, fp16", "tiles", block=16, dtype="fp16"),
    fused("tiles, fp16, parts past its largest", "tiles", block=16, dtype="fp16", seed=EXTREME),
    fused("tiles, fp32", "tiles", dtype="fp32"),
    fused("tiles, swiglu_oai, biases", "tiles", block=16, dims=OAI),
    fused("tiles, gelu", "tiles", block=16, dims={"activation": "gelu"}),
    fused("tiles, gelu_tanh, weights on the input", "tiles", block=16, dims={"activation": "gelu_tanh", "on_input": 1}),
    fused("tiles, silu_limited", "tiles", block=16, dims={"activation": "silu_limited"}),
    fused("tiles, relu2 without a gate", "tiles", block=16, dims={"activation": "relu2", "gated": 0}),
    fused("tiles, a map", "tiles", block=16, dims=MAPPED),
    fused("tiles, odd sizes", "tiles", block=16, dims=ODD),
    fused("tiles, rows of slices", "tiles", block=16, change=changed(hidden_states=_sliced("hidden_states"),
                                                                   w1=_sliced("w1"))),
    fused("tiles, ids of nobody", "tiles", block=16, change=changed(topk_ids=_nowhere)),
    fused("tiles, one expert twice", "tiles", block=16, change=changed(topk_ids=_twice)),
    fused("tiles, one expert", "tiles", 7, experts=1, topk=1),
    fused("tiles, weights past 2 GiB", "tiles", 3, change=_far_apart, always=True),
    # --- fp8
    fused("fp8, fused", "fp8_tiles", fuse=1, dims=BLOCKS, always=True),
    fused("fp8, not fused", "fp8_tiles", fuse=0, dims=BLOCKS),
    fused("fp8 by rows", "fp8_tiles", dims=OAI | {"quant": "fp8_channel"}),
    fused("fp8 by experts", "fp8_tiles", dims={"quant": "fp8_tensor", "on_input": 1}),
    fused("fp8, tiles of 32, products of 16", "fp8_tiles", 40, experts=4, block=32, **NONKDIM, dims=BLOCKS),
    fused("fp8, tiles of 64", "fp8_tiles", 130, experts=4, block=64, dims={"quant": "fp8_channel"}),
    fused("fp8, tiles of 128", "fp8_tiles", 200, experts=2, block=128, dims={"quant": "fp8_tensor"}),
    fused("fp8, fp16, gate and up apart", "fp8_tiles", dtype="fp16", dims=BLOCKS | {"intermediate": 192, "apart": 1}),
    fused("fp8, gate and up as one", "fp8_tiles", fuse=1, dims=BLOCKS | {"intermediate": 192}),
    fused("fp8, relu2 without a gate", "fp8_tiles", dims=BLOCKS | {"activation": "relu2", "gated": 0}),
    fused("fp8, odd sizes", "fp8_tiles", dims=BLOCKS | {"hidden": 200, "intermediate": 100}),
    fused("fp8, ids of nobody", "fp8_tiles", fuse=0, dims=BLOCKS, change=changed(topk_ids=_nowhere)),
    # --- grouped products
    grouped("rows of 16", block=16, always=True),
    grouped("rows of 32, gathered, biased", 130, block=32, dims={"gathered": 1, "biased": 1}),
    grouped("rows of 64, fp16, groups", 300, experts=4, block=64, group=8, dtype="fp16"),
    grouped("rows of 128", 300, experts=2, block=128, k=64),
    grouped("rows of 128, k of 32", 300, experts=2, block=128, k=32),
    grouped("fp32", dtype="fp32"),
    grouped("odd sizes", dims=ODD),
]  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A case on an architecture, with its arguments and the config that is taken."""

    device: Device
    op: Any
    problem: Problem
    config: Config
    args: Args

    @property
    def kernels(self) -> set[str]:
        """Names of what its launch compiles, the sort and the sum included."""
        return {source.fn.__name__ for source in self.op.sources(self.problem, self.config, self.device)}

    @property
    def families(self) -> set[tuple[str, ...]]:
        """(op, variant, kernel) of its own kernels; of the sort and the sum, which other ops have too, the kernel."""
        others = () if self.op.name == "moe_sort" else AROUND
        named = {(self.op.name, self.config.variant, name) for name in self.kernels.difference(others)}
        return named | {(name,) for name in self.kernels}

    def launch(self, log: Log) -> Any:
        """The outputs, which were poisoned before. Arguments stay as they are."""
        log.clear()
        return self.op.launch(self.config, self.args, poison(self.op.outputs(self.args)))


def call(case: Case, arch: str) -> Call:
    """The call of a case.

    Raises:
        LookupError: the search space has no such config.
    """
    device, op = by_arch(arch), ops.get(case.op)
    asked = Problem(op=case.op, vendor="amd", arch=arch, units=device.units, tokens=case.tokens, experts=case.experts,
                    topk=case.topk, dtype=case.dtype, dims=tuple(case.dims.items()))  # fmt: skip
    args = case.change(op.inputs(asked, _ids(case), case.seed))
    problem = op.problem(args, device, "")
    for config in op.space(problem, device):
        has = {"variant": config.variant} | dict(config.params) | dict(config.extra)
        if all(has.get(key) == value for key, value in case.config.items()):
            return Call(device, op, problem, config, args)
    raise LookupError(f"{case.name} on {arch}: no config with {dict(case.config)} for {problem.key}")


def _ids(case: Case) -> torch.Tensor:
    """Distinct experts of each token; one slot in ten is of nobody, unless a map says who is."""
    rng = torch.Generator().manual_seed(case.tokens * 31 + case.experts)
    ids = torch.stack([torch.randperm(case.experts, generator=rng)[: case.topk] for _ in range(case.tokens)]).int()
    if not case.dims.get("mapped") and case.tokens > 2 and case.seed != EXTREME:
        ids[torch.rand(ids.shape, generator=rng) < 0.1] = -1
    return ids


def check(case: Case, arch: str) -> list[str]:
    """What is wrong with a case in any mode; nothing when it is right.

    Of a case that always runs, nearly all instructions have to be executed: in a loop that is never gone through, or
    behind a branch, anything could stand.
    """
    made, wrong = call(case, arch), list[str]()
    want, first = made.op.reference(made.args), None
    with interpreted(arch) as log:
        for name, mode in MODES.items():
            log.mode = mode
            got = made.launch(log)
            found = [*log.wrong, *_wrong(made, got, want)]
            if missing := made.kernels - set(log.names):
                found.append(f"{missing} did not run")
            if first is not None and not equal(got, first):
                found.append("not the bits of the plain mode")
            first = got if first is None else first
            wrong += [f"{name}: {each}" for each in found]
    for kernel in log.kernels if case.always else ():
        if kernel.share < EXECUTED:
            wrong.append(f"{kernel.share:.0%} of the instructions of {kernel.name} were executed")
    return wrong


def _wrong(made: Call, got: Any, want: Any) -> list[str]:
    """How a result differs from the reference."""
    tolerance, error = made.op.tolerance(made.problem), made.op.error(got, want)
    if not error <= tolerance:
        return [f"error {error}, allowed is {tolerance}"]
    if not isinstance(got, torch.Tensor):
        return []
    there = ~want.isnan()  # rows that belong to no expert have none
    size = want[there].double().square().mean().sqrt()
    most = (got.double() - want.double())[there].abs().max() if there.any() else size * 0
    return [] if most <= OFF * tolerance * size else [f"an element is {most / size:.2g} off"]


def equal(one: Any, other: Any) -> bool:
    """Bit for bit, NaN for NaN, in all tensors of two results."""
    return all(
        torch.equal(a.nan_to_num(nan=7e7), b.nan_to_num(nan=7e7))
        for a, b in zip(tensors(one), tensors(other), strict=True)
    )
