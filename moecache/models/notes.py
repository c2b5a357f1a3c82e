"""A layer in words, and what a person should know of a model beside its layers: also fields of its file that may change
what the layers compute and that nothing here understands."""

import re
from collections.abc import Sequence

from moecache.kernels.formats.registry import KINDS, usual
from moecache.models.activation import GATES, LIMITS
from moecache.models.activation import NAMES as ACTIVATIONS
from moecache.models.fields import BIASES, FIELDS, LATENT, NESTED, Config, family, names
from moecache.models.formats import PLACES
from moecache.models.schedule import FIRST_MOE, LISTS, OTHERS, STRIDES
from moecache.schemas.layer import Layer

SHARED = names("n_shared_experts num_shared_experts num_shared_expert moe_num_shared_experts")
WIDTHS = names(  # of shared experts, where their number is not given
    "shared_expert_intermediate_size moe_shared_expert_intermediate_size shared_intermediate_size share_expert_dim"
)
ZERO = names("zero_expert_num")
OTHER = names("zero_expert_type expert_dtype enable_moe_block use_moe")
UNDERSTOOD = {
    *(LATENT + ACTIVATIONS + LIMITS + FIRST_MOE + tuple(STRIDES) + LISTS + OTHERS + PLACES + NESTED + SHARED),
    *(WIDTHS + ZERO + BIASES + GATES + OTHER),
    *(name for published in FIELDS.values() for name in published),
}

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


def words(dtype: str, quant: str) -> str:
    """The format of weights: `bf16`, `fp8 blocks`, `fp8 blocks of 64 × 64`, `int4`."""
    kind = quant or usual(dtype)
    plural = f"{kind}s" if kind in KINDS else kind.replace("_block_", " blocks of ").replace("x", " × ")
    return plural.replace("_", " ") or dtype


def layer_line(layer: Layer) -> str:
    """`128 experts, top-8, 2048 × 768, silu, fp8 blocks, 48 layers`."""
    of = f" of {layer.global_experts}" if layer.experts != layer.global_experts else ""
    limit = "" if layer.limit is None else f" with limit {layer.limit:g}"
    shape, gate = f"{layer.hidden} × {layer.intermediate}", "" if layer.gated else " without gate"
    parts = [f"{layer.experts}{of} experts", f"top-{layer.topk}", shape, f"{layer.activation}{limit}{gate}"]
    parts.append(words(layer.dtype, layer.quant))
    parts += ["router weight on the input"] if layer.on_input else []
    return ", ".join([*parts, f"{layer.layers} layer{'s' if layer.layers != 1 else ''}"])


def notes(config: Config, layer: Layer) -> Sequence[str]:
    """What the file says beyond its layers, of which `layer` is the first."""
    experts, found = layer.global_experts, list[str]()
    if latent := _count(config, LATENT):
        found.append(f"moe_latent_size: experts see {latent} columns of the model's {config.get('hidden_size')}")
    if zero := _count(config, ZERO):
        found.append(
            f"zero_expert_num: {zero} of the router's {experts + zero} choices compute nothing; give them as ids of no "
            f"expert, like -1. Warm-ups draw the {experts} experts alone"
        )
    found += _shared(config, layer)
    alpha = config.get("swiglu_alpha")
    if layer.activation == "swiglu_oai" and alpha not in (None, 1.702):
        found.append(f"swiglu_alpha: give alpha={alpha!r} to the calls, it is not 1.702")
    return [*found, *_disagreeing(config), *filter(None, [_unknown(config)])]


def _shared(config: Config, layer: Layer) -> list[str]:
    """Of shared experts. Only those of the others' size can be fused with them."""
    width = _count(config, WIDTHS)
    count = _count(config, SHARED) or int(bool(width))
    if not count:
        return []
    what, them = ("1 shared expert is", "it") if count == 1 else (f"{count} shared experts are", "them")
    if width not in (0, layer.intermediate, count * layer.intermediate) or _count(config, LATENT):
        return [f"{what} not in these layers, nor of the size of their experts"]
    fused = f"{layer.global_experts + count} experts, top-{layer.topk + count}"
    return [f"{what} not in these layers; an engine that fuses {them} asks {fused}"]


def _count(config: Config, names: Sequence[str]) -> int:
    for name in names:
        value = config.get(name)
        values = value if isinstance(value, list) else [value]
        counts = [item for item in values if isinstance(item, int) and not isinstance(item, bool)]
        if max(counts, default=0) > 0:
            return max(counts)
    return 0


def _unknown(config: Config) -> str:
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


def _disagreeing(config: Config) -> list[str]:
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
