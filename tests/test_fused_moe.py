"""Fused MoE on the CPU: every variant against a plain loop over tokens and slots, its checks, problems and hot path."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moecache
from moecache import feedback, routing
from moecache.kernels.formats import registry as formats
from moecache.kernels.formats.contract import Quant
from moecache.kernels.fused_moe.op import FUSED_MOE, call_args, check
from moecache.kernels.matrix import DTYPES, grouped_mm_works
from moecache.kernels.tensors import poison
from moecache.ops import Quant as PublicQuant
from moecache.predict.ranking import rank
from moecache.schemas.config import config
from moecache.schemas.device import KNOWN, Device
from moecache.schemas.errors import InvalidInput
from moecache.schemas.layer import Layer
from moecache.schemas.problem import problem_from_key
from moecache.warmup import problems, warmup

CPU = Device(vendor="cpu", arch="x86_64", name="test", units=2)


# --- the contract, one pair at a time in float64 ---


def plain(name, x):
    if name == "silu":
        return x / (1 + torch.exp(-x))
    if name == "gelu":
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2
    if name == "gelu_tanh":
        return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    assert name == "relu2"
    return torch.where(x < 0, 0.0, x * x)


def act(args, both):
    name, limit = args.activation, args.limit
    if name.endswith("_ungated"):
        return plain(name.removesuffix("_ungated"), both)
    gate, up = both.split(len(both) // 2)
    if name in ("swiglu_oai", "silu_limited"):
        gate = torch.where(gate > limit, limit, gate)
        up = torch.where(up > limit, limit, torch.where(up < -limit, -limit, up))
    if name == "swiglu_oai":
        return (up + 1) * gate / (1 + torch.exp(-args.alpha * gate))
    return plain(name.removesuffix("_limited"), gate) * up


def coarse(row, kind, dtype):
    """One token through fp8 and back, in pieces of 128 columns or whole."""
    top = {torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 240.0}[dtype]
    size = 128 if kind == "fp8_block" else len(row)
    pieces = []
    for at in range(0, len(row), size):
        piece = row[at : at + size].float()
        scale = max(float(piece.abs().max()), 1e-10) / top
        pieces.append((piece / scale).to(dtype).double() * scale)
    return torch.cat(pieces)


def matrix(args, name, expert):
    """An expert's weights in float64, each element times its own scale."""
    weights, quant = getattr(args, name)[expert].double(), args.quant
    if quant is None:
        return weights
    scale = getattr(quant, f"{name}_scale")[expert].double()
    if quant.kind == "fp8_tensor":
        return weights * scale
    if quant.kind == "fp8_channel":
        return torch.stack([row * s for row, s in zip(weights, scale, strict=True)])
    row, column = torch.arange(weights.shape[0]) // 128, torch.arange(weights.shape[1]) // 128
    return weights * scale[row][:, column]


def model(args):
    """[T, K] float64."""
    ids, router, quant = args.topk_ids.tolist(), args.topk_weights.double(), args.quant
    mapping = None if args.expert_map is None else args.expert_map.tolist()
    out = torch.zeros(args.hidden_states.shape, dtype=torch.float64)
    for token, row in enumerate(ids):
        for slot, expert in enumerate(row):
            if not 0 <= expert < args.num_experts:
                continue
            expert = expert if mapping is None else mapping[expert]
            if not 0 <= expert < args.w1.shape[0]:
                continue
            x, weight = args.hidden_states[token], router[token, slot]
            x = x.double() if quant is None else coarse(x, quant.kind, args.w1.dtype)
            both = matrix(args, "w1", expert) @ (x * weight if args.on_input else x)
            both += 0 if args.w1_bias is None else args.w1_bias[expert].double()
            middle = act(args, both)
            if quant is not None:
                middle = coarse(middle.to(args.hidden_states.dtype), quant.kind, args.w2.dtype)
            result = matrix(args, "w2", expert) @ middle
            result += 0 if args.w2_bias is None else args.w2_bias[expert].double()
            out[token] += result if args.on_input else weight * result
    return out


# --- calls ---

TENSORS = ("hidden_states", "w1", "w2", "topk_weights", "topk_ids")


def tensors_of(args):
    """What `fused_moe` takes by position."""
    return [getattr(args, name) for name in TENSORS]


def call(tokens=9, experts=5, topk=2, hidden=32, middle=24, dtype=torch.bfloat16, ids=None, **changes):
    """Fresh random arguments."""
    given = {name: changes.pop(name) for name in ("activation", "gated", "alpha", "limit") if name in changes}
    panels = 2 if given.get("gated", True) else 1
    ids = torch.stack([torch.randperm(experts)[:topk] for _ in range(tokens)]).int() if ids is None else ids
    x = torch.randn(len(ids), hidden).to(dtype)
    w1 = (torch.randn(experts, panels * middle, hidden) * hidden**-0.5).to(dtype)
    w2 = (torch.randn(experts, hidden, middle) * middle**-0.5).to(dtype)
    router = torch.rand(ids.shape)
    made = call_args(x, w1, w2, router / router.sum(1, keepdim=True).clamp_min(1e-6), ids, **given)
    return replace(made, **changes)


def biased(args):
    experts, both, hidden = args.w1.shape
    return replace(args, w1_bias=torch.randn(experts, both).to(args.w1.dtype), w2_bias=torch.randn(experts, hidden))


def strided(args):
    """The same values with a gap behind every row."""
    wide = {}
    for name in ("hidden_states", "w1", "w2"):
        tensor = getattr(args, name)
        whole = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan")).to(tensor.dtype)
        wide[name] = whole[..., :-3].copy_(tensor)
    return replace(args, **wide)


