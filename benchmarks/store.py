"""The store under load: hydration, concurrent processes, kills, latency. Writes benchmarks/results/cpu/store.json.

    python benchmarks/store.py [--out FILE] [--kills 50] [--processes 16] [--steps 200]

Every process below is a real one on a real file; nothing is simulated. A goal that is missed exits with 1.
"""

import argparse
import json
import os
import platform
import random
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from record import commit

from moecache.schemas.config import config
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Environment, Timing, Winner
from moecache.store import Store, Tiers

OUT = Path(__file__).parent / "results" / "cpu" / "store.json"
HERE = Environment(device_name="NVIDIA H200", driver="575.57", torch="2.8.0", triton="3.6.0")
ROWS = 10_000


def timings(problems: int, candidates: int, first: int = 0) -> list[Timing]:
    """Timings of `problems` sorting problems with `candidates` configs each."""
    rng, rows = random.Random(first), []
    for number in range(first, first + problems):
        problem = Problem(
            op="moe_sort",
            vendor="nvidia",
            arch="sm_90",
            units=132,
            tokens=1 << (number % 17),
            experts=1 + number // 17,
            topk=8,
            routing="a0e1",
            dtype="bf16",
            dims=(("block_m", 64), ("hidden", 4096)),
            source="0123456789ab",
        )
        for k in range(candidates):
            timing = Timing(
                problem=problem,
                config=config("oneshot", block=64 * (k + 1), num_warps=4),
                environment=HERE,
                median_us=10 + rng.random(),
                mad_us=0.1,
                n=50,
                error=0.0,
                is_default=k == 0,
                measured_at="2026-11-20T12:00:00+00:00",
            )
            rows.append(timing)
    return rows


def spread(samples: list[float]) -> dict[str, float]:
    """Milliseconds: median, best and 95th percentile."""
    ordered = sorted(samples)
    return {
        "median_ms": round(statistics.median(ordered), 3),
        "best_ms": round(ordered[0], 3),
        "p95_ms": round(ordered[int(0.95 * (len(ordered) - 1))], 3),
    }


HYDRATE = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from store import HERE, Tiers
began = time.perf_counter()
tiers = Tiers.open(Path(sys.argv[2]))
opened = time.perf_counter()
answers = tiers.winners(HERE)
read = time.perf_counter()
count = len(answers.values())  # validates every row
walked = time.perf_counter()
print(json.dumps([1e3 * t for t in (opened - began, read - opened, walked - read)] + [count]))
"""


def hydrate(folder: Path, problems: int, candidates: int, repeats: int = 15) -> dict[str, Any]:
    """What the first dispatch of a process pays: open a file of 10 000 timings and read every winner."""
    path = folder / f"hydrate-{problems}.sqlite"
    with Store.open(path) as store:
        store.put(timings(problems, candidates))
    runs = [json.loads(python(HYDRATE, Path(__file__).parent, path)) for _ in range(repeats)]
    assert {run[3] for run in runs} == {problems}
    return {
        "what": "hydrate",
        "timings": problems * candidates,
        "winners": problems,
        "bytes": path.stat().st_size,
        **spread([run[0] + run[1] for run in runs]),
        "open_ms": round(statistics.median(run[0] for run in runs), 3),
        "read_ms": round(statistics.median(run[1] for run in runs), 3),
        "validate_all_ms": round(statistics.median(run[2] for run in runs), 3),
        "fresh_processes": repeats,
        "goal": "median_ms <= 50",
    }


WORKER = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
from store import Store, timings
path, number, steps = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
shared, failures, waits = timings(1, 1)[0].problem, [], []
store = Store.open(path)
for step in range(steps):
    began = time.perf_counter()
    try:
        before = store.timings(shared)
        store.put(timings(1, 1, first=1 + number * steps + step))
        store.want([shared])
    except Exception as error:
        failures.append(str(error))
    waits.append(1e3 * (time.perf_counter() - began))
store.close()
print(json.dumps({"failures": failures, "waits": waits}))
"""


def concurrent(folder: Path, processes: int, steps: int) -> dict[str, Any]:
    """Processes that read, put a timing and count up a shared row, all from the moment when there is no file."""
    path, began = folder / "concurrent.sqlite", time.perf_counter()
    workers = [start(WORKER, Path(__file__).parent, path, n, steps) for n in range(processes)]
    told = [json.loads(worker.communicate(timeout=900)[0]) for worker in workers]
    wall = time.perf_counter() - began
    waits = sorted(wait for each in told for wait in each["waits"])
    with Store.open(path) as store:
        kept, (counted,) = len(store.timings()), store.wanted()
        findings = store.check()
    return {
        "what": "read, then write, concurrently",
        "processes": processes,
        "steps": steps,
        "failures": sum(len(each["failures"]) for each in told),
        "lost": 2 * processes * steps - kept - counted[1],
        "check": findings,
        "wall_s": round(wall, 2),
        **spread(waits),
        "max_ms": round(waits[-1], 1),
        "goal": "failures == 0 and lost == 0",
    }


WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
from store import Store, timings
with Store.open(sys.argv[2]) as store:
    for number in range(int(sys.argv[3]), 1 << 30):
        rows = [t.model_copy(update={"reason": "x" * 2000}) for t in timings(1, 8, first=number)]
        store.put(rows)
        print(number, flush=True)
