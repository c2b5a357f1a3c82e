"""Reads the .amdgcn text that Triton emits: its instructions, and the figures that a launch needs.

Whatever is not understood to the letter is refused: an interpreter that guesses proves nothing.
"""

import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cdna.library import Instruction, Operand, codes

NOTHING, VECTOR, SCALAR, CONSTANT, SCC, VCCZ, EXECZ = range(7)  # kinds of operands, as in machine.h
CLAMP, RETURNS, INTO_LDS, OFFSET_BY_LANE, SDWA, DPP = 1, 2, 4, 8, 16, 32  # flags, as in machine.h
WHOLE = 6
PRESERVE = 2
ACCUMULATION = 256  # first accumulation register, while text is read
WIDEST = 16  # registers of one operand
ALL_COUNTS = 1 << 20  # of a wait that does not name a counter

SPECIAL = {"vcc": 106, "vcc_lo": 106, "vcc_hi": 107, "exec": 126, "exec_lo": 126, "exec_hi": 127, "m0": 124}
BITS = {"scc": SCC, "src_scc": SCC, "vccz": VCCZ, "src_vccz": VCCZ, "execz": EXECZ, "src_execz": EXECZ}
PARTS = {"BYTE_0": 0, "BYTE_1": 1, "BYTE_2": 2, "BYTE_3": 3, "WORD_0": 4, "WORD_1": 5, "DWORD": WHOLE}
MOVES = {"quad_perm": 1, "row_shl": 2, "row_shr": 3, "row_ror": 4, "row_mirror": 5, "row_half_mirror": 6,
         "row_bcast:15": 7, "row_bcast:31": 8, "row_newbcast": 9, "wave_shl": 10}  # DPP, as in machine.h  # fmt: skip

INTEGER = re.compile(r"-?(0x[0-9a-fA-F]+|\d+)")
FLOAT = re.compile(r"-?\d+\.\d+(e[+-]?\d+)?")
REGISTER = re.compile(r"([vsa])(?:(\d+)|\[(\d+)(?::\d+)?\])")
LABEL = re.compile(r"([A-Za-z_.$][\w.$]*):")
ENDING = re.compile(r"(_e64_dpp|_e32|_e64|_sdwa|_dpp)$")
MODIFIER = re.compile(
    r"\s(offset|offset0|offset1|op_sel|op_sel_hi|neg_lo|neg_hi|quad_perm|row_shl|row_shr|row_ror|row_bcast|row_newbcast|wave_shl|"
    r"row_mask|bank_mask|bound_ctrl|dst_sel|dst_unused|src0_sel|src1_sel|mul|div|cbsz|blgp|bitop3):(\S+)|"
    r"\s(row_mirror|row_half_mirror|clamp|sc0|sc1|nt|lds|offen)(?=\s|$)"
)
WITHOUT_OPERANDS = {
    "s_nop", "s_setprio", "s_sleep", "s_barrier", "s_endpgm", "s_trap", "s_sched_barrier", "buffer_inv", "buffer_wbl2",
    "s_icache_inv", "s_dcache_inv", "s_dcache_wb", "v_nop",
}  # fmt: skip
TWO_RESULTS = re.compile(r"v_(add|sub|subrev|addc|subb|subbrev)_co_u32|v_div_scale_f32|v_mad_u64_u32|v_mad_i64_i32")
NO_RESULT = re.compile(r"ds_write|ds_(add|or|max)_[uifb]\d|s_cmp|s_bitcmp")
FROM_HALVES = re.compile(r"v_(pk_)?(add|sub|mul|fma|min|max|minimum3|maximum3)_f16|v_cmp_\w+_f16|v_cvt_f32_f16")


class Unsupported(Exception):
    """What this does not interpret; the text says what."""


@dataclass
class Kernel:
    """One kernel, ready to run.

    Attributes:
        name, arch, lines: as in the text; a line for each instruction.
        code: the instructions. registers: how many vector registers they need.
        arguments: offset, size and kind of each.
        arguments_bytes, preloaded, first_word, group_at, arguments_at, group_numbers: see Launch in interpreter.c.
    """

    name: str
    arch: str
    lines: list[tuple[int, str]]
    code: Any
    registers: int
    arguments: list[tuple[int, int, str]] = field(default_factory=list)
    arguments_bytes: int = 16
    preloaded: int = 0
    first_word: int = 0
    group_at: int = 2
    arguments_at: int = 0
    group_numbers: tuple[int, int, int] = (1, 0, 0)

    @property
    def share(self) -> float:
        """How many of its instructions some wave has executed so far."""
        return sum(each.ran for each in self.code) / len(self.code)


