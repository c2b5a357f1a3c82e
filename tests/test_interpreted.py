"""The tests of kernels in Triton's interpreter, which must be chosen before Triton is imported: one process for all."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent
MARKED = re.compile("^from interpreting import .*marked", re.MULTILINE)
FILES = [file for file in sorted(HERE.glob("test_*.py")) if MARKED.search(file.read_text())]


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the process of its own")
def test_every_marked_test_passes():
    assert len(FILES) >= 5
    versions = {each.__name__: tuple(map(int, each.__version__.split(".")[:2])) for each in (triton, numpy)}
    assert versions["triton"] > (3, 6) or versions["numpy"] < (2, 4), "Triton 3.6 interprets with numpy below 2.4 only"
    command = [sys.executable, "-m", "pytest", "-q", "-rpfEs", "-m", "interpreted", "-p", "no:cacheprovider", *FILES]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, cwd=HERE.parent, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
    for file in FILES:
        assert f"PASSED tests/{file.name}::" in done.stdout
