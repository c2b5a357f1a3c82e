"""Published config.json files, and small ones with the fields of the families that have no example file."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecache.models import Model, model_of, read_model
from moecache.models.fields import FIELDS, NESTED
from moecache.models.formats import IGNORED
from moecache.models.schedule import FIRST_MOE, STRIDES
from moecache.schemas.errors import InvalidInput
from moecache.schemas.layer import Layer

EXAMPLES = Path(__file__).parent.parent / "examples" / "models"
CONFIGS = Path(__file__).parent / "data" / "configs"

# file: experts, top-k, hidden, intermediate, MoE layers, activation
PUBLISHED = {
    "mixtral-8x7b": (8, 2, 4096, 14336, 32, "silu"),
    "qwen3-30b-a3b": (128, 8, 2048, 768, 48, "silu"),
    "qwen3-next-80b-a3b": (512, 10, 2048, 512, 48, "silu"),
    "deepseek-v3": (256, 8, 7168, 2048, 58, "silu"),
    "kimi-k2": (384, 8, 7168, 2048, 60, "silu"),
    "gpt-oss-120b": (128, 4, 2880, 2880, 36, "swiglu_oai"),
    "olmoe-1b-7b": (64, 8, 2048, 1024, 16, "silu"),
    "glm-4.5-air": (128, 8, 4096, 1408, 45, "silu"),
}

# The shapes that benchmarks and tuner tests use: name: (file, tp, experts, top-k, hidden, intermediate).
WORKLOADS = {
    "mixtral_8x7b": ("mixtral-8x7b", 1, 8, 2, 4096, 14336),
    "mixtral_tp8": ("mixtral-8x7b", 8, 8, 2, 4096, 1792),
    "qwen3_30b_a3b": ("qwen3-30b-a3b", 1, 128, 8, 2048, 768),
    "dsv3_tp8": ("deepseek-v3", 8, 256, 8, 7168, 256),
    "gptoss_120b": ("gpt-oss-120b", 1, 128, 4, 2880, 2880),
}

# Families without an example file, with the fields that decide: name: (config, the six figures as above).
FAMILIES: dict[str, tuple[dict[str, Any], tuple[int, int, int, int, int, str]]] = {
    "deepseek-v2": (
        {
            "model_type": "deepseek_v2",
            "first_k_dense_replace": 1,
            "hidden_act": "silu",
            "hidden_size": 5120,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "moe_layer_freq": 1,
            "n_routed_experts": 160,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "num_hidden_layers": 60,
        },
        (160, 6, 5120, 1536, 59, "silu"),
    ),
    "llama-4-scout": (
        {
            "architectures": ["Llama4ForConditionalGeneration"],
            "model_type": "llama4",
            "text_config": {
                "model_type": "llama4_text",
                "hidden_act": "silu",
                "hidden_size": 5120,
                "interleave_moe_layer_step": 1,
                "intermediate_size": 8192,
                "intermediate_size_mlp": 16384,
                "num_experts_per_tok": 1,
                "num_hidden_layers": 48,
                "num_local_experts": 16,
                "torch_dtype": "bfloat16",
            },
            "vision_config": {"hidden_act": "gelu", "hidden_size": 1408, "intermediate_size": 5632},
        },
        (16, 1, 5120, 8192, 48, "silu"),
    ),
    "llama-4-maverick": (
        {
            "model_type": "llama4",
            "text_config": {
                "hidden_size": 5120,
                "interleave_moe_layer_step": 2,
                "intermediate_size": 8192,
                "intermediate_size_mlp": 16384,
                "num_experts_per_tok": 1,
                "num_hidden_layers": 48,
                "num_local_experts": 128,
            },
        },
        (128, 1, 5120, 8192, 24, "silu"),
    ),
    "phi-3.5-moe": (
        {
            "model_type": "phimoe",
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 6400,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_local_experts": 16,
        },
        (16, 2, 4096, 6400, 32, "silu"),
    ),
    "dbrx": (
        {
            "model_type": "dbrx",
            "d_model": 6144,
            "n_heads": 48,
            "n_layers": 40,
            "torch_dtype": "float16",
            "ffn_config": {
                "ffn_act_fn": {"name": "silu"},
                "ffn_hidden_size": 10752,
                "model_type": "",
                "moe_num_experts": 16,
                "moe_top_k": 4,
                "top_k": 50,
                "torch_dtype": None,
            },
        },
        (16, 4, 6144, 10752, 40, "silu"),
    ),
    "jamba-1.5-mini": (
        {
            "model_type": "jamba",
            "attn_layer_offset": 4,
            "attn_layer_period": 8,
            "expert_layer_offset": 1,
            "expert_layer_period": 2,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_experts": 16,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
        },
        (16, 2, 4096, 14336, 16, "silu"),
    ),
    "minimax-m2": (
        {
            "model_type": "minimax_m2",
            "hidden_size": 3072,
            "intermediate_size": 1536,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 62,
            "num_local_experts": 256,
        },
        (256, 8, 3072, 1536, 62, "silu"),
    ),
    "minimax-m3 style": (
        {
            "model_type": "minimax_m3_vl",
            "text_config": {
                "dense_intermediate_size": 12288,
                "hidden_act": "swigluoai",
                "hidden_size": 6144,
                "intermediate_size": 3072,
                "moe_layer_freq": [0, 0, 0] + [1] * 57,
                "num_experts_per_tok": 4,
                "num_hidden_layers": 60,
                "num_local_experts": 128,
            },
        },
        (128, 4, 6144, 3072, 57, "swiglu_oai"),
    ),
    "ernie-4.5 style": (
        {
            "model_type": "ernie4_5_moe",
            "hidden_size": 2560,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "moe_k": 6,
            "moe_layer_end_index": 27,
            "moe_layer_interval": 1,
            "moe_layer_start_index": 1,
            "moe_num_experts": 64,
            "num_hidden_layers": 28,
        },
        (64, 6, 2560, 1536, 27, "silu"),
    ),
    "a name never seen": (
        {
            "model_type": "tomorrow",
            "num_experts": 96,
            "num_experts_per_token": 6,
            "hidden_size": 3072,
            "moe_intermediate_size": 1280,
            "mlp_layer_types": ["dense", "sparse", "hash_moe", "sparse"],
            "num_layers": 4,
        },
        (96, 6, 3072, 1280, 3, "silu"),
    ),
}

QWEN = json.loads((EXAMPLES / "qwen3-30b-a3b.json").read_text())


def write(folder: Path, config: object, name: str = "config.json") -> Path:
    file = folder / name
    file.write_text(config if isinstance(config, str) else json.dumps(config))
    return file


def only(file: Path, **more: Any) -> Layer:
    """The layer of a model that has one kind."""
    (layer,) = read_model(file, **more).layers
    return layer


def figures(layer: Any) -> tuple[int, int, int, int, int, str]:
    return (layer.experts, layer.topk, layer.hidden, layer.intermediate, layer.layers, layer.activation)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files(name: str) -> None:
    layer = only(EXAMPLES / f"{name}.json")
    assert figures(layer) == PUBLISHED[name]
    assert (layer.model, layer.global_experts) == (name, PUBLISHED[name][0])
    formats = {"deepseek-v3": ("fp8", "fp8_block"), "kimi-k2": ("fp8", "fp8_block"), "gpt-oss-120b": ("mxfp4", "")}
    assert (layer.dtype, layer.quant) == formats.get(name, ("bf16", ""))
    assert not [note for note in read_model(EXAMPLES / f"{name}.json").notes if "shared expert" not in note]


def test_every_example_file_is_named_here_and_in_the_readme() -> None:
    files = {file.stem for file in EXAMPLES.glob("*.json")}
    readme = (EXAMPLES / "README.md").read_text()
    assert files == set(PUBLISHED)
    assert all(f"`{name}.json`" in readme for name in files)


@pytest.mark.parametrize("name", WORKLOADS)
def test_workload_shapes(name: str) -> None:
    file, tp, *want = WORKLOADS[name]
    layer = only(EXAMPLES / f"{file}.json", tp=tp)
    assert [layer.experts, layer.topk, layer.hidden, layer.intermediate] == want


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str, tmp_path: Path) -> None:
    config, want = FAMILIES[name]
    assert figures(only(write(tmp_path, config))) == want


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({}, 48),
        ({"mlp_only_layers": [0, 5, 47]}, 45),
        ({"decoder_sparse_step": 2}, 24),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1, 2]}, 23),
        ({"decoder_sparse_step": 5}, 9),
        ({"first_k_dense_replace": 3, "moe_layer_freq": 2}, 22),
        ({"expert_layer_period": 4, "expert_layer_offset": 3}, 12),
        ({"moe_layers": [3, 7, 11]}, 3),
        ({"moe_layers_enum": "3,4,5,6"}, 4),
        ({"moe_layer_frequency": 2}, 24),
        ({"num_dense_layers": 2}, 46),
        ({"first_k_dense_replace": None, "moe_layer_freq": None}, 48),
    ],
)
def test_moe_layers(fields: dict[str, Any], layers: int, tmp_path: Path) -> None:
    assert only(write(tmp_path, {**QWEN, **fields})).layers == layers, fields


def test_no_layer_left_is_a_dense_model(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"dense model: by .*decoder_sparse_step.* none of its 48 "):
        read_model(write(tmp_path, {**QWEN, "decoder_sparse_step": 0}))


def test_one_value_a_layer(tmp_path: Path) -> None:
    lists = {"num_experts": [0, 64, 64], "num_experts_per_tok": [8, 8, 8], "num_hidden_layers": 3}
    layer = only(write(tmp_path, {**QWEN, **lists}))
    assert (layer.experts, layer.topk, layer.layers) == (64, 8, 2)
    lists = {"num_experts": 64, "moe_intermediate_size": [96, 192, 96], "num_hidden_layers": 3}
    widths = [(each.intermediate, each.layers) for each in read_model(write(tmp_path, {**QWEN, **lists})).layers]
    assert widths == [(96, 2), (192, 1)]
    with pytest.raises(InvalidInput, match=r"num_experts has 2 values, \[32, 64\], for 48 layers"):
        read_model(write(tmp_path, {**QWEN, "num_experts": [32, 64]}))


def test_parallelism_divides(tmp_path: Path) -> None:
    layer = only(EXAMPLES / "qwen3-30b-a3b.json", tp=4, ep=16)
    assert (layer.intermediate, layer.experts, layer.global_experts) == (192, 8, 128)
    ranks = read_model(EXAMPLES / "qwen3-30b-a3b.json", ep=6).layers
    assert [(rank.experts, rank.global_experts) for rank in ranks] == [(22, 128), (21, 128)]
    with pytest.raises(InvalidInput, match=r"tp=5 does not divide expert .* 768; allowed are 1, 2, 3, 4, 6"):
        read_model(EXAMPLES / "qwen3-30b-a3b.json", tp=5)
    for ep in (0, 129):
        with pytest.raises(InvalidInput, match=rf"ep={ep}; allowed are 1 to 128, the number of experts"):
            read_model(EXAMPLES / "qwen3-30b-a3b.json", ep=ep)
    with pytest.raises(InvalidInput, match="tp=0 does not divide"):
        read_model(EXAMPLES / "qwen3-30b-a3b.json", tp=0)


@pytest.mark.parametrize(
    ("published", "asked", "want"),
    [
        ({"torch_dtype": "bfloat16"}, None, "bf16"),
        ({"torch_dtype": "float16"}, None, "fp16"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, None, "fp16"),
        ({"dtype": "torch.float8_e4m3fn"}, None, "fp8"),
        ({"torch_dtype": "float32"}, None, "bf16"),
        ({"torch_dtype": None}, None, "bf16"),
        ({"torch_dtype": "float16"}, "bf16", "bf16"),
        ({"torch_dtype": "bfloat16"}, "fp8", "fp8"),
        ({"torch_dtype": "bfloat16"}, "half", "fp16"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, None, "fp8"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "bf16", "bf16"),
    ],
)
def test_dtype(published: dict[str, Any], asked: str | None, want: str, tmp_path: Path) -> None:
    assert only(write(tmp_path, {**QWEN, **published}), dtype=asked).dtype == want


@pytest.mark.parametrize("wrong", [None, "2", 2.0, True, [2], b"2"])
def test_a_wrong_type_is_named(wrong: Any) -> None:
    file = EXAMPLES / "qwen3-30b-a3b.json"
    for name in ("tp", "ep"):
        for read in (lambda **more: read_model(file, **more), lambda **more: model_of(128, 8, 2048, 768, **more)):
            with pytest.raises(InvalidInput, match=f"{name} is {re.escape(repr(wrong))}; allowed is int"):
                read(**{name: wrong})


@pytest.mark.parametrize("wrong", [7, 2.0, True, ["bf16"], {}, b"bf16"])
def test_a_word_that_is_none_is_named(wrong: Any) -> None:
    file = EXAMPLES / "qwen3-30b-a3b.json"
    with pytest.raises(InvalidInput, match=re.escape(f"dtype {wrong!r} is not known")):
        read_model(file, dtype=wrong)
    with pytest.raises(InvalidInput, match=re.escape(f"activation {wrong!r} is not known")):
        model_of(128, 8, 2048, 768, activation=wrong)
    with pytest.raises(InvalidInput, match=r"path is .*; allowed is str or PathLike"):
        read_model(wrong)


def test_unknown_dtype_lists_the_known() -> None:
    with pytest.raises(InvalidInput, match=r"dtype 'int3' is not known; allowed are bf16, bfloat16, fp16"):
        read_model(EXAMPLES / "qwen3-30b-a3b.json", dtype="int3")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{not json", "is not JSON"),
        ("[1, 2]", "holds a list, not the object"),
        ({"hello": 1}, r"is not a model's config\.json: none of num_experts, num_local_experts"),
        (
            {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
            r"\(llama\) is a dense model, it has no experts; looked for num_experts, num_local",
        ),
        ({**QWEN, "num_experts": 0}, r"\(qwen3_moe\) is a dense model"),
        ({**QWEN, "num_experts": None}, r"\(qwen3_moe\) is a dense model"),
        ({**QWEN, "num_experts": 1}, r"\(qwen3_moe\) is a dense model"),
        (
            {"model_type": "new", "hidden_size": 64, "expert_count": 8, "experts_used": 2, "num_layers": 2},
            r"does not say: experts \(num_experts, .*top-k \(num_experts_per_tok, .*: expert_count, experts",
        ),
        ({**QWEN, "num_experts_per_tok": None}, r"does not say: top-k \(num_experts_per_tok, "),
        ({**QWEN, "num_experts_per_tok": 129}, "top-k 129 is more than its 128 experts"),
        ({**QWEN, "num_experts": "many"}, "num_experts='many' must be a whole number"),
        ({**QWEN, "hidden_size": True}, "hidden_size=True must be a whole number"),
        ({**QWEN, "num_hidden_layers": 10**12}, "must be a whole number from 1 to 1048576"),
        ({**QWEN, "num_hidden_layers": 5000}, "num_hidden_layers=5000 must be a whole number from 1 to 4096"),
        ({**QWEN, "moe_intermediate_size": -768}, "moe_intermediate_size=-768 must be a whole number"),
    ],
)
def test_errors_say_what_was_looked_for(config: object, message: str, tmp_path: Path) -> None:
    file = write(tmp_path, config)
    with pytest.raises(InvalidInput, match=message) as caught:
        read_model(file)
    assert str(file) in str(caught.value)


def test_missing_file_and_unreadable_text(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"none\.json: No such file.*; give a model's config\.json"):
        read_model(tmp_path / "none.json")
    with pytest.raises(InvalidInput, match=r"config\.json: No such file"):
        read_model(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InvalidInput, match="is not JSON"):
        read_model(tmp_path / "weights.bin")


@pytest.mark.parametrize(
    ("parts", "want"),
    [
        (("Qwen3-30B-A3B", "config.json"), "Qwen3-30B-A3B"),
        (("configs", "my-model.json"), "my-model"),
        (("models--Qwen--Qwen3-30B-A3B", "snapshots", "ad44e777", "config.json"), "Qwen3-30B-A3B"),
    ],
)
def test_the_name_is_what_people_call_it(parts: tuple[str, ...], want: str, tmp_path: Path) -> None:
    folder = tmp_path.joinpath(*parts[:-1])
    folder.mkdir(parents=True)
    file = write(folder, QWEN, parts[-1])
    assert read_model(file).name == only(file).model == want
    if parts[-1] == "config.json":
        assert read_model(str(folder)) == read_model(file)


# --- formats ---

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
BLOCKS = {**FP8, "weight_block_size": [128, 128]}


def tensors(strategy: str | None = None, bits: int = 8, kind: str = "float", **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, **({"strategy": strategy} if strategy else {}), **more}


def groups(weights: Any, tokens: Any = None, targets: Any = ("Linear",), **more: Any) -> dict[str, Any]:
    group = {"targets": list(targets), "weights": weights, "input_activations": tokens}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, **more}


TOKENS = tensors("token", dynamic=True)
# what a file says: format and kind of its experts
FORMATS: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "blocks": (BLOCKS, ("fp8", "fp8_block")),
    "other blocks": ({**FP8, "weight_block_size": [64, 128]}, ("fp8", "fp8_block_64x128")),
    "a tensor": (FP8, ("fp8", "fp8_tensor")),
    "no blocks": ({**FP8, "weight_block_size": None}, ("fp8", "fp8_tensor")),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, ("fp8", "fp8_channel")),
    "channels": (groups(tensors("channel"), TOKENS), ("fp8", "fp8_channel")),
    "tensors": (groups(tensors("tensor"), tensors("tensor", dynamic=False)), ("fp8", "fp8_tensor")),
    "blocks, compressed": (groups(tensors("block", block_structure=[128, 128]), TOKENS), ("fp8", "fp8_block")),
    "weights alone": (groups(tensors("channel")), ("fp8_w8a16", "")),
    "int4": (groups(tensors("group", 4, "int", group_size=32)), ("int4", "")),
    "int8": (groups(tensors("channel", 8, "int"), tensors("token", 8, "int")), ("int8", "")),
    "nvfp4": (groups(tensors("tensor_group", 4, group_size=16)), ("nvfp4", "")),
    "mxfp4": ({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}, ("mxfp4", "")),
    "awq": ({"quant_method": "awq", "bits": 4, "modules_to_not_convert": ["gate"]}, ("int4", "")),
    "gptq": ({"quant_method": "gptq", "bits": 8, "group_size": 128}, ("int8", "")),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ("int4", "")),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, ("fp8", "fp8_tensor")),
    "modelopt, inside": ({"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}, ("nvfp4", "")),
    "modelopt, module by module": (
        {"quant_algo": "MIXED_PRECISION", "config_groups": {
            "group_0": {"weights": tensors(), "input_activations": TOKENS, "targets": ["model.layers.3.self_attn"]},
            "group_1": {"weights": tensors(bits=4, group_size=16), "input_activations": None, "targets": [
                f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in range(48) for expert in range(128)
            ]},
        }},
        ("nvfp4", ""),
    ),
    "nobody knows": ({"quant_method": "tomorrow"}, ("tomorrow", "")),
    # experts that are left as they are
    "no experts": ({**BLOCKS, "modules_to_not_convert": ["lm_head", "experts"]}, ("bf16", "")),
    "no mlp": ({**BLOCKS, "ignored_layers": ["model.layers.*.mlp"]}, ("bf16", "")),
    "attention alone": (groups(tensors("channel"), TOKENS, ["re:.*self_attn.*"]), ("bf16", "")),
    "not by a pattern": (groups(tensors("channel"), TOKENS, ignore=["re:.*experts.*"]), ("bf16", "")),
    # and what leaves others as they are
    "router, attention, shared experts": (
        groups(tensors("group", 4, "int"), ignore=[
            "lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
            "re:.*mlp.gate$", "model.layers.0.mlp.gate", "model.layers.61.mlp.experts",
        ]),
        ("int4", ""),
    ),
    "minimax": ({**BLOCKS, "modules_to_not_convert": ["gate", "e_score_correction_bias"]}, ("fp8", "fp8_block")),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("where", ["quantization_config", "compression_config", "nested"])
def test_the_format_of_the_experts_is_that_of_the_file(name: str, where: str, tmp_path: Path) -> None:
    said, want = FORMATS[name]
    nested = {"model_type": "vl", "text_config": {**QWEN, "quantization_config": said}}
    config = nested if where == "nested" else {**QWEN, where: said}
    layer = only(write(tmp_path, config))
    assert (layer.dtype, layer.quant) == want
    assert only(write(tmp_path, config), dtype="bf16").dtype == "bf16"
    kind = want[1] if want[1] in ("fp8_block", "fp8_channel", "fp8_tensor") else "fp8_block"
    insisted = only(write(tmp_path, config), dtype="fp8")
    assert (insisted.dtype, insisted.quant) == ("fp8", kind)


def test_a_file_beside_says_the_format_too(tmp_path: Path) -> None:
    write(tmp_path, {"producer": {}, "quantization": {"quant_algo": "NVFP4"}}, "hf_quant_config.json")
    assert only(write(tmp_path, QWEN)).dtype == "nvfp4"
    assert only(write(tmp_path, {**QWEN, "quantization_config": BLOCKS})).dtype == "fp8"


def test_layers_whose_experts_are_left_out_are_a_kind_of_their_own(tmp_path: Path) -> None:
    said = {**BLOCKS, "modules_to_not_convert": ["model.layers.0.mlp", "model.layers.47.mlp.experts"]}
    layers = read_model(write(tmp_path, {**QWEN, "quantization_config": said})).layers
    assert {(layer.dtype, layer.layers) for layer in layers} == {("bf16", 2), ("fp8", 46)}


def test_notes_say_what_is_taken_otherwise_than_the_file_says(tmp_path: Path) -> None:
    file = write(tmp_path, {**QWEN, "quantization_config": {"quant_method": "mxfp4"}})
    assert read_model(file, dtype="bf16").notes == ("the file says mxfp4, bf16 is what was asked for",)
    static = {**FP8, "activation_scheme": "static"}
    assert "static scales" in read_model(write(tmp_path, {**QWEN, "quantization_config": static})).notes[0]
    half = {**QWEN, "torch_dtype": "float16", "quantization_config": BLOCKS}
    assert "tokens in bf16" in read_model(write(tmp_path, half)).notes[0]
    with pytest.raises(InvalidInput, match="quantization_config='fp8' must be an object"):
        read_model(write(tmp_path, {**QWEN, "quantization_config": "fp8"}))


# --- what else changes the layer ---

# file: what is told of it, line by line; notes by their beginning
TOLD = {
    "deepseek-v4-flash": [
        "256 experts, top-6, 4096 × 2048, silu with limit 10, mxfp4, 43 layers", "1 shared expert is not",
    ],
    "ernie-4.5-vl-28b": [
        "64 experts, top-6, 2560 × 1536, silu, bf16, 27 layers",
        "64 experts, top-6, 2560 × 512, silu, bf16, 27 layers", "2 shared experts are not",
    ],
    "gemma4-26b-a4b": ["128 experts, top-8, 2816 × 704, gelu_tanh, bf16, 30 layers"],
    "gpt-oss-20b": ["32 experts, top-4, 2880 × 2880, swiglu_oai with limit 7, mxfp4, 24 layers"],
    "grok-1": ["8 experts, top-2, 6144 × 32768, gelu, bf16, 64 layers"],
    "llama4-scout": ["16 experts, top-1, 5120 × 8192, silu, bf16, router weight on the input, 48 layers"],
    "longcat-flash": ["512 experts, top-12, 6144 × 2048, silu, bf16, 28 layers", "zero_expert_num: 256 of"],
    "nemotron-3-nano": [
        "128 experts, top-6, 2688 × 1856, relu2 without gate, bf16, 23 layers", "1 shared expert is not",
    ],
    "qwen3-30b-fp8": ["128 experts, top-8, 2048 × 768, silu, fp8 blocks, 48 layers"],
    "qwen3-30b-w4a16": ["128 experts, top-8, 2048 × 768, silu, int4, 48 layers"],
}  # fmt: skip


@pytest.mark.parametrize("name", TOLD)
def test_what_is_told_of_published_files(name: str) -> None:
    told = [line.removeprefix(f"{name}: ") for line in read_model(CONFIGS / f"{name}.json").told()]
    assert len(told) == len(TOLD[name])
    for line, want in zip(told, TOLD[name], strict=True):
        assert line == want or (not want.endswith("layers") and line.startswith(want))


MIXTRAL = json.loads((EXAMPLES / "mixtral-8x7b.json").read_text())


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({"model_type": "grok-1"}, {"activation": "gelu"}),
        ({"model_type": "git", "architectures": ["Grok1ForCausalLM"]}, {"activation": "gelu"}),
        ({"model_type": "gemma4_text"}, {"activation": "gelu_tanh"}),
        ({"hidden_act": "gelu_pytorch_tanh"}, {"activation": "gelu_tanh"}),
        ({"hidden_act": "relu2"}, {"activation": "relu2", "gated": False}),
        ({"hidden_act": "relu"}, {"activation": "relu", "gated": True}),
        ({"hidden_act": "silu", "swiglu_limit": 10}, {"activation": "silu", "limit": 10.0}),
        ({"hidden_act": "silu", "swiglu_limit": 0}, {"limit": None}),
        ({"model_type": "llama4_text"}, {"on_input": True}),
        ({"hidden_act": "swigluoai", "mlp_bias": False}, {"activation": "swiglu_oai", "biased": False}),
        ({"model_type": "gpt_oss"}, {"activation": "swiglu_oai", "biased": True}),
        ({"moe_latent_size": 1024}, {"hidden": 1024}),
        ({"layers_block_type": ["mamba", "moe", "attention", "moe"]}, {"layers": 2}),
        ({"is_moe_layer": [False, True, True, False]}, {"layers": 2}),
        ({"glu": False}, {"gated": False, "activation": "silu"}),
        ({"hybrid_override_pattern": "ME*E-E", "num_hidden_layers": 6}, {"layers": 3}),
        ({"moe_layer_num_skipped": 2}, {"layers": 30}),
        ({"model_type": "longcat_flash", "num_layers": 16}, {"layers": 16}),
        ({"use_gated_mlp": False}, {"gated": False, "activation": "silu"}),
        ({"mlp_bias": True}, {"biased": True}),
        ({"expert_dtype": "fp4"}, {"dtype": "mxfp4"}),
        ({"expert_dtype": "fp8", "quantization_config": {"weight_block_size": [128, 128]}}, {"quant": "fp8_block"}),
    ],
)
def test_fields_that_change_a_layer(fields: dict[str, Any], want: dict[str, Any], tmp_path: Path) -> None:
    plain = {name: value for name, value in MIXTRAL.items() if name != "hidden_act"}
    layer = only(write(tmp_path, {**plain, **fields}))
    assert {name: getattr(layer, name) for name in want} == want


def test_limits_by_layer_make_kinds_of_layers(tmp_path: Path) -> None:
    """Step-3.5 clamps silu(gate), which no kernel does: such layers are not taken for the clamped silu."""
    limits = {"num_hidden_layers": 4, "swiglu_limits": [None, 0.0, 7.0, 9]}
    layers = read_model(write(tmp_path, {**QWEN, **limits})).layers
    assert [(each.activation, each.limit, each.layers) for each in layers] == [
        ("silu", None, 2), ("silu", 7.0, 1), ("silu", 9.0, 1),
    ]  # fmt: skip
    layers = read_model(write(tmp_path, {**QWEN, **limits, "model_type": "step3p5"})).layers
    assert [each.activation for each in layers] == ["silu", "swiglustep", "swiglustep"]
    longer = {"num_hidden_layers": 4, "swiglu_limits": [0, 0, 0, 7.0, 0, 0]}  # the last two predict further tokens
    layers = read_model(write(tmp_path, {**QWEN, **longer})).layers
    assert [(each.limit, each.layers) for each in layers] == [(None, 3), (7.0, 1)]
    with pytest.raises(InvalidInput, match="swiglu_limit=-1 must be a number above 0"):
        read_model(write(tmp_path, {**QWEN, "swiglu_limit": -1}))


def test_switched_off_experts_are_a_dense_model(tmp_path: Path) -> None:
    for switch in ("enable_moe_block", "use_moe"):
        with pytest.raises(InvalidInput, match=f"is a dense model, {switch} is false"):
            read_model(write(tmp_path, {**QWEN, switch: False}))
    with pytest.raises(InvalidInput, match=r"dense model: by .*hybrid_override_pattern.* none of its 48"):
        read_model(write(tmp_path, {**QWEN, "hybrid_override_pattern": "M-M*-"}))


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ({"model_type": "tomorrow", "hidden_act": None}, r"no activation is given \(.*hidden_act.*\): silu is taken"),
        ({"moe_latent_size": 512}, "moe_latent_size: experts see 512 columns of the model's 2048"),
        ({"zero_expert_num": 64}, r"zero_expert_num: 64 of the router's 192 choices"),
        ({"n_shared_experts": 1}, "an engine that fuses it asks 129 experts, top-9"),
        ({"shared_expert_intermediate_size": 768}, "an engine that fuses it asks 129 experts, top-9"),
        ({"n_shared_experts": 2, "shared_intermediate_size": 1536}, "asks 130 experts, top-10"),
        ({"shared_expert_intermediate_size": 3072}, "1 shared expert is not in these layers, nor of the size"),
        ({"n_shared_experts": 1, "moe_latent_size": 512}, "1 shared expert is not in these layers, nor of the size"),
        ({"model_type": "minimax_m3", "hidden_act": "swigluoai", "swiglu_alpha": 1.5}, "give alpha=1.5 to the calls"),
    ],
)
def test_what_is_not_in_the_layer_is_noted(fields: dict[str, Any], note: str, tmp_path: Path) -> None:
    assert re.search(note, "\n".join(read_model(write(tmp_path, {**QWEN, **fields})).notes))


def test_what_a_stranger_wrote_reaches_a_terminal_as_text(tmp_path: Path) -> None:
    said = {"hidden_act": "\x1b[31mred", "moe_\x1b[2J": 1, "quantization_config": {"quant_method": "a\u202eb\nforged"}}
    for line in read_model(write(tmp_path, {**QWEN, **said})).told():
        assert line.isprintable()


def test_modalities_are_kinds_of_layers(tmp_path: Path) -> None:
    config = json.loads((CONFIGS / "ernie-4.5-vl-28b.json").read_text())
    text, vision = read_model(write(tmp_path, {**config, "moe_num_experts": [64, 32]})).layers
    assert (text.experts, text.intermediate, vision.experts, vision.intermediate) == (64, 1536, 32, 512)
    with pytest.raises(InvalidInput, match="lists of different lengths"):
        read_model(write(tmp_path, {**config, "moe_num_experts": [64, 64, 64]}))


def test_a_model_without_a_file() -> None:
    model = model_of(128, 8, 2048, 768, dtype="fp8", tp=2, ep=6)
    assert (
        isinstance(model, Model)
        and model.told()[0] == "layer: 22 of 128 experts, top-8, 2048 × 384, silu, fp8 blocks, 1 layer"
    )
    assert model_of(8, 2, 64, 32, dtype="fp8_channel").layers[0].quant == "fp8_channel"
    assert not model_of(8, 2, 64, 32, activation="relu2").layers[0].gated
    for wrong, message in (
        ({"topk": 9}, "topk=9 is more than experts=8"), ({"hidden": 0}, "hidden=0; allowed is a whole number from 1"),
        ({"experts": 8.0}, "experts is 8.0; allowed is int"),
        ({"activation": "sine"}, "'sine' is not known; allowed are silu, gelu"),
        ({"dtype": "int3"}, "dtype 'int3' is not known"),
    ):  # fmt: skip
        given: dict[str, Any] = {"experts": 8, "topk": 2, "hidden": 64, "intermediate": 32, **wrong}
        with pytest.raises(InvalidInput, match=re.escape(message)):
            model_of(**given)


def test_a_name_of_the_hub_gets_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInput, match=r"hf download org/some-7B config\.json"):
        read_model("org/some-7B")
    (tmp_path / "org" / "some-7B").mkdir(parents=True)
    write(tmp_path / "org" / "some-7B", QWEN)
    assert read_model("org/some-7B").name == "some-7B"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 400) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = [name for names in FIELDS.values() for name in names]
RULES = [*FIRST_MOE, *STRIDES, "expert_layer_period", "expert_layer_offset", "mlp_only_layers", "moe_layers"]
RULES += ["layers_block_type", "swiglu_limit", "swiglu_limits", "quantization_config", "zero_expert_num"]
RULES += ["moe_layer_end_index", "moe_layers_enum", "mlp_layer_types", "hybrid_override_pattern"]


SAYING = [
    "quant_method", "quant_algo", "bits", "weight_block_size", "activation_scheme", "config_groups", "targets",
    "weights", "input_activations", "num_bits", "type", "strategy", "group_size", "dynamic",
]  # fmt: skip
ANY_NAME = st.sampled_from([*NAMES, *RULES, *NESTED, "hidden_act", "torch_dtype"])


def check_layers_or_error(folder: Path, config: dict[str, Any]) -> None:
    file = write(folder, config, "any.json")
    try:
        model = read_model(file)
    except InvalidInput as error:
        assert len(str(error)) > 20
    else:
        assert model.layers and all(line.isprintable() for line in model.told())
        for layer in model.layers:
            assert 1 <= layer.topk <= layer.experts
            assert min(layer.layers, layer.hidden, layer.intermediate) >= 1


@given(st.dictionaries(ANY_NAME, VALUES, max_size=6))
def test_any_json_gives_a_layer_or_one_readable_error(tmp_path_factory: Any, changed: dict[str, Any]) -> None:
    check_layers_or_error(tmp_path_factory.getbasetemp(), {**QWEN, **changed})


SAID = st.sampled_from([*IGNORED, *SAYING])
WORDS = st.sampled_from(["fp8", "float", "tensor", "re:[", "re:.*experts", "*", "experts", "W4A16_AWQ", ""]) | VALUES


@given(st.dictionaries(SAID, WORDS | st.lists(WORDS, max_size=3) | st.dictionaries(SAID, WORDS), max_size=5))
def test_any_words_on_formats_give_a_layer_or_one_readable_error(tmp_path_factory: Any, said: dict[str, Any]) -> None:
    config = {**QWEN, "quantization_config": said, "num_hidden_layers": 2}
    check_layers_or_error(tmp_path_factory.getbasetemp(), config)
    nested = {"config_groups": {"group_0": said}, "quantized_layers": said.get("quantized_layers")}
    check_layers_or_error(tmp_path_factory.getbasetemp(), {**config, "quantization_config": nested})
