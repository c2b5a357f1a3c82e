"""The page of what kernels need on CDNA: it is of today's kernels, and a sample that changes with the commit holds."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent / "helpers"))

import faulty_op
import tiny_kernels
from drawn import fnuz_fails
from faulty_op import Faulty

from moecache.kernels import code
from moecache.kernels import registry as ops
from moecache.kernels.contract import Source
from moecache.schemas.config import Config, config
from moecache.schemas.device import KNOWN, Device
from moecache.tuning.workers import Workers

ROOT = Path(__file__).parent.parent
SAMPLE, AFTER_CHANGE = 3, 16  # candidates a run compiles: of all ops, and of each op that the page does not know yet


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_cdna", ROOT / "docs" / "make_cdna.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_cdna"] = module  # its dataclasses look it up
    spec.loader.exec_module(module)
    return module


cdna = load()
MI300X, MI355X = KNOWN["mi300x"], KNOWN["mi355x"]


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(2) as pool:
        yield pool


def seed() -> str:
    """The commit, or the kernels where there is no git."""
    try:
        text = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return repr(cdna.present(cdna.gpu_ops()))
    return text.strip()


# --- the real kernels ---


def test_a_sample_of_every_op_compiles_without_spills_and_fits(workers: Workers) -> None:
    known = cdna.recorded(cdna.PAGE.read_text())
    found = cdna.gpu_ops()
    every = {op.name: [job for name in cdna.DEVICES for job in cdna.candidates(op, KNOWN[name])] for op in found}
    jobs = [job for part in every.values() for job in cdna.sample(part, seed(), 1)]  # of each op at least one
    jobs += cdna.sample([job for part in every.values() for job in part], seed(), SAMPLE)
    for op in found:
        if known.get(op.name) != code.whole(op.name):
            jobs += cdna.sample(every[op.name], seed(), AFTER_CHANGE)
    jobs = [job for job in jobs if not (job.problem.dim("quant", "") and fnuz_fails(job.device.arch))]
    kernels, findings = cdna.compiled(jobs, workers)
    assert len(kernels) >= len(found) and not findings, "\n".join(findings)


def test_no_op_with_a_search_space_for_gpus_is_left_out() -> None:
    short = {name: name.removeprefix("moe_") for name in ops.names() if ops.built_in(name)}
    there = {name: [file.stem for file in (ROOT / "kernels" / s).glob("*.py")] for name, s in short.items()}
    wanted = {name for name, found in there.items()
              if any(hasattr(import_module(f"moecache.kernels.{short[name]}.{m}"), "plan") for m in found)}  # fmt: skip
    assert "moe_sort" in wanted and wanted == {op.name for op in cdna.gpu_ops()}


def test_another_commit_means_another_sample() -> None:
    jobs = cdna.candidates(next(op for op in cdna.gpu_ops() if op.name == "moe_sort"), MI300X)
    first, again, other = (cdna.sample(jobs, text, 5) for text in ("a", "a", "b"))
    assert first == again != other and len({id(job) for job in first}) == 5
    assert len(cdna.sample(jobs[:3], "a", 5)) == 3


def test_the_page_has_every_op_on_both_devices() -> None:
    page = cdna.PAGE.read_text()
    for name in cdna.recorded(page):
        for device in (MI300X, MI355X):
            part = page.split(f"### {name} on {device.arch}\n")[1].split("###")[0]
            rows = re.findall(r"^\| \w+: .*\|$", part, re.MULTILINE)
            figures = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
            assert figures and all(len(row) == 9 for row in figures)
            assert all(int(row[5]) <= device.shared_bytes and row[6] == "0" for row in figures)


def test_a_stale_page_is_told_without_compiling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cdna, "Workers", None)
    monkeypatch.setattr(cdna, "PAGE", tmp_path / "cdna.md")
    assert cdna.main(["--check"]) == 1 and "run make cdna" in capsys.readouterr().err
    now = " ".join(f"{name}={source}" for name, source in cdna.present(cdna.gpu_ops()).items())
    cdna.PAGE.write_text(f"<!-- sources: {now} -->")
    assert cdna.main(["--check"]) == 0
    cdna.PAGE.write_text(f"<!-- sources: {now.replace('moe_sort=', 'moe_sort=0')} -->")
    assert cdna.main(["--check"]) == 1 and "moe_sort" in capsys.readouterr().err


# --- how it is counted ---


def job(cfg: Config, device: Device = MI300X) -> Any:
    return cdna.Job(faulty_op.FAULTY, faulty_op.problem(), cfg, device)


def test_equal_kernels_are_compiled_once_and_a_crash_ends_nothing(workers: Workers) -> None:
    small, killer = config("compiles", m=32), config("killer")
    jobs = [job(small), job(killer), job(small), job(small, MI355X)]
    kernels, findings = cdna.compiled(jobs, workers)
    assert len(kernels) == 2 and {k.resources.arch for k in kernels.values()} == {"gfx942", "gfx950"}
    assert len(findings) == 1 and "killer" in findings[0] and "crashed" in findings[0]


def test_an_admitted_candidate_may_not_spill_nor_exceed_the_device(workers: Workers) -> None:
    _, spilling = cdna.compiled([job(config("compiles", m=128, k=128, warps=1), MI355X)], workers)
    assert len(spilling) == 1 and "gfx950" in spilling[0] and "spills" in spilling[0]
    _, large = cdna.compiled([job(config("compiles", m=64, k=1024), MI300X)], workers)
    assert len(large) == 1 and f"gfx942 has {MI300X.shared_bytes} B" in large[0]


def test_instructions_are_counted() -> None:
    signature = {"X": "*fp16", "Y": "*fp32", "M": "constexpr", "K": "constexpr"}
    source = Source(tiny_kernels.square, signature, {"M": 64, "K": 64}, {"num_warps": 4}, ("X", "Y"))
    kernel = cdna.read(source, MI300X)
    text = kernel.resources.text
    assert kernel.mfma == text.count("v_mfma_") > 0
    assert kernel.loads == len(re.findall(r"(?:global|buffer)_load_", text)) > 0
    assert kernel.wide == len(re.findall(r"(?:global|buffer)_load_dwordx4", text)) > 0


def test_a_row_holds_the_most_of_its_family(workers: Workers) -> None:
    jobs = [job(config("compiles", m=16)), job(config("compiles", m=64))]
    kernels, findings = cdna.compiled(jobs, workers)
    assert not findings
    text = cdna.section(Faulty(*(j.config for j in jobs)), MI300X, jobs, kernels)
    row = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
    used = [kernel.resources for kernel in kernels.values()]
    assert row[:3] == ["compiles: square", "2", "2"] and "2 candidates admitted, 0 dropped; 2 different" in text
    assert row[3] == str(max(r.registers for r in used)) and row[5] == str(max(r.shared_bytes for r in used))
    assert row[7] == str(max(k.mfma for k in kernels.values()))
    wide, loads = sum(k.wide for k in kernels.values()), sum(k.loads for k in kernels.values())
    assert row[8] == f"{100 * wide / loads:.0f} %"


class Picky(Faulty):
    """Refuses its configs on a device with limits."""

    def fits(self, problem: Any, config: Config, device: Device) -> str:
        return "" if device.shared_bytes > MI355X.shared_bytes or config.variant == "good" else "too large"

    def space(self, problem: Any, device: Device) -> list[Config]:
        return [c for c in self.configs if not self.fits(problem, c, device)]


def test_dropped_are_those_that_only_a_roomier_device_admits() -> None:
    op = Picky(config("good"), config("fast"), config("slow"))
    problems = len(cdna.problems(op, MI300X))
    assert problems >= 3 and len(cdna.candidates(op, MI300X)) == problems and cdna.dropped(op, MI300X) == 2 * problems
