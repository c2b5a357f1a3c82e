"""The format of the experts' weights, as a quantized checkpoint's config says it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

PLACES = ("quantization_config", "compression_config", "quantization")
IGNORED = ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules", "exclude")
BLOCK = [128, 128]  # rows and columns of the only fp8 blocks that kernels have
LEFT_OUT = ("unquantized", "none", "bf16", "fp16")

# Names that an expert's weights have in published checkpoints; {} is the layer.
_ROOTS = ("", "model.", "language_model.", "language_model.model.", "model.language_model.", "backbone.")
_HOMES = ("mlp", "block_sparse_moe", "feed_forward", "mixer", "moe", "ffn")
_PARTS = ("", ".gate_up_proj", ".down_proj", ".0", ".0.gate_proj", ".0.up_proj", ".0.down_proj", ".0.w1", ".0.w2")
_NAMES = tuple(f"{root}layers.{{}}.{home}.experts{part}" for root in _ROOTS for home in _HOMES for part in _PARTS)
_PLAIN, _LAYER = re.compile(r"[\w.-]+", re.ASCII), re.compile(r"(?:^|\.)layers\.(\d{1,6})(?:\.|$)")
_CLASS = re.compile(r"^Linear$|^\w*(MoE|Moe|Experts)\w*$")  # of modules, as compressed-tensors targets them


@dataclass(frozen=True)
class Weights:
    """`bf16`, `fp16` or `fp8` with its kind, or the word for weights without kernels, like int4."""

    dtype: str
    quant: str = ""
    note: str = ""


def experts_format(found: Mapping[str, Any], config: Mapping[str, Any], layer: int) -> Weights | None:
    """Weights of the experts of a layer by a quantization config; None where it leaves them as they are."""
    if config.get("expert_dtype") in ("fp4", "mxfp4"):  # DeepSeek-V4: fp8 blocks elsewhere
        return Weights("mxfp4")
    if not found or any(_means(_texts(found.get(name)), layer) for name in IGNORED):
        return None
    method = str(found.get("quant_method") or "").lower()
    if isinstance(groups := found.get("config_groups"), dict) and groups:
        return _of_groups(groups, layer)
    if found.get("quant_algo"):
        return _of_algorithm(found["quant_algo"])
    if (block := found.get("weight_block_size")) is not None:
        return _blocks(block)
    if "weight_block_size" in found or method in ("fp8", "fbgemm_fp8"):
        kind = "fp8_channel" if method == "fbgemm_fp8" else "fp8_tensor"
        return Weights("fp8", kind, _static(found.get("activation_scheme") == "static"))
    bits = found.get("bits") or found.get("w_bit") or 4 * bool(found.get("load_in_4bit"))
    return Weights(f"int{bits}" if bits else method or "quantized")


def _blocks(block: object) -> Weights:
    if block == BLOCK:
        return Weights("fp8", "fp8_block")
    words = "x".join(map(str, block)) if isinstance(block, list) else str(block)
    return Weights("fp8", f"fp8_block_{words}")


def _static(static: bool) -> str:
    return "tokens have static scales in the file; kernels quantise them with dynamic ones" if static else ""


def _of_groups(groups: Mapping[str, Any], layer: int) -> Weights | None:
    """compressed-tensors, and modelopt as it is written since: the group whose targets name experts."""
    found = [group for group in groups.values() if isinstance(group, dict)]
    named = [group for group in found if _means(_texts(group.get("targets")), layer)]
    wide = [group for group in found if any(_CLASS.search(text) for text in _texts(group.get("targets")) or ["Linear"])]
    for group in named or wide:
        weights, tokens = group.get("weights"), group.get("input_activations")
        return _of_weights(weights, tokens) if isinstance(weights, dict) else None
    return None


def _of_weights(weights: Mapping[str, Any], tokens: object) -> Weights | None:
    if weights.get("quant_algo"):
        return _of_algorithm(weights["quant_algo"])
    bits, floating = weights.get("num_bits"), weights.get("type") == "float"
    if not floating or bits != 8:
        fp4 = "mxfp4" if weights.get("group_size") == 32 else "nvfp4"
        return Weights(fp4 if floating and bits == 4 else f"{'fp' if floating else 'int'}{bits}")
    if not isinstance(tokens, dict):
        return Weights("fp8_w8a16")
    strategy, note = weights.get("strategy") or "tensor", _static(tokens.get("dynamic") is False)
    if strategy == "block":
        return _blocks(weights.get("block_structure"))
    if strategy in ("channel", "tensor"):
        return Weights("fp8", f"fp8_{strategy}", note)
    return Weights("mxfp8" if weights.get("group_size") == 32 else f"fp8_{strategy}")


def _of_algorithm(word: object) -> Weights | None:
    """modelopt's words."""
    text = str(word).lower()
    known = {
        "fp8": Weights("fp8", "fp8_tensor", _static(True)),
        "fp8_per_channel_per_token": Weights("fp8", "fp8_channel"),
        "fp8_block_scales": Weights("fp8", "fp8_block"),
        "fp8_pb_wo": Weights("fp8_w8a16"),
    }
    if text in LEFT_OUT:
        return None
    for part in ("nvfp4", "mxfp4", "mxfp8"):
        if part in text and text not in known:
            return Weights(part)
    int4 = "int4" in text or re.match(r"w4a(8|16)", text)
    return known.get(text) or Weights("int4" if int4 else "int8" if "int8" in text or "w8a8" in text else text)


# --- names of modules ---


def _texts(value: object) -> Sequence[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list | dict) else []


@lru_cache(maxsize=4096)
def _names(layer: int) -> tuple[tuple[str, ...], str]:
    names = tuple(name.format(layer) for name in _NAMES)
    return names, "".join(f"\n.{name}." for name in names)


@lru_cache(maxsize=8)
def _by_layer(patterns: tuple[str, ...]) -> tuple[list[str], dict[int, list[str]]]:
    """Patterns for any layer, and those for one. modelopt lists each product of each expert of each layer."""
    found: tuple[list[str], dict[int, list[str]]] = [], {}
    for pattern in patterns:
        number = _LAYER.search(pattern) if _PLAIN.fullmatch(pattern) else None
        (found[1].setdefault(int(number[1]), []) if number else found[0]).append(pattern)
    return found


def _means(patterns: Sequence[str], layer: int) -> str:
    """The first pattern that means the experts of a layer; '' for none."""
    anywhere, here = _by_layer(tuple(patterns))
    return next((pattern for pattern in (*anywhere, *here.get(layer, ())) if _covers(pattern, layer)), "")


def _covers(pattern: str, layer: int) -> bool:
    """Whether a pattern means the experts of a layer: a regular expression, a name with *, or whole parts of one."""
    names, text = _names(layer)
    if pattern.startswith("re:"):
        try:
            compiled = re.compile(pattern.removeprefix("re:"))
        except re.error:
            return False
        return any(compiled.match(name) for name in names)
    if "*" in pattern or "?" in pattern:
        return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for name in names)
    return bool(pattern) and f".{pattern}." in text