def fp8(args, kind):
    made = []
    for name in ("w1", "w2"):
        parts = [formats.get(kind).quantised(weights.float(), torch.float8_e4m3fn) for weights in getattr(args, name)]
        made += [torch.stack([w for w, _ in parts]), torch.stack([s for _, s in parts])]
    return replace(args, w1=made[0], w2=made[2], quant=Quant(kind, made[1], made[3], apart=False))


def mapped(args, everywhere=11):
    """Of 11 experts over all ranks this one has those that leave no rest by 2; the id 5 is out of range."""
    mapping = torch.full((everywhere,), -1, dtype=torch.int32)
    mapping[::2] = torch.arange((everywhere + 1) // 2, dtype=torch.int32)
    ids = torch.randint(-1, everywhere + 2, args.topk_ids.shape, dtype=torch.int64)
    return replace(args, topk_ids=ids, expert_map=mapping, num_experts=everywhere)


def cases():
    """Fresh random calls over everything that the contract names."""
    bad = torch.randint(0, 5, (9, 3))
    bad[1], bad[2, 1], bad[3, 0], bad[4, 2] = -1, 5, 2**40 + 1, -(2**33)
    return {
        "plain": call(),
        "fp16": call(dtype=torch.float16),
        "fp32": call(dtype=torch.float32),
        "gelu": call(activation="gelu"),
        "swiglu_oai": call(activation="swiglu_oai", alpha=1.3, limit=0.5),
        "gelu_tanh": call(activation="gelu_tanh"),
        "relu2": call(activation="relu2", dtype=torch.float32),
        "limit": call(limit=0.4),
        "limit, biases, on input": biased(call(limit=1, on_input=True)),
        "relu2, no gate": call(activation="relu2", gated=False),
        "silu, no gate": call(gated=False, dtype=torch.float32),
        "gelu, no gate": call(gated=False, activation="gelu"),
        "gelu_tanh, no gate, biases": biased(call(gated=False, activation="gelu_tanh", middle=25)),
        "relu2, no gate, all": biased(call(activation="relu2", gated=False, on_input=True, dtype=torch.float16)),
        "biases": biased(call()),
        "biases, swiglu_oai": biased(call(activation="swiglu_oai")),
        "first bias": replace(biased(call()), w2_bias=None),
        "on input": call(on_input=True),
        "on input, biases": biased(call(on_input=True, topk=1)),
        "strided": strided(call()),
        "strided, fp32": strided(call(dtype=torch.float32)),
        "odd sizes": call(hidden=33, middle=100),
        "odd sizes, fp32": call(hidden=100, middle=33, dtype=torch.float32),
        "one column": call(hidden=1, middle=1, dtype=torch.float32),
        "invalid ids": call(ids=bad),
        "nothing valid": call(ids=torch.full((4, 2), -1)),
        "one expert takes all": call(ids=torch.full((17, 1), 3)),
        "experts twice": call(ids=torch.randint(0, 2, (9, 4))),
        "one expert": call(experts=1, topk=1),
        "empty experts": call(experts=40, tokens=3),
        "no token": call(ids=torch.empty(0, 2, dtype=torch.int32)),
        "one token": call(tokens=1),
        "ten slots": call(experts=12, topk=10),
        "mapped": mapped(call(tokens=20, experts=5)),
        "half weights": replace(call(), topk_weights=torch.rand(9, 2).half()),
        "transposed ids": call(ids=torch.randint(0, 5, (3, 9), dtype=torch.int32).T),
        "fp8_block": fp8(call(hidden=160, middle=136), "fp8_block"),
        "fp8_channel": fp8(call(hidden=160, middle=33), "fp8_channel"),
        "fp8_block, limit": fp8(call(hidden=160, middle=136, limit=0.5), "fp8_block"),
        "fp8_block, no gate": fp8(call(hidden=160, middle=136, activation="relu2", gated=False), "fp8_block"),
        "fp8_channel, no gate": fp8(biased(call(middle=33, activation="gelu_tanh", gated=False)), "fp8_channel"),
        "fp8_tensor, fp16": fp8(call(dtype=torch.float16), "fp8_tensor"),
        "fp8_block, all": fp8(mapped(biased(call(hidden=130, middle=65, on_input=True))), "fp8_block"),
    }


FORMS = [
    {}, {"activation": "gelu"}, {"activation": "gelu_tanh"}, {"activation": "relu2"}, {"activation": "swiglu_oai"},
    {"limit": 0.5}, {"gated": False}, {"gated": False, "activation": "gelu"},
    {"gated": False, "activation": "gelu_tanh"}, {"gated": False, "activation": "relu2"},
]  # fmt: skip


def run(cfg, args):
    return FUSED_MOE.launch(cfg, args, poison(FUSED_MOE.outputs(args)))


def assert_right(args, what=""):
    check(args)
    want, problem = model(args), FUSED_MOE.problem(args, CPU, "")
    assert FUSED_MOE.error(FUSED_MOE.reference(args), want) <= (5e-3 if args.quant else 1e-5), what
    for cfg in FUSED_MOE.space(problem, CPU):
        got = run(cfg, args)
        assert got.dtype == args.hidden_states.dtype
        assert FUSED_MOE.error(got, want) <= FUSED_MOE.tolerance(problem), f"{what}: {cfg}"


@pytest.mark.parametrize("name", cases())
def test_every_variant_and_the_reference(name):
    assert_right(cases()[name], name)


def test_the_cases_reach_every_variant():
    spaces = [FUSED_MOE.space(FUSED_MOE.problem(args, CPU, ""), CPU) for args in cases().values()]
    expected = {"by_expert", "padded_bmm"} | ({"grouped_mm"} if any(map(grouped_mm_works, DTYPES)) else set())
    assert {c.variant for space in spaces for c in space} == expected


@settings(max_examples=40)
@given(
    st.integers(0, 30), st.integers(1, 9), st.integers(1, 10), st.integers(1, 40), st.integers(1, 40),
    st.sampled_from(sorted(DTYPES)), st.sampled_from(FORMS), st.booleans(), st.booleans(),
    st.integers(0, 2**31),
)  # fmt: skip
def test_any_call(tokens, experts, topk, hidden, middle, dtype, form, on_input, biases, seed):
    torch.manual_seed(seed)
    ids = torch.randint(-1, experts + 1, (tokens, topk))
    args = call(0, experts, topk, hidden, middle, DTYPES[dtype], ids, on_input=on_input, **form)
    args = biased(args) if biases else args
    want, problem = model(args), FUSED_MOE.problem(args, CPU, "")
    space = FUSED_MOE.space(problem, CPU)
    # Few numbers can cancel: their error is measured against what was added up.
    size = max(1.0, want.norm().item())
    assert (run(space[seed % len(space)], args).double() - want).norm().item() <= 2e-2 * size


def test_experts_of_a_batch_that_do_not_divide_all():
    args = biased(call(tokens=30, experts=7, topk=3))
    for step in (1, 2, 3, 5, 7):
        assert FUSED_MOE.error(run(config("padded_bmm", experts=step), args), model(args)) < 1e-2


def test_gradients_stop_here():
    args = call(dtype=torch.float32)
    args.hidden_states.requires_grad_()
    for cfg in FUSED_MOE.space(FUSED_MOE.problem(args, CPU, ""), CPU):
        assert not run(cfg, args).requires_grad


# --- fp8 ---


@pytest.mark.parametrize("kind", ["fp8_block", "fp8_channel", "fp8_tensor"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz])
def test_weights_survive_fp8(kind, dtype):
    weights = torch.randn(150, 300) * torch.logspace(-1, 1, 150)[:, None]
    form = formats.get(kind)
    small, scale = form.quantised(weights, dtype)
    assert scale.shape == form.scale_shape(150, 300) and small.dtype == dtype
    back = form.dequantised(small, scale)
    assert ((back - weights).abs() <= weights.abs() / 16 + scale.max() / 100).all()
    assert small.float().abs().max() == torch.finfo(dtype).max


def test_zero_weights_and_zero_tokens_survive_fp8():
    args = call(hidden=32, middle=32)
    args.hidden_states.zero_()
    args.w2.zero_()
    got = run(config("by_expert", math="native"), fp8(args, "fp8_block"))
    assert got.isfinite().all() and not got.any()


@pytest.fixture
def serving(tmp_path):
    with moecache.using(db=tmp_path / "cache.sqlite", path=(), mode="off", strict=False) as active:
        yield active


# --- what is refused ---

X = torch.zeros(4, 32, dtype=torch.bfloat16)


def meta(*shape, dtype=torch.bfloat16):
    return torch.zeros(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"hidden_states": X[0]}, "hidden_states is torch.bfloat16 [32]"),
        ({"hidden_states": X.double()}, "float64"),
        ({"hidden_states": X[:, :31]}, "hidden=31"),
        ({"w1": torch.zeros(5, 47, 32).bfloat16()}, "w1 is [5, 47, 32]"),
        ({"w1": torch.zeros(48, 32).bfloat16()}, "w1 is [48, 32]"),
        ({"w1": torch.zeros(5, 0, 32).bfloat16()}, "w1 is [5, 0, 32]"),
        ({"w1": torch.zeros(5, 48, 32)}, "w1 is torch.float32"),
        ({"w1": torch.zeros(5, 48, 32).to(torch.float8_e4m3fn)}, "or quant (fp8_block"),
        ({"w2": torch.zeros(5, 24, 32).bfloat16()}, "allowed is [5, 32, 24]"),
        ({"w2": torch.zeros(4, 32, 24).bfloat16()}, "w2 is [4, 32, 24]"),
        ({"w2": torch.zeros(5, 32, 24).half()}, "w2 torch.float16"),
        ({"w1": meta(1025, 48, 32), "w2": meta(1025, 32, 24)}, "1025 experts"),
        ({"w1": meta(0, 48, 32), "w2": meta(0, 32, 24)}, "0 experts"),
        ({"num_experts": 6}, "global_num_experts=6"),
        ({"num_experts": 4}, "global_num_experts=4"),
        ({"num_experts": 4, "expert_map": torch.arange(4)}, "allowed are 5 and more"),
        ({"num_experts": 2000, "expert_map": torch.zeros(2000, dtype=torch.int32)}, "2000"),
        ({"topk_ids": torch.zeros(4, 2)}, "topk_ids is torch.float32"),
        ({"topk_ids": torch.zeros(3, 2, dtype=torch.int32)}, "[4, topk]"),
        ({"topk_ids": torch.zeros(4, dtype=torch.int32)}, "topk_ids is torch.int32 [4]"),
        ({"topk_weights": torch.zeros(4, 3)}, "topk_weights is torch.float32 [4, 3]"),
        ({"topk_weights": torch.zeros(4, 2, dtype=torch.int32)}, "topk_weights is torch.int32"),
        ({"topk_ids": torch.zeros(4, 33, dtype=torch.int32), "topk_weights": torch.zeros(4, 33)}, "topk=33"),
        ({"topk_ids": torch.zeros(4, 0, dtype=torch.int32), "topk_weights": torch.zeros(4, 0)}, "topk=0"),
        ({"activation": "relu"}, "'relu'; allowed are silu, gelu, gelu_tanh, relu2, swiglu_oai"),
        ({"topk_weights": meta(4, 2)}, "cpu, meta"),
        ({"w1_bias": torch.zeros(5, 24)}, "w1_bias is torch.float32 [5, 24]"),
        ({"w2_bias": torch.zeros(5, 32, dtype=torch.int32)}, "w2_bias is torch.int32"),
        ({"w2_bias": meta(5, 32)}, "on meta"),
        ({"expert_map": torch.zeros(4, dtype=torch.int32)}, "expert_map is torch.int32 [4]"),
        ({"expert_map": torch.zeros(5)}, "expert_map is torch.float32"),
        ({"expert_map": meta(5, dtype=torch.int32)}, "on meta"),
        ({"quant": Quant("fp8_row", torch.ones(5), torch.ones(5))}, "fp8_row"),
        ({"quant": Quant("fp8_tensor", torch.ones(5), torch.ones(5))}, "w1 is torch.bfloat16; with quant"),
    ],
)  # fmt: skip
def test_bad_input_names_the_value(change, words):
    args = replace(call(tokens=4), **change)
    with pytest.raises(InvalidInput) as error:
        check(args)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"activation": "gelu", "limit": 7.0}, "limit=7.0 with activation='gelu'"),
        ({"activation": "relu2", "gated": False, "limit": 7.0}, "limit=7.0 with activation='relu2' and gated=False"),
        ({"gated": False, "limit": 7.0}, "silu, swiglu_oai with a gate take one"),
        ({"alpha": 1.702}, "alpha=1.702 with activation='silu', which has none; swiglu_oai has"),
        ({"activation": "swiglu_oai", "gated": False}, "it needs a gate; allowed are silu, gelu, gelu_tanh, relu2"),
        ({"activation": "silu_limited"}, "activation='silu_limited'; allowed are silu, gelu, gelu_tanh, relu2, swig"),
        ({"activation": "relu2_ungated"}, "activation='relu2_ungated'"),
        ({"activation": ["silu"]}, "activation is ['silu']"),
        ({"gated": 1}, "gated is 1"),
        ({"limit": 0}, "limit=0; allowed"),
        ({"limit": -1.0}, "limit=-1.0"),
        ({"limit": float("nan")}, "limit=nan"),
        ({"limit": True}, "limit is True"),
        ({"limit": torch.ones(1)}, "limit is of type torch.Tensor"),
        ({"activation": "swiglu_oai", "alpha": "1.7"}, "alpha is '1.7'"),
    ],
)
def test_what_an_activation_does_not_take(given, words, serving):
    args = call()
    for _ in range(2):  # a hit of the same shapes does not hide it
        with pytest.raises(InvalidInput) as error:
            moecache.fused_moe(*tensors_of(args), **given)
        assert words in str(error.value)
        public(args)


