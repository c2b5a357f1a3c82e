"""MoE sorting: every variant against a plain Python model, element for element."""

import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from drawn import in_turn
from interpreting import marked

from moecache import routing
from moecache.kernels.sort.op import SORT, SortCall, SortResult, capacity, check
from moecache.kernels.tensors import poison
from moecache.schemas.config import Config, config
from moecache.schemas.device import KNOWN, Device
from moecache.schemas.errors import InvalidInput

CPU = Device(vendor="cpu", arch="x86_64", name="test", units=2)


def model(args):
    """The contract in plain Python: (sorted ids, weights, block experts, totals, offsets, counts)."""
    ids, experts, block = args.topk_ids.tolist(), args.num_experts, args.block_m
    tokens, topk = args.topk_ids.shape
    limit = tokens if args.num_tokens is None else max(0, min(tokens, int(args.num_tokens)))
    mapping = None if args.expert_map is None else args.expert_map.tolist()
    groups = [[] for _ in range(experts)]
    for token in range(limit):
        for slot in range(topk):
            expert = ids[token][slot]
            if not 0 <= expert < experts:
                continue
            if mapping is not None and not args.keep_masked:
                expert = mapping[expert]
            if 0 <= expert < experts:
                groups[expert].append((token, slot))
    name = (lambda t, s: s << 24 | t) if args.packed else (lambda t, s: t * topk + s)
    pad = topk << 24 | tokens if args.packed else tokens * topk
    rows, weights, blocks, offsets = [], [], [], []
    for expert, pairs in enumerate(groups):
        offsets.append(len(rows))
        fill = -len(pairs) % block
        rows += [name(t, s) for t, s in pairs] + [pad] * fill
        if args.topk_weights is not None:
            weights += [float(args.topk_weights[t, s]) for t, s in pairs] + [0.0] * fill
        label = mapping[expert] if mapping is not None and args.keep_masked else expert
        blocks += [label] * ((len(pairs) + fill) // block)
    total = len(rows)
    room = args.rows or capacity(tokens * topk, experts, block)
    rows += [pad] * (room - total)
    weights += [0.0] * (room - total)
    blocks += [-1] * (-(-room // block) - len(blocks))
    return rows, weights, blocks, [total, limit], [*offsets, total], [len(g) for g in groups]


def assert_is_model(got: SortResult, args, what=""):
    rows, weights, blocks, totals, offsets, counts = model(args)
    assert got.counts.tolist() == counts, what
    assert got.expert_offsets.tolist() == offsets, what
    assert got.num_tokens_post_padded.tolist() == totals, what
    assert got.sorted_token_ids.tolist() == rows, what
    assert got.expert_ids.tolist() == blocks, what
    assert int(got.posted) == routing.bucket_index(counts), what
    if args.topk_weights is not None:
        assert got.sorted_weights.tolist() == [float(torch.tensor(w, dtype=torch.float32)) for w in weights], what


def half_map(experts: int) -> torch.Tensor:
    e = torch.arange(experts, dtype=torch.int32)
    return torch.where(e % 2 == 0, e // 2, -1)


def fresh(tokens, experts, topk, generator="zipf", seed=None):
    return routing.draw(generator, tokens, experts, topk, int(torch.randint(1 << 30, ())) if seed is None else seed)


def cases(scale: int = 1) -> dict:
    """Fresh random calls over everything that the contract names; `scale` multiplies the tokens."""
    bad = fresh(19 * scale, 12, 3).to(torch.int64)
    bad[1], bad[2, 1], bad[3, 0], bad[4, 2] = -1, 12, 2**40 + 1, -(2**33)
    wide = fresh(24 * scale, 20, 8)
    twice = torch.randint(0, 5, (15 * scale, 4), dtype=torch.int32)
    limit = torch.tensor([7], dtype=torch.int32)
    w = torch.rand(33 * scale, 4)
    return {
        "odd sizes": SortCall(fresh(33 * scale, 20, 4), 20, 16),
        "weights": SortCall(fresh(33 * scale, 20, 4), 20, 8, topk_weights=w),
        "strided weights": SortCall(fresh(33 * scale, 20, 4), 20, 8, topk_weights=torch.rand(4, 33 * scale).T),
        "half weights": SortCall(fresh(33 * scale, 20, 4), 20, 8, topk_weights=w.half()),
        "int64": SortCall(fresh(33 * scale, 20, 4).long(), 20, 16),
        "invalid ids": SortCall(bad, 12, 16),
        "one expert takes all": SortCall(torch.full((21 * scale, 3), 7, dtype=torch.int32), 9, 32),
        "one expert": SortCall(torch.zeros(5 * scale, 1, dtype=torch.int32), 1, 16),
        "no token": SortCall(torch.empty(0, 4, dtype=torch.int32), 20, 16),
        "one token": SortCall(fresh(1, 64, 8), 64, 16),
        "nothing valid": SortCall(torch.full((6, 2), -1, dtype=torch.int32), 8, 16),
        "strided ids": SortCall(wide[:, ::2], 20, 16),
        "transposed ids": SortCall(wide.T.contiguous().T, 20, 16),
        "experts twice": SortCall(twice, 5, 16),
        "mapped": SortCall(fresh(33 * scale, 20, 4), 20, 16, expert_map=half_map(20)),
        "labelled": SortCall(fresh(33 * scale, 20, 4), 20, 16, expert_map=half_map(20), keep_masked=True),
        "mapped beyond": SortCall(fresh(33 * scale, 20, 4), 20, 16, expert_map=torch.arange(20).int() * 3 - 9),
        "all masked": SortCall(fresh(9, 20, 4), 20, 16, expert_map=torch.full((20,), -1, dtype=torch.int32)),
        "limited": SortCall(fresh(33 * scale, 20, 4), 20, 16, num_tokens=limit),
        "limit zero": SortCall(fresh(9, 20, 4), 20, 16, num_tokens=limit * 0),
        "limit past the end": SortCall(fresh(9, 20, 4), 20, 16, num_tokens=limit + 99),
        "packed": SortCall(fresh(33 * scale, 20, 4), 20, 16, packed=True, topk_weights=w),
        "wider": SortCall(fresh(33 * scale, 20, 4), 20, 16, rows=33 * scale * 4 + 20 * 16),
        "block 24": SortCall(fresh(40 * scale, 20, 4), 20, 24),
        "block 1": SortCall(fresh(40 * scale, 20, 4), 20, 1),
        "many experts": SortCall(fresh(10 * scale, 1000, 10), 1000, 16),
        "256 experts": SortCall(fresh(20 * scale, 256, 8, "uniform"), 256, 64),
        "32 slots": SortCall(fresh(5 * scale, 33, 32, "uniform"), 33, 16),
    }


def run(cfg: Config, args) -> SortResult:
    return SORT.launch(cfg, args, poison(SORT.outputs(args)))


@pytest.mark.parametrize("name", cases())
def test_reference(name):
    args = cases()[name]
    assert_is_model(SORT.reference(args), args, name)


@pytest.mark.parametrize("name", cases())
def test_torch_variants(name):
    args = cases(3)[name]
    problem = SORT.problem(args, CPU, "")
    space = SORT.space(problem, CPU)
    assert {c.variant for c in space} == {"argsort", "counting", "by_expert"}
    for cfg in space:
        assert_is_model(run(cfg, args), args, f"{name}: {cfg}")


SHAPES = [  # that force several steps, several programs and every phase
    [config("oneshot", programs=16, step=16, num_warps=4), config("oneshot", programs=64, step=32, num_warps=4)],
    [
        config("multiphase", chunks=4, block=32, step=16, scan=0, fused=0, num_warps=4),
        config("multiphase", chunks=8, block=64, step=32, scan=1, fused=0, num_warps=4),
        config("multiphase", chunks=1, block=16, step=16, scan=0, fused=1, num_warps=4),
    ],
]


def candidates(args, device=KNOWN["h200"]) -> list[Config]:
    """Those of a call that the interpreter tells apart and knows: no number of warps, no dependent launches, and no
    handshake of programs, which it runs one after the other."""
    space = SORT.space(SORT.problem(args, device, ""), device)
    found = [config(c.variant, **dict(c.params) | {"num_warps": 4}) for c in space if not dict(c.params).get("fused")]
    return list(dict.fromkeys(found))


@marked
@pytest.mark.parametrize("name", cases())
def test_triton_variants(name):
    args, number = cases()[name], list(cases()).index(name)
    for configs in (*SHAPES, candidates(args)):
        for cfg in in_turn(configs, number, 1):
            assert_is_model(run(cfg, args), args, f"{name}: {cfg}")


@settings(max_examples=60)
@given(
    st.integers(0, 70),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(1, 130),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_call(tokens, experts, topk, block, packed, seed):
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(-2, experts + 2, (tokens, topk), generator=rng, dtype=torch.int32)
    args = SortCall(ids, experts, block, packed=packed, topk_weights=torch.rand(tokens, topk, generator=rng))
    space = SORT.space(SORT.problem(args, CPU, ""), CPU)
    assert_is_model(run(space[seed % len(space)], args), args)


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=300))
def test_bucket_is_what_its_levels_say(counts):
    """Level 0 is a share above two thirds, and every further level halves it; in exact fractions."""
    pairs, active = sum(counts), sum(c > 0 for c in counts)
    if pairs == 0:
        assert routing.bucket_index(counts) == 0
        return
    effective = Fraction(pairs * pairs, sum(c * c for c in counts))
    reachable = min(len(counts), pairs)

    def level(share, top):
        return next((k for k in range(top) if share > Fraction(2, 3 * 2**k)), top)

    a, e = level(Fraction(active, reachable), 2), level(effective / reachable, 3)
    assert routing.bucket_index(counts) == a * 4 + e


def test_error_is_exact():
    args = SortCall(fresh(16, 8, 2), 8, 16)
    want, got = SORT.reference(args), SORT.reference(args)
    assert SORT.error(got, want) == 0.0
    got.sorted_token_ids[0] += 1
    assert SORT.error(got, want) == float("inf")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_experts": 1025}, "1025"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"block_m": 0}, "block_m=0"),
        ({"topk_ids": torch.zeros(4, dtype=torch.int32)}, "[tokens, topk]"),
        ({"topk_ids": torch.zeros(4, 2)}, "float32"),
        ({"topk_ids": torch.zeros(4, 33, dtype=torch.int32)}, "topk=33"),
        ({"topk_ids": torch.zeros(131073, 1, dtype=torch.int32)}, "131073"),
        ({"topk_weights": torch.zeros(3, 2)}, "topk_weights"),
        ({"expert_map": torch.zeros(7, dtype=torch.int32)}, "expert_map"),
        ({"expert_map": torch.zeros(8)}, "expert_map"),
        ({"num_tokens": torch.zeros(2, dtype=torch.int32)}, "num_tokens"),
    ],
)
def test_bad_input_names_the_value(change, words):
    args = replace(SortCall(torch.zeros(4, 2, dtype=torch.int32), 8, 16), **change)
    with pytest.raises(InvalidInput, match=words.replace("[", r"\[").replace("]", r"\]")):
        check(args)


def test_fits_refuses_what_no_kernel_can_run():
    h200 = KNOWN["h200"]
    problem = SORT.problem(SortCall(fresh(64, 128, 8), 128, 64), h200, "")
    good = SORT.space(problem, h200)
    assert good and all(SORT.fits(problem, c, h200) == "" for c in good)
    for bad, word in [
        (config("oneshot", programs=64, step=16, num_warps=3), "num_warps=3"),
        (config("oneshot", programs=64, step=16, num_warps=64), "threads"),
        (config("oneshot", programs=1, step=16, num_warps=4), "programs"),
        (config("multiphase", chunks=3, block=64, step=32, scan=0, fused=0, num_warps=4), "chunks=3"),
        (config("multiphase", chunks=256, block=64, step=32, scan=0, fused=1, num_warps=4), "handshake"),
        (config("argsort", keys="int32"), "argsort"),
        (config("oneshot", step=16), "num_warps"),
    ]:
        assert word in SORT.fits(problem, bad, h200), bad
    tiny = h200.model_copy(update={"shared_bytes": 1024})
    assert SORT.space(problem, tiny) == []
    assert "shared memory" in SORT.fits(problem, good[0], tiny)
    amd = KNOWN["mi300x"]
    assert "NVIDIA" in SORT.fits(problem, config("oneshot", {"launch_pdl": 1}, programs=64, step=16, num_warps=4), amd)


def test_prediction_follows_the_device():
    """Both paths have a place: one launch for few pairs, all units for many; and a slower launch favours oneshot."""
    h200 = KNOWN["h200"]

    def chosen(tokens, device):
        problem = SORT.problem(SortCall(torch.zeros(tokens, 8, dtype=torch.int32), 128, 64), device, "")
        space = SORT.space(problem, device)
        return space[0].variant

    assert [chosen(t, h200) for t in (1, 16, 64)] == ["oneshot"] * 3
    assert [chosen(t, h200) for t in (1024, 4096, 16384)] == ["multiphase"] * 3
    assert chosen(256, h200) == "multiphase"
    assert chosen(256, h200.model_copy(update={"launch_us": 8.0})) == "oneshot"
    for name in ("mi300x", "mi355x"):
        assert chosen(1, KNOWN[name]) == "oneshot" and chosen(16384, KNOWN[name]) == "multiphase"
