"""Expert parallelism by collectives, and ranks that disagree. Real processes, over gloo."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

pytest.importorskip("triton")

from ranks import ranks


def test_collectives_bring_all_rows_and_the_sums_home() -> None:
    for found in ranks("ep_team:collective", 3):
        assert len(found) == 14 and all(found)


def test_ranks_with_other_arguments_all_say_so() -> None:
    for kind, message in ranks("ep_team:different", 2):
        assert kind == "RanksDiffer" and "EpContext" in message and "rank 1: (64, 6, 2" in message
