"""Workers: every way in which compiling or running a candidate can end its process, and that nothing of it stays."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, wait
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent / "helpers"))

import faulty_op
from faulty_op import FAULTY, Faulty

from moecache.kernels import registry as ops
from moecache.kernels.contract import Source
from moecache.schemas.config import config
from moecache.schemas.device import KNOWN
from moecache.schemas.errors import InvalidInput, MoecacheError
from moecache.tuning.check import Trial, compare, locate
from moecache.tuning.compiler import job
from moecache.tuning.failing import Failed, failure
from moecache.tuning.trial import attempt, resolve
from moecache.tuning.workers import Workers

GPU = KNOWN["mi300x"]  # nothing of it is here, but Triton compiles for it
PROBLEM = faulty_op.problem()


def trial(variant: str, **params: int) -> Trial:
    return Trial(op="faulty_op:FAULTY", problem=PROBLEM, config=config(variant, **params), backend="cpu")


def sources(*variants: str, **params: int) -> list[Source]:
    return [source for each in variants for source in FAULTY.sources(PROBLEM, config(each, **params), GPU)]


def verdict(pool: Workers, trial: Trial, seconds: float = 10.0) -> Failed:
    """How a trial ended, with status "ok" where it did well."""
    try:
        assert pool.run(trial, seconds)
    except Failed as failed:
        return failed
    return Failed("ok", "")


def verdicts(pool: Workers, trials: Sequence[Trial], seconds: float = 10.0) -> list[Failed]:
    return [verdict(pool, each, seconds) for each in trials]


def fault(kernel: "Future[None]", seconds: float = 60.0) -> BaseException | None:
    return kernel.exception(timeout=seconds)


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch, Workers(2) as pool:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        patch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
        patch.setenv("KILLED_BEFORE", str(tmp_path_factory.mktemp("killed") / "before"))
        yield pool


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pids(pool: Workers) -> list[int]:
    return [w._process.pid for w in pool._all if w._process is not None]


# --- compiling ---


def test_compilers_that_crash_fail_or_never_end_cost_one_kernel(workers: Workers) -> None:
    killer, broken, fine = workers.compile(sources("killer", "broken", "compiles", m=32), GPU)
    (endless,) = workers.compile(sources("endless"), GPU, seconds=1)
    crashed, wrong, late = fault(killer), fault(broken), fault(endless)
    assert isinstance(crashed, Failed) and crashed.status == "crashed" and "SIGABRT" in crashed.reason
    assert isinstance(wrong, Failed) and wrong.status == "compile" and "VALUE is too small" in wrong.reason
    assert isinstance(late, Failed) and late.status == "timeout" and "1 s" in late.reason
    assert fault(fine) is None
    folders = [folder for folder in Path(os.environ["TRITON_CACHE_DIR"]).iterdir() if list(folder.glob("square.*"))]
    assert len(folders) == 1, "where a launch finds it"


def test_a_kernel_is_compiled_once_however_often_it_is_asked(workers: Workers) -> None:
    first = workers.compile(sources("compiles", m=16), GPU)
    again = workers.compile([*sources("compiles", m=16), *sources("compiles", m=64)], GPU)
    assert again[0] is first[0] and again[1] is not first[0]
    assert not wait([*first, *again], timeout=600).not_done
    other = workers.compile(sources("compiles", m=16), KNOWN["mi355x"])
    assert other[0] is not first[0] and fault(other[0]) is None


def test_what_the_device_cannot_hold_is_refused(workers: Workers) -> None:
    (kernel,) = workers.compile(sources("compiles", m=64), GPU.model_copy(update={"shared_bytes": 512}))
    found = fault(kernel)
    assert isinstance(found, Failed) and found.status == "compile" and "B of shared memory" in found.reason


def test_what_nobody_has_begun_can_be_dropped_and_asked_again(workers: Workers) -> None:
    slow = workers.compile(sources("endless"), KNOWN["h200"], 2) + workers.compile(sources("endless"), GPU, 2)
    (last,) = workers.compile(sources("compiles", m=128), GPU)
    workers.drop()
    assert last.cancelled()
    with pytest.raises(CancelledError):
        last.result()
    wait(slow, timeout=600)
    (again,) = workers.compile(sources("compiles", m=128), GPU)
    assert again is not last and fault(again) is None


def test_a_kernel_that_no_other_process_can_import_is_left_to_this_one(workers: Workers) -> None:
    (source,) = sources("compiles", m=16)

    class Jit:
        __module__, __name__ = "__main__", "kernel"

    assert workers.compile([replace(source, fn=Jit())], GPU) == []
    assert job(replace(source, fn=Jit()), GPU) is None
    assert job(replace(source, constexprs={"M": lambda: 16, "K": 16}), GPU) is None, "cannot be sent"


def test_a_compiling_process_imports_no_torch() -> None:
    code = "import moecache.tuning.compiler, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert done.stdout.strip() == "False"


def test_compiling_processes_end_when_they_are_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moecache.tuning.workers.IDLE_SECONDS", 0.2)
    with Workers(1) as pool:
        wait(pool.compile(sources("broken"), GPU), timeout=600)
        (first,) = pids(pool)
        end = time.monotonic() + 300
        while alive(first) and time.monotonic() < end:
            time.sleep(0.05)
        assert not alive(first) and pids(pool) == []
        (kernel,) = pool.compile(sources("killer"), GPU)
        assert isinstance(fault(kernel), Failed), "another one starts"


def test_no_more_processes_start_than_there_is_to_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with Workers(8) as pool:
        for most, m in ((2, 32), (4, 64), (6, 128)):  # those from before may not have come to rest
            wait(pool.compile(sources("compiles", "broken", m=m), GPU), timeout=600)
            assert 1 <= len(pids(pool)) <= most


def test_a_process_that_cannot_start_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "pydantic.py").write_text("raise ImportError('this pydantic is broken')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    said = r"ended with code 1.*this pydantic is broken"
    with Workers(1) as pool:
        with pytest.raises(MoecacheError, match=said):
            pool.run(trial("good"), 10.0)
        (kernel,) = pool.compile(sources("compiles", m=32), GPU)
        with pytest.raises(MoecacheError, match=said):
            kernel.result(timeout=600)


# --- running ---


def test_every_fault_has_its_status_and_good_ones_go_on(workers: Workers) -> None:
    """Faults and good candidates alternate: each gets its own verdict."""
    expected = {
        "raise": ("raised", "ValueError: cannot do that"), "oom": ("oom", "7 EiB"),
        "allocate": ("oom", "allocate"), "wrong": ("wrong", "error"), "partial": ("wrong", "error nan"),
        "reshape": ("wrong", "cannot be compared"), "segv": ("crashed", "SIGSEGV"),
        "leave": ("crashed", "ended with code 7: LLVM ERROR: Cannot select"),
        "exit": ("raised", "SystemExit: 3"), "print": ("ok", ""),
    }  # fmt: skip
    found = verdicts(workers, [trial(each) for variant in expected for each in (variant, "good")])
    for (variant, (status, reason)), bad, good in zip(expected.items(), found[::2], found[1::2], strict=True):
        assert bad.status == status and reason in bad.reason, (variant, bad)
        assert good.status == "ok", (variant, good)


def test_what_an_interpreter_prints_answers_nothing_and_its_process_stays_to_the_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = "import os\nprint('Welcome')\nos.write(1, b'a prompt> ')\n"
    (tmp_path / "sitecustomize.py").write_text(said)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with Workers(1) as pool:
        verdicts(pool, [trial("good")])
        (first,) = pids(pool)
        compiled = pool.compile(sources("compiles", "broken", "compiles", m=64), GPU)
        found = verdicts(pool, [trial("good"), trial("wrong"), trial("good")])
        assert [v.status for v in found] == ["ok", "wrong", "ok"]
        assert [type(fault(kernel)) for kernel in compiled] == [type(None), Failed, type(None)]
        assert first in pids(pool) and len(pids(pool)) == 2 and alive(first), "a CPU fault leaves it usable"
    assert not alive(first)
    with pytest.raises(ChildProcessError):  # reaped: no zombie
        os.waitpid(first, os.WNOHANG)


def test_a_process_killed_from_outside_is_no_fault_of_its_job(workers: Workers) -> None:
    once = Path(os.environ["KILLED_BEFORE"])
    assert verdict(workers, trial("killed")).status == "ok" and once.is_file()
    once.unlink()
    once.mkdir()  # no note can be left: it is killed again
    first, second = verdicts(workers, [trial("killed"), trial("good")])
    assert first.status == "lost" and "SIGKILL" in first.reason and second.status == "ok"


def test_hang_is_killed_and_its_process_replaced(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moecache.tuning.workers.CONTEXT_SECONDS", 0.5)
    workers.run(trial("good"), 60.0)
    began = time.perf_counter()
    found = verdicts(workers, [trial("hang"), trial("good")], 0.5)
    assert [v.status for v in found] == ["timeout", "ok"] and "no result after 1 s" in found[0].reason
    assert time.perf_counter() - began >= 1.0


def test_past_the_deadline_nothing_runs(workers: Workers) -> None:
    assert workers.run(trial("good"), 10.0, time.perf_counter() - 1) is False
    assert workers.run(trial("good"), 10.0) is True


def test_unknown_op_is_a_verdict_not_a_crash(workers: Workers) -> None:
    found = verdict(workers, trial("good").model_copy(update={"op": "faulty_op:NOTHING"}))
    assert found.status == "raised" and "NOTHING" in found.reason


def test_pool_that_nobody_closes_ends_with_its_owner(tmp_path: Path) -> None:
    """Killed parent, forgotten pool: its processes see the end of their stdin and go, though they are busy."""
    code = (
        "import sys, os, signal, threading, time\n"
        "sys.path[:0] = sys.argv[1:]\n"
        "from test_trial import GPU, Workers, trial, pids, sources\n"
        "pool = Workers(1); pool.compile(sources('endless'), GPU)\n"
        "threading.Thread(target=pool.run, args=(trial('hang'), 60.0), daemon=True).start()\n"
        "while not os.path.exists(os.environ['HANGING']): time.sleep(0.01)\n"
        "print(*pids(pool), flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", code, str(here), str(here.parent)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
        env=os.environ | {"HANGING": str(tmp_path / "hanging")},
    )
    assert run.returncode == -signal.SIGKILL
    orphans = [int(pid) for pid in run.stdout.split()]
    assert len(orphans) == 2
    end = time.monotonic() + 300
    while any(map(alive, orphans)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(alive, orphans))


def test_forked_child_leaves_its_parents_processes_alone(workers: Workers) -> None:
    verdicts(workers, [trial("good")])
    before = pids(workers)
    child = os.fork()
    if not child:
        workers._finalizer()
        os._exit(0)
    os.waitpid(child, 0)
    assert workers._trial._process is not None and alive(workers._trial._process.pid)
    assert verdict(workers, trial("good")).status == "ok" and workers._trial._process.pid in before


def test_idle_processes_use_no_processor_time(workers: Workers) -> None:
    verdicts(workers, [trial("good")])
    wait(workers.compile(sources("broken"), GPU), timeout=600)

    def ticks() -> list[int]:
        stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids(workers)]
        return [int(s[11]) + int(s[12]) for s in stats]

    def still() -> bool:
        before = ticks()
        time.sleep(0.5)
        return ticks() == before

    deadline = time.monotonic() + 300
    while not still():  # one of them may have been starting while another compiled
        assert time.monotonic() < deadline, "they never rest"
    assert still()


# --- verdicts ---


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


def test_attempt_needs_no_other_process() -> None:
    attempt(trial("good"))
    with pytest.raises(Failed, match="wrong"):
        attempt(trial("wrong"))
