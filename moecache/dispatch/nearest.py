"""Compares problems: which fields differ, and how near a stored problem is to the one that was asked."""

import math
import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from moecache.schemas.problem import Problem

# A neighbour's size may differ by this factor. vLLM's nearest-M table has no limit: 2.35 % slower prefill.
BOUND = 4


class Difference(NamedTuple):
    """One field of the key that differs; '' is a field at its default."""

    field: str
    asked: str
    stored: str

    def __str__(self) -> str:
        return f"{self.field}={self.stored or 'default'} (asked {self.asked or 'default'})"


class Distance(NamedTuple):
    """Smaller is nearer: tokens change a winner least, then routing, then dimensions and device size."""

    others: int
    routing: int
    tokens: float


def fields(problem: Problem) -> dict[str, str]:
    """The fields of the key as text, in the key's order."""
    return dict(part.split("=", 1) for part in problem.key.split(" "))


def differences(asked: Problem, stored: Problem) -> list[Difference]:
    """Every field that differs, in the key's order."""
    a, b = fields(asked), fields(stored)
    dims = sorted(name for name in a | b if name.startswith("dims."))
    order = [*(name for name in Problem.model_fields if name != "dims"), *dims]
    return [Difference(f, a.get(f, ""), b.get(f, "")) for f in order if a.get(f) != b.get(f)]


def free_fields(soft_dims: Collection[str]) -> frozenset[str]:
    """The fields of a key in which a neighbour may differ."""
    return frozenset(("tokens", "routing", "units", *(f"dims.{name}" for name in soft_dims)))


def distance(asked: Problem, stored: Problem, soft_dims: Collection[str] = ()) -> Distance | None:
    """How near `stored` is, None when its winner says nothing about `asked`.

    Only tokens, routing, units and the op's `soft_dims` may differ, a number by at most the factor BOUND.
    """
    free, found = free_fields(soft_dims), differences(asked, stored)
    if not all(each.field in free and _bounded(each.asked, each.stored) for each in found):
        return None
    others = sum(each.field not in ("tokens", "routing") for each in found)
    tokens = abs(math.log2(asked.tokens / stored.tokens)) if asked.tokens and stored.tokens else 0.0
    return Distance(others, routing_distance(asked.routing, stored.routing), tokens)


def routing_distance(a: str, b: str) -> int:
    """Levels between two routing buckets (`a1e2`); unknown routing counts as balanced."""
    if a == b:
        return 0
    levels = [[int(n) for n in re.findall(r"\d+", bucket)] or [0, 0] for bucket in (a, b)]
    return sum(abs(x - y) for x, y in zip(*levels, strict=False)) or 1


def closest(asked: Problem, stored: Iterable[Problem]) -> tuple[Problem, list[Difference]] | None:
    """The stored problem with the fewest differing fields, to explain a miss; None if nothing is stored."""
    pairs = [(p, differences(asked, p)) for p in stored]
    if not pairs:
        return None

    def far(pair: tuple[Problem, list[Difference]]) -> tuple[int, float, str]:
        stored, differ = pair
        return len(differ), abs(math.log2(max(asked.tokens, 1) / max(stored.tokens, 1))), stored.key

    return min(pairs, key=far)


def _bounded(a: str, b: str) -> bool:
    if not (a.isdecimal() and b.isdecimal()):
        return True
    low, high = sorted((int(a), int(b)))
    return high <= low * BOUND
