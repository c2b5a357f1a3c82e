"""The routing in which a question is tuned: that of its call where it can be used, else a drawn one."""

from dataclasses import replace

import torch

from moecache import routing
from moecache.dispatch.policy import Ask
from moecache.kernels.own_mode import own_mode


def in_its_routing(ask: Ask) -> Ask:
    """The question in the routing bucket of its call, where it leaves the routing open."""
    if ask.problem.routing or ask.topk_ids is None:
        return ask
    bucket = routing.bucket(routing.histogram(ask.topk_ids, ask.problem.experts))
    return replace(ask, problem=ask.problem.model_copy(update={"routing": bucket}))


@own_mode()
def routing_to_tune(ask: Ask) -> torch.Tensor:
    """topk_ids [tokens, topk] on the problem's device, in its routing bucket.

    The caller's own routing where it is of that size and bucket; else drawn from the problem's bucket, or, if
    the problem names none, from the bucket of the caller's routing.
    """
    problem, bucket = ask.problem, ask.problem.routing
    given = ask.topk_ids
    if given is not None and given.dim() == 2:
        seen = routing.bucket(routing.histogram(given, problem.experts))
        bucket = bucket or seen
        if bucket == seen and tuple(given.shape) == (problem.tokens, problem.topk):
            return given.detach().clone().to(ask.place.torch_device)
    if problem.topk > problem.experts:  # no draw gives distinct experts then: the caller's rows over again
        rows = given if given is not None and len(given) else torch.zeros(1, problem.topk, dtype=torch.int32)
        return rows[torch.arange(problem.tokens) % len(rows)].to(ask.place.torch_device)
    bucket = bucket or routing.NAMES[0]
    drawn = routing.draw_bucket(bucket, problem.tokens, problem.experts, problem.topk)
    return drawn.to(ask.place.torch_device)
