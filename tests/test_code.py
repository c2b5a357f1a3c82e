"""The code that a config runs, as a hash: what counts, what does not, and what becomes of timings when it changes."""

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moecache.dispatch import using
from moecache.kernels import code
from moecache.kernels.sort.op import SORT
from moecache.schemas.config import config
from moecache.schemas.device import by_arch
from moecache.schemas.layer import Layer
from moecache.schemas.timing import Environment, Timing
from moecache.store import Store, Tiers
from moecache.warmup import problems, warmup

ROOT = Path(__file__).parent.parent
HERE = Environment(device_name="x")
Edit = Callable[[str, str, str], set[tuple[str, str]]]


@pytest.fixture
def edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Edit]:
    """A function that edits a file of a copy of the kernels and says which (op, variant) have another code then."""
    for room in ("kernels", "schemas"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))

    def forget() -> None:
        for cached in (code._code, code._defined, code._module):
            cached.cache_clear()

    def codes() -> dict[tuple[str, str], str]:
        forget()
        return {(op, variant): code.code_of(op, variant) for op, runs in code.RUNS.items() for variant in runs}

    def change(file: str, old: str, new: str) -> set[tuple[str, str]]:
        before, path = codes(), tmp_path / file
        text = path.read_text()
        assert text.count(old) >= 1, f"{file} no longer has {old!r}"
        path.write_text(text.replace(old, new, 1))
        after = codes()
        return {each for each in after if after[each] != before[each]}

    monkeypatch.setattr(code, "__file__", str(tmp_path / "kernels" / "code.py"))
    yield change
    forget()


def test_what_a_kernel_calls_and_its_constants_count() -> None:
    reached = code.reached("fused_moe", "ring")
    for each in ("gemm.ring:_multiply", "gemm.ring:tile_of", "agreed:RING_BOX", "sort.kernels:_handshake"):
        assert f"moecache.kernels.{each}" in reached
    assert "moecache.schemas.problem:ACTIVE_LEVELS" in reached
    assert not any("fp8" in each or "decode" in each or ":check" in each for each in reached)


def test_an_edit_of_one_kernel_retires_what_runs_it_alone(
    edited: Edit,
) -> None:
    assert edited("kernels/gemm/vector.py", "tl.sum(", "1.0 * tl.sum(") == {("fused_moe", "decode")}
    assert edited("kernels/sort/cpu.py", "def argsort(", "STEP = 1\n\n\ndef argsort(") == set()
    assert edited("kernels/sort/cpu.py", "torch.cumsum(", "1 * torch.cumsum(") == {("moe_sort", "")}
    changed = edited("kernels/agreed.py", "RING_BOX = 64", "RING_BOX = 32")
    assert {variant for _, variant in changed} == {"ring", "tiles_ring"} and len(changed) == 3


def test_comments_docstrings_layout_and_checks_count_for_nothing(
    edited: Edit,
) -> None:
    assert edited("kernels/gemm/tile.py", "\n@triton.jit\ndef _dot(", "\n# why\n@triton.jit\ndef _dot(") == set()
    assert edited("kernels/gemm/tile.py", "def _dot(a, w, acc,", "def _dot(\n    a,\n    w, acc,") == set()
    assert (
        edited(
            "kernels/gemm/tile.py",
            "def tile_of(tile,",
            "def unused():\n    pass\n\n\n@triton.jit\ndef tile_of(tile,",
        )
        == set()
    )
    assert edited("kernels/fused_moe/call.py", "allowed is one", "allowed is one device") == set()


def test_a_definition_that_moves_to_another_file_stays_the_same(edited: Edit, tmp_path: Path) -> None:
    (tmp_path / "kernels" / "elsewhere.py").write_text("RING_BOX = 64\n")
    assert (
        edited(
            "kernels/gemm/ring.py",
            "from moecache.kernels import activations, agreed",
            "from moecache.kernels import activations, elsewhere as agreed",
        )
        == set()
    )


def stored(us: float, name: str, told: str) -> Timing:
    problem = SORT.problems(Layer(model="", experts=8, global_experts=8, topk=2, hidden=64, intermediate=32), [16],
                            by_arch("gfx942"))[0]  # fmt: skip
    return Timing(problem=problem, config=config(name), environment=HERE, median_us=us, mad_us=0.01, n=9, code=told)


