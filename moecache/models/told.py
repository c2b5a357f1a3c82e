"""A layer in words, and what a person should know of a model beside its layers."""

from collections.abc import Sequence

from moecache.models import noted
from moecache.models.fields import LATENT, Config
from moecache.schemas.layer import Layer

KINDS = {"fp8_block": "fp8 blocks", "fp8_channel": "fp8 channels", "fp8_tensor": "fp8 tensors"}


def words(dtype: str, quant: str) -> str:
    """The format of weights: `bf16`, `fp8 blocks`, `fp8 blocks of 64 × 64`, `int4`."""
    kind = quant or "fp8_block"
    if dtype != "fp8":
        return dtype
    return KINDS.get(kind) or kind.replace("_block_", " blocks of ").replace("x", " × ").replace("_", " ")


def layer_line(layer: Layer) -> str:
    """`128 experts, top-8, 2048 × 768, silu, fp8 blocks, 48 layers`."""
    of = f" of {layer.global_experts}" if layer.experts != layer.global_experts else ""
    limit = "" if layer.limit is None else f" with limit {layer.limit:g}"
    parts = [
        f"{layer.experts}{of} experts", f"top-{layer.topk}", f"{layer.hidden} × {layer.intermediate}",
        f"{layer.activation}{limit}{'' if layer.gated else ' without gate'}", words(layer.dtype, layer.quant),
    ]  # fmt: skip
    parts += ["router weight on the input"] if layer.on_input else []
    return ", ".join([*parts, f"{layer.layers} layer{'s' if layer.layers != 1 else ''}"])


def notes(config: Config, layer: Layer) -> Sequence[str]:
    """What the file says beyond its layers, of which `layer` is the first."""
    experts, found = layer.global_experts, list[str]()
    if latent := _count(config, LATENT):
        found.append(f"moe_latent_size: experts see {latent} columns of the model's {config.get('hidden_size')}")
    if zero := _count(config, noted.ZERO):
        found.append(
            f"zero_expert_num: {zero} of the router's {experts + zero} choices compute nothing; give them as ids of no "
            f"expert, like -1. Warm-ups draw the {experts} experts alone"
        )
    found += _shared(config, layer)
    alpha = config.get("swiglu_alpha")
    if layer.activation == "swiglu_oai" and alpha not in (None, 1.702):
        found.append(f"swiglu_alpha: give alpha={alpha!r} to the calls, it is not 1.702")
    return [*found, *noted.disagreeing(config), *filter(None, [noted.unknown(config)])]


def _shared(config: Config, layer: Layer) -> list[str]:
    """Of shared experts. Only those of the others' size can be fused with them."""
    width = _count(config, noted.WIDTHS)
    count = _count(config, noted.SHARED) or int(bool(width))
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