def test_shapes_of_the_other_setting_say_so(serving):
    gated, bare = call(hidden=32, middle=24), call(hidden=32, middle=24, gated=False)
    for args, setting in ((bare, True), (gated, False)) * 2:
        with pytest.raises(InvalidInput, match=f"with gated={setting} .* or pass gated={not setting}"):
            moecache.fused_moe(*tensors_of(args), gated=setting)
        public(gated), public(bare)
    odd = call(middle=25, gated=False)
    with pytest.raises(InvalidInput, match=r"w1 is .*2 · intermediate, hidden=32.*, or pass gated=False"):
        moecache.fused_moe(*tensors_of(odd))
    with pytest.raises(InvalidInput) as error:  # which has none without a gate
        moecache.fused_moe(*tensors_of(bare), activation="swiglu_oai")
    assert "pass gated" not in str(error.value)


def test_the_limit_of_silu_clamps(serving):
    """As DeepSeek-V4 does: silu(min(gate, 10)) · clamp(up, ±10)."""
    args = call(tokens=8, dtype=torch.float32)
    args.hidden_states *= 30
    want = model(call_args(*tensors_of(args), limit=10.0))
    assert FUSED_MOE.error(model(args), want) > 0.1
    for limit in (10, 10.0):
        got = moecache.fused_moe(*tensors_of(args), activation="silu", limit=limit)
        assert FUSED_MOE.error(got, want) < 1e-4


