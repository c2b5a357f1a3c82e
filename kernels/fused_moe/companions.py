"""The Triton kernels that sort_and_sum.py launches around the products of fused MoE, to be compiled ahead with them.

What is missed here is compiled by the first launch: that costs a second, no result.
"""

from moecache.kernels.contract import Source
from moecache.kernels.fused_moe import fp8_ring, fp8_space
from moecache.kernels.fused_moe import fp8_tiles as fp8_gpu
from moecache.kernels.fused_moe.sizes import Layer
from moecache.kernels.gemm import fp8_tile as fp8_triton
from moecache.kernels.gemm import tile as gemm
from moecache.kernels.matrix import DTYPE_NAMES, DTYPES, until_summed
from moecache.kernels.signatures import signature_of, sized
from moecache.kernels.sort import gpu as sort_gpu
from moecache.kernels.sort import space as sort_space
from moecache.schemas.config import Config
from moecache.schemas.device import Device
from moecache.schemas.problem import Problem, pow2


def companions(problem: Problem, config: Config, device: Device) -> list[Source]:
    """The sort's kernels, and the sum's unless pairs are added up as they come."""
    early, atomic = bool(dict(config.extra).get("launch_pdl")), dict(config.params).get("combine") == "atomic"
    sort = sort_space.of_layer(
        device, problem.tokens, problem.topk, problem.dim("global", problem.experts), config["block"],
        mapped=bool(problem.dim("mapped")), early=early,
    )  # fmt: skip
    around = [*sort_gpu.sources(*sort, device), *([] if atomic else [_sum(problem, early)])]
    return [*around, *(_quantising(problem, device) if config.variant == fp8_ring.VARIANT else [])]


def _quantising(problem: Problem, device: Device) -> list[Source]:
    """What quantises the tokens: as unfused tiles do it."""
    shape = (64, 128, 2, 4)
    whole = fp8_gpu.sources(problem, fp8_space.tiles({}, block=64, up=shape, down=shape), device)
    return [source for source in whole if source.fn is fp8_triton.quantise][:1]


def _sum(problem: Problem, early: bool) -> Source:
    """As moe_chain.add_up launches it."""
    columns = problem.dim("hidden")
    c = {"TOPK": problem.topk, "G": problem.dim("global", problem.experts), "E": problem.experts, "BT": 1,
         "MAPPED": bool(problem.dim("mapped")), "BN": min(1024, pow2(columns)), "PDL": early}  # fmt: skip
    rows = DTYPE_NAMES[until_summed(DTYPES[problem.dtype])]
    signature = signature_of(gemm.combine, c, {"PARTIAL": f"*{rows}", "OUT": f"*{problem.dtype}"})
    aligned = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    options = {"num_warps": 4} | ({"launch_pdl": True} if early else {})
    lie = Layer(problem, 0)
    plain = Source(gemm.combine, signature, c, options, aligned=aligned)
    return sized(plain, lie.second(), {"PARTIAL": lie.pairs.nbytes, "OUT": lie.out.nbytes})
