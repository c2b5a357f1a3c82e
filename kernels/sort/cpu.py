"""MoE sorting in plain torch: the reference, and the CPU's candidates with their search space, limits and costs."""

from collections.abc import Callable
from math import ceil
from typing import Any

import torch

from moecache.kernels.own_mode import computing
from moecache.predict.work import Work
from moecache.schemas.config import Config, config
from moecache.schemas.device import Device
from moecache.schemas.problem import Problem, bucket_index


def pair_experts(args: Any) -> torch.Tensor:
    """Expert of every pair [T·K] int64, −1 where it takes no part: id out of range, masked, token past the limit."""
    ids = args.topk_ids
    experts = args.num_experts
    flat = ids.reshape(-1).to(torch.int64)
    flat = torch.where((flat >= 0) & (flat < experts), flat, -1)
    if args.expert_map is not None and not args.keep_masked:
        local = args.expert_map.to(torch.int64)[flat.clamp_min(0)]
        flat = torch.where((flat >= 0) & (local >= 0) & (local < experts), local, -1)
    if args.num_tokens is not None:
        limit = args.num_tokens.to(torch.int64).clamp_min(0) * ids.shape[1]
        flat = torch.where(torch.arange(flat.numel(), device=flat.device) < limit, flat, -1)
    return flat


def finish(args: Any, expert: torch.Tensor, order: torch.Tensor, counts: torch.Tensor, out: Any) -> Any:
    """All outputs from the stable order: `order` lists the pairs that take part by expert, then by number."""
    block, (tokens, topk) = args.block_m, args.topk_ids.shape
    pad = (topk << 24) | tokens if args.packed else tokens * topk
    padded = (counts + block - 1) // block * block
    ends = torch.cumsum(padded, 0)
    starts = ends - padded
    firsts = torch.cumsum(counts, 0) - counts
    sorted_expert = expert[order]
    rows = starts[sorted_expert] + torch.arange(order.numel(), device=order.device) - firsts[sorted_expert]
    names = ((order % topk) << 24) | (order // topk) if args.packed else order
    out.sorted_token_ids.fill_(pad)
    out.sorted_token_ids[rows] = names.to(torch.int32)
    if out.sorted_weights is not None:
        out.sorted_weights.zero_()
        out.sorted_weights[rows] = args.topk_weights.reshape(-1)[order].to(out.sorted_weights.dtype)
    labels = torch.arange(args.num_experts, device=expert.device)
    if args.expert_map is not None and args.keep_masked:
        labels = args.expert_map.to(torch.int64)
    blocks = torch.repeat_interleave(labels, padded // block)
    out.expert_ids.fill_(-1)
    out.expert_ids[: blocks.numel()] = blocks.to(torch.int32)
    total = int(ends[-1])
    limit = tokens if args.num_tokens is None else min(tokens, max(0, int(args.num_tokens)))
    out.num_tokens_post_padded.copy_(torch.tensor([total, limit], dtype=torch.int32, device=order.device))
    out.expert_offsets[:-1] = starts.to(torch.int32)
    out.expert_offsets[-1] = total
    out.counts.copy_(counts)
    out.tickets.zero_()
    return out


def argsort(args: Any, out: Any, key_dtype: torch.dtype) -> Any:
    """A stable sort of narrow keys; pairs that take no part sort last."""
    experts = args.num_experts
    expert = pair_experts(args)
    keys = torch.where(expert < 0, experts, expert).to(key_dtype)
    order = torch.sort(keys, stable=True).indices
    counts = torch.bincount(expert[expert >= 0], minlength=experts)
    return finish(args, expert, order[: int(counts.sum())], counts, out)


def counting(args: Any, out: Any, chunk: int) -> Any:
    """A counting sort: one-hot prefix sums give the rank within the expert, `chunk` pairs at a time, then a scatter."""
    experts = args.num_experts
    expert = pair_experts(args)
    valid = expert >= 0
    counts = torch.bincount(expert[valid], minlength=experts)
    firsts = torch.cumsum(counts, 0) - counts
    order = torch.empty(int(counts.sum()), dtype=torch.int64, device=expert.device)
    for at in range(0, expert.numel(), chunk):
        part = expert[at : at + chunk]
        keep = part >= 0
        part, pair = part[keep], torch.arange(at, at + part.numel(), device=part.device)[keep]
        onehot = torch.zeros(part.numel(), experts, dtype=torch.int32, device=part.device)
        onehot.scatter_(1, part[:, None], 1)
        rank = torch.cumsum(onehot, 0, dtype=torch.int32).gather(1, part[:, None])[:, 0] - 1
        order[firsts[part] + rank] = pair
        firsts = firsts + onehot.sum(0)
    return finish(args, expert, order, counts, out)


def by_expert(args: Any, out: Any) -> Any:
    """One pass over the pairs for each expert: cheap where experts are few."""
    expert = pair_experts(args)
    parts = [torch.nonzero(expert == e)[:, 0] for e in range(args.num_experts)]
    counts = torch.tensor([p.numel() for p in parts], device=expert.device)
    return finish(args, expert, torch.cat(parts), counts, out)


KEYS = {"int64": torch.int64, "int32": torch.int32, "int16": torch.int16, "uint8": torch.uint8}

VARIANTS: dict[str, Callable[..., Any]] = {
    "argsort": lambda args, out, c: argsort(args, out, KEYS[c["keys"]]),
    "counting": lambda args, out, c: counting(args, out, c["chunk"]),
    "by_expert": lambda args, out, c: by_expert(args, out),
}


@computing
def launch(config: Config, args: Any, out: Any) -> Any:
    """One variant on the CPU; posts the routing bucket of the call."""
    VARIANTS[config.variant](args, out, config)
    out.posted.fill_(bucket_index(out.counts.tolist()))
    return out


def space(problem: Problem) -> list[Config]:
    """Every config; those that do not fit are left out by the op. The first is the default."""
    sorts = [config("argsort", keys=keys) for keys in KEYS]
    counts = [config("counting", chunk=chunk) for chunk in (256, 2048, 16384)]
    return [*sorts, *counts, config("by_expert")]


def fits(problem: Problem, config: Config) -> str:
    """Why not, or ''."""
    if config.variant == "argsort":
        keys = config["keys"]
        if keys not in KEYS:
            return f"keys={keys}; allowed are {', '.join(KEYS)}"
        return (
            "" if problem.experts <= torch.iinfo(KEYS[keys]).max else f"{problem.experts} experts overflow {keys} keys"
        )
    if config.variant == "counting":
        work = config["chunk"] * problem.experts * 4
        return "" if config["chunk"] >= 1 and work <= 1 << 28 else f"one-hot of {work} bytes; allowed are {1 << 28}"
    if config.variant == "by_expert":
        return ""
    return f"variant {config.variant!r} does not run on a CPU; allowed are {', '.join(VARIANTS)}"


def work(problem: Problem, config: Config, device: Device) -> Work:
    """Calls of torch, and elements that they touch."""
    pairs, experts = problem.tokens * problem.topk, problem.experts
    if config.variant == "argsort":
        return Work(launches=30, instructions=4 * pairs * (4 + KEYS[config["keys"]].itemsize))
    if config.variant == "counting":
        return Work(launches=30 + 12 * max(1, ceil(pairs / config["chunk"])), instructions=4 * pairs * experts)
    return Work(launches=30 + 2 * experts, instructions=pairs * experts)
