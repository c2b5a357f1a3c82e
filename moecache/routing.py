"""Routing: how the tokens of a call spread over the experts, its bucket, and draws for tuning.

The bucket is two small levels. `a` says which share of the experts that could be active is active, `e` which share is
*effective*, (Σt)² / Σt² (Kish's effective sample size): 0 means more than two thirds, and every further level halves
the share. `a0e0` is balanced routing, `a0e2` has a long tail behind a few hot experts, `a2e3` leaves most experts idle.
"""

import math
from collections.abc import Sequence
from itertools import product

import torch

from moecache.kernels.own_mode import own_mode
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import BUCKETS, bucket_index
from moecache.schemas.problem import bucket_name as bucket_name

NAMES = BUCKETS
MOST = 1 << 30  # tokens · experts of a draw: 4 GiB for each of its steps
ENOUGH = 1 << 20  # tokens · experts from which one draw of each kind is enough
LEAST = 1e-2  # of a Dirichlet distribution: one expert gets nearly all; with less float32 may give none
GENERATORS = "uniform, zipf, hot1 or dirX with X > 1, for example dir2"


def bucket(counts: Sequence[int]) -> str:
    """The routing bucket of per-expert token counts, `a0e0` … `a2e3`."""
    return bucket_name(bucket_index(counts))


@own_mode()
def histogram(topk_ids: torch.Tensor, num_experts: int) -> list[int]:
    """Tokens per expert of topk_ids [T, K], ids outside [0, num_experts) left out. Copies to the host: offline only."""
    flat = topk_ids.reshape(-1).to(torch.int64)
    flat = flat[(flat >= 0) & (flat < num_experts)]
    return torch.bincount(flat, minlength=num_experts).tolist()


@own_mode()
def draw(generator: str, tokens: int, experts: int, topk: int, seed: int = 0) -> torch.Tensor:
    """topk_ids [tokens, topk] int32 on the CPU: expert ids distinct in a row, spread as the generator says.

    Args:
        generator: `uniform`; `zipf` (popularity rank^-1.2 over a random permutation of the experts); `dirX`
            (popularity from a symmetric Dirichlet with experts / X expected effective experts, at least one); `hot1`
            (one expert is every token's first choice, the rest uniform).

    Raises:
        InvalidInput: an unknown generator, more choices than experts, or more to draw than memory holds.
    """
    if tokens * experts > MOST:
        raise InvalidInput(
            f"tokens={tokens} and experts={experts} are too many to draw; tokens · experts is {MOST} at most"
        )
    if not 1 <= topk <= experts:
        raise InvalidInput(f"topk={topk} must lie between 1 and experts={experts} to draw distinct experts")
    rng = torch.Generator().manual_seed(seed)
    log_popularity = _log_popularity(generator, experts, seed, rng)
    even = torch.rand(tokens, experts, generator=rng, dtype=torch.float32)
    gumbel = -torch.log(-torch.log(even.clamp_(1e-12, 1 - 1e-7)))
    scores = gumbel + log_popularity
    if generator == "hot1" and tokens:
        scores[:, int(torch.randint(experts, (1,), generator=rng))] = math.inf
    return torch.topk(scores, topk, dim=1).indices.to(torch.int32)


def _log_popularity(generator: str, experts: int, seed: int, rng: torch.Generator) -> torch.Tensor:
    if generator in ("uniform", "hot1"):
        return torch.zeros(experts, dtype=torch.float32)
    if generator == "zipf":
        rank = (torch.randperm(experts, generator=rng) + 1).float()
        return -1.2 * torch.log(rank)
    if generator.startswith("dir"):
        try:
            spread = float(generator[3:])
        except ValueError:
            spread = 0.0
        if spread > 1:
            effective = experts / spread
            alpha = (effective - 1) / (experts - effective) if effective > 1 else LEAST
            spread_evenly = torch.full((experts,), alpha, dtype=torch.float32)
            # with a generator of its own: torch.distributions would seed those of the caller's GPUs
            popularity = torch._sample_dirichlet(spread_evenly, generator=torch.Generator().manual_seed(seed))
            return torch.log(popularity.clamp_min(1e-12))
    raise InvalidInput(f"{generator!r} is no routing generator; allowed are {GENERATORS}")


def draw_bucket(name: str, tokens: int, experts: int, topk: int, seed: int = 0) -> torch.Tensor:
    """topk_ids whose histogram lies in the routing bucket `name`; the nearest draw found where none does.

    Tries the generators from balanced to skewed, then routing confined to few experts.
    """
    if name not in NAMES:
        raise InvalidInput(f"{name!r} is no routing bucket; allowed are {', '.join(NAMES)}")
    want = NAMES.index(name)
    best: torch.Tensor | None = None
    best_distance = math.inf
    for round_, (generator, subset) in product(range(4), _attempts(experts, topk)):
        if round_ and tokens * experts > ENOUGH:  # a large draw hardly depends on its seed
            break
        ids = _confined(generator, tokens, experts, topk, subset, seed + 7919 * round_)
        have = bucket_index(histogram(ids, experts))
        distance = abs(want // 4 - have // 4) * 4 + abs(want % 4 - have % 4)
        if distance < best_distance:
            best, best_distance = ids, distance
        if distance == 0:
            break
    assert best is not None
    return best


def _attempts(experts: int, topk: int) -> list[tuple[str, int]]:
    """(generator, experts used) pairs to try, in order."""
    spreads = [f"dir{x}" for x in (1.2, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32) if x < experts]
    generators = ["uniform", *spreads, "zipf", "hot1"]
    whole = [(g, experts) for g in generators]
    sizes = sorted({max(topk, experts >> k) for k in range(1, experts.bit_length())}, reverse=True)
    confined = [(g, s) for s in sizes for g in ("uniform", "dir2", "zipf", "hot1") if g != "dir2" or s > 2]
    return [*whole, *confined]


@own_mode()
def _confined(generator: str, tokens: int, experts: int, topk: int, subset: int, seed: int) -> torch.Tensor:
    """A draw that uses only `subset` of the experts, spread over all ids."""
    ids = draw(generator, tokens, subset, topk, seed)
    if subset == experts:
        return ids
    rng = torch.Generator().manual_seed(seed + 1)
    return torch.randperm(experts, generator=rng)[:subset].to(torch.int32)[ids.long()]