@pytest.mark.parametrize("kind", ["fp8_block", "fp8_channel", "fp8_tensor"])
@pytest.mark.parametrize("name", ["w1_scale", "w2_scale"])
def test_bad_scales_name_what_is_wanted(kind, name):
    args = fp8(call(), kind)
    check(args)
    good = getattr(args.quant, name)
    for bad in (good[:4], good.half(), good.to("meta")):
        with pytest.raises(InvalidInput, match=f"quant.{name} is"):
            check(replace(args, quant=replace(args.quant, **{name: bad})))


def test_error_is_relative_and_refuses_what_is_not_finite():
    want = torch.tensor([[3.0, 4.0]])
    assert FUSED_MOE.error(want, want) == 0.0
    assert FUSED_MOE.error(torch.tensor([[3.0, 4.5]]), want) == pytest.approx(0.1)
    assert FUSED_MOE.error(torch.tensor([[3.0, float("nan")]]), want) == math.inf
    assert FUSED_MOE.error(torch.tensor([[3.0, float("inf")]]), want) == math.inf
    assert FUSED_MOE.error(want[:, :1], want) == math.inf
    assert FUSED_MOE.error(torch.zeros(2, 2), torch.zeros(2, 2)) == 0.0
    assert FUSED_MOE.error(torch.ones(2, 2), torch.zeros(2, 2)) == math.inf
    assert FUSED_MOE.error(torch.empty(0, 4), torch.empty(0, 4)) == 0.0


# --- problems and configs ---


def key_of(args):
    return FUSED_MOE.problem(args, CPU, "a0e0").key


