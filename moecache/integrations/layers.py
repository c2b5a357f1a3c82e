"""`moecache.fused_moe` in the place of an engine's function of a whole layer, for the layers that it can run."""

import functools
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from moecache.dispatch import dispatcher
from moecache.integrations import warming
from moecache.integrations.kernel import logger
from moecache.kernels.fused_moe.op import FUSED_MOE, call_args
from moecache.ops import fused_moe
from moecache.schemas.errors import InvalidInput, NotTuned

# Activations that engines mean as we do; they multiply with a gate unless it is said otherwise.
SAME = ("silu", "gelu", "gelu_tanh", "relu2")


def either(
    name: str, original: Callable[..., Any], ours: Callable[..., Any], theirs: Callable[..., None] | None = None
) -> Callable[..., Any]:
    """The engine's function, with our layer where `ours` gives one. Each reason why not is said once.

    Args:
        name: of the engine.
        ours: called like `original`; returns what that would, or the reason why it cannot, a text; '' for one that
            nobody asks for.
        theirs: called like `original` before it, while an engine's warm-up is yet to come.
    """
    said = {""}

    @functools.wraps(original)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            done = ours(*args, **kwargs)
        except Exception as error:
            done = f"{type(error).__name__}: {error}"
        if not isinstance(done, str):
            return done
        if done not in said:
            said.add(done)
            logger(name).warning("moecache leaves a layer to the engine: %s", done)
        if theirs is not None and warming.watching():
            with suppress(Exception):  # then it is not measured
                theirs(*args, **kwargs)
        return original(*args, **kwargs)

    run.moecache = name  # type: ignore[attr-defined]
    return run


def fused(
    x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, router: torch.Tensor, ids: torch.Tensor, *, on_input: bool,
    layer: Any, out: torch.Tensor | None = None, **how: Any,
) -> torch.Tensor:  # fmt: skip
    """`moecache.fused_moe` of a layer, which is noted while an engine's warm-up is yet to come.

    Raises:
        InvalidInput: weights on the input beside a bias. Engines multiply the bias too, we do not.
    """
    if on_input and how.get("w1_bias") is not None:
        raise InvalidInput("apply_router_weight_on_input with w1_bias, which engines multiply with the weight too")
    try:
        done = fused_moe(x, w1, w2, router, ids, out=out, layer=layer, apply_router_weight_on_input=on_input, **how)
    except NotTuned:
        if warming.watching():
            _note(x, w1, w2, router, ids, on_input=on_input, **how)
        raise
    if warming.watching():  # no server does so once it serves
        _note(x, w1, w2, router, ids, on_input=on_input, **how)
    return done


def _note(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, router: Any, ids: torch.Tensor, **how: Any) -> None:
    call = call_args(x, w1, w2, router, ids, **how)
    problem = FUSED_MOE.problem(call, dispatcher().places.of_tensor(x).device, "")
    warming.saw(problem, w1, (w1, w2, call.w1_bias, call.w2_bias, call.quant), (router.dtype, ids.dtype))
