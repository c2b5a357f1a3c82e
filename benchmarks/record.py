"""What benchmarks share: the result file (device, versions, commit, date, command and rows), and names of hooks."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moecache.devices import Place

RESULTS = Path(__file__).parent / "results"


def save(name: str, folder: str, place: "Place", rows: list[dict[str, Any]], **facts: Any) -> Path:
    """Write benchmarks/results/<folder>/<name>.json and return its path."""
    import torch

    where = RESULTS / folder / f"{name}.json"
    where.parent.mkdir(parents=True, exist_ok=True)
    head = {
        "device": place.device.name,
        "environment": place.environment.model_dump(),
        "python": sys.version.split()[0],
        "torch_threads": torch.get_num_threads(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python " + " ".join(Path(each).name if Path(each).is_absolute() else each for each in sys.argv),
    }
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    body = json.dumps(head | facts, indent=1)[:-2]
    where.write_text(f'{body},\n "rows": [\n{lines}\n ]\n}}\n')
    return where


def folder_of(place: "Place") -> str:
    """`h200` for "NVIDIA H200", `h100` for "NVIDIA H100 80GB HBM3", `cpu` for any processor."""
    words = place.device.name.lower().split()
    return "cpu" if place.device.vendor == "cpu" else next((w for w in words if any(map(str.isdigit, w))), words[-1])


def load(name: str, folder: str) -> dict[str, Any] | None:
    """What `save` wrote under these names; None where there is nothing."""
    where = RESULTS / folder / f"{name}.json"
    found: dict[str, Any] | None = json.loads(where.read_text()) if where.exists() else None
    return found


def commit() -> str:
    """Short hash of the checkout, with '+' where files differ; COMMIT names it where the files travel without git."""
    if given := os.environ.get("COMMIT"):
        return given
    try:
        text = subprocess.check_output(
            ["git", "describe", "--always", "--dirty=+"],
            cwd=RESULTS.parent,
            text=True,
            stderr=subprocess.DEVNULL,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return text.strip()


def named(references: Sequence[str], what: str) -> list[Any]:
    """What options name as `module:what`, where `what` is a function or a class."""
    found = []
    for reference in references:
        module, colon, name = reference.partition(":")
        if not colon:
            raise SystemExit(f"{reference}: give module:{what}, and its folder in PYTHONPATH")
        found.append(getattr(importlib.import_module(module), name))
    return found
