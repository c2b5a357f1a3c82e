"""What a finished warm-up was asked and what it covered, kept beside the cache file: the same command then sees without
torch that nothing is left to measure.

A receipt says which problems a request means, and with what each was served; whether that is what the cache file has
measured, the file says. It is found again only
by the same request, model file, code, torch and Triton, and holds only for the device that it names.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from moecache.schemas.device import Device
from moecache.schemas.errors import MoecacheError, NoDevice
from moecache.schemas.flags import flags_from
from moecache.schemas.timing import Environment, Winner
from moecache.schemas.warm import LeftOut, WarmRow
from moecache.settings import Settings
from moecache.store import Answers, Tiers
from moecache.store.whole import write

PACKAGE = Path(__file__).parent.parent
KEPT, LONGEST = 32, 32 << 20  # receipts of one file, its bytes
AMD = Path("/dev/kfd")  # where its driver is, torch must be asked


def request(*asked: object) -> str:
    """The name of a request's receipt, of what says the same each time."""
    folders = [PACKAGE, *(path for path in PACKAGE.iterdir() if path.is_dir())]
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in folder.glob("*.py")):
        digest.update(path.read_bytes())
    return hashlib.sha256(repr([digest.hexdigest(), _torch(), _triton(), *asked]).encode()).hexdigest()


def keep(cache: Path, name: str, rows: Sequence[WarmRow], left: Sequence[LeftOut]) -> None:
    """Note which problems a request meant, and what it left out. Where nobody may write it costs the next run its time,
    no more."""
    receipts = _read(cache)
    receipts.pop(name, None)
    served = {row.problem.key: row.config.name for row in rows}
    receipts[name] = {"served": served, "left_out": [astuple(each) for each in left]}
    with contextlib.suppress(OSError):
        write(_beside(cache), json.dumps(dict(list(receipts.items())[-KEPT:])), '{"')


def known(settings: Settings, cache: Path, name: str) -> tuple[list[WarmRow], list[LeftOut]] | None:
    """The rows of a request that has nothing left to measure on this device, and what it left out; None when that
    cannot be told."""
    receipt = _read(cache).get(name) or {}
    served, left = receipt.get("served"), receipt.get("left_out")
    if not served or not isinstance(served, dict) or not isinstance(left, list) or not cache.exists():
        return None
    try:
        here = _here()
        if here is None:
            return None
        tiers = Tiers.open(cache, settings.shipped())
        try:
            rows = _rows(served, here[0], _winners(tiers, *here), set(tiers.unfinished(here[1])))
            return None if rows is None else (rows, [LeftOut(str(op), str(why), bool(all_)) for op, why, all_ in left])
        finally:
            tiers.close()
    except (MoecacheError, TypeError, ValueError):  # the last two: somebody else wrote it
        return None


def _winners(tiers: Tiers, device: Device, environment: Environment) -> Answers:
    return tiers.winners(environment, vendor=device.vendor, arch=device.arch)


def _rows(served: Mapping[str, str], device: Device, winners: Answers, unfinished: set[str]) -> list[WarmRow] | None:
    rows = []
    for key, config in served.items():
        winner, tier, _ = winners.get(key, (None, "", ""))
        if winner is None or tier != "measured" or winner.config.name != config:
            return None
        if key in unfinished or winner.problem.units != device.units:
            return None
        rows.append(_row(winner))
    return rows


def _row(winner: Winner) -> WarmRow:
    return WarmRow(
        winner.problem, winner.config, winner.median_us, winner.default_us, winner.margin, "measured", 0,
        "measured in this environment by an earlier run",
    )  # fmt: skip


def _here() -> tuple[Device, Environment] | None:
    """The device that a warm-up takes, and its environment, as far as that takes no torch."""
    from moecache.backends import cpu, cuda

    backend: cpu.CpuBackend | cuda.CudaBackend
    try:
        cuda.load_runtime()
        backend = cuda.CudaBackend()
    except NoDevice:
        if AMD.exists():
            return None
        backend = cpu.CpuBackend()
    device = backend.device()
    return device, Environment(
        device_name=device.name, driver=backend.driver(), torch=_torch(), triton=_triton(), flags=flags_from(os.environ)
    )


def _torch() -> str:
    """Its version as it says itself, which the package's metadata may shorten; '' where it cannot be read."""
    spec = importlib.util.find_spec("torch")
    try:
        text = Path(str(spec and spec.origin)).with_name("version.py").read_text()
    except OSError:
        return ""
    found = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
    return found[1] if found else ""


def _triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _beside(cache: Path) -> Path:
    return cache.with_name(f"{cache.name}.warmed.json")


def _read(cache: Path) -> dict[str, dict[str, Any]]:
    """Receipts by name; none where the file is absent, damaged, or longer than ours can be."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        beside = _beside(cache)
        found = json.loads(beside.read_bytes()) if beside.is_file() and beside.stat().st_size <= LONGEST else None
        if isinstance(found, dict):
            return {str(name): receipt for name, receipt in found.items() if isinstance(receipt, dict)}
    return {}
