"""docs/extend.md: each diff on the page is applied to a copy of the source, where the toy's own test must pass."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extend.md").read_text()
DIFFS = dict(zip(("format", "body", "op"), re.findall(r"^```diff\n(.*?)^```$", PAGE, re.M | re.S), strict=True))
COPIED = ("backends", "kernels", "moecache", "schemas", "src", "tests/helpers", "tests/conftest.py", "pyproject.toml")


@pytest.mark.slow
@pytest.mark.parametrize("what", DIFFS)
def test_the_toy_of_the_page_works(what: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    for name in COPIED:
        place = tmp_path / name
        place.parent.mkdir(exist_ok=True)
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.sqlite", "*.gz")
            shutil.copytree(ROOT / name, place, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, place)
    apply = ["git", "apply", "--whitespace=error", "-"]
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent), "PYTHONPATH": str(tmp_path / "src")}
    done = subprocess.run(apply, cwd=tmp_path, env=env, input=DIFFS[what], text=True, capture_output=True)
    assert done.returncode == 0, f"the diff no longer applies: {done.stderr}"
    (test,) = (tmp_path / "tests").glob("test_*.py")
    marks = ["interpreted", "not interpreted"] if "INTERPRETED" in test.read_text() else [""]
    for mark in marks:
        command = [sys.executable, "-m", "pytest", "-q", "-m", mark, "-p", "no:cacheprovider", str(test)]
        own = env | {"TRITON_INTERPRET": str(int(mark == "interpreted")), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=own, text=True, capture_output=True)
        assert done.returncode == 0 and re.search(r"^\d+ passed", done.stdout, re.M), done.stdout + done.stderr


def test_the_toys_are_not_here_yet() -> None:
    """What a toy adds must not exist: else the test above would run what is here."""
    made = re.findall(r"^\+\+\+ b/(\S+)$", "".join(DIFFS.values()), re.M)
    new = [name for name in made if f"--- /dev/null\n+++ b/{name}" in "".join(DIFFS.values())]
    assert len(new) >= 8 and not any((ROOT / name).exists() for name in new)
