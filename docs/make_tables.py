"""Fills the marked tables of the pages from result files: `python docs/make_tables.py`; `--check` only compares."""

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs"))

from make_picture import full  # noqa: E402

from moecache.schemas.timing import Winner  # noqa: E402
from moecache.settings import PREBUILT  # noqa: E402
from moecache.store import Store  # noqa: E402

PAGES = ("README.md", *(f"docs/{name}.md" for name in ("sorting", "measured", "use", "file-format", "vllm")))
BLOCK = re.compile(r"(?P<open><!-- table (?P<name>[a-z]+)\b[^>]*-->\n).*?(?P<close><!-- end of table -->)", re.DOTALL)
ABSENT = "Not measured yet: there is no `{file}`.\n"

README_TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
PATHS = ("oneshot", "multiphase", "auto", "vllm")
Result = dict[str, Any]


def table(titles: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table, figures to the right."""
    first, *others = titles
    cells = [[first, *others], ["---", *("---:" for _ in others)], *rows]
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in cells)


def us(value: float | None) -> str:
    """Microseconds with three digits or so; a dash where nothing was measured."""
    return "–" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


# --- sorting, benchmarks/results/h200/moe_sort.json ---


def vllm(result: Result) -> str:
    """moe_sort against vLLM's op, one row for each number of experts."""
    times = {(r["E"], r["T"]): r["us"] for r in result["rows"] if r["routing"] == "uniform"}
    topk = {r["E"]: r["topk"] for r in result["rows"]}
    shown = [t for t in README_TOKENS if any(t == tokens for _, tokens in times)]
    cell = {key: f"{us(value['auto'])} / {us(value['vllm'])}" for key, value in times.items()}
    rows = [(f"{e}, top-{k}", *(cell.get((e, t), "–") for t in shown)) for e, k in topk.items()]
    return table(("experts", *(f"T={t}" for t in shown)), rows) + "\n" + _against_vllm(result) + _taken(result)


def _against_vllm(result: Result) -> str:
    found = result["summary"]
    if "auto_over_vllm_geomean" not in found:
        return "vLLM was not measured in this run. "
    slower, cells = found["cells_slower_than_vllm"], found["cells"]
    worst = f"{found['auto_over_vllm_max']:.2f}×"
    return (
        f"Over all {cells} cells (E × T × uniform and zipf) the geometric mean is "
        f"{found['auto_over_vllm_geomean']:.2f}× vLLM's time, the worst cell {worst}; {slower} of {cells} are slower. "
    )


def _taken(result: Result) -> str:
    """Where a result comes from."""
    here = result["environment"]
    peers = "".join(f", {full(name)} ({version})" for name, version in result.get("peers", {}).items())
    return (
        f"{result['device']}, driver {here['driver']}, torch {here['torch']}, Triton {here['triton']}{peers}; "
        f"commit {result['commit']}, {result['date'][:10]}, `{result['command']}`.\n"
    )


def goals(result: Result) -> str:
    """The goals of the op, and what the run found."""
    found, cells = result["summary"], result["summary"]["cells"]
    over = found["auto_over_better_path_max"]
    rows = [
        (
            "auto at most 3 % over the better path, in every cell",
            f"{100 * over:+.1f} % at most, {100 * found['auto_over_better_path_mean']:+.1f} % on average, "
            f"over 3 % in {found['cells_over_3_percent']} of {cells}",
            _met(over <= 0.03),
        )
    ]
    if "auto_over_vllm_geomean" in found:
        slower, mean = found["cells_slower_than_vllm"], found["auto_over_vllm_geomean"]
        worst = f"{found['auto_over_vllm_max']:.2f}× at most, slower in {slower} of {cells}"
        rows.append(("no cell slower than vLLM", worst, _met(slower == 0)))
        rows.append(("geometric mean of auto / vLLM at most 0.55", f"{mean:.3f}", _met(mean <= 0.55)))
    return table(("goal", "found", ""), rows) + "\n" + _taken(result)


def _met(yes: bool) -> str:
    return "met" if yes else "missed"


def crossover(result: Result) -> str:
    """Where multiphase begins to win, for each number of experts and routing."""
    rows = []
    for experts, topk, routing in dict.fromkeys((r["E"], r["topk"], r["routing"]) for r in result["rows"]):
        cells = [r for r in result["rows"] if (r["E"], r["routing"]) == (experts, routing)]
        at = first_multiphase(cells)
        if at is None:
            rows.append((experts, topk, routing, f"above {max(r['T'] for r in cells)}", "", ""))
        else:
            rows.append((experts, topk, routing, at["T"], us(at["us"]["oneshot"]), us(at["us"]["multiphase"])))
    titles = ("experts", "top-k", "routing", "multiphase from T", "oneshot there, µs", "multiphase there, µs")
    return table(titles, rows)


def first_multiphase(cells: list[Result]) -> Result | None:
    """The row with the fewest tokens from which on multiphase is the faster one, or alone was measured."""
    first = None
    for row in sorted(cells, key=lambda r: int(r["T"]), reverse=True):
        one, many = row["us"]["oneshot"], row["us"]["multiphase"]
        if many is None or (one is not None and one <= many):
            break
        first = row
    return first


def paths(result: Result) -> str:
    """Every cell with its spread, one table for each number of experts."""
    parts = []
    for experts, topk in dict.fromkeys((r["E"], r["topk"]) for r in result["rows"]):
        rows = [
            (r["T"], r["routing"], r["block_m"], *(_spread(r, path) for path in PATHS), r["auto_config"].split("(")[0])
            for r in result["rows"]
            if r["E"] == experts
        ]
        titles = ("T", "routing", "block_m", "oneshot", "multiphase", "auto", "vLLM", "auto takes")
        parts.append(f"**{experts} experts, top-{topk}**\n\n{table(titles, rows)}")
    return "\n".join(parts)


def _spread(row: Result, path: str) -> str:
    time = row["us"][path]
    return "–" if time is None else f"{time:.3f} ± {row['mad_us'][path]:.3f}"


# --- MoE layers, fused_moe.json, fused_moe_skewed.json, fused_moe_fp8.json and grouped_gemm.json of a GPU ---


def fused(result: Result) -> str:
    """The picture, and ours beside every peer over the cells that both have."""
    found = result["summary"]
    routings = " and ".join(dict.fromkeys(r["routing"] for r in result["rows"]))
    lead = (
        "This is the time of a whole MoE layer, `moecache.fused_moe`, over a limit. The limit is the longer of two "
        "times: to move the bytes that must move, and to compute dense products of the same FLOPs. There are "
        f"{found['cells']} cells (shape × T × {routings} routing):\n\n"
        "![Time over the limit, against tokens, of moecache and its peers](docs/fused_moe.svg)\n\n"
    )
    return lead + _peers(found) + "\n" + _taken(result)


def _peers(found: Result) -> str:
    titles = (
        "geometric means over the cells of", "cells", "its time / limit", "our time / limit", "our time / its time",
        "cells where ours is slower",
    )  # fmt: skip
    named = {"the fastest peer of each cell": found.get("fastest_peer")} | found.get("peers", {})
    rows = [
        (
            full(name), each["cells"], f"{each['over_limit_geomean']:.2f}", f"{each['ours_over_limit_geomean']:.2f}",
            f"{each['ours_over_it_geomean']:.2f}", each["cells_ours_slower"],
        )
        for name, each in named.items() if each
    ]  # fmt: skip
    return table(titles, rows)


def layers(result: Result) -> str:
    """Every cell of whole layers, one table for each shape."""
    names = list(dict.fromkeys(name for r in result["rows"] for name in r["us"]))
    parts = [_peers(result["summary"]) + "\n"]
    for shape, cells in _by_shape(result).items():
        rows = [
            (r["T"], r["routing"], us(r["limit_us"]), *(_best(r, name) for name in names), f"`{r.get('config', '')}`")
            for r in cells
        ]
        titles = ("T", "routing", "limit", *map(full, names), "moecache runs")
        parts.append(f"**{shape}**\n\n{table(titles, rows)}\n")
    return "".join(parts) + _taken(result)


def _best(row: Result, name: str) -> str:
    """A time, in bold where it is the cell's lowest."""
    times = [time for time in row["us"].values() if time]
    mine = row["us"].get(name)
    return f"**{us(mine)}**" if mine and mine == min(times) else us(mine)


def products(result: Result) -> str:
    """Every cell of the products alone, one table for each shape."""
    parts = []
    for shape, cells in _by_shape(result).items():
        rows = [
            (r["gemm"], r["T"], r["routing"], us(r["limit_us"]), _best(r, "ours"), _best(r, "torch"), _rate(r))
            for r in cells
        ]
        titles = ("product", "T", "routing", "limit", "ours", "torch", "ours, TFLOP/s")
        parts.append(f"**{shape}**\n\n{table(titles, rows)}\n")
    return "".join(parts) + _taken(result)


def _rate(row: Result) -> str:
    rate = row["tflops"].get("ours")
    return "–" if rate is None else f"{rate:.0f}"


def _by_shape(result: Result) -> dict[str, list[Result]]:
    cells: dict[str, list[Result]] = {}
    for row in result["rows"]:
        cells.setdefault(row["shape"], []).append(row)
    return cells


# --- choosing, regret.json of a GPU ---

GRIDS = {"h100-moecache-grid.json.gz": "ours", "h200-vllm-grid.json": "vLLM's"}
QUANTITIES = {"moe": "whole layer", "gemm1": "first GEMM"}


def regret(result: Result) -> str:
    """Every way to choose, one column for each grid and quantity: mean / 95th percentile / maximum, in per cent."""
    found = {
        f"{GRIDS.get(name, name)}, {told}": grid[of]
        for name, grid in result["grids"].items() for of, told in QUANTITIES.items() if of in grid
    }  # fmt: skip
    ways = [way for way in result["ways"] if any(each["scores"][way] for each in found.values())]
    rows = [(result["ways"][way], *(_three(each["scores"][way]) for each in found.values())) for way in ways]
    return table(("chosen by", *found), rows) + "\n" + _by_model(result) + "\n" + _run(result)


def _three(score: Result | None) -> str:
    return "–" if score is None else f"{score['mean']:.2f} / {score['p95']:.1f} / {score['max']:.1f}"


def _by_model(result: Result) -> str:
    """Means of whole layers for each model, of the ways that say most."""
    shown = ("bucket_transfer", "zero_shot", "transfer", "transfer_bucket", "fitted", "noise")
    rows = [
        (f"{GRIDS.get(name, name)}, {model}", *(_mean(scores[way]) for way in shown))
        for name, grid in result["grids"].items() for model, scores in grid["moe"]["models"].items()
    ]  # fmt: skip
    return table(("mean, whole layers", *(f"`{way}`" for way in shown)), rows)


def _mean(score: Result | None) -> str:
    return "–" if score is None else f"{score['mean']:.2f}"


def _run(result: Result) -> str:
    return f"Commit {result['commit']}, {result['date'][:10]}, `{result['command']}`.\n"


# --- warm-up, first calls and graphs, of a GPU ---


def graphs(result: Result) -> str:
    """One captured graph for all routings beside the best config of each: the worst of the routings, by shape and T."""
    cells: dict[tuple[str, int], list[Result]] = {}
    for row in result["rows"]:
        cells.setdefault((row["shape"], row["T"]), []).append(row)
    rows = [
        (shape, tokens, _worst(group, "ours"), _worst(group, "static"), _posted(group))
        for (shape, tokens), group in cells.items()
    ]
    found, count = result["summary"], len(result["rows"])
    within = (
        f"Graphs within {found['within']}: {found['ours']['within']} of {count}. "
        f"Graphs with uniform's winner: {found['static']['within']}."
    )
    within += f" Graphs with one config for all routings: {found['single']['within']}." if "single" in found else ""
    within += f" A second config costs {found['extra_us']['median']} µs." if "extra_us" in found else ""
    note = f"\nOf these, {result['note']}.\n" if "note" in result else ""
    titles = ("shape", "T", "one graph, worst routing", "uniform's winner, worst routing", "posting costs, µs")
    host = ", ".join(f"{what} {us:.2f}" for what, us in result["host_us"].items() if what != "nothing")
    return (
        table(titles, rows)
        + f"\n{within} Host time of a call to post and read its routing, in µs: {host}.\n\n"
        + _taken(result)
        + note
    )


def _worst(group: list[Result], name: str) -> str:
    loss, routing = max((r["us"][name] / r["us"]["best_single"] - 1, r["routing"]) for r in group)
    return f"{100 * loss:+.1f} % ({routing})"


def _posted(group: list[Result]) -> str:
    return f"{max(r['sort_us']['posted'] - r['sort_us']['alone'] for r in group):.2f}"


def host(result: Result) -> str:
    """Host time of one eager call beside peers, and chains of layers."""
    timed = ("ours", "vllm", "sglang", "torch_add")
    rows = [
        (
            r["shape"],
            r["T"],
            *(us(r["us"].get(name)) for name in timed),
            r["launches"],
            " / ".join(f"{r['chain_ms'][name]:.1f}" for name in ("ours", "vllm") if name in r["chain_ms"]),
        )
        for r in result["rows"]
    ]
    found = result["summary"]
    said = (
        f"Of vLLM's host time ours is {found['ours_over_vllm_max']:.2f} at most; {found['cells_above_overhead']} of "
        f"{found['cells']} cells take more than 5 µs beside one `torch_add` a launch, at most "
        f"{found['us_above_launches_max']:.1f} µs. Chains slower than vLLM's: {found['chains_slower']}. "
    )
    chain = f"{result['layers']} layers, ms: ours / vLLM"
    titles = ("shape", "T", "ours, µs", "vLLM", "SGLang", "`x.add_(1)`", "launches", chain)
    return table(titles, rows) + "\n" + said + _taken(result)


def inside(result: Result) -> str:
    """What the layers of vLLM gain: means of both columns beside what stands without moecache."""
    named = {"vllm_wrapped": "its kernel, our configs", "vllm_with_our_kernels": "our kernels"}
    rows = [
        (f"{named[column]}: {part}", each["cells"],
         *(f"{each[name]:.2f}×" for name in ("gain_geomean", "gain_min", "gain_max")),
         each["slower_by_more_than_1_percent"])
        for column, parts in result["summary"].items()
        for part, each in parts.items()
    ]  # fmt: skip
    titles = ("vLLM's time over that with", "cells", "geometric mean", "least", "most", "slower by more than 1 %")
    return table(titles, rows) + f"\nTimed: {result['timed']}. " + _taken(result)


def cells(result: Result) -> str:
    """Every cell of `inside`."""
    columns = ("vllm", "vllm_wrapped", "vllm_layer", "vllm_with_our_kernels")
    rows = [
        (r["shape"], r["T"], r["routing"], "yes" if r["table"] else "no",
         *(f"{us(r['us'].get(name))} ± {us(r['mad_us'].get(name))}" for name in columns))
        for r in result["rows"]
    ]  # fmt: skip
    titles = ("shape", "T", "routing", "vLLM has a table", "`fused_experts`", "our configs", "its layer", "our kernels")
    return table(titles, rows) + "\nµs ± median absolute deviation. " + _taken(result)


def whole(result: Result) -> str:
    """A whole model in vLLM: tokens per second of every variant and phase."""
    phases = list(result["rows"][0]["phases"])
    rows = [
        (r["variant"], f"{r['seconds_to_start']:.0f} s",
         *(f"{r['phases'][name]['tokens_per_s']:.0f} ± {r['phases'][name]['mad']:.0f}" for name in phases))
        for r in result["rows"]
    ]  # fmt: skip
    stock = result["rows"][0]
    shared = ", ".join(f"{name} {100 * each['moe_share']:.0f} %" for name, each in stock["profile"].items())
    gains = "; ".join(
        f"{variant}: " + ", ".join(f"{phase} {gain:.2f}×" for phase, gain in found.items())
        for variant, found in result["summary"].items()
    )
    model = result["model"]
    said = f"{model['file']}, {model['layers']} layers. Over stock: {gains}. MoE layers' share of the device's time in "
    said += f"stock: {shared}. "
    return table(("tokens a second", "start", *phases), rows) + "\n" + _steps(result, phases) + said + _taken(result)


def _steps(result: Result, phases: list[str]) -> str:
    """What a step of each phase took, and the host's part of it; nothing of a file that does not say."""
    if "steps" not in result:
        return ""
    figures = ("step_us", "execute_us", "sample_us", "replay_us")
    rows = [
        (r["variant"], *(" / ".join(us(r["phases"][name].get(key)) for key in figures) for name in phases))
        for r in result["rows"]
    ]
    note = "In a step the host is so long in the worker's two calls, and of that in launching graphs.\n\n"
    return table(("µs: step / execute / sample / replay", *phases), rows) + "\n" + note


def warmed(result: Result) -> str:
    """Whole processes of `moecache warm`."""
    rows = [(r["case"], r["problems"], r["candidates"], f"{r['seconds']:.1f} s") for r in result["rows"]]
    lead = f"{result['model']}, tp {result['tp']}, {result['dtype']}, {result['cores']} cores:\n\n"
    return lead + table(("", "problems", "candidates", "took"), rows) + "\n" + _taken(result)


def firsts(result: Result) -> str:
    """The first calls of a process."""
    rows = [(r["case"], *(f"{r[name]:.2f} s" for name in ("first_s", "second_s", "other_s"))) for r in result["rows"]]
    titles = ("", "first call", "the same again", "first with other tokens")
    return table(titles, rows) + f"\n{result['shape']}, T={result['tokens']}. " + _taken(result)


# --- the library, benchmarks/results/cpu ---


def hit(result: Result) -> str:
    """What dispatch adds to a launch."""
    rows = []
    for row in result["rows"]:
        times, spread = row["us"], row["spread_us"]["overhead"]
        rows.append((row["case"], us(times["direct"]), us(times["hit"]), f"{us(times['overhead'])} ± {spread:.2f}"))
    goal = f"\nThe goal is {result['goal_us']:g} µs at most. {result['cpu']}, GPU: {result['device']}"
    return table(("µs of host time a call", "direct", "hit", "added"), rows) + goal + _run_of(result)


STORE = {  # what a row measures: case, figure, goal
    "hydrate": ("open a file of {timings} timings, read its {winners} winners", "{median_ms} ms", "50 ms"),
    "look up one problem": ("the winner of a problem: first, again", "{answer_first_us} µs, {answer_again_us} µs", ""),
    "put": ("write the timings of a problem, {timings} in all", "{median_ms} ms", ""),
    "read, then write, concurrently": (
        "{processes} processes, {steps} times read, then write",
        "{failures} failures, {lost} lost, {median_ms} ms a step, {max_ms} ms at most",
        "no failure, none lost",
    ),
    "SIGKILL while writing": (
        "{kills} × SIGKILL while writing",
        "{unsound} files unsound, {committed_lost} committed rows lost, {half_written} half written",
        "none",
    ),
}


def store(result: Result) -> str:
    """How fast and how safe a cache file is."""
    rows = [[cell.format(**row) for cell in STORE[row["what"]]] for row in result["rows"]]
    where = f"\n{result['device']}, journal mode {result['journal'].upper()}"
    return table(("", "measured", "goal"), rows) + where + _run_of(result)


def _run_of(result: Result) -> str:
    versions = "".join(f", {name} {version}" for name, version in result["versions"].items())
    return f"{versions}; commit {result['commit']}, {result['date']}, `{result['command']}`.\n"


# --- what tuning buys, of the measured files that ship ---


def bought(files: dict[str, list[Winner]]) -> str:
    """How much faster the winners are than the static defaults, by file, op and format."""
    rows = []
    for file, winners in files.items():
        gains: dict[str, list[float]] = {}
        for winner in winners:
            if winner.margin is not None:
                kind = winner.problem.dim("quant") or winner.problem.dtype
                gains.setdefault(f"{winner.problem.op}, {kind}", []).append(100 * winner.margin)
        rows += [
            (f"{file}: {what}", len(each), sum(gain == 0 for gain in each), f"{statistics.mean(each):.1f} %",
             f"{statistics.quantiles(each, n=20)[-1]:.1f} %", f"{max(each):.1f} %")
            for what, each in gains.items()
        ]  # fmt: skip
    titles = ("measured winners", "problems", "the default wins", "gain: mean", "95th percentile", "largest")
    return table(titles, rows)


def shipped() -> dict[str, list[Winner]]:
    """The winners of every measured file inside the package."""
    found = {}
    for file in sorted(PREBUILT.glob("*.sqlite")):
        with Store.open(file, shipped=True) as store:
            if winners := store.winners():
                found[file.name] = winners
    return found


# --- the pages ---

TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {  # what each is made of: a result file, else what ships
    "bought": ("", bought),
    "vllm": ("h200/moe_sort.json", vllm),
    "goals": ("h200/moe_sort.json", goals),
    "crossover": ("h200/moe_sort.json", crossover),
    "paths": ("h200/moe_sort.json", paths),
    "fused": ("h100/fused_moe.json", fused),
    "layers": ("h100/fused_moe.json", layers),
    "layersskewed": ("h100/fused_moe_skewed.json", layers),
    "layersfp": ("h100/fused_moe_fp8.json", layers),
    "products": ("h100/grouped_gemm.json", products),
    "older": ("h200/fused_moe.json", layers),
    "olderskewed": ("h200/fused_moe_skewed.json", layers),
    "olderfp": ("h200/fused_moe_fp8.json", layers),
    "olderproducts": ("h200/grouped_gemm.json", products),
    "regret": ("h100/regret.json", regret),
    "graphs": ("h100/in_graph.json", graphs),
    "warmqwen": ("h100/warm-qwen3-30b-a3b.json", warmed),
    "warmdeepseek": ("h100/warm-deepseek-v3.json", warmed),
    "firsts": ("h100/first_encounter.json", firsts),
    "hit": ("cpu/dispatch.json", hit),
    "host": ("h200/host.json", host),
    "store": ("cpu/store.json", store),
    "inside": ("h200/vllm_wrap.json", inside),
    "cells": ("h200/vllm_wrap.json", cells),
    "whole": ("h200/vllm_e2e.json", whole),
}
SILENT = ("fused",)  # these show nothing before they are measured


def fill(page: str, results: Path = ROOT / "benchmarks" / "results") -> str:
    """The page with the present content of its tables."""

    def block(found: re.Match[str]) -> str:
        name, make = TABLES[found["name"]]
        file = results / name
        absent = "" if found["name"] in SILENT else ABSENT.format(file=f"benchmarks/results/{name}")
        text = make(shipped() if not name else json.loads(file.read_text())) if file.exists() else absent
        return f"{found['open']}\n{text}\n{found['close']}"

    return BLOCK.sub(block, page)


def main(arguments: list[str]) -> int:
    """Write the pages, or say which are stale."""
    stale = []
    for page in (ROOT / name for name in PAGES):
        there = page.read_text(encoding="utf-8")
        if (filled := fill(there)) == there:
            continue
        stale.append(page.relative_to(ROOT))
        if "--check" not in arguments:
            page.write_text(filled, encoding="utf-8")
    if stale and "--check" in arguments:
        print(f"stale: {', '.join(map(str, stale))}; run python docs/make_tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
