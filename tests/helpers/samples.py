"""For tests of schemas and store: values by hand or by hypothesis, and a file seen from outside."""

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from moecache.schemas.config import Config, config
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Environment, Prediction, Timing

HERE = Environment(device_name="NVIDIA H200", driver="575.57", torch="2.8.0", triton="3.6.0")
UPGRADED = HERE.model_copy(update={"triton": "3.7.0"})
ELSEWHERE = HERE.model_copy(update={"device_name": "NVIDIA H100"})


ROOT = Path(__file__).parent.parent.parent


def sql(path: Path, *statements: str) -> list[Any]:
    """Change or read a file behind the store's back; the rows of the last statement."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return [connection.execute(statement).fetchall() for statement in statements][-1]


def start(code: str, *args: object) -> subprocess.Popen[str]:
    """A fresh interpreter in which warnings are errors; it can import this module."""
    prelude = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    command = [sys.executable, "-W", "error", "-c", prelude + code, *map(str, args)]
    pipes: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)


def run(code: str, *args: object) -> str:
    """What a fresh interpreter prints."""
    process = start(code, *args)
    try:
        out, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its children, too: they hold the pipes
        raise
    assert process.returncode == 0, errors
    return out.strip()


def problem(**fields: Any) -> Problem:
    """A sorting problem with some fields changed."""
    given: dict[str, Any] = dict(op="moe_sort", vendor="nvidia", arch="sm_90", units=132, tokens=256, experts=64)
    given |= dict(topk=8, routing="a0e1", dims={"block_m": 64}, source="0123456789ab")
    return Problem(**(given | fields))


def timing(name: str, median: float | None = 10.0, **fields: Any) -> Timing:
    """A timing of variant `name` with 50 samples and no spread, some fields changed."""
    given: dict[str, Any] = dict(problem=problem(), config=config(name), environment=HERE, median_us=median)
    given |= dict(mad_us=0.0, n=50, error=0.0, measured_at="2026-11-20T12:00:00+00:00")
    return Timing(**(given | fields))


def prediction(name: str, us: float = 5.0, **fields: Any) -> Prediction:
    """A prediction of variant `name` for an H200, some fields changed."""
    given: dict[str, Any] = dict(problem=problem(), device="NVIDIA H200", config=config(name), predicted_us=us)
    return Prediction(**(given | fields))


def failed(name: str, status: str = "raised", **fields: Any) -> Timing:
    """A timing of a candidate that could not be used."""
    return timing(name, None, status=status, reason=f"{status}: out of luck", mad_us=None, n=0, **fields)


words = st.text(st.sampled_from("abcXYZ019_.:+-"), max_size=8)
names = st.text(st.sampled_from("abcxyz_"), min_size=1, max_size=4)
values = st.one_of(st.integers(-(2**40), 2**40), st.booleans(), words)
sizes = st.integers(1, 2**40)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)

problems = st.builds(
    Problem,
    op=words.filter(bool),
    vendor=st.sampled_from(["nvidia", "amd", "cpu"]),
    arch=words.filter(bool),
    units=sizes,
    tokens=st.integers(0, 2**40),
    experts=sizes,
    topk=sizes,
    routing=words,
    dtype=words,
    dims=st.dictionaries(names, values, max_size=4),
    source=words,
    policy=st.integers(1, 9),
)
configs = st.builds(
    Config,
    variant=words.filter(bool),
    params=st.dictionaries(names, values, max_size=4),
    extra=st.dictionaries(st.sampled_from(["KPACK", "WAVES_PER_EU"]), values, max_size=2),
)
environments = st.builds(Environment, device_name=texts, driver=texts, torch=texts, triton=texts, flags=texts)
statuses = st.sampled_from(["raised", "oom", "timeout", "compile", "crashed", "wrong", "lost"])
microseconds = st.floats(1e-3, 1e9)
usable = st.builds(
    Timing,
    problem=problems,
    config=configs,
    environment=environments,
    median_us=microseconds,
    mad_us=st.none() | st.floats(0, 1e9),
    n=st.integers(0, 1000),
    error=st.none() | st.floats(0, 1),
    is_default=st.booleans(),
    measured_at=st.datetimes().map(lambda when: when.isoformat() + "+00:00"),
)
unusable = st.builds(
    Timing,
    problem=problems,
    config=configs,
    environment=environments,
    status=statuses,
    error=st.none() | st.just(float("inf")),
    reason=texts,
)
timings = usable | unusable
