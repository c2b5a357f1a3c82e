"""Runs Python programs, each in a process of its own that need not load torch: they are forked from one that has.

For tests of what a program does; those of how one starts, or of what it loads, want a fresh interpreter.
"""

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
LONGEST = 600  # seconds of a program


def run(*arguments: str, cwd: Path, env: Mapping[str, str] = os.environ) -> "subprocess.CompletedProcess[str]":
    """A program's file and its arguments; what it answers is text. The package is that of this tree."""
    with tempfile.TemporaryDirectory() as folder:
        out, error = Path(folder, "out"), Path(folder, "error")
        asked = {"argv": arguments, "cwd": str(cwd), "env": dict(env), "streams": [str(out), str(error)]}
        server = _server()
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(arguments, code, out.read_text(), error.read_text())


@cache
def _server() -> "subprocess.Popen[str]":
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MOECACHE_", "TRITON_"))}
    server = subprocess.Popen(
        [sys.executable, "-P", __file__], env=env | {"PYTHONPATH": str(ROOT)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    atexit.register(server.communicate)  # it ends with its input
    return server


def _serve() -> None:
    import torch  # noqa: F401 - what the programs would spend their time on

    for line in sys.stdin:
        child = os.fork()
        if not child:
            return _become(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(argv: list[str], cwd: str, env: dict[str, str], streams: list[str]) -> None:
    """Go on as that program, to the end of this process."""
    for number, path in enumerate([os.devnull, *streams]):
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = os.fdopen(os.dup(0))  # the old one has read ahead
    signal.alarm(LONGEST)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).resolve().parent))
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    _serve()
