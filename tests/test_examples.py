"""Every example runs as its docstring says, in a process of its own, and does what it is there to show."""

import os
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

import programs

from moecache.store import Store

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("0*.py"))


def run(example: str, db: Path, *arguments: str, **environ: str) -> str:
    """What it prints."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MOECACHE_")}
    env = kept | {"MOECACHE_DB": str(db), "PYTHONPATH": str(ROOT)} | environ
    done = programs.run(f"examples/{example}", *arguments, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_wrapped_triton_kernel_is_tuned_once_and_reused(tmp_path: Path) -> None:
    pytest.importorskip("numpy")  # the interpreter of Triton
    db, environ = tmp_path / "c.sqlite", {"TRITON_INTERPRET": "1", "MOECACHE_BUDGET": "120s"}
    first = run("01_wrap_a_triton_kernel.py", db, **environ)
    assert "op=silu_and_mul" in first and "measured: silu_and_mul(BLOCK=" in first
    store = Store.open(db, readonly=True)
    rows = store.timings()
    (winner,) = store.winners()
    store.close()
    assert {row.config["BLOCK"] for row in rows} == {128, 512, 2048} and {row.status for row in rows} == {"ok"}
    assert winner.config["BLOCK"] > 128 and (winner.margin or 0) > 0.5  # fewer programs are interpreted faster
    assert run("01_wrap_a_triton_kernel.py", db, **environ) == first  # the same figures: nothing was measured


def test_the_wrapping_takes_less_than_thirty_lines() -> None:
    text = (ROOT / "examples" / "01_wrap_a_triton_kernel.py").read_text()
    wrapping = text.split("# --- the wrapping ---")[1].split("if __name__")[0]
    assert 5 < len([line for line in wrapping.splitlines() if line.strip()]) < 30


def test_an_engine_warms_up_then_captures(tmp_path: Path) -> None:
    db = tmp_path / "c.sqlite"
    first = run("02_engine_warmup.py", db)
    assert len(re.findall(r"measured: .* \([1-9]\d* measured now\)", first)) == 6  # int32 and int64 ids
    assert re.search(r"batch 64: 512 pairs in \d+ blocks", first)
    again = run("02_engine_warmup.py", db)
    assert len(re.findall(r"measured: .* \(0 measured now\)", again)) == 6


def test_a_prebuilt_file_is_made_shipped_and_read_back(tmp_path: Path) -> None:
    text = run("03_prebuilt.py", tmp_path / "unused.sqlite", str(tmp_path))
    assert re.search(r"[1-9]\d* timings in qwen3-30b-a3b.sqlite", text)
    assert len(re.findall(r"^tokens=\d+ +int(?:32|64) measured: ", text, re.MULTILINE)) == 4
    assert not (tmp_path / "unused.sqlite").exists()


def test_ranks_read_one_file_and_compare(tmp_path: Path) -> None:
    text = run("04_ranks.py", tmp_path / "c.sqlite", OMP_NUM_THREADS="1")
    said = re.findall(r"rank (\d) of 2: digest (\w{12}), 32 pairs sorted", text)  # perhaps on one line
    assert {rank for rank, _ in said} == {"0", "1"} and len({digest for _, digest in said}) == 1


def test_every_example_is_tested_here() -> None:
    here = Path(__file__).read_text()
    assert len(EXAMPLES) >= 3 and all(example.name in here for example in EXAMPLES)
