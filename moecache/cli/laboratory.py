"""The commands of the cost model: score ways to choose a config on a grid of timings, and teach it one layer."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moecache.cli import lookup, show
from moecache.cli.command import Db, Dtype, Ep, Json, Routing, Tokens, Tp, checked, names, numbers, settings, whole
from moecache.schemas.warm import MOST_TOKENS
from moecache.settings import duration
from moecache.text import Column, Table

if TYPE_CHECKING:
    from moecache.profile import Profiled
    from moecache.regret import Report, Score

_COLUMNS = ("way", "mean %", "p95 %", "max %", "calls")


def regret(
    grid: Annotated[Path, typer.Argument(metavar="GRID", help="Timings of many configs, see benchmarks/grid.py.")],
    fit_on: Annotated[
        Path | None, typer.Option(metavar="GRID", help="Fit `transfer` on this grid; default: GRID's other models.")
    ] = None,
    of: Annotated[
        Literal["moe", "gemm1"], typer.Option(metavar="TIMES", help="moe, the whole layer, or gemm1, its first GEMM.")
    ] = "moe",
    splits: Annotated[
        int, typer.Option(parser=whole, metavar="N", help="How often to draw which calls are timed.")
    ] = 10,
    as_json: Json = False,
) -> None:
    """Score ways to choose a config, on timings of all of them.

    Regret is how much slower the chosen config is than the best, in per cent, by the timings in the file. No
    GPU is needed.
    """
    from moecache.regret import WAYS, read, report

    found = report(read(grid, of), read(fit_on, of) if fit_on else None, splits)
    if as_json:
        show.say_json(_record(found, grid, of))
        return
    calls = (
        f"{found.cells} with {found.configs} configs each; {found.alone:g} % share their routing bucket with no other"
    )
    show.say_facts([("grid", str(grid)), ("calls", calls)])
    show.say()
    show.say_table(_ways(found))
    show.say()
    show.say_heading("mean % by model")
    show.say_table(_models(found))
    show.say()
    show.say_facts([(way, told) for way, told in WAYS.items() if found.scores[way] is not None])


def profile(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A model's config.json, or the folder with it.")],
    tokens: Tokens = "1,16,64,256,1024,4096",
    routing: Routing = "uniform,zipf,dir2",
    tp: Tp = 1,
    ep: Ep = 1,
    dtype: Dtype = None,
    budget: Annotated[str, typer.Option(metavar="TIME", help="For all of it, like 60s or 2m.")] = "120s",
    db: Db = None,
    as_json: Json = False,
) -> None:
    """Teach the cost model a model's MoE layer on this GPU.

    Times a sample of calls, fits the cost model to it and keeps what it learnt in the cache file: problems of the
    layer that are not tuned are answered by it. Says what was fitted, and what choosing by it costs on the sample.
    """
    counts, draws = numbers(tokens, "--tokens", 1, MOST_TOKENS), names(routing, "--routing")
    seconds = checked("--budget", duration, budget)
    from moecache.dispatch import using
    from moecache.models import read_model
    from moecache.profile import profile as teach

    tell, model = None if as_json else show.note, read_model(config, tp=tp, ep=ep, dtype=dtype)
    for line in model.told():
        show.note(line)
    chosen = settings(db)
    lookup.writable(chosen).close()
    with using(chosen):
        found = teach(model, tokens=counts, routing=draws, budget=seconds, progress=tell)
    if as_json:
        learned = found.learned.model_dump(mode="json", exclude={"configs", "calls", "leftovers"})
        show.say_json(asdict(found) | {"learned": learned, "device": found.device.name})
        return
    show.say_facts(_profiled(found))
    show.say()
    show.say_table(_kernels(found))


def _profiled(found: "Profiled") -> list[tuple[str, str]]:
    """What was timed, what it is worth, and what was fitted for all kernels."""
    p, left = found.learned.parameters, f"; {found.left} calls left out, the budget was spent" if found.left else ""
    return [
        ("device", found.device.name),
        ("layer", f"{found.learned.about['model']}, {found.learned.layer}"),
        ("timed", f"{found.timings} configs of {found.calls} calls in {found.seconds:.0f} s{left}"),
        ("before", f"regret {found.before.mean:.2f} %, at most {found.before.max:.2f} %"),
        ("now", f"regret {found.after.mean:.2f} %, at most {found.after.max:.2f} %, each call by a fit to the others"),
        ("bandwidth", f"{p.bandwidth:.3f} of {found.device.bandwidth_gbs:g} GB/s"),
        ("reread", f"{p.reread:.2f}"),
        ("early", f"{p.early:.2f}"),
    ]


def _kernels(found: "Profiled") -> Table:
    """What was fitted for each kernel."""
    p = found.learned.parameters
    fields = [name for name in type(next(iter(p.kernels.values()))).model_fields]
    columns = [Column("kernel"), *(Column(name, right=True) for name in fields)]
    rows = [[name, *(f"{getattr(kernel, field):.3g}" for field in fields)] for name, kernel in p.kernels.items()]
    return Table(columns, rows)


def _record(found: "Report", grid: Path, of: str) -> dict[str, object]:
    def scores(part: "dict[str, Score | None]") -> dict[str, object]:
        return {way: asdict(score) if score else None for way, score in part.items()}

    models = {model: scores(part) for model, part in found.models.items()}
    size = {"cells": found.cells, "configs": found.configs, "splits": found.splits, "alone": found.alone}
    return {"grid": str(grid), "of": of, **size, **scores(found.scores), "models": models}


def _ways(found: "Report") -> Table:
    rows = []
    for way, score in found.scores.items():
        if score is not None:
            rows.append([way, *(f"{value:.2f}" for value in (score.mean, score.p95, score.max)), str(score.calls)])
    return Table([Column(title, right=title != "way") for title in _COLUMNS], rows)


def _models(found: "Report") -> Table:
    ways = [way for way, score in found.scores.items() if score is not None and way != "oracle"]
    columns = [Column("model"), *(Column(way, right=True) for way in ways)]
    rows = []
    for model, scores in found.models.items():
        rows.append([model, *(f"{score.mean:.2f}" if (score := scores[way]) else "-" for way in ways)])
    return Table(columns, rows)
