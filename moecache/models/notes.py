"""A layer in words, and what a person should know of a model beside its layers."""

from collections.abc import Sequence

from moecache.kernels.formats.registry import KINDS, usual
from moecache.models.fields import LATENT, Config, names
from moecache.schemas.layer import Layer

SHARED = names("n_shared_experts num_shared_experts num_shared_expert moe_num_shared_experts")
WIDTHS = names(  # of shared experts, where their number is not given
    "shared_expert_intermediate_size moe_shared_expert_intermediate_size shared_intermediate_size share_expert_dim"
)
ZERO = names("zero_expert_num")


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
    return found


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
