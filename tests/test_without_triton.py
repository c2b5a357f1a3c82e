"""Where neither Triton nor a vendor's package is installed, every command works, and says what it cannot know."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from moecache.kernels import registry as ops
from moecache.kernels.code import code_of
from moecache.schemas.config import config
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Environment, Timing
from moecache.store import Store

ROOT = Path(__file__).parent.parent
ABSENT = ("triton", "cuda", "hip", "rocm")
PROBE = """
import json, sys
sys.modules.update(dict.fromkeys({absent}))  # what is None there cannot be imported
from typer.testing import CliRunner
from moecache.cli import app
for arguments in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, arguments, prog_name="moecache")
    error = done.exception if not isinstance(done.exception, SystemExit) else None
    print(json.dumps([arguments[0], done.exit_code, done.stdout, done.stderr, repr(error) if error else ""]))
"""


def commands(folder: Path, key: str) -> list[list[str]]:
    model = str(ROOT / "examples" / "models" / "qwen3-30b-a3b.json")
    db = str(folder / "x.sqlite")
    return [
        ["ls"], ["explain", "--key", key], ["explain", model, "--tokens", "1"], ["doctor"], ["export", f"{db}.db"],
        ["merge", db, "--db", f"{db}.new"], ["verify"], ["verify", "--db", db, "--sample", "1"], ["prune"],
        ["report", f"{db}.html"],
        ["explain", model, "--op", "ep_exchange"], ["warm", model, "--op", "ep_exchange", "--ep", "2"],
        ["warm", model, "--op", "moe_sort", "--tokens", "1", "--routing", "uniform"], ["profile", model],
    ]  # fmt: skip


def test_every_command_works(tmp_path: Path) -> None:
    dims: dict[str, Any] = {"block_m": 16}
    problem = Problem(
        op="moe_sort", vendor="nvidia", arch="sm_90", units=132, tokens=16, experts=128, topk=8, routing="a0e0",
        dtype="int32", source=ops.get("moe_sort").source, dims=dims,
    )  # fmt: skip
    timing = Timing(
        problem=problem, config=config("oneshot", programs=1), environment=Environment(device_name="NVIDIA H200"),
        median_us=2.0, mad_us=0.1, n=40, error=0.0, code=code_of("moe_sort", "oneshot"),
    )  # fmt: skip
    with Store.open(tmp_path / "x.sqlite") as store:
        store.put([timing])
    asked = commands(tmp_path, problem.key)
    env = {name: value for name, value in os.environ.items() if not name.startswith("MOECACHE_")}
    env["MOECACHE_DB"] = str(tmp_path / "x.sqlite")
    run = [sys.executable, "-c", PROBE.format(absent=ABSENT), json.dumps(asked)]
    done = subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = list(map(json.loads, done.stdout.splitlines()))
    found = {row[0]: row for row in rows}
    for arguments, (name, code, out, error, raised) in zip(asked, rows, strict=True):
        lacks = "ep_exchange" in arguments
        assert not raised and code == int(lacks or name == "profile"), (name, code, out, error, raised)
        assert not lacks or error.strip().split("\n")[-1].startswith("moecache: Triton is not installed here"), error
    assert "Triton is not installed here" in found["verify"][2] and "fused_moe" in found["profile"][3]
    explained = next(json.loads(line)[2] for line in done.stdout.splitlines() if line.startswith('["explain"'))
    assert "oneshot(programs=1)" in explained and "Triton is not installed here" in explained
