"""Tables of configs by tokens, as engines keep them for their Triton kernel: JSON files whose name is the key."""

import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moecache.schemas.config import Config
from moecache.schemas.device import KNOWN, Device
from moecache.schemas.errors import InvalidInput
from moecache.schemas.flags import installed
from moecache.schemas.problem import Problem, token_bucket
from moecache.schemas.rule import Entry, believed
from moecache.schemas.timing import FROM, Environment, Timing, now
from moecache.store import atomic

VARIANT = "fused_moe_kernel"
# What the kernel takes of a row; any other name in it would crash the engine.
BLOCKS = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M")
LAUNCH = ("num_warps", "num_stages", "SPLIT_K", "num_ctas", "waves_per_eu", "matrix_instr_nonkdim", "kpack")
# The token counts of nearly all tables that engines ship. They take the nearest row, however far it is, so a table has
# a row for each: one that nobody measured would get the row of a neighbour.
GRID = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)
MOST_BYTES = 1 << 20  # of a table; the longest that engines ship has 5 KB

_NAME = re.compile(
    r"E=(?P<experts>\d{1,6}),N=(?P<intermediate>\d{1,9}),device_name=(?P<device>[^,]*)(?:,dtype=(?P<dtype>\w+))?"
    r"(?:,block_shape=\[(?P<block_n>\d{1,6}), ?(?P<block_k>\d{1,6})\])?(?P<per_channel>,per_channel_quant=True)?\.json"
)


Rows = Mapping[int, Mapping[str, Any]]  # by tokens
Default = Callable[[int, Problem], dict[str, Any]]  # tokens, and their layer -> what the engine would take


def file_name(problem: Problem, device: str, *, space: str = "") -> str:
    """The name of a table, which names neither hidden size nor top-k; `device` as the engine spells it, `space` as it
    writes between the sizes of a block."""
    parts = [f"E={problem.experts}", f"N={problem.dim('intermediate')}", f"device_name={device}"]
    parts += [f"dtype={problem.dtype}"] if problem.dtype else []
    parts += [f"block_shape=[{sizes[0]},{space}{sizes[1]}]"] if (sizes := block(problem)) else []
    parts += ["per_channel_quant=True"] if problem.dim("per_channel") else []
    return ",".join(parts) + ".json"


def block(problem: Problem) -> list[int] | None:
    """Rows and columns that share a scale."""
    return [problem.dim("block_n"), problem.dim("block_k")] if problem.dim("block_k") else None


def config_of(row: Any) -> Config | None:
    """A row as a config; None for what is no row of this kernel."""
    known = isinstance(row, Mapping) and {*BLOCKS} <= row.keys() <= {*BLOCKS, *LAUNCH}
    if not known or not all(type(value) is int for value in row.values()):
        return None
    try:
        return Config(variant=VARIANT, params=tuple(row.items()))
    except ValidationError:
        return None


def refused(config: Config, scales: int = 0) -> str:
    """Why the kernel cannot take a config, as far as that can be said without it; '' where it may.

    Args:
        scales: k values that share a scale; 0 for none.
    """
    row: dict[str, Any] = dict(config.params)
    if config.variant != VARIANT or config.extra or config_of(row) is None:
        return f"{config.name} is no config of {VARIANT}"
    for name, most in {"BLOCK_SIZE_M": 256, "BLOCK_SIZE_N": 256, "BLOCK_SIZE_K": 256, "num_warps": 16}.items():
        if not 1 <= (value := row.get(name, 1)) <= most or value & (value - 1):
            return f"{name}={value} is no power of two up to {most}"
    for name, least, most in (("GROUP_SIZE_M", 1, 128), ("num_stages", 0, 8)):
        if not least <= row.get(name, 1) <= most:
            return f"{name}={row[name]} is not from {least} to {most}"
    if scales and scales % row["BLOCK_SIZE_K"] and row["BLOCK_SIZE_K"] % scales:
        return f"BLOCK_SIZE_K={row['BLOCK_SIZE_K']} and scales of {scales} do not divide each other"
    return ""


