"""Problems, figures and findings as names and values."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moecache.schemas.prediction import Prediction
from moecache.schemas.problem import Problem
from moecache.text import UNITS, Facts, changed, counted, device, dims, wanted

if TYPE_CHECKING:
    from moecache.verify.doctor import Diagnosis


def of_problem(problem: Problem) -> list[tuple[str, str]]:
    """A problem, field by field."""
    return [
        ("problem", problem.id),
        ("op", problem.op),
        ("device", device(problem)),
        ("layer", f"{counted(problem.experts, 'expert')}, top-{problem.topk}"),
        ("dtype", problem.dtype or "-"),
        ("tokens", f"up to {problem.tokens}"),
        ("routing", problem.routing or "-"),
        ("dims", dims(problem)),
        ("source", problem.source or "-"),
        ("key", problem.key),
    ]


def of_predictions(rows: Sequence[tuple[Prediction, str]]) -> list[tuple[str, str]]:
    """Stored predictions of one problem, with their files."""
    found = []
    for row, file in rows:
        how = f"{row.predicted_us:.2f} µs by {row.model or '?'} with the rates of {row.device}"
        found.append(("predicted", f"{row.config.name}: {how}, in {file}"))
    return found


def of_stats(figures: Mapping[str, Any]) -> Facts:
    """What a file holds."""
    f = figures
    statuses = ", ".join(f"{count} {status}" for status, count in sorted(f["status"].items()))
    return [
        ("file", f["path"]),
        ("size", f"{f['bytes'] / 1024:.0f} KiB, format {f['format']}, journal {f['journal']}"),
        ("problems", str(f["problems"])),
        ("winners", f"{f['winners']} in {counted(f['environments'], 'environment')}"),
        ("timings", f"{f['timings']} ({statuses or 'none'}) of {counted(f['configs'], 'config')}"),
        *([("", changed(f["other_code"]))] if f["other_code"] else []),
        ("predictions", str(f["predictions"])),
        ("wanted", str(f["wanted"])),
        *(("", told) for told in wanted(f["wanted_ops"])),
        ("ops", ", ".join(f["ops"]) or "-"),
        ("archs", ", ".join(f["archs"]) or "-"),
        ("measured", f"{f['oldest']} to {f['newest']}" if f["newest"] else "-"),
        ("measured on", ", ".join(f["devices"]) or "-"),
    ]


def scope(figures: Mapping[str, Any]) -> str:
    """What a file is about, in a few words."""
    held = counted(figures["winners"], "winner")
    held += f" and {counted(figures['predictions'], 'prediction')}" if figures["predictions"] else ""
    held += f" of {', '.join(figures['ops'])} on {', '.join(figures['archs'])}" if figures["ops"] else ""
    return held + (f" ({changed(figures['other_code'])})" if figures["other_code"] else "")


def of_diagnosis(seen: "Diagnosis") -> list[tuple[str, Facts]]:
    """What the doctor saw, under headings."""
    environment = dict(seen.environment)
    title = f"environment {environment.pop('id', '')}".strip()
    return [
        ("versions", [(name, version or "not installed") for name, version in seen.versions.items()]),
        (
            "backends",
            [(each["name"], _devices(each["devices"]) or each["reason"]) for each in seen.backends],
        ),
        (title, [(name, value or "-") for name, value in environment.items()]),
        ("ops", [(name, f"source {source}") for name, source in seen.ops.items()]),
        ("settings", [(each["name"], f"{each['value']} ({each['from']})") for each in seen.settings]),
        ("cache files", [(each["role"], f"{each['path']}: {_file(each)}") for each in seen.files]),
        ("findings", [(str(at), text) for at, text in enumerate(seen.findings, 1)] or [("none", "")]),
        *([("next", [(str(at), text) for at, text in enumerate(seen.next, 1)])] if seen.next else []),
    ]


def _devices(devices: Sequence[Mapping[str, Any]]) -> str:
    names = [f"{each['name']} ({each['arch']}, {each['units']} {UNITS[each['vendor']]})" for each in devices]
    counted = {name: names.count(name) for name in names}
    return "; ".join(f"{count} x {name}" if count > 1 else name for name, count in counted.items())


def _file(seen: Mapping[str, Any]) -> str:
    stats = seen["stats"]
    if stats is None:
        return "not there yet" if seen["state"] == "absent" else str(seen["state"])
    size = f"{stats['bytes'] / 1024:.0f} KiB"
    told = [f"{stats[name]} {name}" for name in ("winners", "timings", "wanted")]
    told += [f"{stats['predictions']} predictions"] if stats["predictions"] else []
    where = [f"measured on {', '.join(stats['devices'])}"] if stats["devices"] else []
    return ", ".join([*told, size, *where])
