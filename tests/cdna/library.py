"""Builds the C part with the `cc` on the path, once for all processes of a test run, and loads it."""

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from ctypes import c_char, c_int32, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = ("-O2", "-shared", "-fPIC", "-std=gnu11", "-ffp-contract=off", "-fno-strict-aliasing")


class Operand(ctypes.Structure):
    """As in machine.h."""

    _fields_ = [("kind", c_uint8), ("negative", c_uint8), ("absolute", c_uint8), ("part", c_uint8),
                ("extend", c_uint8), ("index", c_uint16), ("value", c_uint64)]  # fmt: skip


class Instruction(ctypes.Structure):
    """As in machine.h."""

    _fields_ = [
        ("code", c_uint32), ("line", c_int32), ("target", c_int32), ("to", Operand), ("also_to", Operand),
        ("source", Operand * 4), ("offset", c_int32), ("second_offset", c_int32), ("flags", c_uint32),
        ("op_sel", c_uint8), ("op_sel_hi", c_uint8), ("neg_lo", c_uint8), ("neg_hi", c_uint8), ("dpp", c_uint8),
        ("dpp_by", c_uint8), ("row_mask", c_uint8), ("bank_mask", c_uint8), ("bound", c_uint8), ("quad", c_uint8 * 4),
        ("to_part", c_uint8), ("to_rest", c_uint8), ("scale", c_uint8), ("ran", c_uint8),
    ]  # fmt: skip


class Launch(ctypes.Structure):
    """As in interpreter.c."""

    _fields_ = [
        ("program", c_void_p), ("length", c_uint32), ("registers", c_uint32), ("grid", c_uint32 * 3),
        ("threads", c_uint32), ("lds_bytes", c_uint32), ("arguments", c_uint64), ("arguments_at", c_uint32),
        ("preloaded", c_uint32), ("first_word", c_uint32), ("group_at", c_uint32), ("group_numbers", c_uint32 * 3),
    ]  # fmt: skip


class Order(ctypes.Structure):
    """As in interpreter.c."""

    _fields_ = [
        ("gfx950", c_uint32), ("late", c_uint32), ("resident", c_uint32), ("shuffled", c_uint32),
        ("quantum", c_uint32), ("seed", c_uint64), ("most_steps", c_uint64),
    ]  # fmt: skip


class Region(ctypes.Structure):
    """As in machine.h."""

    _fields_ = [("start", c_uint64), ("size", c_uint64)]


class Report(ctypes.Structure):
    """As in machine.h."""

    _fields_ = [("steps", c_uint64), ("faults", c_uint64), ("outside_lds", c_uint64), ("outside_buffer", c_uint64),
                ("text", c_char * 4000)]  # fmt: skip


def compiler() -> str | None:
    """The C compiler, if there is one."""
    return shutil.which("cc")


def _compile(cc: str, into: Path) -> None:
    own = into.with_suffix(".new")
    command = [cc, *FLAGS, "-o", str(own), str(HERE / "interpreter.c"), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    own.replace(into)


@cache
def library() -> ctypes.CDLL:
    """The loaded library. Its file is named by its source, so that processes and runs share it.

    Raises:
        RuntimeError: no compiler, or one that does not compile it.
    """
    cc = compiler()
    if cc is None:
        raise RuntimeError("the interpreter of CDNA code wants a C compiler named cc")
    files = sorted(HERE.glob("*.[ch]"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files) + repr(FLAGS).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"moecache-cdna-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} is another user's; set TMPDIR to a folder of your own")
    built = folder / f"interpreter-{digest}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process compiles, the others wait for it
        if not built.exists():
            _compile(cc, built)
    loaded = ctypes.CDLL(str(built))
    loaded.instruction_name.restype = ctypes.c_char_p
    loaded.size_of.restype = ctypes.c_size_t
    for number, kind in enumerate((Instruction, Launch, Order, Report)):
        assert loaded.size_of(number) == ctypes.sizeof(kind), f"{kind.__name__} is another one in C"
    return loaded


@cache
def codes() -> dict[str, int]:
    """Place of every instruction in the library's list, by mnemonic without an ending such as _e32."""
    known = library()
    return {known.instruction_name(i).decode(): i for i in range(known.instruction_count())}
