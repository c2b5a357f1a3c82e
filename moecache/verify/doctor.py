"""What is installed, found, configured and stored on this machine, and what of it is wrong."""

import os
import platform
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from moecache.schemas.errors import DeviceError, InvalidInput, MoecacheError, NoDevice
from moecache.schemas.flags import installed
from moecache.settings import File, Settings, settings_from, unknown
from moecache.store import Store
from moecache.store.database import resolved
from moecache.text import changed, wanted
from moecache.version import __version__

PACKAGES = ("torch", "triton", "cuda-bindings", "hip-python", "pydantic", "sqlite-utils", "typer", "jinja2")


@dataclass
class Diagnosis:
    """Everything the doctor saw; `findings` are what somebody should mend, `next` what helps where there are none.
    JSON-ready."""

    versions: dict[str, str] = field(default_factory=dict)
    backends: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    ops: dict[str, str] = field(default_factory=dict)
    settings: list[dict[str, str]] = field(default_factory=list)
    files: list[dict[str, Any]] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    next: list[str] = field(default_factory=list)


def examine(environ: Mapping[str, str], db: Path | None = None) -> Diagnosis:
    """Ask everything, raise nothing: what fails becomes a finding."""
    report = Diagnosis(versions=versions())
    _backends(report)
    _ops(report)
    report.findings += unknown(environ)
    try:
        with warnings.catch_warnings(action="ignore"):  # of what is a finding already
            settings = settings_from(environ)
    except InvalidInput as error:
        report.findings.append(str(error))
        settings = Settings()
    report.settings = origins(settings, environ, db)
    chosen = replace(settings, db=db) if db else settings
    report.files = [_state(file, chosen.mode, report.findings) for file in chosen.files()]
    report.next = [] if report.findings else _next(report.files)
    return report


def _next(files: list[dict[str, Any]]) -> list[str]:
    """What helps now, by what the user's own files hold."""
    held = [file["stats"] for file in files if file["role"] != "prebuilt" and file["stats"]]
    steps = [told for stats in held for told in wanted(stats["wanted_ops"])]
    steps += (gone := [changed(stats["other_code"]) for stats in held if stats["other_code"]])
    if not any(stats["winners"] for stats in held):
        first = "nothing is measured yet: `moecache warm CONFIG` measures what a model's layers will ask"
        return steps if gone else [*steps, first]
    more = ["`moecache ls` lists the winners, `moecache explain CONFIG` says who would answer a model's calls and why"]
    return [*steps, *more, "`moecache verify --sample 20` times some winners again: do they still win?"]


def versions() -> dict[str, str]:
    """Versions by package, '' for one that is not installed. Imports none of them."""
    found = {package: installed(package) for package in PACKAGES}
    return {"moecache": __version__, "python": platform.python_version(), **found}


def _backends(report: Diagnosis) -> None:
    from moecache.backends.registry import BACKENDS, detect, load
    from moecache.devices import environment_of

    for name in BACKENDS:
        seen: dict[str, Any] = {"name": name, "devices": [], "reason": ""}
        try:
            backend = load(name)
            devices = [backend.device(index) for index in range(backend.count())]
            seen["devices"] = [device.model_dump(mode="json") for device in devices]
        except NoDevice as error:
            seen["reason"] = str(error)
        except DeviceError as error:
            seen["reason"] = str(error)
            report.findings.append(f"backend {name}: {error}")
        report.backends.append(seen)
    if any(seen["devices"] for seen in report.backends if seen["name"] != "cpu") and not report.versions["triton"]:
        report.findings.append("there is a GPU and no triton: install moecache[cuda] or moecache[rocm]")
    backend = detect()
    environment = environment_of(backend, backend.device())
    report.environment = {"id": environment.id, **environment.model_dump()}


def _ops(report: Diagnosis) -> None:
    from moecache.kernels import code, registry

    for name in registry.names():
        try:
            report.ops[name] = registry.get(name).source or code.whole(name)
        except (ImportError, MoecacheError) as error:
            report.findings.append(f"op {name} cannot be loaded: {error}")


def origins(settings: Settings, environ: Mapping[str, str], db: Path | None = None) -> list[dict[str, str]]:
    """Every setting with its value and what set it."""
    values = {name: str(int(it) if isinstance(it, bool) else it or "-") for name, it in asdict(settings).items()}
    values["db"] = str(db or settings.user_file() or "in memory")
    values["path"] = os.pathsep.join(map(str, settings.path)) or "-"
    values |= {name: f"{getattr(settings, name):g} s" for name in ("budget", "tune_budget")}
    values["tune_gib"] = f"{settings.tune_gib:g} GiB"
    found = []
    for name, value in values.items():
        variable = f"MOECACHE_{name.upper()}"
        origin = variable if environ.get(variable, "").strip() else "default"
        found.append({"name": name, "value": value, "from": "--db" if db and name == "db" else origin})
    return found


def _state(file: File, mode: str, findings: list[str]) -> dict[str, Any]:
    """One cache file: what it holds, or why it cannot be used."""
    seen: dict[str, Any] = {"path": str(file.path), "role": file.role, "state": "ok", "stats": None}
    try:
        if file.role == "user" and not file.path.exists():
            seen["state"] = "absent"
            findings += _unmakeable(file.path)
            return seen
        with Store.open(file.path, readonly=True, shipped=file.role != "user") as store:
            seen["stats"] = store.stats()
        here = (file.path, file.path.absolute().parent)  # beside the file lies its journal
        if file.role == "user" and mode == "tune" and not all(os.access(path, os.W_OK) for path in here):
            findings.append(
                f"{file.path} cannot be written, so nothing is kept; set MOECACHE_DB, or MOECACHE_MODE=replay"
            )
    except OSError as error:  # a name too long, or what the store says
        seen["state"] = "unusable"
        findings.append(str(error))
    return seen


def _unmakeable(path: Path) -> list[str]:
    """Why the user's file cannot be made where it is to be; nothing where it can."""
    path = resolved(path)  # a home that nobody knows, a loop of links
    parent = next(folder for folder in path.parents if folder.exists())
    if not parent.is_dir():
        return [f"{path} cannot be made: {parent} is no folder; set MOECACHE_DB"]
    return [] if os.access(parent, os.W_OK) else [f"{path} cannot be made: {parent} is not writable; set MOECACHE_DB"]