def test_the_key_holds_what_changes_the_answer():
    plain = "op=fused_moe vendor=cpu arch=x86_64 units=2 tokens=16 experts=5 topk=2 routing=a0e0 dtype=bf16"
    args = call()
    assert key_of(args) == f"{plain} dims.hidden=32 dims.intermediate=24"
    changed = {
        "dims.activation=gelu": replace(args, activation="gelu"),
        "dims.activation=silu_limited": call(limit=3.0),
        "dims.gated=0": call(gated=False, activation="relu2"),
        "dims.activation=relu2": call(gated=False, activation="relu2"),
        "dims.activation=gelu_tanh": call(activation="gelu_tanh"),
        "dims.biased=1": replace(args, w2_bias=torch.zeros(5, 32)),
        "dims.on_input=1": replace(args, on_input=True),
        "dims.global=11": mapped(args),
        "dims.mapped=1": mapped(args),
        "dims.quant=fp8_tensor": fp8(args, "fp8_tensor"),
        "dims.unaligned=1": strided(args),
        "dtype=fp16": call(dtype=torch.float16),
        "tokens=32": call(tokens=17),
        "dims.hidden=40": call(hidden=40),
    }
    for part, other in changed.items():
        assert f" {part} " in f"{key_of(other)} ", part
        assert f" {part} " not in f"{key_of(args)} "
        assert problem_from_key(key_of(other)).key == key_of(other)


@pytest.mark.parametrize("which", ["hidden_states", "w1", "w2"])
def test_rows_off_16_bytes_are_another_problem(which):
    args = call()
    tensor = getattr(args, which)
    shifted = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    assert "unaligned=1" in key_of(replace(args, **{which: shifted}))
    transposed = tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert "unaligned=1" in key_of(replace(args, **{which: transposed}))
    assert "unaligned" not in key_of(args)


@pytest.fixture
def deterministic(monkeypatch):
    """As after torch.use_deterministic_algorithms(True), which loads a compiler for seconds."""
    return lambda: monkeypatch.setattr(torch._C, "_get_deterministic_algorithms", lambda: True)


def test_deterministic_algorithms_are_another_problem(deterministic):
    args = call()
    before = key_of(args)
    deterministic()
    assert key_of(args) == before.replace("dims.hidden", "dims.deterministic=1 dims.hidden")


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize(
    "dims",
    [
        {}, {"activation": "gelu"}, {"biased": 1, "activation": "swiglu_oai"}, {"on_input": 1},
        {"gated": 0, "biased": 1},
        {"activation": "silu_limited"}, {"activation": "relu2", "gated": 0, "quant": "fp8_block"},
        {"activation": "gelu_tanh"}, {"unaligned": 1},
        {"quant": "fp8_block"}, {"quant": "fp8_channel"}, {"quant": "fp8_tensor", "unaligned": 1},
        {"mapped": 1, "global": 30}, {"mapped": 1, "global": 9}, {"mapped": 1, "global": 6},
    ],
)  # fmt: skip
def test_inputs_are_of_their_problem(dtype, dims):
    key = key_of(call(tokens=16, experts=6, hidden=48, middle=32, dtype=DTYPES[dtype]))
    asked = problem_from_key(key)
    asked = asked.model_copy(update={"dims": tuple(sorted((dict(asked.dims) | dims).items()))})
    args = FUSED_MOE.inputs(asked, routing.draw("uniform", 16, 6, 2), 1)
    check(args)
    assert FUSED_MOE.problem(args, CPU, "a0e0").key == asked.key
    again, other = (FUSED_MOE.inputs(asked, routing.draw("uniform", 16, 6, 2), seed) for seed in (1, 2))
    assert torch.equal(args.hidden_states, again.hidden_states)
    assert not torch.equal(args.hidden_states, other.hidden_states)
    assert FUSED_MOE.error(run(FUSED_MOE.space(asked, CPU)[0], args), FUSED_MOE.reference(args)) < 5e-2


def test_a_rank_gets_its_share_of_drawn_tokens_and_all_of_real_ones():
    args = mapped(call(experts=4), 32)
    asked = FUSED_MOE.problem(args, CPU, "a0e0")
    drawn = FUSED_MOE.choices(FUSED_MOE.inputs(asked, torch.randint(0, 4, (4000, 2)), 0))
    assert 0.10 < (drawn >= 0).float().mean() < 0.15  # 4 of 32
    real = FUSED_MOE.choices(args)
    assert torch.equal(FUSED_MOE.choices(FUSED_MOE.inputs(asked, real, 0)), real)


def test_fits_refuses_what_no_variant_can_run():
    plain, big = (FUSED_MOE.problem(call(tokens=t), CPU, "a0e0") for t in (9, 9))
    quant, odd, fp32 = (
        FUSED_MOE.problem(args, CPU, "")
        for args in (fp8(call(), "fp8_block"), strided(call()), call(dtype=torch.float32))
    )
    big = big.model_copy(update={"tokens": 1 << 17})
    for problem, bad, word in [
        (plain, config("by_expert", math="fp8"), "math=fp8"),
        (plain, config("by_expert"), "math"),
        (fp32, config("by_expert", math="float32"), "anyway"),
        (plain, config("padded_bmm", experts=0), "experts=0"),
        (plain, config("padded_bmm", experts=6), "1 to 5"),
        (plain, config("padded_bmm", experts="all"), "no config"),
        (plain, config("padded_bmm"), "no config"),
        (big, config("padded_bmm", experts=5), "bytes"),
        (quant, config("padded_bmm", experts=5), "quantised"),
        (quant, config("grouped_mm"), "quantised"),
        (odd, config("grouped_mm"), "16 bytes"),
        (plain, config("fused_triton", block=64), "does not run on a CPU"),
    ]:
        assert word in FUSED_MOE.fits(problem, bad, CPU), bad
    assert all(FUSED_MOE.space(p, CPU) for p in (plain, quant, odd, fp32, big))
    ranked = [rank(FUSED_MOE, p, FUSED_MOE.space(p, CPU), CPU) for p in (plain, quant, fp32)]
    assert all(0 < us < 1e12 for found in ranked for us in found.us)
    assert FUSED_MOE.sources(plain, config("grouped_mm"), CPU) == []


