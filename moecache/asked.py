"""What a miss has to know of the built-in ops: what is checked, and which problem a call asks."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, ClassVar, cast

import torch

from moecache import checks, feedback, routing
from moecache.dispatch import dispatcher
from moecache.dispatch.policy import Ask
from moecache.feedback import FEW_PAIRS
from moecache.kernels.contract import Bound
from moecache.kernels.fused_moe import call as fused
from moecache.kernels.fused_moe.call import LayerCall
from moecache.kernels.fused_moe.op import FUSED_MOE
from moecache.kernels.grouped_gemm import op as grouped
from moecache.kernels.grouped_gemm.op import GROUPED_GEMM
from moecache.kernels.sort.op import SORT, check
from moecache.schemas.config import Alternatives, Config
from moecache.schemas.problem import token_bucket


@dataclass(frozen=True)
class PublicOp:
    """A built-in op, as `serve` asks it.

    Attributes:
        op: SORT, FUSED_MOE or GROUPED_GEMM.
        arguments: raises for arguments that no kernel may see.
        values: raises for what tensors of them hold, of which it waits.
        at: reads a tensor on the device of a call.
        choices: gives the routing to tune on, [T, k], from a call, without waiting.
        experts: those that it may name.
    """

    op: Any
    arguments: Callable[[Any], None]
    values: Callable[[Any], None]
    at: Callable[[Any], torch.Tensor]
    choices: Callable[[Any], torch.Tensor]
    experts: Callable[[Any], int]
    lost: ClassVar[bool] = False

    def check(self, call: Any, variant: str) -> None:
        """Types, shapes, and values where they may be read: in mode=tune, and with the setting debug."""
        checks.types(type(call), {f.name: getattr(call, f.name) for f in fields(call) if f.name != "starts"})
        checks.types(PublicOp.check, {"variant": variant})
        self.arguments(call)
        if _reads() and not dispatcher().places.of_tensor(self.at(call)).capturing():
            self.values(call)

    def question(self, call: Any, posted: int) -> Ask:
        """With the posted routing, else the exact one if it may be read, else for any."""
        active = dispatcher()
        where = active.places.of_tensor(self.at(call))
        may_read = active.settings.mode == "tune" and not where.capturing()
        ids, bucket = self.choices(call) if may_read else None, ""
        if posted >= 0:
            bucket = routing.bucket_name(posted)
        elif posted == feedback.UNKNOWN and ids is not None:
            ids = ids.cpu()  # to count them there a GPU would load kernels, and more for what tuning asks of them
            bucket = routing.bucket(routing.histogram(ids, self.experts(call)))
        return Ask(self.op, self.op.problem(call, where.device, bucket), where, topk_ids=ids)

    def bind(self, what: Config | Alternatives, call: Any, out: Any) -> Bound:
        """What runs a config for calls like this one."""
        return cast(Bound, self.op.bind(what, call, out))

    def again(self, what: Config | Alternatives, call: Any, out: Any) -> Any:
        """The call with another config, into the same output."""
        return self.op.bind(what, call, out)(call, out)


def check_on_cpu(values: Callable[[Any], None], of: torch.Tensor, call: Any) -> None:
    """Values of a tensor on the CPU, where nothing waits, in every call: each may bring others."""
    if not of.is_cuda and _reads():
        values(call)


def _reads() -> bool:
    """Whether what tensors hold is checked at all."""
    settings = dispatcher().settings
    return settings.mode == "tune" or settings.debug


def _fused_choices(call: LayerCall) -> torch.Tensor:
    """The call's own routing; evenly drawn experts for few pairs: theirs, of a dry run say, must not decide for all
    that follow."""
    (tokens, topk), experts = call.topk_ids.shape, len(call.w1)
    if tokens * topk > FEW_PAIRS or topk > experts:
        return FUSED_MOE.choices(call)
    return routing.draw("uniform", token_bucket(tokens), experts, topk).to(call.topk_ids.device)


SORTED = PublicOp(SORT, check, checks.routed, attrgetter("topk_ids"), attrgetter("topk_ids"), attrgetter("num_experts"))
FUSED = PublicOp(
    FUSED_MOE, fused.check, checks.routed, attrgetter("hidden_states"), _fused_choices, lambda call: len(call.w1)
)
GROUPED = PublicOp(
    GROUPED_GEMM, grouped.check, checks.grouped, attrgetter("a"), GROUPED_GEMM.choices, lambda call: len(call.b)
)
