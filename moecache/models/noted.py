"""Fields of a published file that may change what its layers compute and that nothing here understands."""

import re

from moecache.models.activation import GATES, LIMITS
from moecache.models.activation import NAMES as ACTIVATIONS
from moecache.models.fields import BIASES, FIELDS, LATENT, NESTED, Config, family
from moecache.models.formats import PLACES
from moecache.models.schedule import FIRST_MOE, LISTS, OTHERS, STRIDES

SHARED = (
    "n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts",
)  # fmt: skip
WIDTHS = (  # of shared experts, where their number is not given
    "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size",
    "share_expert_dim",
)  # fmt: skip
ZERO = ("zero_expert_num",)
UNDERSTOOD = {
    *(name for names in FIELDS.values() for name in names), *LATENT, *ACTIVATIONS, *LIMITS, *FIRST_MOE, *STRIDES,
    *LISTS, *OTHERS, *PLACES, *NESTED, *SHARED, *WIDTHS, *ZERO, "zero_expert_type", "expert_dtype", *BIASES, *GATES,
    "enable_moe_block", "use_moe",
}  # fmt: skip

SUSPICIOUS = re.compile(
    r"expert|moe|router|routing|swiglu|quant|latent|gated|activation|(^|_)(act|limit|clamp|zero|shared|sparse|glu|dense)(_|$)"
)
# How the router chooses and weighs, what training adds, how engines exchange tokens, and what belongs to attention,
# vision, other blocks or further tokens: a layer's call is the same.
HARMLESS = re.compile(
    r"router|routing|routed_scaling|loss|coef|capacity|drop|jitter|dispatch|balanc|group|norm|bias|correction|score|_gate$"
    r"|gate_|^gating|overlap|attn|attention|mamba|linear_|conv|rope|rotary|index|vision|image|audio|mtp|nextn|kv_"
    r"|^num_hash_layers$|^hidden_size_per_layer|tokens?$|_token_id|time_step|sliding|parallel|comm"
    r"|^(residual_moe|moe_residual|use_residual|ep_size|moe_implementation|experts_implementation|swiglu_limits_shared"
    r"|swiglu_alpha|use_moe_multimodal|moe_random_\w+|moe_normalize_\w+|uniform_expert_assignment|use_mixed_mlp_moe"
    r"|moe_world_size|moe_aux_\w+|embd_layer_\w+|dense_intermediate_size|dense_list|output_router_logits|moe_eval_\w+"
    r"|moe_use_\w+|shared_moe_mode|zero_centered|num_experts_shared_layers|num_kv_shared_layers|sparse_config|moe_layer_type|norm_expert_weight)$"
)
ALWAYS = ("use_bias", "add_bias_linear", "gated_experts")  # to be named though their words look harmless
NEUTRAL = {"moe_every_n_layer": 1}  # values that change nothing


def unknown(config: Config) -> str:
    """One line that names what is set and not understood; '' for nothing."""
    found = [
        f"{name}={_short(value)}"
        for name, value in config.items()
        if name not in UNDERSTOOD and not _off(name, value) and NEUTRAL.get(name) != value
        if name in ALWAYS or (SUSPICIOUS.search(name.lower()) and not HARMLESS.search(name.lower()))
    ]
    return f"not understood, so it may change what these layers are: {', '.join(found)}" if found else ""


def _off(name: str, value: object) -> bool:
    """Whether a value says that there is nothing; without a gate there is less, not nothing."""
    return value in (None, "", [], {}) or (value in (False, 0) and not re.search(r"gated|(^|_)glu(_|$)", name.lower()))


def disagreeing(config: Config) -> list[str]:
    """Sizes that the file gives twice under different names, with different values."""
    found = []
    for what in ("experts", "top-k", "hidden size", "layers"):
        given = {name: config[name] for name in FIELDS[what] if config.get(name)}
        (first, value), *others = given.items() or [("", None)]
        unlike = [f"{name}={_short(other)}" for name, other in others if other != value and not isinstance(other, list)]
        if unlike and not isinstance(value, list) and not (what == "layers" and family(config).startswith("longcat")):
            found.append(f"{first}={value} is taken, though the file also says {', '.join(unlike)}")
    return found


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