def read(text: str, arch: str) -> Kernel:
    """The kernel in an assembly text.

    Raises:
        Unsupported: an instruction, operand or feature that is not interpreted.
    """
    names = re.findall(r"\.amdhsa_kernel (\S+)", text)
    if len(names) != 1:
        raise Unsupported(f"kernels {names}; one is wanted")

    def figure(name: str) -> int:
        found = re.search(rf"\.amdhsa_{name}\s+(\d+)", text)
        return int(found[1]) if found else 0

    if figure("private_segment_fixed_size"):
        raise Unsupported(f"{names[0]} spills: {figure('private_segment_fixed_size')} bytes of scratch")
    body, labels = _body(text, names[0])
    listed = re.search(r"\.args:\n(.*?)\n\s+\.group_segment", text, re.DOTALL)
    size = re.search(r"\.kernarg_segment_size:\s+(\d+)", text)
    assert listed and size
    items = [dict(re.findall(r"\.(\w+):\s+(\S+)", item)) for item in re.split(r"\n\s+- ", "\n" + listed[1])[1:]]
    return Kernel(
        names[0], arch, body, *encoded(body, labels),
        [(int(item["offset"]), int(item["size"]), item["value_kind"]) for item in items], int(size[1]),
        figure("user_sgpr_kernarg_preload_length"), figure("user_sgpr_kernarg_preload_offset"),
        figure("user_sgpr_count"), 2 * figure("user_sgpr_dispatch_ptr") + 2 * figure("user_sgpr_queue_ptr"),
        tuple(figure(f"system_sgpr_workgroup_id_{axis}") for axis in "xyz"),
    )  # fmt: skip


def of_lines(lines: Iterable[str], arch: str) -> Kernel:
    """A kernel of a few lines, whose arguments are two addresses: of what it reads, and of what it writes."""
    body, labels = [], dict[str, int]()
    for number, line in enumerate(lines, 1):
        if label := LABEL.match(line):
            labels[label[1]] = len(body)
        else:
            body.append((number, line))
    pointers = [(0, 8, "global_buffer"), (8, 8, "global_buffer")]
    return Kernel("lines", arch, body, *encoded(body, labels), pointers)


def _body(text: str, name: str) -> tuple[list[tuple[int, str]], dict[str, int]]:
    """(line number and text of each instruction, place of each label among them)."""
    body: list[tuple[int, str]] = []
    labels: dict[str, int] = {}
    inside = False
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split(";")[0].split("//")[0].strip()
        if label := LABEL.match(line):
            inside = (inside or label[1] == name) and not (body and label[1].startswith(".Lfunc_end"))
            labels[label[1]] = len(body)
        elif inside and line and not line.startswith("."):
            body.append((number, line))
    return body, labels


def encoded(body: Sequence[tuple[int, str]], labels: dict[str, int]) -> tuple[Any, int]:
    """The instructions of a kernel, and how many vector registers they need.

    Raises:
        Unsupported: some are not interpreted; all of them are named.
    """
    code, refused = (Instruction * len(body))(), set()
    for into, (number, line) in zip(code, body, strict=True):
        into.line = number
        try:
            _encode(into, line, labels)
        except Unsupported as why:
            refused.add(str(why))
    if refused:
        raise Unsupported("; ".join(sorted(refused)))
    return code, _registers(code)


def _registers(code: Any) -> int:
    """Moves the accumulation registers right behind the others, and counts both."""
    used = [o for each in code for o in (each.to, each.also_to, *each.source) if o.kind == VECTOR]
    plain = max((o.index for o in used if o.index < ACCUMULATION), default=0) + WIDEST
    for operand in used:
        operand.index -= ACCUMULATION - plain if operand.index >= ACCUMULATION else 0
    return max((o.index for o in used), default=0) + WIDEST


def mnemonic(line: str) -> str:
    """The name of a line's instruction without its ending."""
    return ENDING.sub("", line.split(None, 1)[0])


