"""What is wrong with a call's arguments is said: types, what maps, ids and offsets hold, memory that is shared."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import moecache
from moecache.kernels.fused_moe.op import FUSED_MOE
from moecache.kernels.fused_moe.op import call_args as layer_args
from moecache.ops import Quant, moe_align_block_size, moe_sorting
from moecache.schemas.errors import InvalidInput


@pytest.fixture(autouse=True)
def tuning() -> Iterator[None]:
    """Values are read at first encounters in mode=tune; without a budget nothing is timed."""
    with moecache.using(db=Path(":memory:"), path=(), mode="tune", strict=False, budget=0.0):
        yield


TOKENS, EXPERTS, TOPK = 20, 8, 4
X, W1, W2 = torch.randn(TOKENS, 32), torch.randn(EXPERTS, 32, 32), torch.randn(EXPERTS, 32, 16)
IDS = torch.stack([torch.randperm(EXPERTS)[:TOPK] for _ in range(TOKENS)]).int()
ROUTER = torch.rand(TOKENS, TOPK)
LAYER = {"hidden_states": X, "w1": W1, "w2": W2, "topk_weights": ROUTER, "topk_ids": IDS}
SORTED = {"topk_ids": IDS, "num_experts": EXPERTS, "block_m": 16}
ALIGNED = {"topk_ids": IDS, "block_size": 16, "num_experts": EXPERTS}
SORTING = {"topk_ids": IDS, "topk_weights": ROUTER, "num_experts": EXPERTS, "model_dim": 32,
           "moebuf_dtype": torch.float32}  # fmt: skip
OFFSETS = torch.tensor([0, 3, 3, 9, 12, 12, 15, 18, 20])
PRODUCT = {"a": X, "b": W1, "offsets": OFFSETS}

# --- types ---

TENSORS = [[[1, 2]], (1, 2), np.zeros((TOKENS, TOPK), dtype=np.int32), True, 8.0, "x", object()]
NUMBERS = [True, 8.5, "8", [8], torch.tensor(8), None, np.int64(8)]
FLAGS = ["no", 2, None, [True], torch.tensor(True)]
WORDS = [0, None, ["silu"], b"silu", torch.zeros(1)]
LAYERS = [[], {}, ([],), {1}]
SIZES = [None, 32, "bf16", torch.zeros(1)]
WRONG = [
    (moecache.moe_sort, SORTED, {"topk_ids": [*TENSORS, None], "num_experts": NUMBERS, "block_m": NUMBERS,
        "topk_weights": TENSORS, "expert_map": TENSORS, "num_tokens": TENSORS, "layer": LAYERS, "variant": WORDS}),
    (moe_align_block_size, ALIGNED, {"topk_ids": [*TENSORS, None], "block_size": NUMBERS, "num_experts": NUMBERS,
        "expert_map": TENSORS, "pad_sorted_ids": FLAGS, "ignore_invalid_experts": FLAGS}),
    (moe_sorting, SORTING, {"topk_ids": [*TENSORS, None], "topk_weights": [*TENSORS, None], "num_experts": NUMBERS,
        "model_dim": [*NUMBERS, -1], "moebuf_dtype": SIZES, "block_size": NUMBERS, "expert_mask": TENSORS,
        "num_local_tokens": TENSORS, "dispatch_policy": [*NUMBERS, 3]}),
    (moecache.fused_moe, LAYER, {**{name: [*TENSORS, None] for name in LAYER}, "activation": WORDS,
        "gated": FLAGS, "alpha": ["1", True], "limit": ["1", True, [7.0]],
        "w1_bias": TENSORS, "w2_bias": TENSORS, "apply_router_weight_on_input": FLAGS,
        "expert_map": TENSORS, "global_num_experts": [True, 8.5, "8", [8]], "quant": [*TENSORS, {}], "out": TENSORS,
        "layer": LAYERS, "variant": WORDS}),
    (moecache.grouped_gemm, PRODUCT, {**{name: [*TENSORS, None] for name in PRODUCT}, "rows": TENSORS, "bias": TENSORS,
        "out": TENSORS, "layer": LAYERS, "variant": WORDS}),
]  # fmt: skip
CASES = [(op, good, name, value) for op, good, wrong in WRONG for name, values in wrong.items() for value in values]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_wrong_type_is_named(number) -> None:
    op, good, name, value = CASES[number]
    with pytest.raises(InvalidInput, match=rf"{name}\b"):
        op(**good | {name: value})


@pytest.mark.parametrize(("op", "good"), [(op, good) for op, good, _ in WRONG])
def test_a_wrong_type_is_named_where_a_right_call_came_before(op, good) -> None:
    op(**good), op(**good)
    for name in good:
        value = good[name]
        wrong = value.tolist() if isinstance(value, torch.Tensor) else str(value)
        with pytest.raises(InvalidInput, match=rf"{name}\b"):
            op(**good | {name: wrong})


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_a_tensor_that_no_kernel_can_read_is_named(number) -> None:
    op, good, _ = WRONG[number]
    for name in [name for name, value in good.items() if isinstance(value, torch.Tensor)]:
        for value in (good[name].to_sparse(), torch.tensor(1)):
            with pytest.raises(InvalidInput, match=rf"{name}\b"):
                op(**good | {name: value})


def test_a_wrong_type_says_what_is_allowed_and_what_to_do() -> None:
    with pytest.raises(InvalidInput, match=r"topk_ids is .*allowed is a tensor: make one with torch.tensor"):
        moecache.moe_sort([[0, 1]], 8, 16)
    with pytest.raises(InvalidInput, match=r"numpy.ndarray; allowed is a tensor: make one with torch.from_numpy"):
        moecache.fused_moe(**LAYER | {"topk_ids": IDS.numpy()})
    with pytest.raises(InvalidInput, match=r"num_experts is True; allowed is an int"):
        moecache.moe_sort(IDS, True, 16)
    with pytest.raises(InvalidInput, match=r"w1_scale is 'x'; allowed is a tensor"):
        moecache.fused_moe(**LAYER, quant=Quant("fp8_block", "x", "y"))
    with pytest.raises(InvalidInput, match=r"layer is \[\]; allowed is something hashable"):
        moecache.fused_moe(*(t[:1] if t is X or t is IDS or t is ROUTER else t for t in LAYER.values()), layer=[])


def test_errors_of_shape_and_device_stay_what_they_are() -> None:
    with pytest.raises(InvalidInput, match="topk_ids"):
        moe_sorting(**SORTING | {"topk_ids": IDS[0]})
    with pytest.raises(InvalidInput, match="expert_mask"):
        moe_sorting(**SORTING, expert_mask=torch.ones(7))
    with pytest.raises(InvalidInput, match="out is"):
        moecache.fused_moe(**LAYER, out=torch.tensor(1.0))


# --- what maps, masks, ids and offsets hold ---

MAP = torch.tensor([-1, 0, -1, 1, 2, -1, 3, -1])
MASK = (MAP >= 0).int()
LOCAL = {"w1": W1[:4], "w2": W2[:4]}


def test_a_mask_is_no_map() -> None:
    moecache.fused_moe(**LAYER | LOCAL, expert_map=MAP)
    for bad in (MASK, MASK.long()):
        with pytest.raises(InvalidInput, match="it looks like a 0/1 mask"):
            moecache.fused_moe(**LAYER | LOCAL, expert_map=bad)
        with pytest.raises(InvalidInput, match="it looks like a 0/1 mask"):
            moecache.moe_sort(**SORTED, expert_map=bad)
        with pytest.raises(InvalidInput, match="it looks like a 0/1 mask"):
            moe_align_block_size(**ALIGNED, expert_map=bad)
    made = torch.where(MASK != 0, MASK.cumsum(0) - 1, -1)  # what the message says
    assert torch.equal(made, MAP)


def test_a_map_is_no_mask() -> None:
    want = moe_sorting(**SORTING, expert_mask=MASK)
    for good in (MASK.bool(), MASK.long(), (MAP >= 0).int()):
        assert torch.equal(moe_sorting(**SORTING, expert_mask=good)[0], want[0])
    for bad in (MAP, MASK * 2, MASK - 1):
        with pytest.raises(InvalidInput, match="expert_mask holds"):
            moe_sorting(**SORTING, expert_mask=bad)


def test_a_map_names_every_local_expert_once_and_none_that_is_not_here() -> None:
    for at, value, words in ((0, 3, "local expert 3 to 2"), (0, 4, "names local expert 4"), (0, 9, "local expert 9")):
        bad = MAP.clone()
        bad[at] = value
        with pytest.raises(InvalidInput, match=words):
            moecache.fused_moe(**LAYER | LOCAL, expert_map=bad)
    moecache.fused_moe(**LAYER | LOCAL, expert_map=torch.full((EXPERTS,), -1))
    moecache.fused_moe(**LAYER | LOCAL, expert_map=torch.where(MAP < 0, -5, MAP))


def widened(ids, name):
    """The same ids with a shared expert behind them, in every row."""
    return torch.cat([ids[:, :-1], torch.full((len(ids), 1), name, dtype=ids.dtype)], 1)


def test_a_shared_expert_behind_the_map_is_not_lost() -> None:
    ids = widened(IDS, EXPERTS)
    with pytest.raises(InvalidInput, match="names expert 8; allowed are 0 to 7, as the map of 8 says"):
        moecache.fused_moe(**LAYER | LOCAL | {"topk_ids": ids}, expert_map=MAP)
    with pytest.raises(InvalidInput, match="names expert 8; allowed are 0 to 7, as num_experts=8 says"):
        moecache.fused_moe(**LAYER | {"topk_ids": ids})
    with pytest.raises(InvalidInput, match="names expert 8"):
        moecache.moe_sort(**SORTED | {"topk_ids": ids})
    with pytest.raises(InvalidInput, match="names expert 8"):
        moe_align_block_size(**ALIGNED | {"topk_ids": ids.long()})
    with pytest.raises(InvalidInput, match=r"names expert 8.*as the mask of 8 says"):
        moe_sorting(**SORTING | {"topk_ids": ids}, expert_mask=MASK)
    wider = torch.cat([MAP, torch.tensor([4])])
    layer = LAYER | {"topk_ids": ids, "w1": W1[:5], "w2": W2[:5]}
    got = moecache.fused_moe(**layer, expert_map=wider)
    want = FUSED_MOE.reference(layer_args(**layer, expert_map=wider))
    assert float((got - want).norm() / want.norm()) < 1e-4


def test_ids_below_zero_take_no_part_without_a_word() -> None:
    ids = IDS.clone()
    ids[:, 0] = -1
    ids[0] = -7
    assert (moecache.fused_moe(**LAYER | {"topk_ids": ids})[0] == 0).all()
    moecache.moe_sort(**SORTED | {"topk_ids": ids})


def test_ids_of_tokens_that_take_no_part_are_not_looked_at() -> None:
    ids = IDS.clone()
    ids[10:] = 1 << 20
    moecache.moe_sort(**SORTED | {"topk_ids": ids}, num_tokens=torch.tensor([10]))
    with moecache.using(debug=True), pytest.raises(InvalidInput, match=str(1 << 20)):
        moecache.moe_sort(**SORTED | {"topk_ids": ids}, num_tokens=torch.tensor([11]))


def test_replay_reads_no_ids_and_a_debug_setting_reads_those_of_every_call() -> None:
    bad = LAYER | {"topk_ids": widened(IDS, EXPERTS)}
    with moecache.using(mode="replay"):
        moecache.fused_moe(**bad)
    moecache.fused_moe(**LAYER)
    moecache.fused_moe(**bad)  # a hit: nothing is read
    for mode in ("tune", "replay", "off"):
        with moecache.using(mode=mode, debug=True):
            for _ in range(2):
                moecache.fused_moe(**LAYER)
                with pytest.raises(InvalidInput, match="names expert 8"):
                    moecache.fused_moe(**bad)


def test_offsets_rise_and_end_within_the_product() -> None:
    for at, value, words in ((2, 2, r"offsets\[2\]=2 is below offsets\[1\]=3"), (8, 21, "0 to 21; allowed are 0 to 20"),
                             (0, -1, "-1 to 20")):  # fmt: skip
        bad = OFFSETS.clone()
        bad[at] = value
        with pytest.raises(InvalidInput, match=words):
            moecache.grouped_gemm(X, W1, bad)
        moecache.grouped_gemm(X, W1, OFFSETS)
        with pytest.raises(InvalidInput, match=words):  # on a hit, too: on a CPU nothing waits for the values
            moecache.grouped_gemm(X, W1, bad)
    moecache.grouped_gemm(X, W1, OFFSETS - OFFSETS // 20)


def test_rows_name_rows_of_a() -> None:
    rows = torch.arange(24).int() % TOKENS
    rows[OFFSETS[-1] :] = 1 << 20  # behind the last group: nobody reads them
    moecache.grouped_gemm(X, W1, OFFSETS, rows=rows)
    for bad in (TOKENS, -1):
        rows[3] = bad
        with moecache.using(debug=True), pytest.raises(InvalidInput, match="allowed are 0 to 19, rows of a"):
            moecache.grouped_gemm(X, W1, OFFSETS, rows=rows)


# --- memory ---


def buffers(rows, columns, more=0):
    whole = torch.zeros(rows + more, columns)
    return whole, whole[:rows]


@pytest.mark.parametrize("shift", [0, 1, 8, TOKENS - 1])
@pytest.mark.parametrize("first", ["fresh", "known"])
def test_out_may_not_overlap_the_tokens(shift, first) -> None:
    whole, x = buffers(TOKENS, 32, TOKENS)
    x.copy_(X)
    if first == "known":
        moecache.fused_moe(**LAYER, out=torch.empty_like(X)), moecache.grouped_gemm(**PRODUCT, out=torch.empty_like(X))
    with pytest.raises(InvalidInput, match="out shares memory with hidden_states"):
        moecache.fused_moe(**LAYER | {"hidden_states": x}, out=whole[shift : shift + TOKENS])
    with pytest.raises(InvalidInput, match="out shares memory with a;"):
        moecache.grouped_gemm(**PRODUCT | {"a": x}, out=whole[shift : shift + TOKENS])
    moecache.fused_moe(**LAYER | {"hidden_states": x}, out=whole[TOKENS:])


def test_out_may_not_lie_within_another_input() -> None:
    size = TOKENS * 32
    w1, w2 = W1.clone(), W2.clone()
    biases = {"w1_bias": torch.zeros(200, 32)[:EXPERTS], "w2_bias": torch.zeros(200, 32)[-EXPERTS:]}
    inside = {
        "w1": w1.view(-1)[-size:], "w2": w2.view(-1)[8 : size + 8], "w1_bias": biases["w1_bias"]._base.view(-1)[:size],
        "w2_bias": biases["w2_bias"]._base.view(-1)[-size:],
    }  # fmt: skip
    ids, router = torch.zeros(TOKENS * 32).int(), torch.rand(TOKENS * 32)
    inside |= {"topk_ids": ids.view(torch.float32), "topk_weights": router}
    call = (
        LAYER
        | biases
        | {"w1": w1, "w2": w2, "topk_ids": ids[-80:].view(20, 4), "topk_weights": router[:80].view(20, 4)}
    )
    for name, where in inside.items():
        for known in (call, {n: v for n, v in call.items() if n not in biases}):
            if name in known:
                with pytest.raises(InvalidInput, match=f"out shares memory with {name};"):
                    moecache.fused_moe(**known, out=where.view(TOKENS, 32))
    product = PRODUCT | {"b": w1, "bias": biases["w1_bias"]}
    for name, where in (("b", inside["w1"]), ("bias", inside["w1_bias"])):
        with pytest.raises(InvalidInput, match=f"out shares memory with {name};"):
            moecache.grouped_gemm(**product, out=where.view(TOKENS, 32))


def test_columns_and_rows_of_one_buffer_that_lie_beside_each_other_are_allowed() -> None:
    want = moecache.fused_moe(**LAYER)
    wide = torch.zeros(TOKENS, 96)
    tall = torch.zeros(2 * TOKENS, 32)
    for x, out in (
        (wide[:, :32], wide[:, 32:64]), (wide[:, 64:], wide[:, :32]), (wide[:, 32:64], wide[:, 64:]),
        (tall[0::2], tall[1::2]), (tall[1::2], tall[0::2]), (wide[:, :32], wide[:, 64:]),
    ):  # fmt: skip
        x.copy_(X)
        assert torch.allclose(moecache.fused_moe(**LAYER | {"hidden_states": x}, out=out), want, atol=1e-4)
        moecache.grouped_gemm(**PRODUCT | {"a": x}, out=out)
    for x, out in ((wide[:, :32], wide[:, 31:63]), (wide[:, 40:72], wide[:, 64:]), (tall[:TOKENS], tall[1::2])):
        with pytest.raises(InvalidInput, match="out shares memory"):
            moecache.fused_moe(**LAYER | {"hidden_states": x}, out=out)


def test_rows_of_out_may_not_overlap_each_other() -> None:
    for out in (torch.zeros(1, 32).expand(TOKENS, 32), torch.zeros(1000).as_strided((TOKENS, 32), (16, 1))):
        with pytest.raises(InvalidInput, match="out has rows"):
            moecache.fused_moe(**LAYER, out=out)


def test_no_tokens_share_nothing() -> None:
    x = X[:0]
    call = LAYER | {"hidden_states": x, "topk_ids": IDS[:0], "topk_weights": ROUTER[:0]}
    assert moecache.fused_moe(**call, out=x).shape == (0, 32)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.int32])
def test_weights_of_a_sort_are_floating(dtype) -> None:
    for op, good in ((moecache.moe_sort, SORTED), (moe_sorting, SORTING)):
        with pytest.raises(InvalidInput, match=rf"topk_weights is {dtype}.*allowed is floating"):
            op(**good | {"topk_weights": torch.ones(TOKENS, TOPK, dtype=dtype)})


@pytest.mark.parametrize("given", [{"limit": 1e39}, {"limit": 10**400}, {"activation": "swiglu_oai", "alpha": 1e300}])
def test_what_float32_cannot_hold_is_refused(given) -> None:
    with pytest.raises(InvalidInput, match="allowed are None and finite float32 numbers above 0"):
        moecache.fused_moe(**LAYER, **given)
    assert torch.isfinite(
        moecache.fused_moe(**LAYER, **dict.fromkeys(given, 3e38) | {"activation": "swiglu_oai"})
    ).all()
