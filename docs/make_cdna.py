"""Compiles the GPU candidates for CDNA and writes docs/cdna.md: `make cdna`. `--check` compiles nothing: it only fails
when the kernels have changed since the page was made."""

import argparse
import hashlib
import random
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moecache.dispatch.policy import ROOMY
from moecache.kernels import code
from moecache.kernels import registry as ops
from moecache.kernels.compile import Resources, compile_source, why_unfit
from moecache.kernels.contract import Op, Source
from moecache.schemas.config import Config
from moecache.schemas.device import KNOWN, Device
from moecache.schemas.layer import Layer
from moecache.schemas.problem import Problem
from moecache.tuning.workers import Workers

PAGE = Path(__file__).with_name("cdna.md")
DEVICES = ("mi300x", "mi355x")
SMALL, MIDDLE, LARGE = 16, 1024, 16384  # tokens
FEW, MANY, MOST = (8, 2, 4096, 14336), (128, 8, 2048, 768), (256, 8, 7168, 256)  # experts, top-k, hidden, intermediate
EVERY = tuple((tokens, shape, "bf16") for shape in (FEW, MANY, MOST) for tokens in (SMALL, MIDDLE, LARGE))
PRODUCTS = ((SMALL, MOST, "bf16"), (MIDDLE, MANY, "bf16"), (LARGE, FEW, "bf16"))
ONE = ((1, MANY, "bf16"), (1, MANY, "fp8"))
ASKED = {"moe_sort": EVERY, "fused_moe": (*ONE, *PRODUCTS, (MIDDLE, MANY, "fp8"))}  # of any other op: PRODUCTS
TILE = ("BLOCK", "BM", "BN", "BK")  # constants that make a family of kernels; of sorting, whose BM is padding, STEP
CHUNK = 32  # kernels between two lines of progress

MFMA = re.compile(r"^\s*v_(?:mfma|smfmac)_", re.MULTILINE)
LOAD = re.compile(r"^\s*(?:global|buffer|flat)_load_(\w+)", re.MULTILINE)
SOURCES = re.compile(r"<!-- sources: (.*?) -->")

HEAD = """# What the kernels need on CDNA

<!-- Made by docs/make_cdna.py: run `make cdna` after a change of a kernel -->
<!-- sources: {sources} -->

Every GPU candidate of the problems below, compiled with Triton {triton} for gfx942 (MI300X) and gfx950 (MI355X),
and what its machine code asks for: **compiled, its assembly checked, executed on an interpreter; not run on hardware**.
The figures say that a kernel can be launched, not how fast it is. What is executed are small calls of each op, variant
and kernel, not each candidate; [CONTRIBUTING](../CONTRIBUTING.md#what-executing-cdna-code-proves) says what it proves.
A row is a family: the candidates' variant, the kernel, and the tile that it works on.

- *candidates* use a kernel of the family; equal kernels of several candidates are compiled and counted once.
- *VGPRs*, *AGPRs*, *LDS*, *spills*: the most that a kernel of the family takes; VGPRs include the AGPRs.
- *MFMA*: matrix instructions in the machine code of the kernel that has the most.
- *16-byte loads*: share of the vector memory loads in the machine code, over the family's kernels.
- *Dropped* are candidates that `fits` does not admit on this device, mostly because they would not fit into LDS.
"""


@dataclass(frozen=True)
class Job:
    """One candidate on one device."""

    op: Op
    problem: Problem
    config: Config
    device: Device

    @property
    def kernels(self) -> dict[str, Source]:
        """The kernels by what decides their machine code."""
        sources = self.op.sources(self.problem, self.config, self.device)
        return {_identity(source, self.device): source for source in sources}

    def family(self, source: Source) -> str:
        """The variant, the kernel, and the tile that it works on."""
        constants = source.constexprs
        tile = [str(constants[name]) for name in (("STEP",) if "STEP" in constants else TILE) if name in constants]
        return f"{self.config.variant}: {source.fn.__name__} {'×'.join(tile)}".strip()


