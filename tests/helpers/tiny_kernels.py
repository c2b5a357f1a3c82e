"""Triton kernels for the tests: every kind of parameter, spills, compilers that fail, crash or never end."""

import os
import signal

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["offset"], do_not_specialize_on_alignment=["stride"])
def scale(X, Y, n, stride, offset, factor, flag, BLOCK: tl.constexpr, MODE: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + i * stride, mask=i < n, other=0.0)
    x = tl.where(flag, x * factor, x)
    if MODE == "DOUBLE":
        x += x
    tl.store(Y + i, x + offset, mask=i < n)


@triton.jit
def square(X, Y, M: tl.constexpr, K: tl.constexpr):
    """Y [M, M] = X [M, K] @ X^T, in float16, twice over: a big tile in few warps spills."""
    rows = tl.arange(0, M)
    a = tl.load(X + rows[:, None] * K + tl.arange(0, K)[None, :])
    b = tl.load(X + tl.arange(0, K)[:, None] + rows[None, :] * K)
    c = tl.sqrt(tl.dot(a, b))
    c += tl.dot(c.to(tl.float16), c.to(tl.float16))
    tl.store(Y + rows[:, None] * M + rows[None, :], c)


@triton.constexpr_function
def _abort(value):
    return getattr(os, "abort")()  # noqa: B009 - Triton refuses to compile a plain reference to it


@triton.jit
def killer(Y, VALUE: tl.constexpr):
    tl.store(Y, _abort(VALUE))


@triton.constexpr_function
def _never():
    return getattr(signal, "pause")()  # noqa: B009 - a compiler that waits for ever, as quietly as that goes


@triton.jit
def endless(Y, VALUE: tl.constexpr):
    tl.store(Y, VALUE + _never())


@triton.jit
def broken(Y, VALUE: tl.constexpr):
    tl.static_assert(VALUE > 100, "VALUE is too small")
    tl.store(Y, VALUE)


@triton.jit
def pass_on(BOXES, OUT, rank, WORLD: tl.constexpr, BLOCK: tl.constexpr):
    """On each of WORLD GPUs: write rank · BLOCK + i into the box of the next one, raise its flag there, wait for the
    own flag, and read what the one before has written. BOXES has the address of each box: a flag, and from 16 on
    BLOCK numbers."""
    i = tl.arange(0, BLOCK)
    there = tl.load(BOXES + (rank + 1) % WORLD).to(tl.pointer_type(tl.int32))
    here = tl.load(BOXES + rank).to(tl.pointer_type(tl.int32))
    tl.store(there + 16 + i, rank * BLOCK + i)
    tl.debug_barrier()
    tl.atomic_add(there, 1, sem="release", scope="sys")
    while tl.atomic_add(here, 0, sem="acquire", scope="sys") == 0:
        pass
    tl.debug_barrier()
    tl.store(OUT + i, tl.load(here + 16 + i))
