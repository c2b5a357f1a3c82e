"""A few of many cases that each take seconds: others with every change of the kernels, all of them with SWEEP=1."""

import hashlib
import os
import random
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
NO_FNUZ = "Triton 3.6 fails an assertion of its own where it turns float32 into the fp8 of gfx942, in some layouts"
KERNELS = Path(__file__).parents[2] / "kernels"


def drawn(cases: Sequence[T], count: int) -> list[T]:
    """`count` of the cases, the same ones as long as the kernels are the same."""
    if os.environ.get("SWEEP"):
        return list(cases)
    return random.Random(kernels()).sample(list(cases), min(count, len(cases)))


def in_turn(cases: Sequence[T], number: int, count: int) -> list[T]:
    """`count` of the cases, others for every number."""
    if os.environ.get("SWEEP"):
        return list(cases)
    first = int(kernels()[:8], 16) + number * count
    return [cases[(first + i) % len(cases)] for i in range(min(count, len(cases)))]


def fnuz_fails(arch: str) -> bool:
    """Whether some fp8 kernels do not compile for this architecture: see NO_FNUZ."""
    return arch == "gfx942" and version("triton").startswith("3.6.")


@cache
def kernels() -> str:
    """A digest of the text of all kernels."""
    digest = hashlib.sha256()
    for file in sorted(KERNELS.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