@dataclass(frozen=True)
class Kernel:
    """What one compiled kernel needs, and what its instructions are."""

    resources: Resources
    mfma: int
    loads: int
    wide: int  # of them 16 bytes a lane


def _identity(source: Source, device: Device) -> str:
    parts = (device.arch, source.fn.cache_key, sorted(source.signature.items()), sorted(source.constexprs.items()),
             sorted(source.options.items()), sorted(source.aligned), sorted(source.large))  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def gpu_ops() -> list[Op]:
    """The built-in ops that have candidates for a GPU."""
    found = []
    for name in filter(ops.built_in, ops.names()):
        try:
            op = ops.get(name)
            found += [op] if any(candidates(op, KNOWN[device]) for device in DEVICES) else []
        except (ImportError, AttributeError) as missing:  # an op may be there for the CPU alone
            print(f"{name} has no GPU candidates: {missing}", file=sys.stderr)
    return found


def problems(op: Op, device: Device) -> list[Problem]:
    """What is compiled of an op: the problems of a few layers, as `warm` asks them, with int32 ids."""
    found: list[Problem] = []
    for tokens, (experts, topk, hidden, intermediate), dtype in ASKED.get(op.name, PRODUCTS):
        layer = Layer(model="", experts=experts, global_experts=experts, topk=topk, hidden=hidden,
                      intermediate=intermediate, dtype=dtype)  # fmt: skip
        found += op.problems(layer, [tokens], device)
    return [each for each in dict.fromkeys(found) if each.dtype != "int64"]  # which differ in a load


def candidates(op: Op, device: Device) -> list[Job]:
    """Every admitted candidate of every problem."""
    return [Job(op, p, config, device) for p in problems(op, device) for config in op.space(p, device)]


def dropped(op: Op, device: Device) -> int:
    """How many candidates would be in the search space of a device without limits, and are not in this one's."""
    roomy = device.model_copy(update=ROOMY)
    return sum(
        bool(op.fits(problem, config, device))
        for problem in problems(op, device)
        for config in op.space(problem, roomy)
    )


def compiled(jobs: Sequence[Job], workers: Workers) -> tuple[dict[str, Kernel], list[str]]:
    """(kernels by identity, findings). Compiles in subprocesses, as a compiler's crash ends its process; the results
    are then read from Triton's disk cache."""
    first: dict[str, tuple[Job, Source]] = {}
    for job in jobs:
        for identity, source in job.kernels.items():
            first.setdefault(identity, (job, source))
    todo, kernels, findings = list(first.items()), dict[str, Kernel](), []
    for start in range(0, len(todo), CHUNK):
        part = todo[start : start + CHUNK]
        started = [workers.compile([source], job.device, 300) for _, (job, source) in part]
        for (identity, (job, source)), (kernel,) in zip(part, started, strict=True):
            why = kernel.exception()
            if why is None:
                kernels[identity] = read(source, job.device)
                why = why_unfit(kernels[identity].resources, job.device)
            if why:
                findings.append(f"{job.device.arch} {job.config.name} of {job.problem.key}: {why}")
        print(f"  {min(start + CHUNK, len(todo))} of {len(todo)}, {len(kernels)} kernels", flush=True)
    return kernels, findings


def read(source: Source, device: Device) -> Kernel:
    """Read a kernel that Triton's cache holds."""
    found = compile_source(source, device)
    loads = LOAD.findall(found.text)
    return Kernel(found, len(MFMA.findall(found.text)), len(loads), sum(kind.startswith("dwordx4") for kind in loads))


