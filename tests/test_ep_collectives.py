"""Expert parallelism by collectives, and ranks that disagree. Real processes, over gloo."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

pytest.importorskip("triton")

from ranks import ranks


def test_collectives_bring_all_rows_and_the_sums_home() -> None:
    for found in ranks("ep_team:collective", 3):
        assert len(found) == 22 and all(found)


def test_ranks_tune_together_and_take_the_same(tmp_path: Path) -> None:
    found = ranks("ep_team:tuned", 2, FOLDER=str(tmp_path))
    for each in found:
        assert each["before"] == "all_gather" and each["tiers"] == ["measured", "measured"]
        assert each["again"] == each["ways"] and each["error"] < 1e-5
        kind, message = each["refused"]
        assert kind == "InvalidInput" and "7 tokens; allowed are 1 to 6" in message
        kind, message = each["alone"]
        assert kind == "InvalidInput" and "the team has 1 ranks, the context 2" in message
    assert found[0]["ways"] == found[1]["ways"] and set(found[0]["ways"]) <= {"all_gather", "all_to_all"}


def test_ranks_with_other_arguments_all_say_so() -> None:
    for kind, message in ranks("ep_team:different", 2):
        assert kind == "RanksDiffer" and "EpContext" in message and "rank 1: (64, 6, 2" in message
