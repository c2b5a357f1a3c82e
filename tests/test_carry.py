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
OLD, THIRD = "0" * 12, "1" * 12  # stands for the source of the old tree; a source that neither tree has


def timing(which, tokens, source, version=triton.__version__):
    asked = Problem(op="moe_sort", vendor="nvidia", arch="sm_90", units=132, tokens=tokens, experts=8, topk=2,
                    dims=(("block_m", 16),), source=source)  # fmt: skip
    where = Environment(device_name=f"{DEVICE.name} 80GB HBM3", triton=version)
    return Timing(problem=asked, config=which, environment=where, median_us=2.0 + tokens, mad_us=0.1, n=9)


def kept(folder, before, after, timings):
    """Timings that are carried after `before` of the sort's kernels was edited to `after`."""
    for room in ("moecache", "backends", "kernels", "schemas"):
        shutil.copytree(ROOT / room, folder / "old" / room, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    kernels = folder / "old" / "kernels" / "sort_triton.py"
    assert before in kernels.read_text()
    kernels.write_text(kernels.read_text().replace(before, after))
    old = ops.source_hash(*(str(kernels.with_name(file)) for file in sort.FILES))
    for number, each in enumerate(timings):
        if each.problem.source == OLD:
            timings[number] = timing(each.config, each.problem.tokens, old)
    with Store.open(folder / "in.sqlite") as store:
        store.put(timings)
    carry.main([str(folder / "old"), str(folder / "in.sqlite"), str(folder / "out.sqlite"), "--jobs", "1"])
    with Store.open(folder / "out.sqlite", readonly=True) as store:
        return {(t.problem.tokens, t.config.variant, t.median_us, t.problem.source) for t in store.timings()}


def test_what_runs_the_same_is_carried_over(tmp_path, capsys):
    """A comment is added to the kernels; what was timed from the present source needs no look."""
    now, both = ops.get("moe_sort").source, [timing(FEW, 8, OLD), timing(MANY, 64, OLD)]
    found = kept(tmp_path, "def count(", "# counted otherwise\ndef count(", [*both, timing(FEW, 32, now)])
    assert found == {(8, "oneshot", 10.0, now), (64, "multiphase", 66.0, now), (32, "oneshot", 34.0, now)}
    assert "3 timings of 3 problems" in capsys.readouterr().out


def test_other_machine_code_is_left_out(tmp_path, capsys):
    """Also what else was timed for a problem of which one config changed: a rest would look measured. And what a third
    tree measured, though its kernels look the same in the two."""
    now = ops.get("moe_sort").source
    timings = [timing(FEW, 8, OLD), timing(FEW, 64, OLD), timing(MANY, 64, OLD), timing(FEW, 32, THIRD)]
    found = kept(tmp_path, "+ expert, counts, mask=expert < E)", "+ expert, counts + 1, mask=expert < E)", timings)
    assert found == {(8, "oneshot", 10.0, now)}
    said = capsys.readouterr().out
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
