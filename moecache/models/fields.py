"""Published files: where they lie, the names under which they say a layer's sizes, and how a value is found."""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moecache.schemas.errors import InvalidInput, typed

Config = Mapping[str, Any]
_HUB = re.compile(r"[\w.-]+/[\w.-]+")


def names(text: str) -> tuple[str, ...]:
    """Names with blanks between them."""
    return tuple(text.split())


# First name present wins. An expert's own width stands before the dense one: DeepSeek, Qwen and GLM publish
# both; Mixtral, OLMoE, Phi, Jamba, gpt-oss and Llama-4 publish the experts' width as `intermediate_size`.
FIELDS = {
    "experts": names("num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts"),
    "top-k": names(
        "num_experts_per_tok num_experts_per_token experts_per_token moe_top_k moe_topk moe_k top_k_experts"
        " num_selected_experts"
    ),
    "hidden size": names("hidden_size d_model n_embd"),
    "expert intermediate size": names(
        "moe_intermediate_size expert_intermediate_size expert_hidden_dim routed_expert_intermediate_size"
        " expert_ffn_hidden_size moe_ffn_hidden_size ffn_hidden_size intermediate_size"
    ),
    "layers": names("num_hidden_layers n_layers num_layers n_layer"),
}
LATENT = names("moe_latent_size")  # experts that work in fewer columns than the model (Nemotron-3)
BIASES = names("mlp_bias moe_bias expert_bias experts_bias")  # true: both products of an expert add one
LARGEST = 1 << 20  # no published size comes near; a made-up one must not cost minutes
NESTED = names("thinker_config text_config llm_config language_config ffn_config")


def located(path: Path | str) -> Path:
    """The file that is meant by it or by its folder.

    Raises:
        InvalidInput: it reads like a model of the Hugging Face hub; the message says how to get the file.
    """
    given = Path(typed("path", path, str, os.PathLike))
    if given.is_dir():
        return given / "config.json"
    text = str(path)
    if _HUB.fullmatch(text) and not given.exists() and given.suffix != ".json" and not given.parent.is_dir():
        how = f"fetch it (hf download {text} config.json) and give the path that it prints"
        raise InvalidInput(f"{text} is no file here; a model of the hub is read from its config.json: {how}")
    return given


def named(file: Path) -> str:
    """The file's name, or for a config.json its folder's. A hub cache names the folder by a hash, and one above it
    `models--org--name`."""
    for part in file.parts:
        if part.startswith("models--"):
            return part.rsplit("--", 1)[1]
    return file.absolute().parent.name if file.stem == "config" else file.stem


def load(file: Path) -> dict[str, Any]:
    """The object in a file of JSON.

    Raises:
        InvalidInput: there is none.
    """
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


def flatten(config: Config) -> Config:
    """The language model's fields on one level. Nulls and empty texts never hide a value: DBRX's ffn_config
    carries `"torch_dtype": null` and `"model_type": ""`."""
    for name in NESTED:
        inner = config.get(name)
        if isinstance(inner, dict):
            config = {**config, **{key: value for key, value in inner.items() if value not in (None, "")}}
    return config


def size(name: str, value: object) -> int:
    """A size as it is published; null in a list stands for a layer that has none."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST:
        raise InvalidInput(f"{name}={value!r} must be a whole number from 1 to {LARGEST}")
    return value


def find(config: Config, names: Sequence[str], read: Callable[[str, Any], Any] = size) -> tuple[str, Any]:
    """The first of `names` that is set with its value, one of all layers or a list; ("", None) where none is."""
    for name in names:
        value = config.get(name)
        if isinstance(value, list):
            return name, [read(name, item) for item in value]
        if value is not None:
            return name, read(name, value)
    return "", None


def expert_like(config: Config) -> list[str]:
    """Fields that speak of experts."""
    return sorted(name for name in config if "expert" in name.lower() or "moe" in name.lower())


def family(config: Config) -> str:
    """The model's type; grok-2 calls itself `git`, so its architecture decides."""
    architectures = config.get("architectures")
    if isinstance(architectures, list) and "Grok1ForCausalLM" in architectures:
        return "grok"
    return str(config.get("model_type") or "")
