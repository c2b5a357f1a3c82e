"""The command that scores ways to choose a config, on a grid of timings."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moecache.cli import show
from moecache.cli.command import Json, whole

if TYPE_CHECKING:
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
    show.say_facts([("grid", str(grid)), ("calls", f"{found.cells} with {found.configs} configs each")])
    show.say()
    show.say_table(_ways(found))
    show.say()
    show.say_heading("mean % by model")
    show.say_table(_models(found))
    show.say()
    show.say_facts([(way, told) for way, told in WAYS.items() if found.scores[way] is not None])


def _record(found: "Report", grid: Path, of: str) -> dict[str, object]:
    def scores(part: "dict[str, Score | None]") -> dict[str, object]:
        return {way: asdict(score) if score else None for way, score in part.items()}

    models = {model: scores(part) for model, part in found.models.items()}
    size = {"cells": found.cells, "configs": found.configs, "splits": found.splits}
    return {"grid": str(grid), "of": of, **size, **scores(found.scores), "models": models}


def _ways(found: "Report") -> show.Table:
    rows = []
    for way, score in found.scores.items():
        if score is not None:
            rows.append([way, *(f"{value:.2f}" for value in (score.mean, score.p95, score.max)), str(score.calls)])
    return show.Table([show.Column(title, right=title != "way") for title in _COLUMNS], rows)


def _models(found: "Report") -> show.Table:
    ways = [way for way, score in found.scores.items() if score is not None and way != "oracle"]
    columns = [show.Column("model"), *(show.Column(way, right=True) for way in ways)]
    rows = []
    for model, scores in found.models.items():
        rows.append([model, *(f"{score.mean:.2f}" if (score := scores[way]) else "-" for way in ways)])
    return show.Table(columns, rows)
