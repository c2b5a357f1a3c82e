"""Expert parallelism on two, four and eight GPUs: `pytest -m gpu tests/test_ep_gpu.py` starts a process for each."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
SCENES = Path(__file__).parent / "helpers" / "ep_scenes.py"


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("scene", ["exact", "eager", "replayed", "two_contexts", "late", "layer", "tuned", "replicas"])
def test_ranks_get_what_they_should(scene: str, world: int) -> None:
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    done = subprocess.run([*launcher, SCENES, scene], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.count(f"{scene} is right") == world
