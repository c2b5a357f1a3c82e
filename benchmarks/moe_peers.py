"""What ours is timed against: vLLM and torch where they can be imported, and whatever a hook `module:function` brings.

A hook is a function of a `moe_case.Case` that returns {name: callable -> [T, K]}. The callables must be capturable: no
host synchronisation. A peer of a hook replaces the built-in one of the same name. The hook's module may name its peers'
versions in a dict VERSIONS.
"""

import argparse
import importlib
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar, cast

import torch
from moe_case import GROUP, Case

from moecache.devices import Places
from moecache.kernels.sort.op import SORT, SortCall, SortResult

Peers = dict[str, Callable[[], torch.Tensor]]
Hook = Callable[[Case], Peers]
Result = TypeVar("Result")


class Absent(Exception):
    """This peer cannot serve the case, or is not installed."""


def vllm(case: Case) -> Peers:
    """vLLM's fused_experts as installed, with the configs that it ships."""
    try:
        from vllm.model_executor.layers.fused_moe import fused_experts
    except ImportError as error:
        raise Absent(f"vllm cannot be imported: {error}") from error
    more = {}
    if case.weights.dtype != "bf16":
        from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config

        scales = {"w1_scale": case.weights.w1_scale, "w2_scale": case.weights.w2_scale}
        more["quant_config"] = fp8_w8a8_moe_quant_config(**scales, block_shape=[GROUP, GROUP])
    return {"vllm": lambda: fused_experts(case.x, case.w1, case.w2, case.wts, case.ids, **more)}


def grouped_mm(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """torch's grouped product: rows [R, K] sorted by expert, weights [E, N, K], ends [E] int32 of their rows.

    Raises:
        Absent: this torch has none.
    """
    function = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if function is None:
        raise Absent(f"torch {torch.__version__} has no grouped_mm")
    product: torch.Tensor = function(rows, weights.mT, offs=ends)
    return product


def sort_of(case: Case) -> Callable[[], SortResult]:
    """Our sort of the case's pairs by expert, without padding, by its static default: no tuning."""
    args = SortCall(case.ids, case.E, 1)
    device = Places().of_tensor(case.ids).device
    config = SORT.space(SORT.problem(args, device, ""), device)[0]
    run = SORT.bind(config, args, SORT.outputs(args))
    return lambda: cast(SortResult, run(args, SORT.outputs(args)))


def torch_grouped(case: Case) -> Peers:
    """Two grouped_mm of torch between our sort and plain torch."""
    if case.weights.dtype != "bf16":
        raise Absent("torch's grouped_mm has no 128x128 blocks of fp8")

    sort = sort_of(case)

    def call() -> torch.Tensor:
        order = sort()
        pairs, ends = order.sorted_token_ids, order.expert_offsets[1:]
        gate, up = grouped_mm(case.x[pairs // case.topk], case.w1, ends).split(case.N, dim=1)
        rows = grouped_mm(torch.nn.functional.silu(gate) * up, case.w2, ends)
        placed = torch.empty_like(rows)
        placed[pairs] = rows * case.wts.view(-1)[pairs, None].to(rows.dtype)
        return placed.view(case.T, case.topk, case.K).sum(1)

    return {"torch": call}


BUILT_IN: tuple[Hook, ...] = (vllm, torch_grouped)


def versions(references: Sequence[str]) -> dict[str, str]:
    """Peer -> version, as the hooks' modules and the installed packages say."""
    found: dict[str, str] = {}
    with suppress(PackageNotFoundError):
        found["vllm"] = version("vllm")
    for reference in references:
        found |= getattr(importlib.import_module(reference.partition(":")[0]), "VERSIONS", {})
    return found


def collect(case: Case, hooks: Sequence[Hook], skip: Collection[str] = ()) -> Peers:
    """Every peer that can serve the case. One that cannot is told, and costs nobody else."""
    peers: Peers = {}
    for hook in (*hooks, *BUILT_IN):
        try:
            found = hook(case)
        except Absent as why:
            tell(str(why))
        except Exception as error:
            stop_if_lost(hook.__name__, error)
            tell(f"{hook.__module__}:{hook.__name__} failed: {type(error).__name__}: {str(error)[:300]}")
        else:
            peers = {name: call for name, call in found.items() if name not in skip} | peers
    return peers


def prewarm(script: str, options: argparse.Namespace, arguments: Sequence[str], *, apart: bool = False) -> None:
    """Fill the peers' compiler caches: the script with `--once`, a process for few and one for many tokens a shape; if
    `apart`, one for each number of tokens."""
    base = [sys.executable, script, *(a for a in arguments if a not in ("--prewarm", "--merge", "--missing"))]
    began, running = time.monotonic(), []
    groups = [[t for t in options.tokens if t <= 64], [t for t in options.tokens if t > 64]]
    for shape in options.shapes:
        for tokens in [[t] for t in options.tokens] if apart else groups:
            if tokens:
                more = ["--once", "--shapes", shape, "--tokens", *map(str, tokens)]
                running.append(subprocess.Popen([*base, *more], stdout=subprocess.DEVNULL))
    for process in running:
        try:
            process.wait(max(5.0, min(240.0, options.budget_s / 2) - (time.monotonic() - began)))
        except subprocess.TimeoutExpired:
            process.kill()
    print(f"prewarmed in {time.monotonic() - began:.0f} s", flush=True)


def attempt(name: str, call: Callable[[], Result]) -> Result | None:
    """What the call returns; None where it fails, which is told."""
    try:
        return call()
    except Exception as error:
        stop_if_lost(name, error)
        tell(f"{name} failed: {type(error).__name__}: {str(error)[:300]}")
        return None


_told: set[str] = set()


def tell(line: str) -> None:
    """Print it, once."""
    if line not in _told:
        _told.add(line)
        print(line, flush=True)


def stop_if_lost(name: str, error: Exception) -> None:
    """After a fault on the device nothing in this process works any more.

    Raises:
        SystemExit: says what to leave out of the next run.
    """
    if any(sign in str(error) for sign in ("illegal", "misaligned", "launch failure")):
        raise SystemExit(f"the device is lost in {name} ({str(error)[:200]}): run again with --merge --skip {name}")
