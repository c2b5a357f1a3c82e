"""Expert parallelism by collectives, and ranks that disagree. Real processes, over gloo."""

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

pytest.importorskip("triton")

import programs
from ranks import ROOT, ranks

from moecache.store import Store


@pytest.mark.parametrize("size", [4, 6, 8])
def test_collectives_bring_all_rows_and_the_sums_home(size: int) -> None:
    """Also where ranks have no tokens, and where they do not divide the experts: 22 and 21 of 128 on 6."""
    for found in ranks("ep_team:collective", size):
        assert len(found) == 4 + 6 * size and all(found)


MODEL = "experts=127,topk=2,hidden=64,intermediate=32 --op ep_exchange --tokens 4 --budget 10s --json"


def test_a_warm_up_starts_its_ranks_as_torchrun_would(tmp_path: Path) -> None:
    """Which do not divide the experts. Then one that another launcher has started among too many."""
    db, program = tmp_path / "one.sqlite", str(ROOT / "moecache" / "__main__.py")
    arguments = [program, "warm", *MODEL.split(), "--ep", "2", "--db", str(db)]
    done = programs.run(*arguments, cwd=ROOT)
    (row,) = json.loads(done.stdout)
    assert row["tier"] == "measured" and row["measured"] == 2 and done.returncode == 0, done.stderr
    with Store.open(db, readonly=True) as store:
        (problem,) = {timing.problem for timing in store.timings()}
    assert (problem.op, problem.experts, problem.topk, problem.tokens, problem.routing) == (
        "ep_exchange",
        127,
        2,
        4,
        "",
    )
    assert dict(problem.dims) == {"hidden": 64, "links": "cpu", "wire": "same", "world": 2}
    env = os.environ | {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost"}
    done = programs.run(*arguments, cwd=ROOT, env=env)
    assert done.returncode == 1 and "--ep 2, but WORLD_SIZE=3" in done.stderr


def test_ranks_tune_together_and_take_the_same(tmp_path: Path) -> None:
    found = ranks("ep_team:tuned", 2, FOLDER=str(tmp_path))
    for each in found:
        assert each["before"] == "all_gather" and each["tiers"] == ["measured", "measured"]
        assert each["again"] == each["ways"] and max(each["error"], *each["replicas"]) < 1e-5
        kind, message = each["refused"]
        assert kind == "InvalidInput" and "7 tokens; allowed are 1 to 6" in message
        kind, message = each["alone"]
        assert kind == "InvalidInput" and "the team has 1 ranks, the context 2" in message
    assert found[0]["ways"] == found[1]["ways"] and set(found[0]["ways"]) <= {"all_gather", "all_to_all"}


def test_ranks_with_other_arguments_all_say_so() -> None:
    for kind, message in ranks("ep_team:different", 2):
        assert kind == "RanksDiffer" and "EpContext" in message and "rank 1: (64, 6, 2" in message
