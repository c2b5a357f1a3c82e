"""A prebuilt cache file is made on one machine and shipped. Another machine reads it and never writes it.

    python examples/03_prebuilt.py [FOLDER]

In a shell do the same with `moecache warm …` and `moecache export FILE`, then set `MOECACHE_PATH=FILE` where it serves.
"""

import hashlib
import sys
import tempfile
from pathlib import Path

import moecache
from moecache.models import read_model
from moecache.store import Store

MODEL = Path(__file__).parent / "models" / "qwen3-30b-a3b.json"


def build(folder: Path) -> Path:
    """Measure on the machine that builds, then export the file to ship."""
    private, shipped = folder / "build.sqlite", folder / "qwen3-30b-a3b.sqlite"
    with moecache.using(mode="tune", db=private, path=()):
        moecache.warmup(read_model(MODEL), tokens=(1, 16), routing=["uniform"], ops=["moe_sort"], budget="10s")
    store = Store.open(private)
    print(f"{store.export_file(shipped)} timings in {shipped.name}, {shipped.stat().st_size} bytes")
    store.close()
    return shipped


def serve(folder: Path, shipped: Path) -> None:
    """Serve from the file on another machine, whose own cache file is empty. Nothing is measured or written."""
    before = hashlib.sha256(shipped.read_bytes()).hexdigest()
    with moecache.using(mode="replay", db=folder / "user.sqlite", path=(shipped,)):
        for row in moecache.warmup(read_model(MODEL), tokens=(1, 16), routing=["uniform"], ops=["moe_sort"]):
            assert row.measured == 0
            print(f"tokens={row.problem.tokens:<3} {row.problem.dtype} {row.tier}: {row.config}\n  {row.reason}")
    assert hashlib.sha256(shipped.read_bytes()).hexdigest() == before


def main(folder: Path) -> None:
    shipped = build(folder)
    serve(folder, shipped)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
