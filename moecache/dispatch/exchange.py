"""How ranks exchange tokens, as it is tuned and remembered: all ranks measure together, and all take what rank 0 has
chosen."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from moecache.dispatch import dispatcher
from moecache.kernels import registry
from moecache.kernels.ep.context import EpContext
from moecache.kernels.ep.exchange import CombineConfig, DispatchConfig
from moecache.kernels.ep.op import EXCHANGE, Exchange, ways
from moecache.schemas.config import Config
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import Problem, token_bucket
from moecache.schemas.timing import Choice

registry.register(EXCHANGE)
SECONDS = 20.0  # of one problem


def tune(ctx: EpContext, tokens: Sequence[int], seconds: float = SECONDS) -> list[Choice]:
    """Measure how to exchange so many tokens a rank, store it, and serve it from here on.

    All ranks of the context call this together, within `moecache.using(team=ctx.team)`.

    Args:
        ctx: the ranks.
        tokens: the most tokens of a rank, 1 to the context's max_tokens_per_rank; each stands for its bucket.
        seconds: for each of them.

    Raises:
        InvalidInput: see `Dispatcher.measure`; not within `using(team=ctx.team)`.
        TeamLost: a rank died, hangs or left.
    """
    serving, op = dispatcher(), Exchange(ctx)
    if serving.team.size != ctx.world:
        raise InvalidInput(f"the team has {serving.team.size} ranks, the context {ctx.world}: use using(team=ctx.team)")
    found = []
    for each in tokens:
        serving.measure(op, asked := problem(ctx, each), seconds=seconds)
        found.append(serving.peek(op, asked))
    ctx.chosen.clear()
    return found


def chosen(ctx: EpContext, capacity: int) -> tuple[DispatchConfig, CombineConfig]:
    """How to exchange so many tokens a rank: what rank 0 has measured or takes for best. The first call for a token
    bucket waits for the other ranks, which all make it."""
    bucket = token_bucket(capacity)
    if bucket not in ctx.chosen:
        own = dispatcher().choose(Exchange(ctx), problem(ctx, capacity)).config if ctx.rank == 0 else None
        agreed = ctx.team.broadcast(f"how to exchange {bucket} tokens", own and own.model_dump(mode="json"))
        ctx.chosen[bucket] = ways(Config.model_validate(agreed))
    found: tuple[DispatchConfig, CombineConfig] = ctx.chosen[bucket]
    return found


@contextmanager
def offered(ctx: EpContext) -> Iterator[None]:
    """Within the block a warm-up can measure problems of this context."""
    registry.register(Exchange(ctx))
    try:
        yield
    finally:
        registry.register(EXCHANGE)


def problem(ctx: EpContext, capacity: int) -> Problem:
    """The tuning question of so many tokens a rank: what all ranks know."""
    if not 1 <= capacity <= ctx.max_tokens:
        raise InvalidInput(f"{capacity} tokens; allowed are 1 to {ctx.max_tokens}, as the context has room for")
    return Exchange(ctx).question(dispatcher().places.of_tensor(ctx.error).device, capacity)
