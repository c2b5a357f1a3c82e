"""Tests of kernels in Triton's interpreter, all in one process of their own: see test_interpreted."""

import os
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moecache.kernels import running
from moecache.kernels.launch import WORKSPACE, Launch, operands
from moecache.kernels.running import Running
from moecache.kernels.sort.op import SORT
from moecache.kernels.tensors import poison

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MARKS = [
    pytest.mark.interpreted,
    pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, see test_interpreted"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NaN of the poison in rows that count for nothing
]


def marked(test):
    for mark in MARKS:
        test = mark(test)
    return test


def of_the_cpu_test(name):
    """The module test_NAME.py: its calls and its model serve here too."""
    spec = spec_from_file_location(f"cpu_{name}", Path(__file__).parent.parent / f"test_{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def full_of_nan(tensor):
    """The tensor, all NaN, or an integer that is no row. Both kinds of fp8 have NaN, but no fill that knows it."""
    if tensor.itemsize == 1:
        tensor.view(torch.uint8).fill_(0x7F if tensor.dtype == torch.float8_e4m3fn else 0x80)
        return tensor
    return poison(tensor)


def poison_workspaces(monkeypatch):
    """What no kernel has written of a workspace is NaN, or an integer that is no row."""
    through_jit = Running._through_jit

    def poisoned(self, given):
        named = dict(zip(self._order, given, strict=True))
        for each in (operand for launch in self.plan.launches for operand in operands(launch)):
            if each.name == WORKSPACE:
                full_of_nan(running._tensor(each, named))
        through_jit(self, given)

    monkeypatch.setattr(Running, "_through_jit", poisoned)


class TorchSort:
    """The sort of a call in torch, launched as a kernel is."""

    arg_names = ("ids", "mapping", "sorted_token_ids", "expert_ids", "num_tokens_post_padded", "expert_offsets",
                 "counts", "tickets", "posted")  # fmt: skip

    def __init__(self, call):
        self.call = call

    def __getitem__(self, grid):
        return self.run

    def run(self, ids, mapping, **outs):
        mapping = None if self.call.expert_map is None else mapping
        found = SORT.reference(replace(self.call, topk_ids=ids, expert_map=mapping, posted=None))
        for name, out in outs.items():
            out.copy_(getattr(found, name).view(out.shape))


def sort_in_torch(monkeypatch):
    """The sort has tests of its own, and half of the time of others."""
    from moecache.kernels.fused_moe import sort_and_sum

    def launches(config, call, out, work, fused=True):
        outs = (getattr(out, name) for name in TorchSort.arg_names[2:])
        return [Launch(TorchSort(call), (1,), (call.topk_ids, call.expert_map or call.topk_ids, *outs), {}, {})]

    monkeypatch.setattr(sort_and_sum.sort_gpu, "launches", launches)


def without_waste():
    """Take from Triton's interpreter what it does over and over to no effect: two thirds of its time."""
    from triton.runtime import interpreter

    patch, np_dtype, patched, known = interpreter._patch_lang, interpreter._get_np_dtype, set(), {}

    def patched_once(fn):
        """The language of a module stays replaced, which every call of a function does anew."""
        if fn.__module__ not in patched:
            patched.add(fn.__module__)
            patch(fn)
        return SimpleNamespace(restore=lambda: None)

    def known_dtype(dtype):
        """From a table that is not made anew."""
        name = dtype.scalar.name
        if name not in known:
            known[name] = np_dtype(dtype.scalar)
        return known[name]

    interpreter._patch_lang, interpreter._get_np_dtype = patched_once, known_dtype
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)  # sums for a check that is off


def knows_fnuz():
    """Whether this Triton's interpreter has gfx942's fp8: 3.7 has not."""
    from triton import __version__

    return tuple(map(int, __version__.split(".")[:2])) >= (3, 8)


if INTERPRETED:
    without_waste()
