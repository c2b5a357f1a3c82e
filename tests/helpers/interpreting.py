"""Tests of kernels in Triton's interpreter, all in one process of their own: see test_interpreted."""

import os
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest

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


if INTERPRETED:
    without_waste()