def dims(experts: int, intermediate: int, tokens: int, hidden: int = 0, topk: int = 1, **named: Any) -> dict[str, Any]:
    """What a problem of an engine's kernel consists of. What tables say stands under top-k 1 and no hidden size, as
    they name neither.

    Args:
        named: `dtype`, the engine's word where it is not 16 bits; `block_n` and `block_k`, which share a scale;
            `per_channel`.
    """
    known = {"tokens": token_bucket(tokens), "experts": experts, "topk": topk, "dtype": named.pop("dtype", "")}
    named |= {"intermediate": intermediate, "hidden": hidden}
    return known | {name: value for name, value in named.items() if value}


def problem(op: str, device: Device, found: Mapping[str, Any], **rest: Any) -> Problem:
    """The problem of an engine's kernel on a device; `found` is what `dims` gives."""
    fields = {name: found[name] for name in ("tokens", "experts", "topk", "dtype")}
    dims = tuple((name, value) for name, value in found.items() if name not in fields)
    return Problem(op=op, vendor=device.vendor, arch=device.arch, units=device.units, dims=dims, **fields, **rest)


def told(problem: Problem) -> Problem:
    """The problem under which rows of tables stand that are meant for it."""
    dims = tuple((name, value) for name, value in problem.dims if name != "hidden")
    return problem.model_copy(update={"topk": 1, "dims": dims, "routing": "", "source": ""})


# --- tables of engines, read ---