def test_timings_of_other_code_decide_nothing_and_are_kept() -> None:
    fresh = code.code_of("moe_sort", "multiphase")
    with Store.memory() as store:
        store.put([stored(5.0, "oneshot", "0123456789ab"), stored(9.0, "multiphase", fresh)])
        (winner,) = store.winners()
        assert winner.config.variant == "multiphase" and winner.candidates == 1
        assert len(store.timings()) == 2 and [t.config.variant for t in store.timings(today=True)] == ["multiphase"]
        assert store.stale(HERE) == [(winner.problem.key, "oneshot()")]
        assert Tiers(store, []).unfinished(HERE) == {winner.problem.key: {"oneshot()"}}
        assert store.prune() == 1
        store.put([stored(5.0, "oneshot", code.code_of("moe_sort", "oneshot"))])
        assert store.winners()[0].config.variant == "oneshot" and not store.stale(HERE)


def test_what_is_measured_says_what_it_ran_and_is_measured_again_when_that_changes(tmp_path: Path) -> None:
    layer = Layer(model="", experts=8, global_experts=8, topk=2, hidden=64, intermediate=32)
    ask = {"tokens": [16], "routing": ["uniform"], "ops": ["moe_sort"]}
    with using(db=tmp_path / "x.sqlite", mode="tune"):
        warmup(layer, **ask)
        (first, *_) = problems(layer, **ask)
        assert first.source == "" and not any(row.measured for row in warmup(layer, **ask))
    with Store.open(tmp_path / "x.sqlite") as store:
        rows = store.timings()
        assert {row.code for row in rows} == {code.code_of("moe_sort", row.config.variant) for row in rows} != {""}
    with sqlite3.connect(tmp_path / "x.sqlite") as other:
        other.execute("UPDATE timing SET code = '0123456789ab'")
    with Store.open(tmp_path / "x.sqlite") as store:
        assert store.winners() == []
    with using(db=tmp_path / "x.sqlite", mode="tune"):
        assert any(row.measured for row in warmup(layer, **ask))
    with Store.open(tmp_path / "x.sqlite") as store:
        assert store.winners() and len(store.timings()) == 2 * len(store.timings(today=True))


@pytest.mark.parametrize("told", ["", code.code_of("fused_moe", "decode"), "x'ff'", "12"])
def test_what_does_not_say_that_it_ran_the_code_of_today_decides_nothing(told: str, tmp_path: Path) -> None:
    """A file that something else wrote, an export from which an older version dropped the field."""
    with Store.open(tmp_path / "x.sqlite") as store:
        store.put([stored(5.0, "oneshot", "")])
    with sqlite3.connect(tmp_path / "x.sqlite") as other:
        value = told if told in ("x'ff'", "12") else repr(told)
        other.execute(f"UPDATE timing SET code = {value}")
    with Store.open(tmp_path / "x.sqlite") as store:
        assert not store.winners() and not store.timings(today=True) and len(store.stale(HERE)) == 1
        assert store.prune() == 1 and not store.timings()


def test_versions_that_share_a_file_keep_their_timings() -> None:
    fresh = stored(5.0, "oneshot", code.code_of("moe_sort", "oneshot"))
    good = fresh.model_copy(update={"measured_at": "2026-01-01T00:00:00+00:00"})
    later = stored(7.0, "oneshot", "0123456789ab").model_copy(update={"measured_at": "2026-01-02T00:00:00+00:00"})
    with Store.memory() as mine, Store.memory() as other:
        mine.put([good])
        other.put([later])
        assert mine.merge(other) == 1 and len(mine.timings()) == 2 and mine.timings(today=True) == [good]
        assert other.merge(mine) == 1 and other.winners()[0].median_us == 5.0 and not other.stale(HERE)
        other.put([good.model_copy(update={"median_us": 6.0, "measured_at": "2026-01-03T00:00:00+00:00"})])
        assert other.merge(mine) == 0 and mine.merge(other) == 1 and mine.winners()[0].median_us == 6.0