SMALL = Layer(model="m", experts=4, global_experts=4, topk=2, hidden=64, intermediate=32)


def test_problems_of_a_layer_are_those_that_its_calls_ask():
    asked = FUSED_MOE.problems(SMALL, [9, 16, 1], CPU)
    assert [p.tokens for p in asked] == [16, 1] and not any(p.routing for p in asked)
    called = FUSED_MOE.problem(call(16, 4, 2, 64, 32), CPU, "")
    assert asked[0].key == called.key
    odd = SMALL.model_copy(update={"hidden": 33, "activation": "gelu"})
    assert (
        FUSED_MOE.problems(odd, [16], CPU)[0].key
        == FUSED_MOE.problem(call(16, 4, 2, 33, 32, activation="gelu"), CPU, "").key
    )
    fp8_layer = SMALL.model_copy(update={"dtype": "fp8"})
    assert (
        FUSED_MOE.problems(fp8_layer, [16], CPU)[0].key
        == FUSED_MOE.problem(fp8(call(16, 4, 2, 64, 32), "fp8_block"), CPU, "").key
    )
    for kind in ("fp8_channel", "fp8_tensor"):
        scaled = fp8_layer.model_copy(update={"quant": kind, "on_input": True})
        asks = FUSED_MOE.problem(fp8(call(16, 4, 2, 64, 32, on_input=True), kind), CPU, "")
        assert FUSED_MOE.problems(scaled, [16], CPU)[0].key == asks.key
    for form in FORMS:
        named = SMALL.model_copy(update=form)
        asks = FUSED_MOE.problem(call(16, 4, 2, 64, 32, **form), CPU, "")
        extra = {"biased": 1} if form.get("activation") == "swiglu_oai" else {}
        assert dict(FUSED_MOE.problems(named, [16], CPU)[0].dims) == dict(asks.dims) | extra
    rank = SMALL.model_copy(update={"global_experts": 32})
    assert FUSED_MOE.problems(rank, [16], CPU)[0].dim("global") == 32
    oai = SMALL.model_copy(update={"activation": "swiglu_oai"})
    assert FUSED_MOE.problems(oai, [16], CPU)[0].dim("biased") == 1
    assert FUSED_MOE.problems(oai.model_copy(update={"biased": False}), [16], CPU)[0].dim("biased") == 0
    assert FUSED_MOE.problems(SMALL.model_copy(update={"biased": True}), [16], CPU)[0].dim("biased") == 1


def test_problems_leave_out_what_makes_no_sense():
    """On a CPU what would take minutes; anywhere activations that are not there and what cannot be drawn."""
    large = Layer(model="m", experts=128, global_experts=128, topk=8, hidden=2048, intermediate=768)
    assert FUSED_MOE.problems(large, [1, 16], CPU) == []
    assert [p.tokens for p in FUSED_MOE.problems(large, [1, 16], KNOWN["h200"])] == [1, 16]
    few = SMALL.model_copy(update={"hidden": 1024, "intermediate": 512})
    assert [p.tokens for p in FUSED_MOE.problems(few, [1, 4096], CPU)] == [1]
    for change in ({"activation": "relu"}, {"experts": 1, "global_experts": 4}, {"dtype": "fp8", "quant": "int4"},
                   {"activation": "gelu", "limit": 7.0}, {"activation": "swiglu_oai", "gated": False}):  # fmt: skip
        odd = SMALL.model_copy(update=change)
        assert FUSED_MOE.problems(odd, [16], KNOWN["h200"]) == []
        assert any(str(value) in FUSED_MOE.left_out(odd, [16], KNOWN["h200"]) for value in change.values())
    int4 = SMALL.model_copy(update={"dtype": "int4"})
    assert FUSED_MOE.problems(int4, [16], CPU) == [] and "int4" in FUSED_MOE.left_out(int4, [16], CPU)
    assert FUSED_MOE.left_out(few, [1, 4096], CPU).startswith("tokens 4096: more than 256 MB")
    assert FUSED_MOE.left_out(SMALL, [16], CPU) == FUSED_MOE.left_out(large, [1, 4096], KNOWN["h200"]) == ""


# --- the public function ---


def public(args, **more):
    word = args.activation
    given = {n: getattr(args, n) for n in ("w1_bias", "w2_bias", "expert_map", "quant")}
    given |= {"activation": word.removesuffix("_ungated").removesuffix("_limited"), "gated": "_ungated" not in word}
    given |= {"limit": args.limit} if word in ("silu_limited", "swiglu_oai") else {}
    given |= {"alpha": args.alpha} if word == "swiglu_oai" else {}
    given |= {"apply_router_weight_on_input": args.on_input, "global_num_experts": args.num_experts}
    return moecache.fused_moe(*tensors_of(args), **given, **more)


@pytest.mark.parametrize("name", cases())
def test_the_public_function(name, serving):
    args = cases()[name]
    out = torch.full(args.hidden_states.shape, float("nan"), dtype=args.hidden_states.dtype)
    assert public(args, out=out, layer=name) is out
    assert FUSED_MOE.error(out, model(args)) <= 5e-2
    assert torch.equal(public(args, layer=name), out)


