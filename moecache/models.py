"""Reads a published config.json into the shapes of its MoE layer; the only file that knows field names."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moecache.schemas.errors import InvalidInput
from moecache.schemas.layer import Layer

Config = Mapping[str, Any]

# First name present wins. An expert's own width stands before the dense one: DeepSeek, Qwen and GLM publish
# both; Mixtral, OLMoE, Phi, Jamba, gpt-oss and Llama-4 publish the experts' width as `intermediate_size`.
FIELDS: dict[str, tuple[str, ...]] = {
    "experts": (
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "moe_num_experts",
        "num_routed_experts",
    ),
    "top-k": (
        "num_experts_per_tok",
        "num_experts_per_token",
        "experts_per_token",
        "moe_top_k",
        "moe_topk",
        "moe_k",
        "top_k_experts",
        "num_selected_experts",
    ),
    "hidden size": ("hidden_size", "d_model", "n_embd"),
    "expert intermediate size": (
        "moe_intermediate_size",
        "expert_ffn_hidden_size",
        "moe_ffn_hidden_size",
        "ffn_hidden_size",
        "intermediate_size",
    ),
    "layers": ("num_hidden_layers", "n_layers", "num_layers", "n_layer"),
}
LARGEST = 1 << 20  # no published size comes near; a made-up one must not cost minutes
NESTED = ("thinker_config", "text_config", "llm_config", "language_config", "ffn_config")

# Which layers are MoE: those from the first on whose (number + shift) is a multiple of every step given.
FIRST_MOE = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
STRIDES = {
    "moe_layer_freq": 0,
    "decoder_sparse_step": 1,
    "interleave_moe_layer_step": 1,
    "moe_layer_interval": 1,
    "moe_layer_frequency": 1,
}

DTYPES = {
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp16": "fp16",
    "float16": "fp16",
    "half": "fp16",
    "fp8": "fp8",
    "float8_e4m3fn": "fp8",
    "float8_e4m3fnuz": "fp8",
}
ACTIVATIONS = {"swish": "silu", "swiglu": "silu", "swigluoai": "swiglu_oai"}


def read_model(path: Path | str, *, tp: int = 1, ep: int = 1, dtype: str | None = None) -> Layer:
    """The MoE layer of a model as one GPU sees it.

    Args:
        path: a Hugging Face config.json as it is published, or the folder that holds it.
        tp: tensor parallelism, divides the experts' intermediate size.
        ep: expert parallelism, divides the experts.
        dtype: `bf16`, `fp16` or `fp8`; None takes the published one, bf16 where that is absent or float32. A
            quantized checkpoint keeps its activation dtype: ask for `fp8` to tune its kernels.

    Raises:
        InvalidInput: no such file, not JSON, no model, a dense model, a field missing (the message lists
            what was looked for), or tp or ep do not divide.
    """
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    config = _flatten(_load(file))
    sizes = _sizes(file, config)
    return Layer(
        model=_name(file),
        experts=_share(sizes["experts"], ep, "ep", "experts"),
        global_experts=sizes["experts"],
        topk=sizes["top-k"],
        hidden=sizes["hidden size"],
        intermediate=_share(sizes["expert intermediate size"], tp, "tp", "expert intermediate size"),
        activation=_activation(config),
        dtype=_dtype(config, dtype),
        layers=_moe_layers(file, config, sizes["layers"]),
    )


def _load(file: Path) -> Config:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        hint = "give a model's config.json or the folder that holds it"
        raise InvalidInput(f"{file}: {error.strerror or error}; {hint}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{file} is not JSON ({error}); give a model's config.json") from error
    if not isinstance(config, dict):
        raise InvalidInput(f"{file} holds a {type(config).__name__}, not the object of a model's config.json")
    return config


def _flatten(config: Config) -> Config:
    """The language model's fields on one level. Nulls and empty texts never hide a value: DBRX's ffn_config
    carries `"torch_dtype": null` and `"model_type": ""`."""
    for name in NESTED:
        inner = config.get(name)
        if isinstance(inner, dict):
            config = {**config, **{key: value for key, value in inner.items() if value not in (None, "")}}
    return config


def _sizes(file: Path, config: Config) -> dict[str, int]:
    found = {what: _find(file, config, names) for what, names in FIELDS.items()}
    _refuse_others(file, config, found)
    sizes = {what: value for what, value in found.items() if value}
    missing = [f"{what} ({', '.join(names)})" for what, names in FIELDS.items() if what not in sizes]
    if missing:
        like = ", ".join(_expert_like(config)) or "none"
        raise InvalidInput(
            f"{file} does not say: {'; '.join(missing)}. These fields were looked for, also inside "
            f"{', '.join(NESTED)}; fields with 'expert' or 'moe' in their name: {like}"
        )
    if sizes["top-k"] > sizes["experts"]:
        raise InvalidInput(f"{file}: top-k {sizes['top-k']} is more than its {sizes['experts']} experts")
    return sizes


def _refuse_others(file: Path, config: Config, found: Mapping[str, int | None]) -> None:
    """Raise for a file that is no model's, and for a dense model."""
    if not any(found.values()) and not config.keys() & {"model_type", "architectures"}:
        looked = ", ".join(name for names in FIELDS.values() for name in names)
        raise InvalidInput(f"{file} is not a model's config.json: none of {looked} is in it")
    experts = found["experts"]
    stated = any(name in config for name in FIELDS["experts"])
    if (stated and (experts or 0) < 2) or (experts is None and not _expert_like(config)):
        kind = config.get("model_type") or "its type is not given"
        looked = ", ".join(FIELDS["experts"])
        raise InvalidInput(f"{file} ({kind}) is a dense model, it has no experts; looked for {looked}")


