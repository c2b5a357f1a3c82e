"""How far a call goes through the rooms: which files of ours a hit and a miss enter, and how often a key is built."""

import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import moecache
from moecache import devices
from moecache.dispatch import Dispatcher
from moecache.schemas.problem import Problem

ROOT = Path(__file__).parent.parent
ROOMS = ("moecache", "kernels", "backends", "schemas")
LAUNCH = {"kernels/running.py", "kernels/launchers.py"}  # what a hit enters on a GPU, behind what it enters anywhere


@pytest.fixture
def replay(tmp_path: Path) -> Iterator[Dispatcher]:
    with moecache.using(mode="replay", db=tmp_path / "c.sqlite", path=()) as active:
        yield active


def layer(tokens: int = 64, device: str = "cpu") -> Callable[[], torch.Tensor]:
    """A call whose kernels post its routing."""
    x, router = torch.randn(tokens, 256, dtype=torch.bfloat16, device=device), torch.rand(tokens, 4, device=device)
    w1 = torch.randn(16, 128, 256, dtype=torch.bfloat16, device=device)
    w2 = torch.randn(16, 256, 64, dtype=torch.bfloat16, device=device)
    ids = torch.rand(tokens, 16, device=device).topk(4).indices.int()
    return lambda: moecache.fused_moe(x, w1, w2, router, ids)


def entered(call: Callable[[], Any]) -> set[str]:
    """The files of ours in which functions are called."""
    found = set[str]()

    def look(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call":
            found.add(frame.f_code.co_filename)

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    paths = (Path(name).resolve() for name in found if name.endswith(".py"))
    ours = {path.relative_to(ROOT) for path in paths if path.is_relative_to(ROOT)}
    return {str(path) for path in ours if path.parts[0] in ROOMS}


def test_a_hit_enters_six_files(replay: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "several", False)  # as a first question finds on a machine with one GPU
    call = layer()
    for _ in range(3):
        call()
    runs = []
    replay.hot.update({k: v._replace(run=lambda call, out: runs.append(out)) for k, v in replay.hot.items()})
    found = entered(call)
    assert len(runs) == 1, "a hit"
    assert found == {
        "moecache/ops.py",
        "kernels/fused_moe/call.py",
        "moecache/calls.py",
        "moecache/dispatch/__init__.py",
    }
    assert len(found | LAUNCH) <= 6


@pytest.mark.gpu
def test_a_hit_on_a_gpu_enters_six_files(replay: Dispatcher) -> None:
    call = layer(device="cuda")
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    found = entered(call)
    assert found >= LAUNCH and len(found) <= 6, found


def test_a_miss_builds_few_keys(replay: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a new token count, in a process that has served others; nothing is stored."""
    built, build = list[str](), Problem.key.func  # type: ignore[attr-defined]
    counted = cached_property(lambda problem: built.append(build(problem)) or built[-1])
    counted.__set_name__(Problem, "key")
    layer()()
    monkeypatch.setattr(Problem, "key", counted)
    found = entered(layer(200))
    print(f"a miss builds {len(built)} keys and enters {len(found)} files: {sorted(found)}")
    assert len(replay.hot) == 2 and 1 <= len(built) <= 4, built
    assert "moecache/dispatch/policy.py" in found and len(found) <= 40
