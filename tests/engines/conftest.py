"""The real engines, without a GPU: `make engines` installs each into a folder of its own and runs these."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for engine_cases

if importlib.util.find_spec("sglang") is not None:
    # The build of torchvision for GPUs, which SGLang imports, cannot load its operators here.
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def pytest_ignore_collect(collection_path: object) -> bool | None:
    """The file of an engine that is not on the path is none for this run."""
    name = str(collection_path).rpartition("test_real_")[2].removesuffix(".py")
    return True if name in ("vllm", "sglang") and importlib.util.find_spec(name) is None else None


@pytest.fixture(autouse=True)
def _memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECACHE_DB", ":memory:")
