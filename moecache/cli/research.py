"""The commands of the laboratory: `profile` teaches the cost model a layer, `regret` scores ways to choose."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moecache.cli import find, show
from moecache.cli.options import Db, Dtype, Ep, Json, Routing, Tokens, Tp, budget, settings, whole


def profile(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A model's config.json, or the folder with it.")],
    tokens: Tokens = "1,16,64,256,1024,4096",
    routing: Routing = "uniform,zipf,dir2",
    tp: Tp = 1,
    ep: Ep = 1,
    dtype: Dtype = None,
    budget: Annotated[Any, budget("Time for all of it, like 60s or 2m.")] = "120s",
    db: Db = None,
    as_json: Json = False,
) -> None:
    """Teach the cost model a model's MoE layer on this GPU.

    Times a sample of calls, fits the cost model to it, and keeps the fitted model in the cache file. That model then
    answers those problems of the layer that are not tuned. Prints what was fitted, and how much slower the configs that
    it chooses are than the best of the sample.
    """
    from moecache.dispatch import using
    from moecache.lab import profile as lab
    from moecache.models import read_model

    tell, model = None if as_json else show.note, read_model(config, tp=tp, ep=ep, dtype=dtype)
    for line in model.told():
        show.note(line)
    chosen = settings(db)
    find.writable(chosen).close()
    with using(chosen):
        found = lab.profile(model, tokens=tokens, routing=routing, budget=budget, progress=tell)
    if as_json:
        learned = found.learned.model_dump(mode="json", exclude={"configs", "calls", "leftovers"})
        show.say_json(asdict(found) | {"learned": learned, "device": found.device.name})
        return
    show.say_facts(lab.facts(found))
    show.say()
    show.say_table(lab.kernels(found))


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
