"""The cost model against physics: rooflines, monotony, what devices change; its fit against known and real timings."""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from parts import spent

from moecache.kernels.gemm.work import layer
from moecache.lab import ramp
from moecache.lab.fitting import fit, leftovers
from moecache.lab.grid import read, work_of
from moecache.predict import parameters, products, rates
from moecache.predict.calls import cell as cell_of
from moecache.predict.calls import representative
from moecache.predict.model import times
from moecache.predict.parameters import Parameters, zero_shot
from moecache.predict.products import Candidates
from moecache.predict.ranking import Smoothed, features
from moecache.predict.work import Cell, Tile, Work
from moecache.schemas.config import Config, config
from moecache.schemas.device import KNOWN, Device
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import BUCKETS, Problem, bucket_index

DATA = Path(__file__).parent / "data"
H200 = KNOWN["h200"]
GPUS = sorted(KNOWN)
Counts = tuple[int, ...]


def tile(m: int = 64, n: int = 128, k: int = 64, group: int = 1, warps: int = 4, stages: int = 3) -> Config:
    sizes = {"BLOCK_SIZE_M": m, "BLOCK_SIZE_N": n, "BLOCK_SIZE_K": k, "GROUP_SIZE_M": group}
    return config("triton", num_warps=warps, num_stages=stages, **sizes)


SPACE = [
    tile(m, n, k, group, warps, stages)
    for m, n, k, group in product((16, 32, 64, 128), (64, 128, 256), (64, 128), (1, 16))
    for warps, stages in product((4, 8), (2, 3, 4))
]  # fmt: skip
FEW = [SPACE[at] for at in range(0, len(SPACE), 29)]
PAIR = dict(up_stages=4, up_warps=4, down_stages=3, down_warps=4)


def ours(variant: str, block: int = 64, up: tuple[int, int] = (64, 64), down: tuple[int, int] = (128, 64), *,
         pdl: int = 0, **more: Any) -> Config:  # fmt: skip
    """A config of our own kernels; `up` and `down` are (n, k)."""
    sizes = {"up_n": up[0], "up_k": up[1], "down_n": down[0], "down_k": down[1], "group": 1, "combine": "sum"}
    return config(variant, {"launch_pdl": 1} if pdl else {}, **sizes | PAIR | {"block": block, "swap": 0} | more)


RING = {"programs": 132, "tma": 1}
OURS = [
    ours("tiles"), ours("tiles", 16, swap=1, pdl=1), ours("tiles", 128, group=8, combine="atomic"),
    ours("heights", 128, low=32, group=8), ours("ring", 16, swap=1, **RING), ours("ring", 64, parts=2, group=8, **RING),
    ours("ring", 64, parts=2, combine="atomic", **RING), ours("ring", 128, down_warps=8, up_warps=8, **RING),
    ours("tiles_ring", 32, swap=1, pdl=1, **RING),
    config("decode", up_n=1, up_k=1024, up_warps=4, down_n=4, down_k=512, down_warps=8),
]  # fmt: skip


