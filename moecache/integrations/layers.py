"""`moecache.fused_moe` in the place of an engine's function of a whole layer, for the layers that it can run."""

import functools
from collections.abc import Callable
from typing import Any

from moecache.integrations.kernel import logger

# Activations that engines mean as we do; they multiply with a gate unless it is said otherwise.
SAME = ("silu", "gelu", "gelu_tanh", "relu2")


def either(name: str, original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """The engine's function, with our layer where `ours` gives one. Each reason why not is said once.

    Args:
        name: of the engine.
        ours: called like `original`; returns what that would, or the reason why it cannot, a text.
    """
    said: set[str] = set()

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
        return original(*args, **kwargs)

    run.moecache = name  # type: ignore[attr-defined]
    return run
