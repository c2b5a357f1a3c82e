"""An op on the CPU whose candidates misbehave in every way that the tuner must survive."""

import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tiny_kernels
import torch

from moecache.kernels.contract import Args, Bound, Source
from moecache.predict.work import Work
from moecache.schemas.config import Config, config
from moecache.schemas.device import Device
from moecache.schemas.layer import Layer
from moecache.schemas.problem import Problem

GOOD, FAST, SLOW = config("good"), config("fast"), config("slow")
COMPILED = {"killer": tiny_kernels.killer, "endless": tiny_kernels.endless, "broken": tiny_kernels.broken}


def problem(tokens: int = 32, **changes: Any) -> Problem:
    fields: dict[str, Any] = {
        "op": "faulty", "vendor": "cpu", "arch": "x86_64", "units": 2, "tokens": tokens, "experts": 8,
        "topk": 2,
    }  # fmt: skip
    return Problem(**fields | changes)


class Faulty:
    """Adds the expert ids to random numbers. A config's variant names its fault; it sleeps for `us`."""

    name, source, where = "faulty", "v1", "faulty_op:FAULTY"

    def __init__(self, *configs: Config) -> None:
        self.configs = list(configs)
        self.bare = False  # do as if the compiled candidates had nothing to compile
        self.running: list[str] = []

    def problems(self, layer: Layer, tokens: Sequence[int], device: Device) -> list[Problem]:
        return [problem(t) for t in tokens]

    def left_out(self, layer: Layer, tokens: Sequence[int], device: Device) -> str:
        return ""

    def space(self, problem: Problem, device: Device) -> list[Config]:
        return self.configs

    def fits(self, problem: Problem, config: Config, device: Device) -> str:
        return "" if config in self.configs else "not one of ours"

    def work(self, problem: Problem, config: Config, device: Device) -> Work:
        return Work(us=float(dict(config.params).get("cost", 10)))

    def inputs(self, problem: Problem, topk_ids: torch.Tensor, seed: int) -> Args:
        rng = torch.Generator().manual_seed(seed)
        return {"ids": topk_ids, "x": torch.rand(topk_ids.shape, generator=rng)}

    def outputs(self, args: Args) -> torch.Tensor:
        return torch.empty_like(args["x"])

    def bind(self, config: Config, args: Args, out: torch.Tensor) -> Bound:
        return partial(self.launch, config)

    def launch(self, config: Config, args: Args, out: torch.Tensor) -> torch.Tensor:
        self.running.append(config.variant)
        torch.add(args["x"], args["ids"], out=out)
        if us := dict(config.params).get("us", 0):
            time.sleep(float(us) * 1e-6)
        if fault := FAULTS.get(config.variant):
            return fault(args, out)
        return out

    def reference(self, args: Args) -> torch.Tensor:
        return args["x"] + args["ids"]

    def error(self, got: torch.Tensor, want: torch.Tensor) -> float:
        return float((got - want).abs().max() / want.abs().max())

    def tolerance(self, problem: Problem) -> float:
        return 1e-6

    def sources(self, problem: Problem, config: Config, device: Device) -> list[Source]:
        if self.bare or config.variant not in [*COMPILED, "compiles"]:
            return []
        if config.variant == "compiles":
            signature = {**dict.fromkeys("XY", "*fp16"), "M": "constexpr", "K": "constexpr"}
            given = {"k": 16, "warps": 4} | dict(config.params)
            sizes = {"M": given["m"], "K": given["k"]}
            return [Source(tiny_kernels.square, signature, sizes, {"num_warps": given["warps"]})]
        return [Source(COMPILED[config.variant], {"Y": "*i32", "VALUE": "constexpr"}, {"VALUE": 7})]


def _raise(args: Args, out: torch.Tensor) -> torch.Tensor:
    raise ValueError("cannot do that")


def _oom(args: Args, out: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("tried to allocate 7 EiB")


def _allocate(args: Args, out: torch.Tensor) -> torch.Tensor:
    return torch.empty(1 << 55)


def _exit(args: Args, out: torch.Tensor) -> torch.Tensor:
    raise SystemExit(3)


def _hang(args: Args, out: torch.Tensor) -> torch.Tensor:
    """For ever; HANGING says where to note that it has begun."""
    Path(os.environ.get("HANGING", os.devnull)).touch()
    threading.Event().wait()
    return out


def _wrong(args: Args, out: torch.Tensor) -> torch.Tensor:
    out[0, 0] += 1
    return out


def _partial(args: Args, out: torch.Tensor) -> torch.Tensor:
    out[-1] = float("nan")  # what the poison leaves in rows that nobody writes
    return out


def _greedy(args: Args, out: torch.Tensor) -> torch.Tensor:
    args["ids"].zero_()
    return out


def _reshape(args: Args, out: torch.Tensor) -> torch.Tensor:
    return torch.zeros(3, 5, 7)


def _dice(args: Args, out: torch.Tensor) -> torch.Tensor:
    torch.rand(1000)
    random.random()
    return out


def _print(args: Args, out: torch.Tensor) -> torch.Tensor:
    print("a kernel talks", flush=True)
    os.write(1, b"below Python, too\n")
    return out


def _segv(args: Args, out: torch.Tensor) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGSEGV)
    return out


def _leave(args: Args, out: torch.Tensor) -> torch.Tensor:
    os.write(2, b"LLVM ERROR: Cannot select: something\n")
    os._exit(7)


def _killed(args: Args, out: torch.Tensor) -> torch.Tensor:
    """Ended from outside, as where memory runs out: once, if KILLED_BEFORE says where to note it."""
    note = Path(os.environ.get("KILLED_BEFORE", os.devnull))
    if not note.is_file():
        if note != Path(os.devnull):
            note.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return out


FAULTS = {
    "raise": _raise, "oom": _oom, "allocate": _allocate, "exit": _exit, "hang": _hang, "wrong": _wrong,
    "partial": _partial, "greedy": _greedy, "reshape": _reshape, "dice": _dice, "print": _print,
    "segv": _segv, "leave": _leave, "killed": _killed,
}  # fmt: skip
FAULTY = Faulty(GOOD, *(config(name) for name in [*FAULTS, *COMPILED]))
