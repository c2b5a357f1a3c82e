"""Expert parallelism on several GPUs: `pytest -m gpu tests/test_ep_gpu.py` starts a process for each of two."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
SCENES = Path(__file__).parent / "helpers" / "ep_scenes.py"


@pytest.mark.parametrize("scene", ["exact", "eager", "replayed", "two_contexts", "late", "layer", "tuned"])
def test_ranks_get_what_they_should(scene: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCENES, scene]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.count(f"{scene} is right") == 2