def _encode(into: Instruction, line: str, labels: dict[str, int]) -> None:
    full, _, rest = line.partition(" ")
    name = mnemonic(line)
    if name not in codes():
        raise Unsupported(f"instruction {full}")
    into.code = codes()[name]
    into.to_part, into.op_sel_hi, into.row_mask, into.bank_mask = WHOLE, 0 if "_mix" in name else 7, 15, 15
    if name == "s_waitcnt":
        _wait(into, rest)
    elif name == "s_setreg_imm32_b32":
        _mode(into, rest)
    elif name.startswith(("s_cbranch", "s_branch")):
        into.target = labels[rest.strip()]
    elif name not in WITHOUT_OPERANDS:
        into.flags |= SDWA * full.endswith("_sdwa") | DPP * full.endswith("_dpp")
        parts = _modifiers(into, " " + rest, name)
        _operands(into, name, split(parts.pop("")), parts)


def _wait(into: Instruction, rest: str) -> None:
    """s_waitcnt: what may stay on its way of vector memory, and of LDS and scalar loads."""
    counts = dict(re.findall(r"(\w+)\((\d+)\)", rest))
    if not counts or set(counts) - {"vmcnt", "lgkmcnt", "expcnt"}:
        raise Unsupported(f"s_waitcnt {rest}")
    into.offset = int(counts.get("vmcnt", ALL_COUNTS))
    into.second_offset = int(counts.get("lgkmcnt", ALL_COUNTS))


def _mode(into: Instruction, rest: str) -> None:
    """s_setreg_imm32_b32 hwreg(HW_REG_MODE, first bit, width), value: rounding may only be what it is anyway."""
    found = re.fullmatch(r"\s*hwreg\(HW_REG_MODE, (\d+), (\d+)\), (\w+)", rest)
    if not found or (found[1], found[2]) != ("23", "1"):
        raise Unsupported(f"s_setreg_imm32_b32 {rest}")
    into.offset, into.second_offset = int(found[1]), int(found[3], 0)


def _bits(text: str) -> int:
    return sum(int(bit) << i for i, bit in enumerate(text.strip("[]").split(",")))


def _modifiers(into: Instruction, rest: str, name: str) -> dict[str, str]:
    """Enters them; returns those that operands depend on, and under '' what is left of the text."""
    found: dict[str, str] = {}
    for key, value, word in MODIFIER.findall(rest):
        found[key or word] = value
        _modifier(into, key or word, value)
    if {"cbsz", "blgp"} & {key for key, value in found.items() if value != "0"}:
        raise Unsupported(f"{name} with formats other than e4m3")
    if "op_sel" in found and name in ("v_cvt_f32_fp8", "v_cvt_f32_bf8"):
        raise Unsupported(f"{name} with op_sel")
    return found | {"": MODIFIER.sub("", rest)}


def _modifier(into: Instruction, key: str, value: str) -> None:
    simple = {"offset": "offset", "offset0": "offset", "bitop3": "offset", "offset1": "second_offset",
              "row_mask": "row_mask", "bank_mask": "bank_mask"}  # fmt: skip
    flags = {"clamp": CLAMP, "sc0": RETURNS, "lds": INTO_LDS, "offen": OFFSET_BY_LANE}
    if swap := re.fullmatch(r"swizzle\(SWAP,(\d+)\)", value or ""):  # lanes of 32 trade places with those so far away
        into.offset = 31 | int(swap[1]) << 10
    elif key in simple and not value.startswith("swizzle"):
        setattr(into, simple[key], int(value, 0))
    elif key in ("op_sel", "op_sel_hi", "neg_lo", "neg_hi"):
        setattr(into, key, _bits(value))
    elif key in flags:
        into.flags |= flags[key]
    elif key == "quad_perm":
        into.dpp = MOVES[key]
        into.quad[:] = [int(lane) for lane in value.strip("[]").split(",")]
    elif key == "row_bcast":
        into.dpp = MOVES[f"row_bcast:{value}"]
    elif key in MOVES:
        into.dpp, into.dpp_by = MOVES[key], int(value or 0)
    elif key == "bound_ctrl":
        into.bound = 1  # 0 and 1 are two spellings of it
    elif key == "dst_sel":
        into.to_part = PARTS[value]
    elif key == "dst_unused" and value != "UNUSED_SEXT":
        into.to_rest = {"UNUSED_PAD": 0, "UNUSED_PRESERVE": PRESERVE}[value]
    elif key == "src0_sel":
        into.source[0].part = PARTS[value]
    elif key == "src1_sel":
        into.source[1].part = PARTS[value]
    elif key == "mul":
        into.scale = {"2": 1, "4": 2}[value]
    elif key == "div":
        into.scale = {"2": 3}[value]
    elif key not in ("sc1", "nt", "cbsz", "blgp"):  # caches are not modelled
        raise Unsupported(f"{key}:{value}")


