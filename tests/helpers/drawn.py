"""A few of many cases that each compile for seconds: others with every commit, all of them with SWEEP=1."""

import os
import random
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def drawn(cases: Sequence[T], count: int) -> list[T]:
    """`count` of the cases, the same ones as long as the commit is the same."""
    if os.environ.get("SWEEP"):
        return list(cases)
    return random.Random(commit()).sample(list(cases), min(count, len(cases)))


@cache
def commit() -> str:
    """'' where there is no git."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.check_output(command, cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return ""
