"""Tests of kernels in Triton's interpreter, which run in a process of their own: see the tests `…_interpreted`."""

import os
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MARKS = [
    pytest.mark.interpreted,
    pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, see test_the_kernels_interpreted"),
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