def split(text: str) -> list[str]:
    """Operands, which commas part outside of brackets."""
    return [part.strip() for part in re.split(r",(?![^\[(]*[\])])", text) if part.strip()]


def _operands(into: Instruction, name: str, given: list[str], modifiers: dict[str, str]) -> None:
    """Which operand is a result, and which is which source."""
    into.source[0].part = into.source[0].part if "src0_sel" in modifiers else WHOLE
    into.source[1].part = into.source[1].part if "src1_sel" in modifiers else WHOLE
    if name.startswith(("buffer_", "global_")):
        _memory(into, name, given)
        return
    if NO_RESULT.match(name):
        results = 0
    else:
        results = 2 if TWO_RESULTS.fullmatch(name) else 1
    for text, into_operand in zip(given[:results], (into.to, into.also_to), strict=False):
        _operand(into_operand, text)
    sources = given[results:]
    if name.startswith("s_load_") and INTEGER.fullmatch(sources[1]):
        into.offset = int(sources.pop(), 0)
    if name == "v_cndmask_b32" and len(sources) == 2:
        sources.append("vcc")
    if len(sources) > 4:
        raise Unsupported(f"{name} of {len(sources)} operands")
    for i, text in enumerate(sources):
        narrow = bool(FROM_HALVES.fullmatch(name)) or ("_mix" in name and into.op_sel_hi >> i & 1 == 1)
        _operand(into.source[i], text, narrow)
    if (shown := modifiers.get("op_sel", "")).count(",") == len(sources) < 3:
        # the last bit is that of the result, the fourth of op_sel
        into.op_sel = (into.op_sel & (1 << len(sources)) - 1) | _bits(shown) >> len(sources) << 3


def _memory(into: Instruction, name: str, given: list[str]) -> None:
    """Sources: address or offset of a lane, SGPRs of the base, scalar offset, and what an atomic is given."""
    buffer, atomic = name.startswith("buffer_"), "_atomic_" in name
    if name.startswith("global_load_lds_"):
        into.flags |= INTO_LDS
    order = given
    if buffer:
        value, order = ("", given) if into.flags & INTO_LDS else (given[0], given[1:])
        order = ["off", *order] if len(order) == 2 else order
    elif atomic:
        value = given.pop(0) if into.flags & RETURNS else ""
        order = [given[0], given[2], "off", given[1]]
    elif "_store_" in name:
        value, order = given[1], [given[0], given[2]]
    else:
        value, order = ("", given) if into.flags & INTO_LDS else (given[0], given[1:])
    if value:
        _operand(into.to, value)
    for operand, text in zip(into.source, order, strict=False):
        _operand(operand, text)
    if buffer and atomic:
        _operand(into.source[3], value)


def _operand(into: Operand, text: str, narrow: bool = False) -> None:
    """One operand; `narrow`: a constant with a point is a float16."""
    if text.startswith("sext("):
        into.extend, text = 1, text[5:-1]
    if re.match(r"-\||-[vsame]", text):
        into.negative, text = 1, text[1:]
    elif text.startswith("neg("):
        into.negative, text = 1, text[4:-1]
    if text.startswith("|"):
        into.absolute, text = 1, text[1:-1]
    if found := REGISTER.fullmatch(text):
        into.kind = SCALAR if found[1] == "s" else VECTOR
        into.index = int(found[2] or found[3]) + ACCUMULATION * (found[1] == "a")
    elif text in SPECIAL:
        into.kind, into.index = SCALAR, SPECIAL[text]
    elif text in BITS:
        into.kind = BITS[text]
    elif INTEGER.fullmatch(text):
        into.kind, into.value = CONSTANT, int(text, 0) & 0xFFFFFFFFFFFFFFFF
    elif FLOAT.fullmatch(text):
        value = 0.15915494309189532 if text.startswith("0.15915494") else float(text)  # 1 / 2π
        into.kind, into.value = CONSTANT, int.from_bytes(struct.pack("<e" if narrow else "<f", value), "little")
    elif text != "off":
        raise Unsupported(f"operand {text}")
