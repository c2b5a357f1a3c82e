"""Carrying timings over an edit: what runs the same machine code stays, what does not is left to be measured."""

import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import carry
import triton

from moecache.kernels import op as ops
from moecache.kernels import sort
from moecache.schemas.config import config
from moecache.schemas.device import KNOWN
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Environment, Timing
from moecache.store import Store

ROOT = Path(__file__).parent.parent
DEVICE = KNOWN["h100"]
FEW = config("oneshot", {"launch_pdl": 1}, programs=16, step=16, num_warps=4)
MANY = config("multiphase", {"launch_pdl": 1}, chunks=4, block=32, step=32, num_warps=4, scan=0, fused=0)
OLD, THIRD = "0" * 12, "1" * 12  # sources that neither tree has


def timing(which, tokens, source, version=triton.__version__):
    asked = Problem(op="moe_sort", vendor="nvidia", arch="sm_90", units=132, tokens=tokens, experts=8, topk=2,
                    dims=(("block_m", 16),), source=source)  # fmt: skip
    where = Environment(device_name=f"{DEVICE.name} 80GB HBM3", triton=version)
    return Timing(problem=asked, config=which, environment=where, median_us=2.0 + tokens, mad_us=0.1, n=9)


def edited(folder, edits):
    """The old tree: this one before its sort's kernels were edited so. And the source of its sort."""
    for room in ("moecache", "backends", "kernels", "schemas"):
        shutil.copytree(ROOT / room, folder / room, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    kernels = folder / "kernels" / "sort_triton.py"
    for now, before in edits.items():
        assert now in kernels.read_text()
        kernels.write_text(kernels.read_text().replace(now, before))
    return ops.source_hash(*(str(kernels.with_name(file)) for file in sort.FILES))


def test_what_runs_the_same_is_carried_over_and_other_machine_code_left_out(tmp_path, capsys):
    """A comment went, and one kernel of `multiphase` was changed. Left out is also what else was timed for a problem of
    which one config changed: a rest would look measured. And what a third tree measured, though its kernels look the
    same in the two. What was timed from the present source needs no look."""
    stored = "+ expert, counts, mask=expert < E)"
    edits = {"def count(": "# counted otherwise\ndef count(", stored: stored.replace("counts", "counts + 1")}
    now, old = ops.get("moe_sort").source, edited(tmp_path / "old", edits)
    asked = [(FEW, 8, old), (FEW, 64, old), (MANY, 64, old), (FEW, 32, THIRD), (FEW, 16, now)]
    with Store.open(tmp_path / "in.sqlite") as store:
        store.put([timing(*each) for each in asked])
    carry.main([str(tmp_path / "old"), str(tmp_path / "in.sqlite"), str(tmp_path / "out.sqlite"), "--jobs", "1"])
    with Store.open(tmp_path / "out.sqlite", readonly=True) as store:
        found = {(t.problem.tokens, t.config.variant, t.median_us, t.problem.source) for t in store.timings()}
    assert found == {(8, "oneshot", 10.0, now), (16, "oneshot", 18.0, now)}
    said = capsys.readouterr().out
    assert "2 timings of 2 problems" in said
    assert "tokens=64" in said and f"tokens=32 experts=8 topk=2 source={THIRD}" in said


def test_it_says_what_it_wants(tmp_path, capsys):
    with Store.open(tmp_path / "in.sqlite") as store:
        store.put([timing(FEW, 8, OLD)])
    with pytest.raises(SystemExit):
        carry.main([str(ROOT), str(tmp_path / "in.sqlite")])
    assert "OUT.sqlite is missing" in capsys.readouterr().err


def test_another_triton_proves_nothing(tmp_path):
    with Store.open(tmp_path / "in.sqlite") as store:
        store.put([timing(FEW, 8, OLD, "3.5.0")])
    with pytest.raises(SystemExit, match=r"Triton 3\.5\.0; this is"):
        carry.main([str(ROOT), str(tmp_path / "in.sqlite"), str(tmp_path / "out.sqlite")])
