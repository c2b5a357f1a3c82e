"""What a finished warm-up was asked and what it covered, kept in the cache file: the same command then sees without
torch that nothing is left to measure.

A receipt says which problems a request means, and with what each was served; whether that is what the cache file has
measured, its timings say. It is found again only by the same request, model file and code, on the same device, with the
same torch and Triton.
"""

import contextlib
import hashlib
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from moecache.schemas.device import Device
from moecache.schemas.errors import MoecacheError, NoDevice, StoreError
from moecache.schemas.flags import flags_from, installed
from moecache.schemas.frozen import Frozen
from moecache.schemas.timing import Environment
from moecache.schemas.warm import LeftOut, WarmRow
from moecache.settings import Settings
from moecache.store import Store, Tiers

PACKAGE = Path(__file__).parent
AMD = Path("/dev/kfd")  # where its driver is, torch must be asked
Here = tuple[Device, Environment]


class Receipt(Frozen):
    """Problem key to the name of the config that it is served with, and what has no problems."""

    served: dict[str, str]
    left_out: list[LeftOut]


def here() -> Here | None:
    """The device that a warm-up takes, and its environment; None where that takes torch to say."""
    from moecache.backends import cpu, cuda

    backend: cpu.CpuBackend | cuda.CudaBackend
    try:
        cuda.load_runtime()
        backend = cuda.CudaBackend()
    except NoDevice:
        if AMD.exists():
            return None
        backend = cpu.CpuBackend()
    device, flags = backend.device(), flags_from(os.environ)
    versions = {"driver": backend.driver(), "torch": _torch(), "triton": installed("triton")}
    return device, Environment(device_name=device.name, flags=flags, **versions)


def request(here: Here, *asked: object) -> str:
    """The name of a request's receipt, of what says the same each time."""
    (device, environment), digest = here, hashlib.sha256()
    rooms = [path for path in PACKAGE.iterdir() if path.is_dir()]  # some of them links, which rglob does not follow
    for path in sorted([*PACKAGE.glob("*.py"), *(path for room in rooms for path in room.rglob("*.py"))]):
        digest.update(path.read_bytes())
    return hashlib.sha256(
        repr([digest.hexdigest(), device.arch, device.units, environment, *asked]).encode()
    ).hexdigest()


def keep(store: Store, name: str, rows: Sequence[WarmRow], left: Sequence[LeftOut]) -> None:
    """Note in a cache file which problems a request meant, and what it left out. Where that cannot be written it costs
    the next run its time, no more."""
    receipt = Receipt(served={row.problem.key: row.config.name for row in rows}, left_out=list(left))
    with contextlib.suppress(StoreError):
        store.keep_receipt(name, receipt.model_dump_json())


def known(settings: Settings, here: Here, name: str) -> tuple[list[WarmRow], list[LeftOut]] | None:
    """The rows of a request that has nothing left to measure, and what it left out; None when that cannot be told."""
    tiers, (device, environment) = Tiers.open(settings.user_file(), settings.shipped()), here
    try:
        receipt = Receipt.model_validate_json(tiers.user.receipt(name))
        winners = tiers.winners(environment, vendor=device.vendor, arch=device.arch)
        unfinished, rows = tiers.unfinished(environment), list[WarmRow]()
        for key, config in receipt.served.items():
            winner, tier, _ = winners.get(key) or (None, "", "")
            if winner is None or tier != "measured" or winner.config.name != config or key in unfinished:
                return None
            said = "measured in this environment by an earlier run"
            us = winner.median_us, winner.default_us, winner.margin
            rows.append(WarmRow(winner.problem, winner.config, *us, "measured", 0, said))
        return (rows, receipt.left_out) if rows else None
    except (MoecacheError, ValidationError):  # the last: there is none, or somebody else wrote it
        return None
    finally:
        tiers.close()


def _torch() -> str:
    """Its version as it says itself, which the package's metadata may shorten; '' where it cannot be read."""
    spec = importlib.util.find_spec("torch")
    try:
        text = Path(str(spec and spec.origin)).with_name("version.py").read_text()
    except OSError:
        return ""
    found = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
    return found[1] if found else ""
