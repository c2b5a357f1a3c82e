"""Ranks of torch.distributed over gloo, each a forked process: `ranks.py MODULE:SCENE SIZE KEEPER FROZEN`.

A scene is a function of rank and size that returns what JSON can say.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import programs
import torch.distributed as dist

from moecache.schemas.errors import MoecacheError

ROOT = Path(__file__).parents[2]
SHORT = 1.0  # seconds that a team waits for who never comes
LONG = 300.0  # for who comes: however slow the machine is
PARENT, NOBODY = -1, -1

Pipe = tuple[int, int]


def ranks(scene: str, size: int, keeper: int = PARENT, frozen: int = NOBODY, **environ: str) -> list[Any]:
    """What the ranks of a scene returned, None of those that did not live to say anything.

    Args:
        keeper: the rank that keeps the store; else the parent does, as that of torchrun.
        frozen: a rank that does not end: it is killed when all others have.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MOECACHE_")}
    asked = [scene, str(size), str(keeper), str(frozen)]
    done = programs.run(__file__, *asked, cwd=ROOT, env=kept | {"OMP_NUM_THREADS": "1"} | environ)
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def lost(work: Callable[[], Any]) -> list[Any]:
    """The error of work that raises one of ours, and the seconds until then."""
    began = time.monotonic()
    try:
        work()
    except MoecacheError as error:
        return [type(error).__name__, str(error), time.monotonic() - began]
    return ["nothing", "", 0.0]


def main(scene: str, size: int, keeper: int, frozen: int) -> None:
    module, _, name = scene.partition(":")
    play = getattr(import_module(module), name)
    ports, said, pids = [os.pipe() for _ in range(size)], [os.pipe() for _ in range(size)], []
    for rank in range(size):
        pids.append(os.fork())
        if not pids[-1]:
            return _rank(play, rank, size, ports, said[rank], rank == keeper)
    store = _store(ports) if keeper == PARENT else None
    for rank, pid in enumerate(pids):
        if rank != frozen:
            os.waitpid(pid, 0)
    if frozen != NOBODY:
        os.kill(pids[frozen], signal.SIGKILL)
    for _, writing in said:
        os.close(writing)
    texts = [os.fdopen(reading).read() for reading, _ in said]
    print(json.dumps([json.loads(text) if text else None for text in texts]))
    del store


def _store(ports: list[Pipe]) -> Any:
    """A store that all ranks are told of."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for _, writing in ports:
        os.write(writing, f"{store.port}\n".encode())
    return store


def _rank(play: Callable[[int, int], Any], rank: int, size: int, ports: list[Pipe], said: Pipe, keeps: bool) -> None:
    kept = _store(ports) if keeps else None
    port = int(os.read(ports[rank][0], 16))
    store = kept or dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    os.write(said[1], json.dumps(play(rank, size)).encode())
    os._exit(0)  # not through gloo's own end, which would wait for ranks that are no more


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
