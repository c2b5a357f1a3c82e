"""The tables of docs/expert-parallel.md, made of what benchmarks/ep.py wrote."""

from collections.abc import Sequence
from typing import Any

HIDDEN = 7168  # columns of the rows whose phases are shown
GOALS: list[tuple[str, str, int, str, float]] = [  # phase, wire, tokens, at most µs or at least a share of the copy
    ("dispatch", "same", 128, "us", 12), ("dispatch", "fp8", 128, "us", 9), ("combine", "same", 128, "us", 13),
    ("dispatch", "same", 4096, "share", 0.93), ("combine", "same", 4096, "share", 0.92),
]  # fmt: skip
THEIRS = {
    "all-gather, our experts, reduce-scatter": "ag_rs",
    "all-to-all, our experts": "a2a",
    "experts alone": "experts",
}


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """The tables of docs/expert-parallel.md."""
    moved = [row for row in rows if row["phase"] in ("dispatch", "combine") and row["hidden"] == HIDDEN]
    moved.sort(key=lambda row: (row["phase"] == "combine", row["wire"] != "same", row["routing"] != "uniform"))
    lines = table("phase", "wire", "routing", "T", "ours", "all-gather, reduce-scatter", "all-to-all", "remote MB",
                  "GB/s", "of a copy", "config")  # fmt: skip
    for row in moved:
        us, choice = row["us"], " ".join(str(value) for value in row["choice"].values())
        lines += cells(row["phase"], row["wire"], row["routing"], row["T"], f"**{us['ours']:.1f}**",
                       f"{us['ag_rs']:.1f}", f"{us['a2a']:.1f}", f"{row['remote_bytes'] / 1e6:.2f}",
                       f"{row['gb_s']:.0f}", f"{share(row):.2f}", choice)  # fmt: skip
    whole = [row for row in rows if row["phase"] == "layer"]
    lines += ["", *table("layer", "T", "ours", "all-gather, vLLM's experts, reduce-scatter", "times faster", *THEIRS)]
    for row in whole:
        us = row["us"]
        vllm = (by, f"{by / us['ours']:.2f}") if (by := with_vllm(row)) else ("–", "–")
        lines += cells(row["model"], row["T"], f"**{us['ours']}**", *vllm, *(us[name] for name in THEIRS.values()))
    lines += linked([row for row in rows if row["phase"] == "link"])
    lines += ["", *table("goal", "", "reached", "")]
    for phase, wire, tokens, kind, goal in GOALS:
        (row,) = [r for r in moved if (r["phase"], r["wire"], r["T"], r["routing"]) == (phase, wire, tokens, "uniform")]
        value = row["us"]["ours"] if kind == "us" else share(row)
        met = value <= goal if kind == "us" else value >= goal
        wanted, found = (f"≤ {goal} µs", f"{value:.1f} µs") if kind == "us" else (f"≥ {goal} of a copy", f"{value:.2f}")
        lines += cells(f"{phase}, {tokens} tokens, {wire}", wanted, found, "met" if met else "not met")
    for told, goal, chosen in (
        ("128 tokens or fewer", 1.5, [row for row in whole if row["T"] <= 128]),
        ("4096 tokens", 1.25, [row for row in whole if row["T"] == 4096]),
    ):
        lines += ratio(f"layer, {told}: times faster than all-gather, vLLM's experts and reduce-scatter", goal,
                       [by / row["us"]["ours"] for row in chosen if (by := with_vllm(row))])  # fmt: skip
    fastest = [min(us for name, us in row["us"].items() if name[:4] != "ours" and name != "experts") for row in whole]
    lines += ratio("layer, all tokens: times faster than the fastest of the others", 1.0,
                   [us / row["us"]["ours"] for us, row in zip(fastest, whole, strict=True)])  # fmt: skip
    return "\n".join(lines)


def with_vllm(row: dict[str, Any]) -> float:
    """µs with vLLM's experts between all-gather and reduce-scatter, in the faster of its configs; 0 if not measured."""
    return min((us for name, us in row["us"].items() if name.startswith("vllm")), default=0.0)


def ratio(told: str, goal: float, found: Sequence[float]) -> list[str]:
    """A goal and the least and the most that was reached."""
    if not found:
        return cells(told, f"≥ {goal}", "–", "not measured yet")
    met = "met" if min(found) >= goal else "not met"
    return cells(told, f"≥ {goal}", f"{min(found):.2f} to {max(found):.2f}", met)


def linked(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the link carries without flags."""
    lines = ["", *table("link, GB/s", "rows of 7168", *rows[0]["gb_s"])] if rows else []
    for row in rows:
        lines += cells("both ways" if row["at_once"] else "one way", row["T"], *row["gb_s"].values())
    return lines


def beside(found: dict[str, Any]) -> str:
    """The table of what benchmarks/ep_beside.py wrote."""
    rows = sorted(found["rows"], key=lambda row: (row["wire"] != "same", row["routing"] != "uniform", row["T"]))
    names = list(dict.fromkeys(name for row in rows for name in row["us"]))
    lines = table("wire", "routing", "T", *names)
    for row in rows:
        shown = []
        for name in names:
            halves = [f"{row[part][name]:.1f}" for part in ("dispatch_us", "combine_us") if name in row[part]]
            whole = f"{row['us'][name]:.1f}" if name in row["us"] else "–"
            shown.append(whole + (f" ({' + '.join(halves)})" if halves else ""))
        lines += cells(row["wire"], row["routing"], row["T"], *shown)
    return "\n".join([*lines, "", *table("name", "what it is"), *(f"| {n} | {v} |" for n, v in found["peers"].items())])


def table(*names: str) -> list[str]:
    return [*cells(*names), "|" + "---|" * len(names)]


def cells(*values: Any) -> list[str]:
    return [f"| {' | '.join(map(str, values))} |"]


def share(row: dict[str, Any]) -> float:
    return float(row["gb_s"]) / float(row["p2p_gb_s"])