def package_folder(package: str) -> Path:
    """Where an installed package lies, which is not imported.

    Raises:
        InvalidInput: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InvalidInput(f"{package} is not installed here; name a file or a folder of its tables")
    return Path(spec.submodule_search_locations[0])


def found(package: str, path: Path | None, within: str, pattern: str = "E=*.json") -> tuple[list[Path], str]:
    """Files to read, and where they are from, like `vllm-0.33.0`; without a path those of the installed package.

    Raises:
        InvalidInput: there is none.
    """
    root = path or package_folder(package) / within
    files = [root] if root.is_file() else sorted(root.rglob(pattern))
    if not files:
        why = f"has no file like {pattern}" if root.is_dir() else "is no file and no folder here"
        raise InvalidInput(f"{root} {why}")
    return files, f"{package}-{'tables' if path else installed(package)}"


def read(file: Path) -> tuple[str, dict[str, Any], dict[int, Config | None], str] | None:
    """The device of a table, what else its name says, as arguments of `dims`, its rows, None for what is no config of
    this kernel, and the Triton that it was made with, if it says so; None for a file that is no table."""
    if not (named := _NAME.fullmatch(file.name)):
        return None
    of: dict[str, Any] = {name: int(named[name] or 0) for name in ("experts", "intermediate", "block_n", "block_k")}
    of |= {"dtype": named["dtype"] or "", "per_channel": bool(named["per_channel"])}
    try:
        rows = json.loads(file.read_bytes()[:MOST_BYTES])
        configs = {int(tokens): config_of(row) for tokens, row in rows.items() if tokens.isdecimal()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise InvalidInput(f"{file}: this is no table of configs by tokens ({error})") from None
    versioned = re.fullmatch(r"triton_([\d_]+)", file.parent.name)
    triton = versioned[1].replace("_", ".") if versioned else str(rows.get("triton_version", ""))
    return named["device"], of, configs, triton


def device_of(name: str) -> Device | None:
    """The known device that a name in a table means: `NVIDIA_H100_80GB_HBM3`, `AMD_Instinct_MI355_OAM`."""
    words = {word.rstrip("X") for word in re.split(r"[_\s/]+", name.upper())}
    return next((device for device in KNOWN.values() if device.name.split()[-1].rstrip("X") in words), None)


def seeds(op: str, package: str, path: Path | None, within: str) -> tuple[list[Timing], int]:
    """What tables name, as timings without a time that answer nothing, and how many tables or rows are of unknown
    devices or configs.

    Raises:
        InvalidInput: there is no file (see `found`), or none is a table.
    """
    files, source = found(package, path, within)
    rows: dict[tuple[str, str, str], Timing] = {}
    others = 0
    if not (given := [each for file in files if (each := read(file))]):
        named = "E=8,N=14336,device_name=NVIDIA_H100_80GB_HBM3.json"
        raise InvalidInput(f"{', '.join(map(str, files))}: no table, as its name is not like {named}")
    for name, of, configs, triton in given:
        if (device := device_of(name)) is None:
            others += 1
            continue
        there = Environment(device_name=device.name, triton=triton, flags=f"{FROM}{source}")
        for tokens, config in configs.items():
            asked = problem(op, device, dims(tokens=tokens, **of))
            if config is None or not tokens or refused(config, asked.dim("block_k")):
                others += 1
                continue
            row = seed(asked, config, there)
            rows[row.problem.key, config.name, there.id] = row
    return list(rows.values()), others


def seed(problem: Problem, config: Config, there: Environment, said: str = "") -> Timing:
    """A config that a table names, with what it says of it."""
    reason = f"a table names it{said}; to be measured here"
    return Timing(problem=problem, config=config, environment=there, reason=reason, measured_at=now())


# --- tables for engines, written ---


def grouped(timings: Iterable[Timing], path: Callable[[Problem, Environment], Path]) -> dict[Path, list[Timing]]:
    """Timings by the table that they belong to; `path` says where the engine looks for it."""
    groups: dict[Path, list[Timing]] = {}
    for row in timings:
        if row.status == "ok" and row.median_us is not None:
            groups.setdefault(path(row.problem, row.environment), []).append(row)
    return groups


def table(timings: Sequence[Timing], default: Default) -> dict[int, dict[str, Any]]:
    """The rows of one table: of each size what loses least over all layers and routings that were measured for it, else
    what the engine would take without a table.

    Args:
        default: the engine's own choice.

    Raises:
        InvalidInput: a size was not measured, and the engine is not installed, or cannot be asked here.
    """
    measured: dict[int, list[Timing]] = {}
    for row in timings:
        measured.setdefault(row.problem.tokens, []).append(row)
    of, rows = timings[0].problem, {}
    for tokens in sorted({*GRID, *(size for size in measured if size > GRID[-1])}):
        if token_bucket(tokens) in measured:
            rows[tokens] = dict(_best(measured[token_bucket(tokens)]).params)
            continue
        try:
            rows[tokens] = default(tokens, of)
        except Exception as error:  # the engine's own
            layer = f"E={of.experts}, N={of.dim('intermediate')} on {timings[0].environment.device_name}"
            told = f"{layer}: {tokens} tokens were not measured"
            why = f"{type(error).__name__}: {error}"
            raise InvalidInput(f"{told}, and the engine does not say what it would take ({why})") from None
    return rows


def _best(timings: Sequence[Timing]) -> Config:
    """The config that loses least where it loses most, of those that were timed everywhere."""
    from moecache.dispatch.any_routing import least_worst

    groups: dict[tuple[str, str], list[Entry]] = {}
    for row in timings:
        groups.setdefault((row.problem.key, row.environment.id), []).append(row.entry)
    verdict = least_worst({" ".join(group): believed(entries) for group, entries in groups.items()})
    assert verdict is not None
    return next(row.config for row in timings if row.config.name == verdict.name)


def write(path: Path, rows: Rows, **head: str) -> None:
    """One table, in place of none or of another table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**head, **{str(tokens): row for tokens, row in rows.items()}}, indent=4)
    atomic.write(path, text + "\n", '"BLOCK_SIZE_M"')