def _find(file: Path, config: Config, names: Sequence[str]) -> int | None:
    """The first of `names` that is set. A list (one value a layer) counts when its non-zero values agree."""
    for name in names:
        value = config.get(name)
        if isinstance(value, list):
            distinct = {item for item in value if isinstance(item, int) and item}
            if len(distinct) > 1:
                raise InvalidInput(f"{file}: {name} differs from layer to layer: {sorted(distinct)}; give one")
            value = distinct.pop() if distinct else 0
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST:
                raise InvalidInput(f"{file}: {name}={value!r} must be a whole number from 1 to {LARGEST}")
            return value
    return None


def _expert_like(config: Config) -> list[str]:
    return sorted(name for name in config if "expert" in name.lower() or "moe" in name.lower())


def _moe_layers(file: Path, config: Config, total: int) -> int:
    listed = _listed(config)
    if listed is None:
        listed = sum(_is_moe(config, layer) for layer in range(total))
    if listed < 1:
        names = (*FIRST_MOE, *STRIDES, "moe_layers", "mlp_only_layers", "expert_layer_period")
        fields = ", ".join(name for name in names if name in config)
        raise InvalidInput(f"{file} is a dense model: by {fields} none of its {total} layers is MoE")
    return listed


def _listed(config: Config) -> int | None:
    """The number of MoE layers where the config lists them; None where a rule says it."""
    match config:
        case {"moe_layers": list(indices)}:
            return len(indices)
        case {"moe_layers_enum": str(indices)}:
            return len(indices.split(","))
        case {"moe_layer_freq": list(flags)}:
            return sum(1 for flag in flags if flag)
        case {"mlp_layer_types": list(kinds)}:
            return sum(1 for kind in kinds if kind != "dense")
        case {"hybrid_override_pattern": str(pattern)} if "E" in pattern:
            return pattern.count("E")
        case {"num_experts": list(counts)}:
            return sum(1 for count in counts if count)
    return None


def _is_moe(config: Config, layer: int) -> bool:
    first = next((config[name] for name in FIRST_MOE if isinstance(config.get(name), int)), 0)
    last = config.get("moe_layer_end_index")
    dense = config.get("mlp_only_layers")
    if layer < first or (isinstance(last, int) and 0 <= last < layer):
        return False
    if isinstance(dense, list) and layer in dense:
        return False
    offset = config.get("expert_layer_offset")
    shifts = {**STRIDES, "expert_layer_period": -offset if isinstance(offset, int) else 0}
    steps = [(config[name], shift) for name, shift in shifts.items() if isinstance(config.get(name), int)]
    return all(step > 0 and (layer + shift) % step == 0 for step, shift in steps)


def _activation(config: Config) -> str:
    """gpt-oss publishes "silu" and computes the clamped (up + 1) · gate · sigmoid(1.702 · gate)."""
    if config.get("model_type") == "gpt_oss":
        return "swiglu_oai"
    names = ("hidden_act", "hidden_activation", "mlp_hidden_act", "activation_function", "ffn_act_fn")
    value = next((config[name] for name in names if config.get(name)), "silu")
    word = str(value.get("name", "silu") if isinstance(value, dict) else value).lower()
    return ACTIVATIONS.get(word, word)


def _dtype(config: Config, asked: str | None) -> str:
    if asked is not None:
        if asked not in DTYPES:
            raise InvalidInput(f"dtype {asked!r} is not known; allowed are {', '.join(DTYPES)}")
        return DTYPES[asked]
    published = config.get("dtype") or config.get("torch_dtype")
    return DTYPES.get(str(published).removeprefix("torch."), "bf16")


def _share(size: int, ways: int, flag: str, what: str) -> int:
    if ways < 1 or size % ways:
        allowed = ", ".join(str(n) for n in range(1, min(size, 1024) + 1) if size % n == 0)
        raise InvalidInput(f"{flag}={ways} does not divide {what} {size}; allowed are {allowed}")
    return size // ways


def _name(file: Path) -> str:
    """What people call the model: the file's name, or for a config.json its folder's. A hub cache names the
    folder by a hash, and one above it `models--org--name`."""
    for part in file.parts:
        if part.startswith("models--"):
            return part.rsplit("--", 1)[1]
    return file.absolute().parent.name if file.stem == "config" else file.stem
