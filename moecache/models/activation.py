"""What experts compute between their products, as published files say it."""

from typing import Any

from moecache.kernels.activations import NAMES as KNOWN
from moecache.models.fields import Config, family, names
from moecache.schemas.errors import InvalidInput

NAMES = names(
    "moe_hidden_act expert_hidden_act hidden_act hidden_activation mlp_hidden_act activation_function ffn_act_fn"
)
WORDS = {
    **dict.fromkeys(names("silu swish swiglu"), "silu"),
    **dict.fromkeys(names("gelu geglu"), "gelu"),
    **dict.fromkeys(names("gelu_tanh gelu_pytorch_tanh gelu_new"), "gelu_tanh"),
    **dict.fromkeys(names("relu2 relu_squared squared_relu"), "relu2"),
    **dict.fromkeys(names("swiglu_oai swigluoai"), "swiglu_oai"),
}
GATES = names("is_gated gated_mlp use_gated_mlp mlp_gated moe_gated use_glu glu")  # false: no gate
UNGATED = names("relu2")  # every published family that squares has one product before it, no gate

# Of families whose code, not their file, says what they compute; others are taken to compute silu, which is noted.
OF_FAMILY = {"grok": "gelu", "grok-1": "gelu", "gemma": "gelu_tanh", "nemotron_h": "relu2"}
SILU = names(
    "afmoe arctic bailing dbrx deepseek dots1 ernie4_5 exaone glm granitemoe hunyuan jamba jetmoe kimi lfm2 llama4"
    " longcat minimax mixtral olmoe phimoe qwen step3"
)
LIMITS = names("swiglu_limit swiglu_limits")
CLAMPS_AFTER = names("step3p5 step3p7 step3_5 step3_7")  # these clamp silu(gate), the others gate


def activation(config: Config) -> tuple[str, str]:
    """The word that kernels use and a note, where it was guessed. A word that no kernel knows stays as it is.

    gpt-oss publishes "silu" and computes the clamped (up + 1) · gate · sigmoid(1.702 · gate).
    """
    kind = family(config)
    if kind == "gpt_oss":
        return "swiglu_oai", ""
    value = next((config[name] for name in NAMES if config.get(name)), None)
    if isinstance(value, dict):
        value = value.get("name")
    if value:
        return WORDS.get(str(value).lower(), str(value).lower()), ""
    for prefix, word in OF_FAMILY.items():
        if kind.startswith(prefix):
            return word, ""
    known = kind.startswith(SILU)
    return "silu", "" if known else f"no activation is given ({', '.join(NAMES)}): silu is taken"


def gated(config: Config, word: str) -> bool:
    """Whether experts have a gate beside the other half of the first product."""
    return word not in UNGATED and not any(config.get(name) is False for name in GATES)


def known(word: str) -> str:
    """The kernels' word for an activation.

    Raises:
        InvalidInput: they have none; the message lists those that exist.
    """
    if not isinstance(word, str) or word.lower() not in WORDS:
        raise InvalidInput(f"activation {word!r} is not known; allowed are {', '.join(KNOWN)}")
    return WORDS[word.lower()]


def limit(name: str, value: Any) -> float | None:
    """What gate and up are clamped to, as it is published; None for nothing."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9):
        raise InvalidInput(f"{name}={value!r} must be a number above 0, or 0 or null for no limit")
    return float(value) if value else None


def clamped(config: Config, word: str, limit: float | None) -> tuple[str, float | None]:
    """Activation and limit of one layer; `swiglustep`, which no kernel has, where silu(gate) is clamped."""
    if limit is not None and word == "silu" and family(config).startswith(CLAMPS_AFTER):
        return "swiglustep", limit
    return word, limit
