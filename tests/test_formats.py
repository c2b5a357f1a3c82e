"""Formats of weights: what ops ask them, with one that packs two weights into a byte, has scales in float16 for 32
columns of a row, and leaves activations as they are."""

import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from moecache.kernels.formats import registry as formats
from moecache.kernels.formats.contract import Format
from moecache.kernels.fused_moe.call import check
from moecache.kernels.fused_moe.op import FUSED_MOE
from moecache.kernels.running import described
from moecache.models import model_of
from moecache.schemas.device import KNOWN, Device
from moecache.schemas.errors import InvalidInput

CPU = Device(vendor="cpu", arch="x86_64", name="a CPU", units=4)
GROUP = 32


@dataclass(frozen=True)
class Int4(Format):
    def scale_shape(self, rows, columns):
        return rows, columns // GROUP

    def quantise(self, weights, dtype):
        parts = weights.view(len(weights), -1, GROUP)
        scale = (parts.abs().amax(2) / 7).to(self.scale_dtype)
        codes = (parts / scale.float()[..., None]).round().clamp(-7, 7).view_as(weights).to(torch.int8) + 8
        return (codes[:, ::2] | codes[:, 1::2] << 4).to(dtype), scale

    def dequantise(self, weights, scale):
        codes = torch.stack([weights & 15, weights >> 4], 2).flatten(1).float() - 8
        return codes * scale.float().repeat_interleave(GROUP, 1)


@pytest.fixture
def int4(monkeypatch):
    one = Int4("int4_g32", (torch.uint8,), 1e-2, "bf16", packed=2, scale_dtype=torch.float16)
    monkeypatch.setitem(formats.KINDS, one.name, "int4")
    monkeypatch.setitem(sys.modules, "moecache.kernels.formats.int4", SimpleNamespace(FORMATS={one.name: one}))
    formats.get.cache_clear()
    yield one
    formats.get.cache_clear()


def asked(device=CPU, hidden=64, middle=96):
    (layer,) = model_of(4, 2, hidden, middle).layers
    (problem,) = FUSED_MOE.problems(layer.model_copy(update={"dtype": "int4"}), [8], device)
    return problem


def made(problem, seed=0):
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(8)]).int()
    return FUSED_MOE.inputs(problem, ids, seed)


def test_a_packed_format_runs_where_experts_go_one_by_one(int4):
    problem = asked()
    assert problem.dim("quant") == int4.name and FUSED_MOE.tolerance(problem) == int4.tolerance
    args = made(problem)
    assert args.w1.shape == (4, 192, 32) and args.quant.w1_scale.shape == (4, 192, 2)
    check(args)
    assert FUSED_MOE.problem(args, CPU, "").key == problem.key
    wide = [
        torch.stack([int4.dequantised(*pair) for pair in zip(w, scale, strict=True)]).bfloat16()
        for w, scale in ((args.w1, args.quant.w1_scale), (args.w2, args.quant.w2_scale))
    ]
    want = FUSED_MOE.reference(args)
    plain = FUSED_MOE.reference(replace(args, w1=wide[0], w2=wide[1], quant=None))
    assert FUSED_MOE.error(plain, want) < 5e-3  # float16 scales do not all fit into bfloat16
    space = FUSED_MOE.space(problem, CPU)
    assert {c.variant for c in space} == {"by_expert"}
    for each in space:
        got = FUSED_MOE.launch(each, args, FUSED_MOE.outputs(args))
        assert FUSED_MOE.error(got, want) <= int4.tolerance, each
    assert FUSED_MOE.space(asked(KNOWN["h200"]), KNOWN["h200"]) == []


def test_what_a_plan_reads_lies_as_the_inputs_do(int4):
    args, (operands, _) = made(asked()), FUSED_MOE.operands(asked())
    found, planned = (
        (call.w1, call.w2, call.quant.w1_scale, call.quant.w2_scale) for call in (described(args), operands)
    )
    assert found == planned


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: replace(a, w1=a.w1[:, :, :31]), "hidden/2=32"),
        (lambda a: replace(a, w2=a.w2[:, :, :47]), r"w2 is \[4, 64, 47\]"),
        (lambda a: replace(a, w1=a.w1.char(), w2=a.w2.char()), "torch.uint8 is allowed for int4_g32"),
        (lambda a: replace(a, quant=replace(a.quant, w1_scale=a.quant.w1_scale.float())), "int4_g32 wants float16"),
        (lambda a: replace(a, quant=replace(a.quant, w2_scale=a.quant.w2_scale[:, :, :2])), r"w2_scale.*\[4, 64, 3\]"),
    ],
)
def test_bad_input_is_named(int4, change, words):
    with pytest.raises(InvalidInput, match=words):
        check(change(made(asked())))


def test_names_are_all_that_a_light_process_reads(int4):
    assert formats.usual("fp8") == "fp8_block" and formats.usual("bf16") == "" and formats.usual("int4") == int4.name
    with pytest.raises(InvalidInput, match=r"quant.kind='int3'; allowed are fp8_block, .*int4_g32"):
        formats.get("int3")
    for kind, dtype in formats.KINDS.items():
        form = formats.get(kind)
        assert form.name == kind and (form.nbytes == 0.5) == (dtype == "int4")
    assert [formats.get("", dtype).nbytes for dtype in ("bf16", "fp16", "fp32")] == [2, 2, 4]


def test_a_model_whose_weights_have_a_format_is_tuned_with_it():
    layer = model_of(8, 2, 64, 64, dtype="fp8").layers[0]
    assert (layer.dtype, layer.quant) == ("fp8", "fp8_block")
    for dtype, quant, words in (("fp8", "fp8_rows", "only for fp8_block"), ("int3", "", "int3 weights")):
        assert words in FUSED_MOE.left_out(layer.model_copy(update={"dtype": dtype, "quant": quant}), [1], CPU)