def test_defaults_of_the_public_function(serving):
    args = call()
    got = moecache.fused_moe(*tensors_of(args))
    assert FUSED_MOE.error(got, model(args)) < 1e-2
    on_map = mapped(args)
    got = moecache.fused_moe(*tensors_of(on_map), expert_map=on_map.expert_map)
    assert FUSED_MOE.error(got, model(on_map)) < 1e-2
    assert PublicQuant is Quant


def test_a_hit_opens_nothing_and_asks_nobody(serving, monkeypatch):
    args = call()
    public(args, layer="hit"), public(args, layer="hit")
    monkeypatch.setattr(type(serving), "choose", lambda *a, **k: pytest.fail("a hit asked the policy"))
    monkeypatch.setattr(routing, "histogram", lambda *a, **k: pytest.fail("a hit read the routing back"))
    assert FUSED_MOE.error(public(args, layer="hit"), model(args)) < 1e-2


def test_what_makes_another_problem_is_no_hit(serving, deterministic):
    args = call()
    public(args), public(args)
    others = [
        replace(args, activation="gelu"), replace(args, activation="silu_limited", limit=1.0),
        replace(args, on_input=True), replace(args, w1_bias=torch.zeros(5, 48)), strided(args),
        fp8(args, "fp8_tensor"), fp8(args, "fp8_channel"), mapped(args), call(dtype=torch.float16), call(tokens=40),
        call(middle=16), call(topk=3),
    ]  # fmt: skip
    for number, other in enumerate(others):
        before = set(serving.hot)
        public(other, layer=number)  # another layer, so that the posted routing is unknown again
        assert len(set(serving.hot) - before) == 1, number
    before = set(serving.hot)
    deterministic()
    public(args)
    assert len(set(serving.hot) - before) == 1


def test_routing_is_posted_per_layer(serving):
    cpu = torch.device("cpu")
    public(call(80, ids=torch.arange(80).reshape(80, 1) % 5), layer="even")
    public(call(80, ids=torch.zeros(80, 1, dtype=torch.int32)), layer="hot")
    assert feedback.post("even", 128, 5, cpu).word.value == 0
    assert feedback.post("hot", 128, 5, cpu).word.value == routing.bucket_index([80, 0, 0, 0, 0])


def test_bad_output_is_refused(serving):
    args = call()
    for out in (torch.empty(9, 31, dtype=torch.bfloat16), torch.empty(9, 32), args.hidden_states,
                torch.empty(32, 9, dtype=torch.bfloat16).T):  # fmt: skip
        with pytest.raises(InvalidInput, match=r"out (is|shares)"):
            public(args, out=out)
    with pytest.raises(InvalidInput, match="w1 is"):
        public(replace(args, w1=args.w1[:, 1:]))


def test_a_variant_can_be_asked_for(serving, monkeypatch):
    args = call()
    public(args, variant="padded_bmm")
    assert {served.what.variant for served in serving.hot.values()} == {"padded_bmm"}
    with pytest.raises(InvalidInput, match="'fastest'"):
        public(args, variant="fastest")


def mapped_in_range(args):
    args = mapped(args)
    return replace(args, topk_ids=args.topk_ids.clamp_max(args.num_experts - 1))


@pytest.mark.parametrize("change", [lambda a: a, mapped_in_range, lambda a: fp8(a, "fp8_block")])
def test_first_call_tunes_and_the_second_is_a_hit(tmp_path, change):
    args = change(call(tokens=40, experts=6))
    with moecache.using(db=tmp_path / "c.sqlite", path=(), mode="tune", budget=2.0) as active:
        got = public(args, layer=f"tunes{change}")
        bucket = routing.bucket(routing.histogram(FUSED_MOE.choices(args), 6))
        place = active.places.of_tensor(None)
        choice = active.peek(FUSED_MOE, FUSED_MOE.problem(args, place.device, bucket))
        assert choice.tier == "measured", choice.reason
        timings = [t for t, _ in active.lookup.timings(FUSED_MOE.problem(args, place.device, bucket))]
        assert {t.status for t in timings} == {"ok"} and len(timings) >= 2
        assert FUSED_MOE.error(got, model(args)) < 5e-2
        public(args, layer=f"tunes{change}")
        again = [t for t, _ in active.lookup.timings(FUSED_MOE.problem(args, place.device, bucket))]
        assert [t.measured_at for t in again] == [t.measured_at for t in timings]


def test_a_config_that_raises_at_launch_is_replaced(tmp_path, monkeypatch):
    args = call(tokens=16)
    with moecache.using(db=tmp_path / "c.sqlite", path=(), mode="tune", budget=1.0) as active:
        for _ in range(2):
            public(args, layer="raises")
        victim, real = config("padded_bmm", experts=5), type(FUSED_MOE).bind

        def raises(args, out):
            raise RuntimeError("no kernel image")

        def bind(self, what, args, out):
            return raises if what == victim else real(self, what, args, out)

        monkeypatch.setattr(type(FUSED_MOE), "bind", bind)
        active.hot.update({key: served._replace(run=raises, what=victim) for key, served in active.hot.items()})
        assert FUSED_MOE.error(public(args, layer="raises"), model(args)) < 1e-2
        public(args, layer="raises")
        assert active.hot and victim not in {served.what for served in active.hot.values()}


def test_warm_up_covers_the_op(tmp_path):
    with moecache.using(db=tmp_path / "c.sqlite", path=(), mode="tune", budget=1.0, strict=True):
        rows = warmup(SMALL, tokens=[4], routing=["uniform"], ops=["fused_moe"])
        assert [r.tier for r in rows] == ["measured"] and rows[0].measured >= 2
        assert [p.op for p in problems(SMALL, tokens=[4], routing=["uniform"])].count("fused_moe") == 1
        ids = routing.draw("uniform", 4, 4, 2)
        public(call(4, 4, 2, 64, 32, ids=ids), layer="warmed")  # strict: this call asks what was measured


