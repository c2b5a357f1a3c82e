"""`moecache profile`: the cost model learns one layer."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from moecache.cli import lookup, show
from moecache.cli.command import Db, Dtype, Ep, Json, Routing, Tokens, Tp, checked, names, numbers, settings
from moecache.schemas.warm import MOST_TOKENS
from moecache.settings import duration


def profile(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A model's config.json, or the folder with it.")],
    tokens: Tokens = "1,16,64,256,1024,4096",
    routing: Routing = "uniform,zipf,dir2",
    tp: Tp = 1,
    ep: Ep = 1,
    dtype: Dtype = None,
    budget: Annotated[str, typer.Option(metavar="TIME", help="Time for all of it, like 60s or 2m.")] = "120s",
    db: Db = None,
    as_json: Json = False,
) -> None:
    """Teach the cost model a model's MoE layer on this GPU.

    Times a sample of calls, fits the cost model to it, and keeps the fitted model in the cache file. That model then
    answers those problems of the layer that are not tuned. Prints what was fitted, and how much slower the configs that
    it chooses are than the best of the sample.
    """
    counts, draws = numbers(tokens, "--tokens", 1, MOST_TOKENS), names(routing, "--routing")
    seconds = checked("--budget", duration, budget)
    from moecache.dispatch import using
    from moecache.lab import words
    from moecache.lab.profile import profile as teach
    from moecache.models import read_model

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
    show.say_facts(words.profiled(found))
    show.say()
    show.say_table(words.kernels(found))
