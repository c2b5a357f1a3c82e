"""How far the config that the cost model takes is behind the fastest one, over the timings of a cache file.

    python benchmarks/order.py tests/data/h200-fp8.sqlite.gz

The model predicts the configs that were timed for a problem, without its timings. `behind` of a problem is the time of
the one that is predicted fastest over the lowest time, less 1. Printed are mean, 95th percentile and worst in per cent,
for each op and format. No GPU is needed. Files may be compressed by gzip.
"""

import argparse
import gzip
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from moecache.kernels import registry
from moecache.predict.ranking import rank
from moecache.schemas.config import Config
from moecache.schemas.device import KNOWN, Device
from moecache.schemas.problem import Problem
from moecache.store import Store


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    for what, each in behind(parser.parse_args(arguments).file).items():
        ends = statistics.quantiles(each, n=20)[-1] if len(each) > 1 else each[0]
        told = " / ".join(f"{100 * value:.1f}" for value in (statistics.mean(each), ends, max(each)))
        print(f"{what}: {len(each)} problems, {told} % behind")


def behind(file: Path) -> dict[str, list[float]]:
    """By op and format, how far each problem's predicted choice is behind, for problems with two timings or more."""
    found: dict[str, list[float]] = {}
    for (problem, device), timed in timings(file).items():
        if len(timed) > 1:
            us = rank(registry.get(problem.op), problem, list(timed), device).us
            chosen = min(zip(us, timed.values(), strict=True))[1]
            what = f"{problem.op}, {problem.dim('quant', '') or problem.dtype}"
            found.setdefault(what, []).append(chosen / min(timed.values()) - 1)
    return found


def timings(file: Path) -> dict[tuple[Problem, Device], dict[Config, float]]:
    """The usable timings of built-in ops on known devices."""
    devices = {device.name: device for device in KNOWN.values()}
    found: dict[tuple[Problem, Device], dict[Config, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if file.suffix == ".gz":
            plain = Path(folder, file.stem)
            plain.write_bytes(gzip.decompress(file.read_bytes()))
            file = plain
        with Store.open(file, readonly=True) as store:
            for row in store.timings():
                device = devices.get(row.environment.device_name)
                if row.status == "ok" and row.median_us is not None and device and registry.built_in(row.problem.op):
                    found.setdefault((row.problem, device), {})[row.config] = row.median_us
    return found


if __name__ == "__main__":
    main()