def call(counts: Counts = (32,) * 64, hidden: int = 2048, inter: int = 768, dtype: str = "bf16") -> Cell:
    return Cell(hidden, inter, max(1, sum(counts) // 4), counts, dtype)


def candidates(configs: Sequence[Config]) -> Candidates:
    return products.candidates([work_of(config) for config in configs])


def us(cell: Cell, configs: list[Config], device: Device = H200, p: Parameters | None = None) -> np.ndarray:
    return times(p or zero_shot(device), device, [cell], candidates(configs))[0]


def smoothed(p: Parameters, cells: list[Cell], among: Candidates, us: np.ndarray) -> Smoothed:
    """What timings teach beside the parameters."""
    return Smoothed(p, H200, features(cells), among, leftovers(p, H200, cells, among, us))


some_counts = st.lists(st.integers(0, 400), min_size=1, max_size=64).filter(sum).map(tuple)
some_config = st.sampled_from(SPACE + OURS * 12)
some_device = st.sampled_from([KNOWN[name] for name in GPUS])
sizes = st.sampled_from([256, 704, 2048, 2880, 7168])


# --- physics ---


@given(some_counts, some_config, some_device, sizes, sizes, st.sampled_from(["bf16", "fp8"]))
def test_predictions_respect_the_roofline(
    counts: Counts, config: Config, device: Device, hidden: int, inter: int, dtype: str
) -> None:
    """Never faster than the bytes that must move at full bandwidth, nor than the FLOPs at the device's peak."""
    usual, fast = zero_shot(device), {"matmul": 9.0, "tall": 9.0, "small": 9.0, "latency_us": 1e-3, "slice_us": 1e-4}
    fast |= {"tile_us": 1e-3, "rows_us": 1e-3, "start_us": 1e-3, "drift": 1e-4}
    kernels = {name: kernel.model_copy(update=fast) for name, kernel in usual.kernels.items()}
    p = usual.model_copy(update={"bandwidth": 9.0, "reread": 1e-3, "early": 1e-3, "kernels": kernels})
    optimist = p.model_copy(update={"bodies": dict.fromkeys(sum(candidates([config]).bodies, ()), 0.01)})
    active, rows, cell = sum(c > 0 for c in counts), sum(counts), call(counts, hidden, inter, dtype)
    size = {"bf16": 2, "fp8": 1}[dtype]
    plain, atomic = "up_n" not in dict(config.params), dict(config.params).get("combine") == "atomic"
    between, out = (3 if plain else 2) * rows * inter, (cell.tokens if atomic else rows) * hidden
    moved = size * (3 * active * hidden * inter + rows * hidden + between + out)
    floor = moved / (device.bandwidth_gbs * 1e3)
    flops = 6 * rows * hidden * inter / (dict(device.peak_tflops)[dtype] * 1e6)
    for found in (usual, p, optimist):
        assert us(cell, [config], device, found)[0] >= max(floor, flops) * (1 - 1e-9), (floor, flops)


@given(some_counts, some_config, some_device, st.data())
def test_more_rows_hardly_ever_cost_less(counts: Counts, config: Config, device: Device, data: st.DataObject) -> None:
    """Up to 3 % less where one tile more opens a round whose latency hides its share of the bytes, and up to 7 % where
    tiles have two heights: see the next test."""
    at = data.draw(st.integers(0, len(counts) - 1))
    more = list(counts)
    more[at] += data.draw(st.integers(1, 500))
    before, after = us(call(counts), [config], device)[0], us(call(tuple(more)), [config], device)[0]
    assert after >= before * (0.96)


@given(some_counts, some_config, some_device)
def test_twice_the_rows_never_cost_less(counts: Counts, config: Config, device: Device) -> None:
    """Where tiles have two heights, up to 5 % less: a low tile counts as more uneven than its time is."""
    least = 0.98
    assert us(call(tuple(2 * c for c in counts)), [config], device)[0] >= us(call(counts), [config], device)[0] * least


@given(some_counts, some_config, some_device, sizes, st.sampled_from(["hidden", "inter"]))
def test_larger_layers_never_cost_less(counts: Counts, config: Config, device: Device, size: int, which: str) -> None:
    small, large = call(counts, **{which: size}), call(counts, **{which: 2 * size})
    assert us(large, [config], device)[0] >= us(small, [config], device)[0]


@given(some_counts, some_config, some_device)
def test_the_order_of_experts_does_not_matter(counts: Counts, config: Config, device: Device) -> None:
    assert us(call(counts), [config], device)[0] == us(call(tuple(sorted(counts))), [config], device)[0]


def twice(device: Device) -> Device:
    """Two of it: units and caches."""
    return device.model_copy(update={name: 2 * getattr(device, name) for name in ("units", "l2_bytes", "llc_bytes")})


@given(some_counts, some_config, some_device)
def test_twice_the_units_hardly_ever_cost_more(counts: Counts, config: Config, device: Device) -> None:
    """Up to 4 % more where tiles are unequal: what that adds is not hidden behind memory, and
    fewer tiles of a unit even it out less."""
    assert us(call(counts), [config], twice(device))[0] <= us(call(counts), [config], device)[0] * 1.06


@given(some_counts, st.sampled_from(SPACE), some_device)
def test_twice_the_units_never_cost_more_where_tiles_are_equal(counts: Counts, config: Config, device: Device) -> None:
    assert us(call(counts), [config], twice(device))[0] <= us(call(counts), [config], device)[0] * 1.01


@given(some_counts, some_config, st.sampled_from(["mi300x", "mi355x"]))
def test_dies_without_a_common_l2_never_cost_less(counts: Counts, config: Config, name: str) -> None:
    device = KNOWN[name]
    one = device.model_copy(update={"xcds": 1})
    assert us(call(counts), [config], device)[0] >= us(call(counts), [config], one)[0]


@pytest.mark.parametrize("of", ["plain", "ours"])
def test_dies_cost_where_an_expert_has_several_blocks(of: str) -> None:
    device, counts = KNOWN["mi300x"], (512,) * 8
    one = device.model_copy(update={"xcds": 1})
    small = [tile(16, 128, 64) if of == "plain" else ours("tiles", 16, (64, 64), (128, 64))]
    assert us(call(counts, 4096, 4096), small, device)[0] > 1.02 * us(call(counts, 4096, 4096), small, one)[0]


def cdna(block: int, k: int = 64, group: int = 1, stages: int = 2, warps: int = 4) -> Config:
    held = {"up_stages": stages, "down_stages": stages, "up_warps": warps, "down_warps": warps}
    return ours("tiles", block, (64, k), (128, k), group=group, **held)


@pytest.mark.parametrize("name", ["mi300x", "mi355x"])
def test_our_rankings_move_with_what_a_device_has(name: str) -> None:
    """Units: a call that fills few prefers small tiles. LDS: deep stages that leave one program a unit lose. Dies:
    groups that share weights gain, as every die reads them for itself."""
    device, few = KNOWN[name], call((48,) * 4, 4096, 1024)

    def gain(a: Config, b: Config, cell: Cell, **changes: Any) -> float:
        """Time of b over that of a, on the device with these changes."""
        first, second = us(cell, [a, b], device.model_copy(update=changes))
        return float(second / first)

    short, tall = cdna(16), cdna(64)
    assert gain(short, tall, few, units=device.units) > gain(short, tall, few, units=16)
    shallow, deep, many = cdna(32, 64), cdna(32, 128, stages=3), call((200,) * 64)
    assert gain(shallow, deep, many, shared_bytes=65536) > gain(shallow, deep, many, shared_bytes=1 << 20)
    alone, grouped, hot = cdna(64), cdna(64, group=16), call((1024,) * 8, 4096, 14336)
    assert gain(grouped, alone, hot, xcds=8) > gain(grouped, alone, hot, xcds=1) >= 1


@pytest.mark.parametrize("arch", ["mi300x", "mi355x"])
def test_less_lds_holds_fewer_programs(arch: str) -> None:
    """gfx942 has 64 KiB and gfx950 160: with the small one, deep pipelines leave one program a unit."""
    device, among = KNOWN[arch], candidates([tile(64, 128, 128, stages=2), tile(16, 64, 64, stages=2)])
    held = products.products([call()], among, device)[0].resident[0]
    least = device.model_copy(update={"shared_bytes": 32768})
    assert products.products([call()], among, least)[0].resident[0, 0] == 1
    assert held[1] > held[0] >= 1 and (arch != "mi355x" or held[0] > 1)
    deep = [tile(64, 128, 128, stages=2)]
    assert us(call(), deep, least)[0] >= us(call(), deep, device)[0]


@pytest.mark.parametrize("name", GPUS)
def test_more_bandwidth_helps_where_weights_are_read(name: str) -> None:
    device, sparse = KNOWN[name], call((1,) * 64, 4096, 4096)
    faster = device.model_copy(update={"bandwidth_gbs": 2 * device.bandwidth_gbs})
    assert us(sparse, [tile(16, 128, 64)], faster)[0] < 0.75 * us(sparse, [tile(16, 128, 64)], device)[0]


def test_routing_with_the_same_tiles_differs_by_the_weights_it_reads() -> None:
    """RaMP's form cannot see this: 64 tiles in either call, but 8 experts or 64."""
    hot, cold = call((128,) * 8 + (0,) * 56), call((16,) * 64)
    among = candidates([tile(16, 128, 64)])
    assert ramp.grid([hot], among, H200) == ramp.grid([cold], among, H200)
    assert us(cold, [tile(16, 128, 64)])[0] > 1.5 * us(hot, [tile(16, 128, 64)])[0]


def test_one_more_round_costs_a_step() -> None:
    """132 tiles fill 132 units once; the next needs a second round."""
    wide = tile(128, 256, 64, warps=8, stages=3)
    full, over = (call((128 * blocks,), 4096, 1536) for blocks in (11, 12))  # 12 tiles across
    assert us(over, [wide])[0] > 1.15 * us(full, [wide])[0]


def test_what_only_our_kernels_have() -> None:
    """Atomic additions write less and copy nothing, a second group of warps hides the ends of tiles, dependent launch
    shortens starts, a lower tile spares the rows that a block lacks, and decode reads an expert once a pair."""
    cell, p = call((64,) * 64), zero_shot(H200)
    ring = ours("ring", parts=1, **RING), ours("ring", parts=2, **RING), ours("ring", parts=1, pdl=1, **RING)
    alone, turns, early = us(cell, list(ring))
    assert turns < alone and 2 < alone - early < 6
    added, summed = (spent(p, H200, cell, work_of(ours("ring", combine=how, **RING))) for how in ("atomic", "sum"))
    assert added.other < summed.other
    assert us(call((140,) * 64), [ours("heights", 128, low=16)])[0] < us(call((140,) * 64), [ours("tiles", 128)])[0]
    decode = work_of(OURS[-1])
    once, again = (spent(p, H200, Cell(4096, 2048, 8, counts), decode).up["memory"] for counts in ((1,) * 8, (8,)))
    assert again > 0.5 * once


def test_what_the_caches_lose() -> None:
    """One sweep over all blocks keeps what is added to in L2 and asks for the rows once a sweep: good where the product
    is short, bad where the rows are many bytes. Neighbours far apart, and wide panels, fall out of step."""

    def down(cell: Cell, **more: Any) -> float:
        return spent(zero_shot(H200), H200, cell, work_of(ours("ring", 128, **RING, **more))).down["memory"]

    short, long = Cell(7168, 256, 4096, (128,) * 256), Cell(2048, 2048, 4096, (256,) * 128)
    added = dict(combine="atomic", up_warps=8, down_warps=8)
    assert down(short, **added, down_group=1024) < 0.9 * down(short, **added)
    assert down(long, **added, down_group=1024) > 1.2 * down(long, **added)
    assert down(short) < down(short, **added), "most of what is added is read again"

    def up(cell: Cell, n: int, group: int) -> float:
        config = ours("ring", 64, (n, 64), parts=2, group=group, **RING)
        return spent(zero_shot(H200), H200, cell, work_of(config)).up["memory"]

    deep, alone = Cell(2880, 2880, 4096, (128,) * 128), Cell(2880, 2880, 2048, (64,) * 128)
    assert up(deep, 128, 1) > 1.2 * up(deep, 128, 16) > 1.2 * 1.02 * up(deep, 64, 16)
    assert up(alone, 128, 1) == pytest.approx(up(alone, 128, 16), rel=0.02), "no expert has two blocks"


def test_unequal_halves_keep_others_waiting() -> None:
    """Tiles of 256 rows leave padding out, so that blocks differ; equal ones of as many rows are faster."""
    halves = [ours("ring", 256, (64, 64), (64, 64), parts=2, **RING)]
    assert us(call((256, 64) * 4, 4096, 1792), halves)[0] > 1.05 * us(call((160,) * 8, 4096, 1792), halves)[0]
    one, many = (products.products([call((c,) * 8)], candidates(halves), H200)[0].uneven[0, 0] for c in (250, 300))
    assert one == 0 and many == pytest.approx(96)  # blocks of 256 and 64


@pytest.mark.parametrize(
    ("hidden", "inter", "experts", "topk", "down", "took"),
    [
        (2048, 768, 128, 8, (4, 256), 27.0),
        (7168, 256, 256, 8, (4, 256), 32.3),
        (2880, 2880, 128, 4, (8, 512), 68.9),
        (4096, 14336, 8, 2, (16, 1024), 227.7),
    ],
)
def test_one_token_wants_decode_and_many_do_not(
    hidden: int, inter: int, experts: int, topk: int, down: tuple[int, int], took: float
) -> None:
    """With the times of one token that a warm-up of an H100 took (data/h100-moecache-warm.json.gz)."""
    decode = config(
        "decode", {"launch_pdl": 1}, up_n=1, up_k=1024, up_warps=4, down_n=down[0], down_k=down[1], down_warps=8
    )
    tiled = ours("tiles", 16, (64, 256), (64, 64), swap=1, pdl=1)
    h100 = KNOWN["h100"]
    fast, slow = us(Cell(hidden, inter, 1, (1,) * topk + (0,) * (experts - topk)), [decode, tiled], h100)
    assert fast < slow and fast == pytest.approx(took, rel=0.1)
    fast, slow = us(Cell(hidden, inter, 64, (64 * topk // experts,) * experts), [decode, tiled], h100)
    assert fast > slow


def test_few_rows_want_short_tiles_and_many_want_tall_ones() -> None:
    for name in GPUS:
        device = KNOWN[name]
        fitting = [
            c for c in SPACE if (c["BLOCK_SIZE_M"] + c["BLOCK_SIZE_N"]) * c["BLOCK_SIZE_K"] * 4 < device.shared_bytes
        ]
        decode, prefill = (fitting[int(us(call((n,) * 64), fitting, device).argmin())] for n in (2, 1024))
        assert decode["BLOCK_SIZE_M"] <= 32 < prefill["BLOCK_SIZE_M"], name


# --- the pieces ---


def test_the_parts_add_up() -> None:
    for cell in (call(), Cell(2048, 768, 512, (32,) * 64, whole=False)):
        for each in FEW:
            found = spent(zero_shot(H200), H200, cell, work_of(each))
            assert found.us == pytest.approx(us(cell, [each])[0])
            assert found.us == pytest.approx(found.up["us"] + cell.whole * found.down["us"] + found.other)
            for half in (found.up, found.down):
                assert half["us"] == pytest.approx(half["start"] + half["rounds"] + half["last"])
                assert half["rounds"] > 0 and half["memory"] > 0 and half["matmul"] > 0 and half["l2"] > 0
    assert found.other == 0


def test_tiles_of_the_kernels_that_exist() -> None:
    plain = work_of(tile(64, 128, 32, 16, 8, 4))
    assert plain.up == plain.down == Tile("plain", 64, 128, 32, 16, 8, 4)
    own = {"block": 32, "up_n": 64, "up_k": 128, "up_stages": 4, "up_warps": 4, "down_n": 128, "down_k": 64,
           "down_stages": 3, "down_warps": 8, "group": 8, "programs": 132, "swap": 1, "combine": "sum"}  # fmt: skip
    ring, mixed = (work_of(config(variant, **own)) for variant in ("ring", "tiles_ring"))
    up = Tile("ring", 32, 128, 128, 8, 4, 4, 132, swap=1, gated=1)
    down = Tile("ring", 32, 256, 64, 8, 8, 3, 132, swap=1)
    assert ring == Work(up, down, launches=2, row_hidden=1, token_hidden=1)
    assert mixed.up == replace(up, kernel="tile") and mixed.down == down
    assert down.body == "ring:32x256x64.w8.s3.t"
    assert layer(config("tiles", **own), False).up == Tile("tile", 32, 64, 128, 8, 4, 4, 132, swap=1)
    few = work_of(config("decode", up_n=4, up_k=512, up_warps=4, down_n=4, down_k=256, down_warps=4))
    assert few.up == Tile("vector", 1, 8, 512, gated=1) and few.launches == 0
    both = work_of(config("heights", **own | {"block": 128, "low": 32, "swap": 0, "combine": "atomic"}))
    assert both.atomic and both.launches == 1 and both.up and both.up.low == 32
    for wrong in (config("by_expert", math="native"), config("x", n=16), config("x", BLOCK_SIZE_N=0, BLOCK_SIZE_K=64)):
        with pytest.raises(InvalidInput, match=r"no tile"):
            work_of(wrong)


def test_every_config_of_our_kernels_is_predicted() -> None:
    op = pytest.importorskip("moecache.kernels.fused_moe.op").FUSED_MOE
    pytest.importorskip("triton")
    from moecache.schemas.layer import Layer

    layer = Layer(model="x", experts=128, global_experts=128, topk=8, hidden=2048, intermediate=768)
    for name in ("h200", "mi300x", "mi355x"):
        for problem in op.problems(layer, [1, 64, 4096], KNOWN[name]):
            counts = (-(-problem.tokens * 8 // 128),) * 128
            cell, space = cell_of(problem, counts), op.space(problem, KNOWN[name])
            found = us(cell, space, KNOWN[name])
            assert [op.work(problem, config, KNOWN[name]) for config in space] == [work_of(config) for config in space]
            assert np.isfinite(found).all() and (found > 0).all() and found.max() / found.min() < 50


def test_a_cell_of_a_problem() -> None:
    fields = {"vendor": "nvidia", "arch": "sm_90", "units": 132, "tokens": 64, "experts": 8, "topk": 2, "dtype": "bf16"}
    asked = Problem(op="fused_moe", **fields, dims={"hidden": 2048, "intermediate": 768})
    assert cell_of(asked, (16,) * 8) == Cell(2048, 768, 64, (16,) * 8)
    quantised = Problem(op="fused_moe", **fields, dims={"hidden": 2048, "intermediate": 768, "quant": "fp8_block"})
    assert cell_of(quantised, (16,) * 8).dtype == "fp8"
    alone = Problem(op="grouped_gemm", **fields, dims={"hidden": 2048, "intermediate": 1536})
    assert cell_of(alone, (16,) * 8) == Cell(2048, 1536, 64, (16,) * 8, whole=False, gated=False)
    with pytest.raises(InvalidInput, match="0 rows; allowed are sizes from 1"):
        cell_of(asked, (0,) * 8)
    with pytest.raises(InvalidInput, match="hidden=0"):
        cell_of(Problem(op="moe_sort", **fields), (16,) * 8)


def test_a_gpu_that_says_nothing_of_its_rates_is_taken_for_a_small_one() -> None:
    unknown = Device(vendor="nvidia", arch="sm_100", name="a GPU", units=148)
    told = unknown.model_copy(update={"peak_tflops": (("bf16", 2250.0),), "bandwidth_gbs": 8000})
    assert (us(call(), FEW, unknown) > us(call(), FEW, told)).all() and (us(call(), FEW, told) > 0).all()


def test_launches_without_products_take_what_a_device_has() -> None:
    """On a GPU a work takes its launches, what it issues and waits for, its bytes and its FLOPs."""
    base, gpu = Work(launches=2, instructions=1e4, barriers=3, nbytes=1e6, flops=(("bf16", 1e9),)), KNOWN["h200"]
    slower: list[dict[str, Any]] = [
        {"launch_us": 9.0}, {"clock_mhz": 900}, {"bandwidth_gbs": 100.0}, {"peak_tflops": (("bf16", 9.0),)}
    ]  # fmt: skip
    for changes in slower:
        assert rates.alone_us(base, gpu.model_copy(update=changes)) > rates.alone_us(base, gpu), changes
    assert rates.floor_us(base, gpu) == pytest.approx(1e9 / 694e6) and rates.floor_us(Work(nbytes=4440e3), gpu) == 1
    cpu = Device(vendor="cpu", arch="x86_64", name="a processor", units=8)
    assert rates.alone_us(Work(launches=30, instructions=1e3), cpu) == 151
    assert rates.alone_us(base, cpu.model_copy(update={"units": 16})) < rates.alone_us(base, cpu)


@pytest.mark.parametrize("experts, topk", [(8, 2), (128, 8), (256, 8), (128, 4)])
@pytest.mark.parametrize("tokens", [1, 4, 16, 256, 4096, 131072])
def test_a_representative_call_lies_in_its_bucket_where_one_does(tokens: int, experts: int, topk: int) -> None:
    """As a draw: all pairs are there, no expert takes a token twice, and large calls reach their bucket."""
    for name in ("", *BUCKETS):
        counts = representative(name, tokens, experts, topk)
        assert len(counts) == experts and sum(counts) == tokens * topk and 0 <= min(counts) <= max(counts) <= tokens
        if tokens >= 256 and experts > 8 and name not in ("", "a1e0", "a2e0", "a2e1"):  # as many idle are uneven
            assert BUCKETS[bucket_index(counts)] == name, (name, counts)
    assert representative("", 0, experts, topk) == (0,) * experts


@pytest.mark.parametrize("name", GPUS)
def test_the_tables_peak_is_that_of_the_matrix_units(name: str) -> None:
    """FLOPs per clock, units and clock reproduce the datasheets; what was measured lies below."""
    device = KNOWN[name]
    full, table = rates.peak(device, "bf16") / 1e6, dict(device.peak_tflops)["bf16"]
    assert table <= full * 1.001 and (table > 0.9 * full or device.rates_from.startswith("measured"))
    assert rates.peak(device, "fp8") == 2 * rates.peak(device, "bf16")


# --- the fit ---


MADE = {"matmul": 0.6, "tall": 0.6, "latency_us": 0.7, "tile_us": 2.0, "start_us": 15.0}
START = zero_shot(H200)
TRUTH = START.model_copy(
    update={"bandwidth": 0.8, "kernels": START.kernels | {"plain": START.kernels["plain"].model_copy(update=MADE)}}
)
CALLS = [
    call((rows,) * active + (0,) * (64 - active), hidden, inter)
    for rows, active, (hidden, inter) in product((1, 8, 40, 300), (8, 30, 64), ((2048, 768), (4096, 1792), (7168, 256)))
]
SPREAD = [
    tile(m, n, k, g, w, s)
    for m in (16, 64, 128)
    for n, k, g, w, s in ((64, 128, 1, 4, 3), (128, 64, 16, 4, 4), (256, 64, 1, 8, 3))
]


def test_a_fit_finds_the_parameters_that_made_the_timings() -> None:
    among = candidates(SPREAD)
    made = times(TRUTH, H200, CALLS, among)
    found = fit(CALLS, among, made, H200)
    assert found.bandwidth == pytest.approx(TRUTH.bandwidth, rel=0.03)
    for name in MADE:
        assert getattr(found.kernels["plain"], name) == pytest.approx(MADE[name], rel=0.15), name
    assert found.kernels["ring"] == START.kernels["ring"], "nobody timed it"
    assert all(factor == pytest.approx(1, abs=0.05) for factor in found.bodies.values())
    assert np.abs(np.log(times(found, H200, CALLS, among) / made)).max() < 0.03
    assert Parameters.model_validate_json(found.model_dump_json()) == found and found.version == parameters.VERSION


def test_a_fit_learns_that_one_tile_is_slow() -> None:
    among = candidates(SPREAD)
    slow = "plain:64x128x64.w4.s4"
    made = times(TRUTH.model_copy(update={"bodies": {slow: 1.25}}), H200, CALLS, among)
    found = fit(CALLS, among, made, H200)
    assert max(found.bodies, key=lambda name: found.bodies[name]) == slow and found.bodies[slow] > 1.12


def test_missing_timings_count_nothing() -> None:
    among = candidates(SPREAD)
    made = times(TRUTH, H200, CALLS, among)
    holes = np.where(np.random.default_rng(0).random(made.shape) < 0.3, np.nan, made)
    holes[:, 0] = np.nan
    found = fit(CALLS, among, holes, H200)
    assert np.abs(np.log(times(found, H200, CALLS, among) / made)).max() < 0.1
    smooth = smoothed(found, CALLS, among, holes).times(CALLS, among)
    assert np.isfinite(smooth).all() and np.abs(np.log(smooth / made)).max() < 0.1


def test_timings_that_cannot_be_fitted_are_refused() -> None:
    among = candidates(SPREAD)
    with pytest.raises(InvalidInput, match="one timing a cell"):
        fit(CALLS[:2], among, np.full((2, len(SPREAD)), np.nan), H200)
    with pytest.raises(InvalidInput, match="more than 0"):
        fit(CALLS[:2], among, np.zeros((2, len(SPREAD))), H200)
    with pytest.raises(InvalidInput, match="0 configs to predict"):
        candidates([])


def test_smoothing_repeats_what_was_timed_and_forgets_it_far_away() -> None:
    """A leftover holds at its call and at a similar one, and not at all for another layer."""
    among, p = candidates(SPREAD), zero_shot(H200)
    plain = times(p, H200, CALLS, among)
    odd = SPREAD.index(tile(64, 128, 64, 16, 4, 4))
    timed = plain.copy()
    timed[:, odd] *= 0.9
    part = [at for at, cell in enumerate(CALLS) if cell.hidden == 2048]
    smooth = smoothed(p, [CALLS[at] for at in part], among, timed[part])

    def correction(cell: Cell) -> float:
        ratio = smooth.times([cell], among)[0] / times(p, H200, [cell], among)[0]
        return float(np.log(ratio[odd] / np.median(ratio)))

    here, similar = correction(CALLS[part[0]]), correction(call((2,) * 10 + (0,) * 54))
    far = correction(Cell(16384, 32768, 1 << 16, (4096,) * 256))
    assert here < -0.05 and similar < -0.02 and abs(far) < 0.005


def test_smoothing_reaches_configs_that_were_not_timed() -> None:
    """Others of the same height go with those that were timed; another kernel knows nothing of it."""
    among, p = candidates(SPREAD), zero_shot(H200)
    timed = times(p, H200, CALLS, among)
    tall = [at for at, each in enumerate(SPREAD) if each["BLOCK_SIZE_M"] == 128]
    timed[:, tall] *= 1.1
    smooth = smoothed(p, CALLS, among, timed)
    new = candidates([tile(128, 64, 64, 1, 4, 4), tile(16, 128, 128, 1, 4, 3), ours("ring", **RING)])
    change = np.log(smooth.times(CALLS, new) / times(p, H200, CALLS, new)).mean(axis=0)
    assert change[0] > 0.01 > change[1] and change[2] == pytest.approx(0, abs=1e-9)


# --- RaMP ---


@given(st.lists(st.tuples(*[st.floats(0.01, 50)] * 4), min_size=1, max_size=3), st.booleans())
def test_ramp_recovers_its_own_form(coefficients: list[tuple[float, ...]], relative: bool) -> None:
    g = np.repeat(np.round(np.logspace(0.5, 4.5, 25))[:, None], len(coefficients), axis=1)
    made = ramp.times(np.array(coefficients), g, 132)
    found = ramp.times(ramp.fit(g, made, 132, relative=relative), g, 132)
    assert np.allclose(found, made, rtol=1e-5)


def test_ramp_leaves_out_what_is_missing() -> None:
    g = np.round(np.logspace(0.5, 4, 25))[:, None]
    made = ramp.times(np.array([[5.0, 2.0, 0.1, 0.5]]), g, 132)
    holes = made.copy()
    holes[::4] = np.nan
    assert np.allclose(ramp.times(ramp.fit(g, holes, 132), g, 132), made, rtol=1e-6)


def test_the_wave_term_is_rounded_up() -> None:
    """Without the ceiling two of the four columns are parallel."""
    g = np.round(np.logspace(0.5, 4, 25))
    columns = ramp._columns(g, 132)
    assert np.linalg.matrix_rank(columns / np.abs(columns).max(axis=0)) == 4


# --- the real grid ---


@pytest.mark.parametrize(
    ("name", "slow", "most"),
    [
        ("h200-vllm-grid.json", [("mixtral_tp8", 4096, "all")], 1.35),
        ("h100-moecache-grid.json.gz", [], 1.15),
    ],
)
def test_the_absolute_level_is_right_without_any_timing(
    name: str, slow: list[tuple[str, int, str]], most: float
) -> None:
    """But for calls that a throttled GPU took 1.25 to 1.7 times as long for."""
    grid = read(DATA / name)
    error = np.abs(np.log(times(zero_shot(grid.device), grid.device, grid.cells, grid.among) / grid.us))
    best = error[np.arange(len(error)), np.nanargmin(grid.us, axis=1)]
    calls = zip(grid.models, grid.cells, grid.routings, strict=True)
    sound = np.array([(m, c.tokens, r) not in slow and (m, c.tokens, "all") not in slow for m, c, r in calls])
    assert np.nanmean(error) < 0.09 and best.mean() < 0.08 and math.exp(best[sound].max()) < most
