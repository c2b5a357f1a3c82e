"""Workers: every way in which a candidate can end its process, and that nothing of it stays behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent / "helpers"))

import faulty_op
from faulty_op import FAULTY, Faulty

from moecache.kernels import op as ops
from moecache.schemas.config import config
from moecache.schemas.device import KNOWN, Device
from moecache.schemas.errors import InvalidInput, MoecacheError
from moecache.tuning.timing import Failed
from moecache.tuning.trial import Trial, attempt, compare, failure, locate, resolve
from moecache.tuning.workers import Workers

CPU = Device(vendor="cpu", arch="x86_64", name="cpu", units=2)
GPU = KNOWN["mi300x"]  # nothing of it is here, but Triton compiles for it
HERE = {"backend": "cpu"}


def trial(variant: str, device: Device = CPU, backend: str = "cpu", **params: int) -> Trial:
    return Trial(
        op="faulty_op:FAULTY",
        problem=faulty_op.problem(),
        config=config(variant, **params),
        device=device,
        backend=backend,
    )


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch, Workers(2) as pool:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        patch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
        yield pool


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pids(pool: Workers) -> list[int]:
    return [w._process.pid for w in pool._all if w._process is not None]


def test_every_fault_has_its_status_and_good_ones_go_on(workers: Workers) -> None:
    """Faults and good candidates alternate on two workers: each gets its own verdict."""
    expected = {
        "raise": ("raised", "ValueError: cannot do that"), "oom": ("oom", "7 EiB"),
        "allocate": ("oom", "allocate"), "wrong": ("wrong", "error"), "partial": ("wrong", "error nan"),
        "reshape": ("wrong", "cannot be compared"), "segv": ("crashed", "SIGSEGV"),
        "leave": ("crashed", "ended with code 7: LLVM ERROR: Cannot select"),
        "exit": ("raised", "SystemExit: 3"), "print": ("ok", ""),
    }  # fmt: skip
    trials = [t for variant in expected for t in (trial(variant), trial("good"))]
    verdicts = workers.run(trials)
    for (variant, (status, reason)), bad, good in zip(expected.items(), verdicts[::2], verdicts[1::2], strict=True):
        assert bad is not None and good is not None
        assert bad.status == status and reason in bad.reason, (variant, bad)
        assert good.status == "ok", (variant, good)


def test_hang_is_killed_and_its_worker_replaced(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moecache.tuning.workers.CONTEXT_SECONDS", 0.5)
    began = time.perf_counter()
    verdicts = workers.run([trial("hang"), trial("good"), trial("good")], call_seconds=0.5)
    assert [v and v.status for v in verdicts] == ["timeout", "ok", "ok"]
    assert verdicts[0] is not None and "no result after 1 s" in verdicts[0].reason
    assert 1.0 <= time.perf_counter() - began < 30


def test_compilers_that_crash_fail_or_never_end(workers: Workers) -> None:
    trials = [trial(v, GPU, "") for v in ("killer", "broken")] + [trial("compiles", GPU, "", m=32)]
    killer, broken, fine = workers.run(trials)
    (endless,) = workers.run([trial("endless", GPU, "")], compile_seconds=2)
    assert killer is not None and killer.status == "crashed" and "SIGABRT" in killer.reason, killer
    assert broken is not None and broken.status == "compile" and "VALUE is too small" in broken.reason, broken
    assert endless is not None and endless.status == "timeout" and "2 s" in endless.reason, endless
    assert fine is not None and fine.status == "ok" and fine.resources[0].registers >= 16, fine
    assert fine.resources[0].arch == "gfx942" and fine.resources[0].spills == 0 and fine.resources[0].text == ""


def test_what_the_device_cannot_hold_is_refused(workers: Workers) -> None:
    small = GPU.model_copy(update={"shared_bytes": 512})
    (verdict,) = workers.run([trial("compiles", small, "", m=64)])
    assert verdict is not None and verdict.status == "compile" and "B of shared memory" in verdict.reason, verdict


def test_deadline_spares_the_first_two(workers: Workers) -> None:
    verdicts = workers.run([trial("good")] * 5, deadline=time.perf_counter() - 1)
    assert [v and v.status for v in verdicts] == ["ok", "ok", None, None, None]


def test_unknown_op_is_a_verdict_not_a_crash(workers: Workers) -> None:
    (verdict,) = workers.run([trial("good").model_copy(update={"op": "faulty_op:NOTHING"})])
    assert verdict is not None and verdict.status == "raised" and "NOTHING" in verdict.reason


def test_workers_keep_their_process_and_end_with_the_pool() -> None:
    with Workers(1) as pool:
        pool.run([trial("good")])
        (first,) = pids(pool)
        pool.run([trial("good"), trial("wrong"), trial("good")])
        assert pids(pool) == [first], "a CPU fault leaves the worker usable"
        assert alive(first)
    assert not alive(first)
    with pytest.raises(ChildProcessError):  # reaped: no zombie
        os.waitpid(first, os.WNOHANG)


def test_pool_that_nobody_closes_ends_with_its_owner() -> None:
    """Killed parent, forgotten pool: the worker sees the end of its stdin and goes, though a call hangs."""
    code = (
        "import sys, os, signal, threading, time\n"
        "sys.path[:0] = sys.argv[1:]\n"
        "from test_trial import Workers, trial, pids\n"
        "pool = Workers(1); pool.run([trial('good')])\n"
        "threading.Thread(target=pool.run, args=([trial('hang')],), daemon=True).start(); time.sleep(1)\n"
        "print(*pids(pool), flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", code, str(here), str(here.parent)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    assert run.returncode == -signal.SIGKILL
    orphan = int(run.stdout)
    end = time.monotonic() + 10
    while alive(orphan) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(orphan)


def test_forked_child_leaves_its_parents_workers_alone() -> None:
    with Workers(1) as pool:
        pool.run([trial("good")])
        (worker,) = pids(pool)
        child = os.fork()
        if not child:
            pool._finalizer()
            os._exit(0)
        os.waitpid(child, 0)
        assert alive(worker)
        assert [v and v.status for v in pool.run([trial("good")])] == ["ok"]


def test_worker_that_cannot_start_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('this torch is broken')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with Workers(1) as pool, pytest.raises(MoecacheError, match=r"ended with code 1.*this torch is broken"):
        pool.run([trial("good")])


def test_idle_workers_use_no_processor_time(workers: Workers) -> None:
    workers.run([trial("good")] * 2)

    def ticks() -> list[int]:
        stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids(workers)]
        return [int(s[11]) + int(s[12]) for s in stats]

    before = ticks()
    time.sleep(0.5)
    assert ticks() == before


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("x"), "oom"), (MemoryError(), "oom"),
        (RuntimeError("can't allocate memory"), "oom"), (ValueError("a\n\n b"), "raised"),
        (Failed("wrong", "kept"), "wrong"),
    ],
)  # fmt: skip
def test_failure_names_what_happened(error: Exception, status: str) -> None:
    assert failure(error).status == status
    assert "\n" not in failure(error).reason


def test_triton_errors_are_compile_errors() -> None:
    from triton.runtime.errors import OutOfResources

    assert failure(OutOfResources(70000, 65536, "shared memory")).status == "compile"


def test_compare_accepts_the_tolerance_and_no_more() -> None:
    op, p, want = Faulty(), faulty_op.problem(), torch.ones(4)
    assert compare(op, p, want * (1 + 5e-7), want) < 1e-6
    for got in (want * 1.01, want * float("nan"), torch.ones(3, 4, 5, 6, 7)[..., :3]):
        with pytest.raises(Failed, match="wrong"):
            compare(op, p, got, want)


def test_locate_and_resolve() -> None:
    assert locate(FAULTY) == "faulty_op:FAULTY" and resolve("faulty_op:FAULTY") is FAULTY
    assert resolve("moe_sort") is ops.get("moe_sort") and locate(ops.get("moe_sort")) == "moe_sort"

    class Homeless(Faulty):
        where = ""

    assert locate(Homeless()) == ""
    with pytest.raises(InvalidInput, match="no_such_module"):
        resolve("no_such_module:OP")


def test_attempt_needs_no_worker() -> None:
    assert attempt(trial("good")).status == "ok"
    assert attempt(trial("wrong")).status == "wrong"
