"""`moecache profile`: the cost model learns one layer."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moecache.cli import lookup, show
from moecache.cli.command import Db, Dtype, Ep, Json, Routing, Tokens, Tp, checked, names, numbers, settings
from moecache.schemas.warm import MOST_TOKENS
from moecache.settings import duration
from moecache.text import Column, Table

if TYPE_CHECKING:
    from moecache.profile import Profiled


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
