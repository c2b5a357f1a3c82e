"""Two configs in one captured call: where they serve it, how they are launched, and which is at fault if that fails."""

from collections.abc import Callable
from typing import Any

from moecache.kernels import op as ops
from moecache.kernels.op import Args, Op
from moecache.schemas.config import Alternatives, Config


def launch(op: Op, what: Config | Alternatives, args: Args, out: Any) -> Any:
    """Run a config, or the one of two that owns the call's routing, into `out`; made where it is None."""
    out = op.outputs(args) if out is None else out
    if isinstance(what, Config):
        return op.launch(what, args, out)
    return ops.alternating(op.name).launch(what, args, out)


def at_fault(
    what: Config | Alternatives, error: Exception, run: Callable[[Config], Any]
) -> tuple[Config | Alternatives, Exception]:
    """What raised, and its error: of two configs the one that raises alone too, both if none does."""
    for config in () if isinstance(what, Config) else (what.first, what.second):
        try:
            run(config)
        except Exception as own:
            return config, own
    return what, error
