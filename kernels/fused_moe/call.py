"""What a call of fused MoE holds, how it is checked, and what a problem says of the calls that ask it."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from moecache.kernels import activations
from moecache.kernels.formats import registry as formats
from moecache.kernels.formats.contract import Format, Quant
from moecache.kernels.launch import Operand, rows_of
from moecache.kernels.matrix import DTYPE_NAMES, DTYPES, ID_DTYPES, MAX_EXPERTS, MAX_TOPK, NAMES, check_map, gap
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import Problem
from moecache.schemas.warm import MOST_TOKENS

STARTS = ("hidden_states", "w1", "w2", "topk_weights", "topk_ids", "out", "posted")  # of LayerCall.starts


@dataclass(slots=True, eq=False)
class LayerCall:
    """The arguments of `moecache.fused_moe`; in a plan each tensor is an Operand.

    Attributes:
        activation: a word of activations.py, which says all that kernels must know of it, the gate too.
        on_input: `apply_router_weight_on_input`.
        num_experts: how many ids may name: `global_num_experts`.
        posted: [1] int32, where the sort leaves the call's routing bucket; None: nowhere.
        starts: the addresses of those tensors that STARTS names, if they are known.
    """

    hidden_states: torch.Tensor
    w1: torch.Tensor
    w2: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    activation: str
    alpha: float
    limit: float
    w1_bias: torch.Tensor | None
    w2_bias: torch.Tensor | None
    on_input: bool
    expert_map: torch.Tensor | None
    num_experts: int
    quant: Quant | None
    posted: torch.Tensor | None
    starts: tuple[int, ...] | None = None


def call_args(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str = "silu",
    gated: bool = True,
    alpha: float | None = None,
    limit: float | None = None,
    w1_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    on_input: bool = False,
    expert_map: torch.Tensor | None = None,
    num_experts: int | None = None,
    quant: Quant | None = None,
    posted: torch.Tensor | None = None,
) -> LayerCall:
    """The call with these arguments; see `moecache.fused_moe`. `num_experts` is how many ids may name.

    `activation` becomes the word of activations.py, which says all that kernels must know of it.

    Raises:
        InvalidInput: no such activation, or one that does not take what is given.
    """
    a, b = activations.ALPHA, activations.LIMIT  # which are read where they belong to the activation
    if gated is not True or alpha is not None or limit is not None or activation not in activations.NAMES:
        activation, a, b = activations.settled(activation, gated, alpha, limit)
    if num_experts is None:
        num_experts = w1.shape[0] if expert_map is None else expert_map.numel()
    return LayerCall(
        hidden_states, w1, w2, topk_weights, topk_ids, activation, a, b, w1_bias, w2_bias, on_input, expert_map,
        num_experts, quant, posted,
    )  # fmt: skip


def check(call: LayerCall) -> None:
    """Raise InvalidInput for arguments that no kernel may see. A microsecond or two: every call pays it."""
    x, w1, w2, ids, router = call.hidden_states, call.w1, call.w2, call.topk_ids, call.topk_weights
    dtype, shape, first, second = x.dtype, x.shape, w1.shape, w2.shape
    if len(shape) != 2 or dtype not in DTYPE_NAMES:
        raise InvalidInput(
            f"hidden_states is {dtype} {list(shape)}; allowed is [tokens, hidden] of {_names(DTYPE_NAMES)}"
        )
    panels, quant = activations.panels(call.activation), call.quant
    packed = 1 if quant is None else formats.get(quant.kind).packed
    if len(first) != 3 or packed * first[2] != shape[1] or first[1] % panels or not first[1] or not shape[1]:
        raise InvalidInput(_misfit(call, panels, packed))
    if len(second) != 3 or second[0] != first[0] or second[1] != shape[1] or panels * packed * second[2] != first[1]:
        raise InvalidInput(_misfit(call, panels, packed))
    if not 1 <= first[0] <= MAX_EXPERTS or not first[0] <= call.num_experts <= MAX_EXPERTS:
        _check_experts(call)
    rows = ids.shape
    if len(rows) != 2 or rows[0] != shape[0] or ids.dtype not in ID_DTYPES:
        raise InvalidInput(f"topk_ids is {ids.dtype} {list(rows)}; allowed is int32 or int64 [{shape[0]}, topk]")
    if router.shape != rows or not router.is_floating_point():
        raise InvalidInput(f"topk_weights is {router.dtype} {list(router.shape)}; allowed is floating {list(rows)}")
    if not 1 <= rows[1] <= MAX_TOPK or rows[0] > MOST_TOKENS:
        raise InvalidInput(f"{rows[0]} tokens, topk={rows[1]}; allowed are 0 to {MOST_TOKENS}, and 1 to {MAX_TOPK}")
    if call.activation not in activations.WORDS:
        raise InvalidInput(f"activation={call.activation!r}; allowed are {', '.join(activations.NAMES)}")
    if not w1.device == w2.device == ids.device == router.device == x.device:
        raise InvalidInput(f"the tensors are on {_names({t.device for t in (x, w1, w2, ids, router)})}; allowed is one")
    if w1.dtype != w2.dtype or (quant is None and w1.dtype != dtype):
        kinds = ", ".join(formats.KINDS)
        raise InvalidInput(f"w1 is {w1.dtype}, w2 {w2.dtype}; allowed is {dtype} for both, or quant ({kinds})")
    if quant is not None:
        formats.get(quant.kind).check(quant, w1, w2)
    if call.w1_bias is not None or call.w2_bias is not None or call.expert_map is not None:
        _check_extras(call)
    elif call.num_experts != first[0]:
        _check_experts(call)


def _misfit(call: LayerCall, panels: int, packed: int) -> str:
    """What is wrong with the shape of w1, or of w2 beside it; and whether the other setting of `gated` fits."""
    hidden, first, second = call.hidden_states.shape[1], list(call.w1.shape), list(call.w2.shape)
    other, rows = 3 - panels, "2 · intermediate" if panels == 2 else "intermediate"
    turned = len(first) == len(second) == 3 and second == [first[0], hidden, first[1] // other // packed]
    stored = f"hidden={hidden}" if packed == 1 else f"hidden/{packed}={hidden / packed:g}"
    there = panels == 1 or activations.ungated(call.activation) in activations.WORDS
    hint = f", or pass gated={panels == 1}" if turned and there else ""
    if len(first) != 3 or packed * first[2] != hidden or not first[1] or first[1] % panels:
        return f"w1 is {first}; with gated={panels == 2} allowed is [experts, {rows}, {stored}]{hint}"
    want = [first[0], hidden, first[1] // panels // packed]
    return f"w2 is {second}; with gated={panels == 2} allowed is {want}, as w1 [experts, {rows}, hidden] says{hint}"


def _names(values: Any) -> str:
    return ", ".join(sorted(map(str, values)))


def _check_experts(call: LayerCall) -> None:
    experts, count = call.w1.shape[0], call.num_experts
    if not 1 <= experts <= MAX_EXPERTS:
        raise InvalidInput(f"w1 has {experts} experts; allowed are 1 to {MAX_EXPERTS}")
    if not 1 <= count <= MAX_EXPERTS:
        raise InvalidInput(f"global_num_experts={count}; allowed are 1 to {MAX_EXPERTS}")
    if call.expert_map is None and count != experts:
        raise InvalidInput(f"global_num_experts={count} but w1 has {experts} experts: an expert_map is wanted")
    if count < experts:  # sorts group by as many experts as ids may name
        raise InvalidInput(f"global_num_experts={count} but w1 has {experts} experts; allowed are {experts} and more")


def _check_extras(call: LayerCall) -> None:
    """Biases and map: their shapes, dtypes and device."""
    w1, w2, mapping = call.w1, call.w2, call.expert_map
    _check_experts(call)
    for name, bias, want in (("w1_bias", call.w1_bias, w1.shape[:2]), ("w2_bias", call.w2_bias, w2.shape[:2])):
        if bias is None:
            continue
        if bias.shape != want or bias.dtype not in DTYPE_NAMES or bias.device != w1.device:
            raise InvalidInput(
                f"{name} is {bias.dtype} {list(bias.shape)} on {bias.device}; allowed is {list(want)} of "
                f"{_names(DTYPE_NAMES)} on {w1.device}"
            )
    if mapping is not None:
        check_map(mapping, call.num_experts, w1.device)


def side_by_side(call: LayerCall) -> LayerCall:
    """The call as kernels read it: elements of a token side by side, small tensors contiguous; copied where not."""
    x, quant = call.hidden_states, call.quant
    return replace(
        call,
        hidden_states=x if x.stride(1) == 1 else x.contiguous(),
        topk_weights=call.topk_weights.contiguous(),
        w1_bias=_whole(call.w1_bias),
        w2_bias=_whole(call.w2_bias),
        expert_map=_whole(call.expert_map),
        quant=quant and replace(quant, w1_scale=_whole(quant.w1_scale), w2_scale=_whole(quant.w2_scale)),
    )


def check_rows(call: Any) -> None:
    """Raise InvalidInput where elements of a row of weights are not side by side: they are never copied."""
    w1, w2 = call.w1, call.w2
    if w1.stride(2) != 1 or w2.stride(2) != 1:
        raise InvalidInput(f"weights have last strides {w1.stride(2)} and {w2.stride(2)}; allowed is 1")


def blocks_apart(call: Any) -> bool:
    """Whether gate and up have blocks of scales of their own, and that is another layout than blocks of both."""
    return call.quant is not None and formats.get(call.quant.kind).apart(call.quant, call.w1, call.w2)


def _whole(tensor: Any) -> Any:
    return None if tensor is None else tensor.contiguous()


def format_of(problem: Problem) -> Format:
    """That of the weights."""
    return formats.get(problem.dim("quant", ""), problem.dtype)


def rows_in_memory(form: Format, dtype: str, hidden: int, middle: int, arch: str) -> list[tuple[int, torch.dtype]]:
    """(elements, their dtype) of a row of the tokens, of w1 and of w2."""
    return [(hidden, DTYPES[dtype]), form.row(hidden, arch), form.row(middle, arch)]


def behind(problem: Problem) -> int:
    """Elements behind each row of the tokens and weights of a layer."""
    sizes = problem.dim("hidden"), problem.dim("intermediate")
    return gap(problem, *rows_in_memory(format_of(problem), problem.dtype, *sizes, problem.arch))


def operands(problem: Problem) -> tuple[Any, Operand]:
    """(a LayerCall of operands, its output) as the calls of a problem usually have them, and as `inputs` makes them.

    Rows lie one after the other, ids are int32, router weights float32, biases have the dtype of the tokens. A call
    whose tensors lie otherwise may ask for kernels of its own, which its first launch compiles.
    """
    tokens, topk, experts, form = problem.tokens, problem.topk, problem.experts, format_of(problem)
    hidden, middle, after = problem.dim("hidden"), problem.dim("intermediate"), behind(problem)
    word, biased = activations.word_of(problem), bool(problem.dim("biased"))
    high = activations.panels(word) * middle
    (columns, weights), (inner, _) = form.row(hidden, problem.arch), form.row(middle, problem.arch)
    mapped, everywhere = bool(problem.dim("mapped")), problem.dim("global", experts)
    of: Any = rows_of  # stands where a tensor stands in a call
    quant = None
    if form.name:
        apart, scale = bool(problem.dim("apart")), NAMES[form.scale_dtype]
        first, second = form.scale_shape(high, hidden), form.scale_shape(hidden, middle)
        if apart:
            first = (2 * form.scale_shape(middle, hidden)[0], *first[1:])
        scales = (of(f"quant.{name}_scale", scale, experts, *s) for name, s in (("w1", first), ("w2", second)))
        quant = Quant(form.name, *scales, apart)
    call = LayerCall(
        hidden_states=of("hidden_states", problem.dtype, tokens, hidden, behind=after),
        w1=of("w1", NAMES[weights], experts, high, columns, behind=after),
        w2=of("w2", NAMES[weights], experts, hidden, inner, behind=after),
        topk_weights=of("topk_weights", "fp32", tokens, topk),
        topk_ids=of("topk_ids", "i32", tokens, topk),
        activation=word,
        alpha=activations.ALPHA,
        limit=activations.LIMIT,
        w1_bias=of("w1_bias", problem.dtype, experts, high) if biased else None,
        w2_bias=of("w2_bias", problem.dtype, experts, hidden) if biased else None,
        on_input=bool(problem.dim("on_input")),
        num_experts=everywhere,
        quant=quant,
        posted=None,
        expert_map=of("expert_map", "i32", everywhere) if mapped else None,
    )
    return call, rows_of("out", problem.dtype, tokens, hidden)
