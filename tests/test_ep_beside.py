"""What other libraries are asked to do beside ours: the checks of benchmarks/ep_peers.py tell right from wrong."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "helpers"))
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

pytest.importorskip("triton")

import ep_beside
import ep_peers
import ep_tables
import torch.distributed as dist
from ep_peers import Gathered, Ours, Peer, Rows, verified
from ranks import ranks
from record import RESULTS, named

from moecache.kernels.ep.context import EpContext
from moecache.kernels.ep.exchange import CombineConfig, DispatchConfig
from moecache.team import Team

TOKENS, HIDDEN, EXPERTS, TOPK = 9, 256, 6, 3


@pytest.fixture
def ctx() -> Iterator[EpContext]:
    """One rank, over gloo."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with EpContext(None, HIDDEN, EXPERTS, TOPK, TOKENS, slots=2, device="cpu", team=Team.of(None)) as made:
        yield made
    dist.destroy_process_group()


def case() -> Any:
    torch.manual_seed(1)
    ids = torch.stack([torch.randperm(EXPERTS)[:TOPK] for _ in range(TOKENS)]).int()
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16)
    return SimpleNamespace(tokens=TOKENS, routing="uniform", x=x, ids=ids, weights=torch.rand(TOKENS, TOPK))


class Turned(Gathered):
    """Gives rows in another order each time, as is allowed."""

    name, calls = "turned", 0

    def dispatch(self) -> None:
        super().dispatch()
        self.calls += 1
        self.order = torch.roll(torch.arange(TOKENS), self.calls)

    def received(self) -> tuple[Rows, torch.Tensor, torch.Tensor]:
        rows, ids, weights = super().received()
        return tuple(each[self.order] for each in rows), ids[self.order], weights[self.order]

    def fill(self, y: torch.Tensor) -> None:
        self.y = torch.empty_like(y)
        self.y[self.order] = y


class Stale(Gathered):
    name = "stale"

    def received(self) -> tuple[Rows, torch.Tensor, torch.Tensor]:
        (rows, *scales), ids, weights = super().received()
        return (rows.roll(1, 0), *scales), ids, weights  # another token's ids and weights


class Short(Gathered):
    name = "short"

    def received(self) -> tuple[Rows, torch.Tensor, torch.Tensor]:
        rows, ids, weights = super().received()
        return tuple(each[1:] for each in rows), ids[1:], weights[1:]


class Doubled(Gathered):
    name = "doubled"

    def combine(self) -> torch.Tensor:
        return super().combine() * 2


class Lazy(Gathered):
    """Sends nothing after the first time."""

    name = "lazy"

    def dispatch(self) -> None:
        if not hasattr(self, "ids"):
            super().dispatch()


class Broken(Gathered):
    name = "broken"

    @classmethod
    def version(cls) -> str:
        raise ImportError("libnone.so")


@pytest.mark.parametrize("wire", ["same", "fp8"])
def test_a_right_peer_is_told_from_wrong_ones(ctx: EpContext, wire: str) -> None:
    drawn = case()
    sent: Rows = (drawn.x,)
    if wire == "fp8":
        sent = (drawn.x.to(torch.float8_e4m3fn).view(torch.uint8), torch.rand(TOKENS, HIDDEN // 128) + 0.5)
    for right in (Gathered, Turned):
        assert verified(right(ctx, drawn, sent))
    for wrong, why in (
        (Stale, "0: other rows"),
        (Short, "0: other rows"),
        (Lazy, "1: other rows"),
        (Doubled, "error 0.9|error 1.0"),
    ):
        with pytest.raises(AssertionError, match=why):
            verified(wrong(ctx, drawn, sent))


def test_one_that_fails_is_left_out_and_the_reason_kept(ctx: EpContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    told: dict[str, str] = {}
    assert not ep_beside.usable(Broken, told) and told == {"broken": "import: ImportError: libnone.so"}
    told["doubled"] = "3.0"
    drawn = case()
    made = Doubled(ctx, drawn, (drawn.x,))
    assert ep_beside.together(Doubled, "T=9", lambda: verified(made), told) is None
    assert told["doubled"].startswith("3.0; T=9: AssertionError: turn 0: error ")


def test_what_fails_on_one_rank_is_left_out_on_all() -> None:
    """And none goes on to a collective that the other does not enter."""
    for right, told in ranks("ep_beside_scenes:left_out", 2):
        assert right == [False, False, True] and told["unmade"] == "made: MemoryError: rank 0 has no room"
        assert told["wrong"].startswith("checked: AssertionError: turn 0: error ") and set(told) == {"unmade", "wrong"}


def test_ours_runs_with_what_was_chosen_for_the_case() -> None:
    found = json.loads((RESULTS / "h200x2" / "ep.json").read_text())["rows"]
    known = {"world": 2, "T": 128, "hidden": 7168, "topk": 8, "E": 256, "routing": "uniform", "wire": "fp8"}
    dispatch, combine = ep_beside.configs_of(known, found)
    (row,) = [r for r in found if r["phase"] == "dispatch" and all(r[key] == value for key, value in known.items())]
    assert dispatch is not None and row["choice"].items() <= vars(dispatch).items()
    assert combine is not None and combine.how in ("pull", "push")
    assert ep_beside.configs_of(known | {"world": 3}, found) == (None, None)


@pytest.mark.parametrize("how", ["pull", "push"])
def test_ours_fills_the_memory_that_its_combine_takes(
    ctx: EpContext, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, chosen = case(), CombineConfig(how, 1, 4, 256)
    monkeypatch.setattr(Ours, "configs", (DispatchConfig("all_gather", 1, 4, 256), chosen))
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(ep_peers, "combine", lambda ctx, y, handle, config: seen.append(y))
    ours = Ours(ctx, drawn, (drawn.x,))
    ours.dispatch()
    ours.fill(drawn.x)
    ours.combine()
    assert torch.equal(seen[0], drawn.x) and (seen[0].data_ptr() == ours.got.sums.data_ptr()) == (how == "pull")


def test_a_peer_is_named_by_its_module_and_class() -> None:
    (found,) = named(["ep_libraries:FlashInfer"], "class")
    assert issubclass(found, Peer) and found.name == "flashinfer"
    with pytest.raises(SystemExit, match="give module:class"):
        named(["ep_libraries"], "class")


def test_the_table_shows_who_was_timed_and_why_others_were_not() -> None:
    row = {"wire": "same", "routing": "uniform", "T": 16, "us": {"ours": 9.04, "b": 30.0}}
    rows = [row | {"dispatch_us": {"ours": 5.0}, "combine_us": {"ours": 5.16}},
            row | {"T": 1, "us": {"ours": 8.0}, "dispatch_us": {}, "combine_us": {}}]  # fmt: skip
    text = ep_tables.beside({"rows": rows, "peers": {"b": "2.1; T=1: AssertionError: error 1.0"}})
    assert "| wire | routing | T | ours | b |" in text
    assert "| same | uniform | 1 | 8.0 | – |\n| same | uniform | 16 | 9.0 (5.0 + 5.2) | 30.0 |" in text
    assert text.endswith("| b | 2.1; T=1: AssertionError: error 1.0 |")
