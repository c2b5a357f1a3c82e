"""Carries timings over an edit of the kernels' source text that left their machine code as it was.

    python benchmarks/carry.py OLD_TREE FILE.sqlite OUT.sqlite [--jobs 2]

Timings are kept under a hash of the source, so a comment, a name or a constant that moved makes them answer no more.
OLD_TREE is the repository at the commit that they were measured at (`git worktree add`). What each config launches is
compiled from there and from here; a problem is carried over if for all its configs kernels, options and machine code
are the same, else left out for `moecache warm` to measure. So is what neither tree has measured. NVIDIA alone, with the
Triton that measured; needs no GPU.
"""

import argparse
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import triton
from triton.compiler import compile as compiled

from moecache.kernels import compile as compiling
from moecache.kernels import op as ops
from moecache.kernels.op import Source
from moecache.schemas.device import KNOWN, Device
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Timing
from moecache.store import Store


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, metavar="OLD_TREE")
    parser.add_argument("file", type=Path, metavar="FILE.sqlite", help="is only read")
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT.sqlite", help="timings are added to it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--describe", nargs="*", metavar="OP", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    timings = read(options.file)
    now = {op: ops.get(op).source for op in {timing.problem.op for timing in timings}}
    if options.describe is not None:
        launches = described([t for t in timings if t.problem.op in options.describe], options.jobs)
        print(json.dumps({"sources": now, "launches": launches}))
        return
    if options.out is None:
        parser.error("OUT.sqlite is missing: the cache file that timings are added to")
    kept = [timing for timing in timings if timing.problem.source == now[timing.problem.op]]
    edited = [timing for timing in timings if timing.problem.source != now[timing.problem.op]]
    old, new = (asked(tree, edited, options) for tree in (options.tree, Path(__file__).parents[1]))
    changed = {
        timing.problem.key
        for timing in edited
        if timing.problem.source != old["sources"][timing.problem.op]  # of a third tree
        or old["launches"].get(name(timing), "") != new["launches"].get(name(timing))
    }
    kept += [t.model_copy(update={"problem": present(t.problem)}) for t in edited if t.problem.key not in changed]
    with Store.open(options.out) as store:
        store.put(kept)
    print(f"{options.out}: {len(kept)} timings of {len({t.problem.key for t in kept})} problems; left out:")
    for key in sorted(changed):
        print(" ", key)


def read(file: Path) -> list[Timing]:
    """The timings of a file.

    Raises:
        SystemExit: one is from another Triton than this.
    """
    with Store.open(file, shipped=True) as store:
        timings = list(store.timings())
    if others := {timing.environment.triton for timing in timings} - {triton.__version__}:
        raise SystemExit(f"{file} has timings of Triton {', '.join(sorted(others))}; this is {triton.__version__}")
    return timings


def present(problem: Problem) -> Problem:
    """The same question to the kernels of this process."""
    return problem.model_copy(update={"source": ops.get(problem.op).source})


def name(timing: Timing) -> str:
    """Which problem and config a timing is of, and of which source it was when it was stored."""
    return f"{timing.problem.key} {timing.config.name}"


def asked(tree: Path, timings: Sequence[Timing], options: argparse.Namespace) -> dict[str, dict[str, str]]:
    """The sources of the ops of `tree`, and `described` in a process that imports its package, with an empty compiler
    cache."""
    edited = sorted({timing.problem.op for timing in timings})
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join([str(tree.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": folder}
        given = [str(tree), str(options.file.resolve()), "--jobs", str(options.jobs), "--describe", *edited]
        command = [sys.executable, "-P", str(Path(__file__).resolve()), *given]
        found = subprocess.run(command, env=env, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout
    return dict(json.loads(found.splitlines()[-1]))


def described(timings: Sequence[Timing], jobs: int) -> dict[str, str]:
    """Of each problem and config what a launch of it runs, as a digest; those that do not fit are missing."""
    launches: dict[str, list[str]] = {}
    kernels: dict[str, tuple[str, str, Source, Device]] = {}
    for timing in timings:
        problem, device = present(timing.problem), device_of(timing.environment.device_name)
        op = ops.get(problem.op)
        if op.fits(problem, timing.config, device):
            continue
        launches[name(timing)] = []
        for source in ops.kernels(op, problem, timing.config, device):
            text = f"{source.fn.__name__} {replace(source, fn=None)}"
            kernels[text] = (source.fn.__module__, source.fn.__name__, replace(source, fn=None), device)
            launches[name(timing)].append(text)
    with ProcessPoolExecutor(jobs) as pool:
        code = dict(zip(kernels, pool.map(machine_code, *zip(*kernels.values(), strict=True)), strict=True))
    return {
        each: hashlib.sha256("".join(launched(kernels[text]) + code[text] for text in needed).encode()).hexdigest()
        for each, needed in launches.items()
    }


def launched(kernel: tuple[str, str, Source, Device]) -> str:
    """What of a launch its machine code does not show: arguments that fold away change nothing."""
    _, function, source, _ = kernel
    return f"{function} {sorted(source.options.items())}"


def machine_code(module: str, function: str, source: Source, device: Device) -> str:
    """A digest of the kernel's instructions, which debug information is no part of."""
    whole = replace(source, fn=getattr(importlib.import_module(module), function))
    compile_asks = getattr(compiling, "asked", None) or compiling._asked  # of older trees
    ast, where, options = compile_asks(whole, device)
    cubin = compiled(ast, target=where, options=options).asm["cubin"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", str(file)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    code = re.findall(r"/\*[0-9a-f]{4,}\*/.*", text)
    if not code:
        raise RuntimeError(f"cuobjdump showed no instructions: {text[:200]!r}")
    return hashlib.sha256("\n".join(code).encode()).hexdigest()


def device_of(product: str) -> Device:
    """The device that a product name begins with."""
    return next(device for device in KNOWN.values() if product.startswith(device.name))


if __name__ == "__main__":
    main()
