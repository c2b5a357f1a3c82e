"""`moecache regret`: what each way of choosing costs, on a grid of timings."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from moecache.cli import show
from moecache.cli.command import Json, whole


def regret(
    grid: Annotated[
        Path, typer.Argument(metavar="GRID", help="File with timings of many configs, see benchmarks/grid.py.")
    ],
    fit_on: Annotated[
        Path | None, typer.Option(metavar="GRID", help="Fit `transfer` on this grid; default: GRID's other models.")
    ] = None,
    of: Annotated[
        Literal["moe", "gemm1"], typer.Option(metavar="TIMES", help="moe (the whole layer) or gemm1 (its first GEMM).")
    ] = "moe",
    splits: Annotated[
        int, typer.Option(parser=whole, metavar="N", help="How many times to draw the calls that count as timed.")
    ] = 10,
    as_json: Json = False,
) -> None:
    """Score ways to choose a config, on timings of all of them.

    Regret is how much slower the chosen config is than the best one, in per cent, by the timings in the file. It
    needs no GPU.
    """
    from moecache.lab import words
    from moecache.lab.grid import read
    from moecache.lab.regret import score_ways

    found = score_ways(read(grid, of), read(fit_on, of) if fit_on else None, splits)
    if as_json:
        show.say_json({"grid": str(grid), "of": of, **words.record(found)})
        return
    show.say_facts([("grid", str(grid)), ("calls", words.calls(found))])
    show.say()
    show.say_table(words.ways(found))
    show.say()
    show.say_heading("mean % by model")
    show.say_table(words.models(found))
    show.say()
    show.say_facts(words.meanings(found))
