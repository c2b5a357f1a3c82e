"""Reads the MoE layers of a model from its published config.json. Only this room knows the names of its fields."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecache.kernels.formats.registry import KINDS, usual
from moecache.models import activation as activations
from moecache.models import fields, formats, notes
from moecache.models.fields import FIELDS, Config, family, located, named, names
from moecache.models.formats import Weights
from moecache.models.schedule import moe_layers
from moecache.schemas.errors import InvalidInput, printable, typed
from moecache.schemas.layer import Layer

DTYPES = {
    **dict.fromkeys(names("bf16 bfloat16"), "bf16"),
    **dict.fromkeys(names("fp16 float16 half"), "fp16"),
    **dict.fromkeys(names("float8_e4m3fn float8_e4m3fnuz"), "fp8"),
    **{dtype: dtype for dtype in KINDS.values()},
    **KINDS,
}
ON_INPUT = ("llama4",)  # families that apply the router's weight to the token
SWITCHES = ("enable_moe_block", "use_moe")  # false: all layers are dense
# In files for several modalities these are lists with one value for each modality (Ernie-4.5-VL), never with many.
MODAL = names("moe_num_experts moe_intermediate_size moe_k moe_layer_start_index moe_layer_end_index")
MODALITIES = 4
MOST_LAYERS = 4096


@dataclass(frozen=True)
class Model:
    """What is known of a model's MoE layers.

    Attributes:
        name: name of the model, for people.
        layers: each kind of layer once; there are several if modalities, layers or ranks differ.
        notes: what else a person should know, a line each.
    """

    name: str
    layers: tuple[Layer, ...]
    notes: tuple[str, ...] = ()

    def told(self) -> list[str]:
        """What was read, a line for each kind of layer, then the notes."""
        lines = (f"{self.name}: {notes.layer_line(layer)}" for layer in self.layers)
        return [printable(line) for line in (*lines, *self.notes)]


def read_model(path: Path | str, *, tp: int = 1, ep: int = 1, dtype: str | None = None) -> Model:
    """The MoE layers of a model as one GPU sees them.

    Args:
        path: a Hugging Face config.json as it is published, or the folder that holds it.
        tp: tensor parallelism; it divides the experts' intermediate size.
        ep: expert parallelism; it divides the experts. If it leaves a rest, some ranks have one expert more.
        dtype: `bf16` or `fp16` forces such weights. `fp8` forces fp8 weights, with the kind of scales that the file
            has, or else blocks. `fp8_block`, `fp8_channel` and `fp8_tensor` force a kind of scales. None takes the
            format of the file, and bf16 if the file gives none, or float32.

    Raises:
        InvalidInput: there is no such file, it is not JSON, or it is no model's; the model is dense; a field is missing
            or wrong (the message lists the fields that were looked for); tp does not divide the intermediate size; ep
            is more than the experts.
    """
    file = located(path)
    config, beside = fields.flatten(fields.load(file)), file.with_name("hf_quant_config.json")
    name, said, found = named(file), dict[str, None](), Counter[Layer]()
    try:
        quantization = _quantization(config, beside)
        for one in _modalities(config):
            found.update(_layers(name, one, quantization, dtype, said))
    except InvalidInput as error:
        raise InvalidInput(f"{file}: {error}") from None
    whole = [layer.model_copy(update={"layers": count}) for layer, count in found.items()]
    ranks = tuple(each for layer in whole for each in _split(layer, tp, ep))
    return Model(name, ranks, (*said, *notes.notes(config, whole[0])))


def model_of(
    experts: int,
    topk: int,
    hidden: int,
    intermediate: int,
    *,
    activation: str = "silu",
    tp: int = 1,
    ep: int = 1,
    dtype: str | None = None,
) -> Model:
    """A model without a file, with one kind of layer. `relu2` has no gate. tp, ep and dtype are as in `read_model`.

    Raises:
        InvalidInput: a size below 1, more choices than experts, an unknown activation; see `read_model`.
    """
    sizes: dict[str, Any] = {"experts": experts, "topk": topk, "hidden": hidden, "intermediate": intermediate}
    for name, value in sizes.items():
        if not 1 <= typed(name, value, int) <= fields.LARGEST:
            raise InvalidInput(f"{name}={value!r}; allowed is a whole number from 1 to {fields.LARGEST}")
    if topk > experts:
        raise InvalidInput(f"topk={topk} is more than experts={experts}")
    word, form = activations.known(activation), _wanted(dtype, Weights("bf16"))
    sizes |= {"activation": word, "gated": word not in activations.UNGATED, "dtype": form.dtype, "quant": form.quant}
    layer = Layer(model="layer", global_experts=experts, **sizes)
    return Model(layer.model, tuple(_split(layer, tp, ep)))


# --- one layer after the other ---


def _modalities(config: Config) -> list[Config]:
    """The config of each modality."""
    lists = {name: config[name] for name in MODAL if isinstance(config.get(name), list)}
    count = max((len(values) for values in lists.values()), default=0)
    total = next((config[name] for name in FIELDS["layers"] if config.get(name)), None)
    if not 1 < count <= MODALITIES or count == total:
        return [config]
    uneven = {name: values for name, values in lists.items() if len(values) != count}
    if uneven:
        raise InvalidInput(f"{uneven} and {lists} are lists of different lengths; one value a modality is wanted")
    return [{**config, **{name: values[at] for name, values in lists.items()}} for at in range(count)]


def _layers(
    name: str, config: Config, quantization: Config, dtype: str | None, said: dict[str, None]
) -> Iterator[Layer]:
    """Every MoE layer; what a person should know of them is added to `said`."""
    found, total = _sizes(config)
    hidden, own = _top(found["hidden size"][1]), _published(config)
    word, guess = activations.activation(config)
    limit = _by_layer(*fields.find(config, activations.LIMITS, activations.limit), total)
    sizes = [_by_layer(*found[what], total) for what in ("experts", "top-k", "expert intermediate size")]
    for at in moe_layers(config, total):
        experts, topk, width = (size(at) for size in sizes)
        if topk > experts:
            raise InvalidInput(f"top-k {topk} is more than its {experts} experts")
        if min(experts, topk, width) < 1:
            raise InvalidInput(f"an MoE layer with {experts} experts, top-{topk}, of width {width}: no layer")
        act, most = activations.clamped(config, word, limit(at))
        published = formats.experts_format(quantization, config, at) or own
        form = _wanted(dtype, published)
        said |= dict.fromkeys(filter(None, (guess, published.note, _insisted(form, published, own))))
        yield Layer(
            model=name,
            experts=experts,
            global_experts=experts,
            topk=topk,
            hidden=hidden,
            intermediate=width,
            activation=act,
            limit=most,
            gated=activations.gated(config, act),
            biased=family(config) == "gpt_oss" or any(config.get(name) is True for name in fields.BIASES),
            on_input=family(config).startswith(ON_INPUT),
            dtype=form.dtype,
            quant=form.quant,
        )


def _by_layer(name: str, value: Any, total: int) -> Callable[[int], Any]:
    """What a field says of a layer. A list may go on for layers of further tokens; a short one has to agree."""
    if not isinstance(value, list):
        return lambda layer: value
    distinct = list(dict.fromkeys(value))
    if len(value) < total and len(distinct) == 1:
        return lambda layer: distinct[0]
    if len(value) < total:
        raise InvalidInput(f"{name} has {len(value)} values, {distinct[:8]}, for {total} layers")
    return lambda layer: value[layer] if layer < len(value) else None


def _sizes(config: Config) -> tuple[dict[str, tuple[str, Any]], int]:
    """Name and value of each field, and the number of layers."""
    if not any(config.get(name) for name in FIELDS["layers"]) and isinstance(config.get("layers_block_type"), list):
        config = {**config, "num_hidden_layers": len(config["layers_block_type"])}
    if family(config).startswith("longcat") and config.get("num_layers"):  # whose other count is of attentions
        config = {**config, "num_hidden_layers": config["num_layers"]}
    found = {what: fields.find(config, names) for what, names in FIELDS.items()}
    _refuse_others(config, found)
    missing = [f"{what} ({', '.join(FIELDS[what])})" for what, (_, value) in found.items() if not _top(value)]
    if missing:
        like = ", ".join(fields.expert_like(config)) or "none"
        raise InvalidInput(
            f"it does not say: {'; '.join(missing)}. These fields were looked for, also inside "
            f"{', '.join(fields.NESTED)}; fields with 'expert' or 'moe' in their name: {like}"
        )
    if _top((latent := fields.find(config, fields.LATENT))[1]):
        found["hidden size"] = latent
    total = _top(found["layers"][1])
    if total > MOST_LAYERS:
        raise InvalidInput(f"{found['layers'][0]}={total} must be a whole number from 1 to {MOST_LAYERS}")
    return found, total


def _top(value: Any) -> int:
    return max(value, default=0) if isinstance(value, list) else value or 0


def _refuse_others(config: Config, found: Mapping[str, tuple[str, Any]]) -> None:
    """Raise for a file that is no model's, and for a dense model."""
    if not any(name for name, _ in found.values()) and not config.keys() & {"model_type", "architectures"}:
        looked = ", ".join(name for names in FIELDS.values() for name in names)
        raise InvalidInput(f"this is not a model's config.json: none of {looked} is in it")
    name, experts = found["experts"]
    off = next((switch for switch in SWITCHES if config.get(switch) is False), "")
    stated = any(each in config for each in FIELDS["experts"])
    if off or (stated and _top(experts) < 2) or (not name and not fields.expert_like(config)):
        kind = config.get("model_type") or "its type is not given"
        why = f"{off} is false" if off else f"it has no experts; looked for {', '.join(FIELDS['experts'])}"
        raise InvalidInput(f"this ({kind}) is a dense model, {why}")


