"""Published config.json files, and small ones with the fields of the families that have no example file."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecache.models import FIELDS, FIRST_MOE, NESTED, STRIDES, read_model
from moecache.schemas.errors import InvalidInput

EXAMPLES = Path(__file__).parent.parent / "examples" / "models"

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


def figures(layer: Any) -> tuple[int, int, int, int, int, str]:
    return (layer.experts, layer.topk, layer.hidden, layer.intermediate, layer.layers, layer.activation)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files(name: str) -> None:
    layer = read_model(EXAMPLES / f"{name}.json")
    assert figures(layer) == PUBLISHED[name]
    assert (layer.model, layer.dtype, layer.global_experts) == (name, "bf16", PUBLISHED[name][0])


def test_every_example_file_is_named_here_and_in_the_readme() -> None:
    files = {file.stem for file in EXAMPLES.glob("*.json")}
    readme = (EXAMPLES / "README.md").read_text()
    assert files == set(PUBLISHED)
    assert all(f"`{name}.json`" in readme for name in files)


@pytest.mark.parametrize("name", WORKLOADS)
def test_workload_shapes(name: str) -> None:
    file, tp, *want = WORKLOADS[name]
    layer = read_model(EXAMPLES / f"{file}.json", tp=tp)
    assert [layer.experts, layer.topk, layer.hidden, layer.intermediate] == want


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str, tmp_path: Path) -> None:
    config, want = FAMILIES[name]
    assert figures(read_model(write(tmp_path, config))) == want


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
    assert read_model(write(tmp_path, {**QWEN, **fields})).layers == layers, fields


def test_no_layer_left_is_a_dense_model(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"dense model: by .*decoder_sparse_step.* none of its 48 "):
        read_model(write(tmp_path, {**QWEN, "decoder_sparse_step": 0}))


def test_one_value_a_layer(tmp_path: Path) -> None:
    lists = {"num_experts": [0, 64, 64], "num_experts_per_tok": [8, 8, 8], "num_hidden_layers": 3}
    layer = read_model(write(tmp_path, {**QWEN, **lists}))
    assert (layer.experts, layer.topk, layer.layers) == (64, 8, 2)
    with pytest.raises(InvalidInput, match=r"num_experts differs from layer to layer: \[32, 64\]"):
        read_model(write(tmp_path, {**QWEN, "num_experts": [32, 64]}))


def test_parallelism_divides(tmp_path: Path) -> None:
    layer = read_model(EXAMPLES / "qwen3-30b-a3b.json", tp=4, ep=16)
    assert (layer.intermediate, layer.experts, layer.global_experts) == (192, 8, 128)
    with pytest.raises(InvalidInput, match=r"tp=5 does not divide expert .* 768; allowed are 1, 2, 3, 4, 6"):
        read_model(EXAMPLES / "qwen3-30b-a3b.json", tp=5)
    with pytest.raises(InvalidInput, match=r"ep=3 does not divide experts 128; .* 1, 2, 4, 8, 16, 32, 64, 128$"):
        read_model(EXAMPLES / "qwen3-30b-a3b.json", ep=3)
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
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, None, "bf16"),
    ],
)
def test_dtype(published: dict[str, Any], asked: str | None, want: str, tmp_path: Path) -> None:
    assert read_model(write(tmp_path, {**QWEN, **published}), dtype=asked).dtype == want


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
    assert read_model(file).model == want
    if parts[-1] == "config.json":
        assert read_model(str(folder)) == read_model(file)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 400) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = [name for names in FIELDS.values() for name in names]
RULES = [*FIRST_MOE, *STRIDES, "expert_layer_period", "expert_layer_offset", "mlp_only_layers", "moe_layers"]
RULES += ["moe_layer_end_index", "moe_layers_enum", "mlp_layer_types", "hybrid_override_pattern"]


ANY_NAME = st.sampled_from([*NAMES, *RULES, *NESTED, "hidden_act", "torch_dtype"])


@given(st.dictionaries(ANY_NAME, VALUES, max_size=6))
def test_any_json_gives_a_layer_or_one_readable_error(tmp_path_factory: Any, changed: dict[str, Any]) -> None:
    file = write(tmp_path_factory.getbasetemp(), {**QWEN, **changed}, "any.json")
    try:
        layer = read_model(file)
    except InvalidInput as error:
        assert len(str(error)) > 20
    else:
        assert 1 <= layer.topk <= layer.experts
        assert min(layer.layers, layer.hidden, layer.intermediate) >= 1
