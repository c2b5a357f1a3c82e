"""Times `moecache warm` for a model, each in a process of its own: from nothing, with kernels compiled, all known.

    python benchmarks/warm.py examples/models/deepseek-v3.json --tp 8 [-- MORE OPTIONS OF WARM]

Seconds from the start of the process to its end. `all known` is the median of five.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    mine, more = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--no-compiled", action="store_true", help="leave out the run that finds kernels compiled")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="where the cache file of the first run goes")
    options = parser.parse_args(mine)
    what = [str(options.model), "--tp", str(options.tp), "--dtype", options.dtype, *more]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows.append({"case": "nothing known", **warm(what, folder, folder / "first.sqlite")})
        tell(rows[-1])
        if options.keep:
            shutil.copy(folder / "first.sqlite", options.keep)
        if not options.no_compiled:
            rows.append({"case": "kernels compiled", **warm(what, folder, folder / "second.sqlite")})
            tell(rows[-1])
        known = [warm(what, folder, folder / "first.sqlite") for _ in range(5)]
        took = [each["seconds"] for each in known]
        rows.append({"case": "all known", **known[0], "seconds": statistics.median(took), "runs_s": took})
        tell(rows[-1])
    from moecache.devices import Places

    place = Places().first()
    facts = {"model": options.model.stem, "tp": options.tp, "dtype": options.dtype}
    cores = len(os.sched_getaffinity(0))
    print(record.save(f"warm-{options.model.stem}", record.folder_of(place), place, rows, **facts, cores=cores))


def warm(what: list[str], folder: Path, db: Path) -> dict[str, Any]:
    """One run, with Triton's cache in the folder."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MOECACHE_")}
    env["TRITON_CACHE_DIR"] = str(folder / "kernels")
    command = [sys.executable, "-m", "moecache", "warm", *what, "--db", str(db), "--json"]
    began = time.perf_counter()
    with (folder / "stderr").open("w+") as errors:
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True)
        seconds = time.perf_counter() - began
        errors.seek(0)
        said = [line.rstrip() for line in errors if not line.startswith("[")]
    if done.returncode:
        print("\n".join(said[-10:]), file=sys.stderr)
    rows = json.loads(done.stdout or "[]")
    return {
        "seconds": round(seconds, 2), "problems": len(rows), "measured": sum(bool(row["measured"]) for row in rows),
        "candidates": sum(row["measured"] for row in rows), "code": done.returncode,
        "unmeasured": sum(row["tier"] != "measured" for row in rows),
    }  # fmt: skip


def tell(row: dict[str, Any]) -> None:
    counts = f"{row['problems']} problems, {row['candidates']} candidates"
    print(f"{row['case']}: {row['seconds']} s, {counts}", flush=True)


if __name__ == "__main__":
    main()
