"""Which of a model's layers are MoE."""

from collections.abc import Sequence
from typing import Any

from moecache.models.fields import Config, names
from moecache.schemas.errors import InvalidInput

# Which layers are MoE: those from the first on whose (number + shift) is a multiple of every step given.
FIRST_MOE = names("first_k_dense_replace num_dense_layers moe_layer_start_index moe_layer_num_skipped")
STRIDES = {
    "moe_layer_freq": 0,
    **dict.fromkeys(names("decoder_sparse_step interleave_moe_layer_step moe_layer_interval moe_layer_frequency"), 1),
}
LISTS = names("moe_layers moe_layers_enum is_moe_layer mlp_layer_types layers_block_type hybrid_override_pattern")
OTHERS = names("moe_layer_end_index mlp_only_layers expert_layer_period expert_layer_offset")
BLOCKS = frozenset("M*-E")  # Mamba, attention, dense and MoE in Nemotron's pattern


def moe_layers(config: Config, total: int) -> Sequence[int]:
    """Numbers of the MoE layers.

    Raises:
        InvalidInput: there is none.
    """
    found = _listed(config, total)
    if found is None:
        found = [layer for layer in range(total) if _is_moe(config, layer)]
    if not found:
        asked = (*FIRST_MOE, *STRIDES, *LISTS, *OTHERS, "num_experts")
        fields = ", ".join(name for name in asked if name in config)
        raise InvalidInput(f"this is a dense model: by {fields} none of its {total} layers is MoE")
    return found


def _listed(config: Config, total: int) -> list[int] | None:
    """Where the config lists them; None where a rule says it."""
    match config:
        case {"moe_layers": list(indices)}:
            return [int(layer) for layer in indices if _whole(layer)]
        case {"moe_layers_enum": str(text)}:
            return [int(word) for word in text.split(",") if word.strip().isdecimal()]
        case {"moe_layer_freq": list(flags)} | {"is_moe_layer": list(flags)}:
            return _set(flags)
        case {"mlp_layer_types": list(kinds)}:
            return _set([kind != "dense" for kind in kinds])
        case {"layers_block_type": list(kinds)} if "moe" in kinds:
            return _set([kind == "moe" for kind in kinds])
        case {"hybrid_override_pattern": str(pattern)} if pattern and set(pattern) <= BLOCKS:
            return _set([block == "E" for block in pattern])
        case {"num_experts": list(counts)} if len(counts) == total:
            return _set(counts)
    return None


def _set(flags: Sequence[Any]) -> list[int]:
    return [layer for layer, flag in enumerate(flags) if flag]


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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