def section(op: Op, device: Device, jobs: Sequence[Job], kernels: dict[str, Kernel]) -> str:
    """The table of one op on one device."""
    families: dict[str, dict[str, Kernel]] = {}
    users: dict[str, set[int]] = {}
    for number, job in enumerate(jobs):
        for identity, source in job.kernels.items():
            users.setdefault(job.family(source), set()).add(number)
            if identity in kernels:
                families.setdefault(job.family(source), {})[identity] = kernels[identity]
    rows = [_row(name, len(users[name]), families[name].values()) for name in sorted(families, key=_natural)]
    distinct = {identity for own in families.values() for identity in own}
    what = "family | candidates | kernels | VGPRs | AGPRs | LDS bytes | spills | MFMA | 16-byte loads"
    return "\n".join([
        f"### {op.name} on {device.arch}\n",
        f"{len(jobs)} candidates admitted, {dropped(op, device)} dropped; {len(distinct)} different kernels. Limits: "
        f"{device.shared_bytes} bytes of LDS, {device.max_threads} threads, no spills.\n",
        f"| {what} |", f"| --- |{' ---: |' * 8}", *rows, "",
    ])  # fmt: skip


def _row(name: str, admitted: int, kernels: Iterable[Kernel]) -> str:
    every = list(kernels)
    used = [k.resources for k in every]
    loads = sum(k.loads for k in every)
    cells = (
        name, admitted, len(every), max(r.registers for r in used), max(r.agprs for r in used),
        max(r.shared_bytes for r in used), max(r.spills for r in used), max(k.mfma for k in every),
        f"{100 * sum(k.wide for k in every) / loads:.0f} %" if loads else "–",
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def sample(jobs: Sequence[Job], seed: str, count: int) -> list[Job]:
    """Some of the candidates: the same for the same seed, others for another."""
    return random.Random(seed).sample(list(jobs), min(count, len(jobs)))


def present(found: Iterable[Op]) -> dict[str, str]:
    """Op -> hash of its code of today."""
    return {op.name: code.whole(op.name, gpus=True) for op in found}


def recorded(page: str) -> dict[str, str]:
    """Op -> source hash that a page was made from."""
    found = SOURCES.search(page)
    return dict(pair.split("=", 1) for pair in found[1].split()) if found else {}


def render(workers: Workers) -> tuple[str, list[str]]:
    """(the page, findings)."""
    import triton

    found = gpu_ops()
    sources = " ".join(f"{name}={source}" for name, source in present(found).items())
    parts, findings = [HEAD.format(sources=sources, triton=triton.__version__)], []
    for op in found:
        parts.append(f"## {op.name}\n\nCompiled for {_asked(op)}.\n")
        for device in (KNOWN[name] for name in DEVICES):
            jobs = candidates(op, device)
            print(f"{op.name} for {device.arch}: {len(jobs)} candidates", flush=True)
            kernels, bad = compiled(jobs, workers)
            parts.append(section(op, device, jobs, kernels))
            findings += bad
    return "\n".join(parts), findings


def _asked(op: Op) -> str:
    """The problems of an op in words."""
    tokens: dict[str, list[str]] = {}
    for count, (experts, topk, hidden, intermediate), dtype in ASKED.get(op.name, PRODUCTS):
        layer = f"{experts} experts, top-{topk}, {hidden} × {intermediate}, {dtype}"
        tokens.setdefault(layer, []).append(str(count))
    return "; ".join(f"T = {', '.join(counts)} with {layer}" for layer, counts in tokens.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or say that it is stale; 1 when there is something wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare the recorded source hashes, compile nothing")
    parser.add_argument("--workers", type=int, help="processes; one a core otherwise")
    options = parser.parse_args(arguments)
    if options.check:
        there = recorded(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}
        if there != (now := present(gpu_ops())):
            print(f"docs/cdna.md is stale: made from {there}, present are {now}; run make cdna", file=sys.stderr)
            return 1
        return 0
    began = time.monotonic()
    with Workers(options.workers) as workers:
        page, findings = render(workers)
    for finding in findings:
        print(finding, file=sys.stderr)
    if findings:
        print(f"{len(findings)} admitted candidates may not be: docs/cdna.md is left as it was", file=sys.stderr)
        return 1
    PAGE.write_text(page, encoding="utf-8")
    print(f"docs/cdna.md written after {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