def _split(layer: Layer, tp: int, ep: int) -> Iterator[Layer]:
    """What the ranks see of it: two kinds where the experts leave a rest."""
    size, experts = layer.intermediate, layer.experts
    if typed("tp", tp, int) < 1 or size % tp:
        allowed = ", ".join(str(n) for n in range(1, min(size, 1024) + 1) if size % n == 0)
        raise InvalidInput(f"tp={tp} does not divide expert intermediate size {size}; allowed are {allowed}")
    if not 1 <= typed("ep", ep, int) <= experts:
        raise InvalidInput(f"ep={ep}; allowed are 1 to {experts}, the number of experts")
    for count in dict.fromkeys((-(-experts // ep), experts // ep)):
        yield layer.model_copy(update={"experts": count, "intermediate": size // tp})


# --- formats ---


def _quantization(config: Config, beside: Path) -> Config:
    """What is said of quantized weights, {} for nothing; modelopt may say it in a file beside."""
    name = next((place for place in formats.PLACES if config.get(place)), "")
    found = config.get(name) if name else fields.load(beside) if beside.is_file() else {}
    if not isinstance(found, dict):
        raise InvalidInput(f"{name}={found!r} must be an object")
    inner = found.get("quantization")
    return {**found, **inner} if isinstance(inner, dict) else found


def _published(config: Config) -> Weights:
    word = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    dtype = DTYPES.get(word, "bf16")
    return Weights(dtype, usual(dtype))


def _wanted(asked: str | None, published: Weights) -> Weights:
    if asked is None:
        return published
    if not isinstance(asked, str) or asked not in DTYPES:
        raise InvalidInput(f"dtype {asked!r} is not known; allowed are {', '.join(DTYPES)}")
    dtype = DTYPES[asked]
    kind = next((each for each in (asked, published.quant) if KINDS.get(each) == dtype), usual(dtype))
    return Weights(dtype, kind)


def _insisted(form: Weights, published: Weights, own: Weights) -> str:
    """What is taken otherwise than the file says."""
    if (form.dtype, form.quant) != (published.dtype, published.quant) and published.dtype not in ("bf16", "fp16"):
        says, asked = notes.words(published.dtype, published.quant), notes.words(form.dtype, form.quant)
        return f"the file says {says}, {asked} is what was asked for"
    if form.quant and own.dtype == "fp16":
        return f"{form.dtype} layers are tuned for tokens in bf16, the file says float16"
    return ""