# --- scales of gate and up apart ---


def apart(args, explicit=False):
    """The same weights in fp8 as checkpoints have them: gate and up quantised apart."""
    parts = [formats.get("fp8_block").quantised(weights.float(), torch.float8_e4m3fn, True) for weights in args.w1]
    w1, first = (torch.stack(each) for each in zip(*parts, strict=True))
    back = fp8(args, "fp8_block")
    return replace(back, w1=w1, quant=replace(back.quant, w1_scale=first, apart=explicit or None))


def loud(args):
    """Experts whose rows differ in size, up's from the gate's above all: a scale of another row would show."""
    rows = torch.logspace(-2, 2, args.w1.shape[1])[:, None]
    return replace(args, w1=(args.w1.float() * rows).to(args.w1.dtype))


def joined(args):
    """A layer without quant of the weights that the scales apart stand for."""
    quant, halves = args.quant, args.w1.shape[1] // 2
    up_rows = torch.arange(2 * halves) % halves // 128 + (torch.arange(2 * halves) >= halves) * -(-halves // 128)
    scale = quant.w1_scale[:, up_rows][:, :, torch.arange(args.w1.shape[2]) // 128]
    w2_scale = quant.w2_scale[:, torch.arange(args.w2.shape[1]) // 128][:, :, torch.arange(halves) // 128]
    return replace(args, w1=args.w1.float() * scale, w2=args.w2.float() * w2_scale, quant=None)


@pytest.mark.parametrize("middle", [192, 160, 320, 704, 136, 128, 96])
def test_scales_of_gate_and_up_apart(middle, serving):
    args = apart(loud(call(hidden=160, middle=middle)), explicit=middle % 128 > 64)
    check(args)
    assert args.quant.w1_scale.shape[1] == 2 * -(-middle // 128)
    plain = joined(args)
    for expert in range(len(plain.w1)):
        got = formats.get("fp8_block").dequantised(args.w1[expert], args.quant.w1_scale[expert], middle % 128 > 0)
        assert torch.equal(got, plain.w1[expert])
    x = args.hidden_states.double()
    args.hidden_states = torch.ones_like(x, dtype=torch.bfloat16)  # no rounding of its own in fp8
    plain.hidden_states = args.hidden_states.float()
    want = FUSED_MOE.reference(plain)
    assert FUSED_MOE.error(public(args), want) <= 5e-2
    assert FUSED_MOE.error(FUSED_MOE.reference(args), want) <= 5e-2


def test_the_layout_is_part_of_the_problem_where_it_is_another_one(serving):
    for middle, differs in ((192, True), (96, True), (128, False), (256, False)):
        both, each = (made(call(hidden=32, middle=middle)) for made in (lambda a: fp8(a, "fp8_block"), apart))
        each.quant = replace(each.quant, apart=True if middle == 96 else None)
        assert "apart" not in key_of(both)
        assert ("dims.apart=1" in key_of(each)) == differs, middle
        before = set(serving.hot)
        public(both), public(each)
        assert len(set(serving.hot) - before) >= 1 + differs
        inputs = FUSED_MOE.inputs(FUSED_MOE.problem(each, CPU, ""), each.topk_ids, 1)
        check(inputs)
        assert key_of(inputs) == key_of(each)


def test_a_shard_that_begins_inside_a_block_says_so():
    args = fp8(call(hidden=32, middle=352), "fp8_block")
    with pytest.raises(InvalidInput, match=r"\[5, 8, 1\].*\[5, 6, 1\].*N=352.*begins inside a block.*multiples of 128"):
        check(replace(args, quant=replace(args.quant, w1_scale=torch.ones(5, 8, 1))))
    with pytest.raises(InvalidInput, match=r"\[5, 1, 4\].*\[5, 1, 3\].*N=352.*begins inside a block"):
        check(replace(args, quant=replace(args.quant, w2_scale=torch.ones(5, 1, 4))))
    args = fp8(call(hidden=32, middle=320), "fp8_block")
    with pytest.raises(InvalidInput, match=r"\[5, 7, 1\].*\[5, 5, 1\] or \[5, 6, 1\].*N=320"):
        check(replace(args, quant=replace(args.quant, w1_scale=torch.ones(5, 7, 1), apart=None)))
    with pytest.raises(InvalidInput, match=r"wants float32 \[5, 6, 1\] on"):
        check(replace(args, quant=replace(args.quant, apart=True)))


@pytest.mark.parametrize("middle", [96, 224, 352])
def test_scales_of_one_shape_either_way_want_to_be_told_apart(middle, serving):
    args = fp8(call(hidden=32, middle=middle), "fp8_block")
    with pytest.raises(InvalidInput, match=rf"quant.apart is not given, and N={middle}.*apart=True.*apart=False"):
        public(replace(args, quant=replace(args.quant, apart=None)))
    assert (
        public(args).isfinite().all() and public(replace(args, quant=replace(args.quant, apart=True))).isfinite().all()
    )


def test_warm_up_asks_for_both_layouts_of_scales():
    asked = FUSED_MOE.problems(SMALL.model_copy(update={"dtype": "fp8"}), [16], CPU)
    assert [p.dim("apart", 0) for p in asked] == [0, 1]
    whole = SMALL.model_copy(update={"dtype": "fp8", "intermediate": 128})
    assert [p.dim("apart", 0) for p in FUSED_MOE.problems(whole, [16], CPU)] == [0]