"""


def kills(folder: Path, count: int) -> dict[str, Any]:
    """SIGKILL at random moments of a writer: files found unsound, committed rows lost, groups half written."""
    path, rng = folder / "killed.sqlite", random.Random(7)
    committed, lost, torn, unsound, interrupted = -1, 0, 0, 0, 0
    for _ in range(count):
        writer = start(WRITER, Path(__file__).parent, path, committed + 1)
        assert writer.stdout is not None
        for _ in range(rng.randrange(1, 6)):
            committed = int(writer.stdout.readline())
        time.sleep(rng.random() * 0.006)
        writer.send_signal(signal.SIGKILL)
        rest = writer.communicate()[0].split()
        committed = max([committed, *map(int, rest)])
        journals = [path.with_name(path.name + suffix) for suffix in ("-journal", "-wal")]
        interrupted += any(file.exists() and file.stat().st_size for file in journals)
        with Store.open(path) as store:
            unsound += bool(store.check()) or store.path != path
            sizes = [row[0] for row in counts(path)]
            lost += max(0, committed + 1 - len(sizes))
            torn += sum(size != 8 for size in sizes)
        committed = len(sizes) - 1
    aside = len(list(folder.glob("killed.sqlite.corrupt-*")))
    return {
        "what": "SIGKILL while writing",
        "kills": count,
        "left_a_journal": interrupted,
        "unsound": unsound + aside,
        "committed_lost": lost,
        "half_written": torn,
        "transactions_kept": committed + 1,
        "goal": "unsound == committed_lost == half_written == 0",
    }


def counts(path: Path) -> list[tuple[int]]:
    """Timings per problem, read without moecache."""
    connection = sqlite3.connect(path)
    try:
        return connection.execute("SELECT count(*) FROM timing GROUP BY problem").fetchall()
    finally:
        connection.close()


def latency(folder: Path, candidates: int, repeats: int = 200) -> dict[str, Any]:
    """One put of a tuned problem, as the tuner does it."""
    samples = []
    with Store.open(folder / f"latency-{candidates}.sqlite") as store:
        for number in range(repeats):
            rows = timings(1, candidates, first=number)
            began = time.perf_counter()
            store.put(rows)
            samples.append(1e3 * (time.perf_counter() - began))
    return {"what": "put", "timings": candidates, "repeats": repeats, **spread(samples)}


def lookups(folder: Path) -> dict[str, Any]:
    """One problem out of 10 000 timings: its timings from the file, and its winner from what was hydrated."""
    path = folder / "hydrate-1000.sqlite"
    with Store.open(path, readonly=True) as store:
        problems = [winner.problem for winner in store.winners(tokens=16)]
        answers = Tiers(store, []).winners(HERE)
        from_file, first, again = [], [], []
        for problem in problems:
            key, began = problem.key, time.perf_counter()
            winner, _, _ = answers.get(key)
            assert isinstance(winner, Winner)
            touched = time.perf_counter()
            answers.get(key)
            known = time.perf_counter()
            store.timings(problem)
            first.append(1e6 * (touched - began))
            again.append(1e6 * (known - touched))
            from_file.append(1e6 * (time.perf_counter() - known))
    names = ("answer_first_us", "answer_again_us", "timings_from_file_us")
    medians = (round(statistics.median(samples), 2) for samples in (first, again, from_file))
    return {"what": "look up one problem", "problems": len(problems), **dict(zip(names, medians, strict=True))}


def start(code: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, text=True)


def python(code: str, *args: object) -> str:
    with start(code, *args) as process:
        out = process.communicate(timeout=300)[0]
    assert process.returncode == 0
    return out


def machine() -> dict[str, Any]:
    """What the figures were taken on and with."""
    cpu = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
    with Store.memory() as store:
        library = store.stats()["sqlite"]
    return {
        "device": f"{cpu or platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            "sqlite": library,
            **{name: version(name) for name in ("pydantic", "sqlite-utils")},
        },
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", "benchmarks/store.py", *sys.argv[1:]]),
    }


def missed(row: dict[str, Any]) -> str:
    """Which goal a row misses; '' when none."""
    if row["what"] == "hydrate" and row["median_ms"] > 50:
        return f"hydrating {row['winners']} winners took {row['median_ms']} ms"
    wrong = [name for name in ("failures", "lost", "unsound", "committed_lost", "half_written") if row.get(name)]
    return f"{row['what']}: {', '.join(f'{name} = {row[name]}' for name in wrong)}" if wrong else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows = [
            hydrate(folder, ROWS // 10, 10),
            hydrate(folder, ROWS, 1),
            lookups(folder),
            latency(folder, 1),
            latency(folder, 24),
            concurrent(folder, given.processes, given.steps),
            kills(folder, given.kills),
        ]
        with Store.open(folder / "killed.sqlite") as store:
            journal = store.stats()["journal"]
    for row in rows:
        print(json.dumps(row))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({**machine(), "journal": journal}, indent=1).removesuffix("\n}")
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    given.out.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n')
    misses = [text for row in rows if (text := missed(row))]
    print(*misses or ["every goal is met"], sep="\n")
    return int(bool(misses))


if __name__ == "__main__":
    sys.exit(main())
