"""The commands that measure and look. Each imports what it needs when it runs, so that `ls` is quick."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moecache import text
from moecache.cli import files, find, fleet, options, ranks, show, tables, warming
from moecache.cli.model import given, tell
from moecache.cli.options import Alone, Db, Json, app, option
from moecache.cli.progress import Meter
from moecache.schemas.errors import InvalidInput, MoecacheError
from moecache.schemas.problem import Problem
from moecache.schemas.warm import ROUTING, SPENT, TOKENS
from moecache.settings import duration
from moecache.store import Store
from moecache.version import __version__

if TYPE_CHECKING:
    from moecache.dispatch import Dispatcher
    from moecache.dispatch.explain import Explanation

__all__ = ["app"]

_TOKENS, _ROUTING = ",".join(map(str, TOKENS)), ",".join(ROUTING)


def _version(wanted: bool) -> None:
    if wanted:
        show.say(f"moecache {__version__}")
        raise typer.Exit


@app.callback()
def moecache(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Finds, remembers and ships the fastest Mixture-of-Experts kernels."""


@app.command(epilog="Example: moecache warm config.json --tp 8")
def warm(
    config: options.Config = None,
    wanted: Annotated[
        bool, typer.Option("--wanted", help="Also measure problems that calls met without a measured choice.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Also measure what is measured already; without CONFIG, all that is stored.")
    ] = False,
    tokens: options.Tokens = _TOKENS,
    routing: options.Routing = _ROUTING,
    tp: options.Tp = 1,
    ep: options.Ep = 1,
    dtype: options.Dtype = None,
    budget: Annotated[Any, option("budget", "TIME", "Time for the whole run, like 60s or 5m.", duration)] = None,
    op: options.OfOp = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Spread the problems over the free GPUs of a Ray cluster.")
    ] = False,
    db: Db = None,
    as_json: Json = False,
) -> int:
    """Measure the problems of a model's MoE layers, and keep the winners.

    First prints what was read of the model, and what is left out of it. Without --op the ops are moe_sort and
    fused_moe; grouped_gemm is left out, as fused_moe does not call it. With --ep N and N GPUs, N processes also measure
    how they exchange tokens (ep_exchange); torchrun may start them instead. --ray takes a model: a worker for each free
    GPU of the cluster.
    Ctrl-C stops at any moment: finished problems are kept, and the same command goes on from there.
    """
    model = given(config, tp=tp, ep=ep, dtype=dtype)
    if model is None and not wanted and not again:
        raise typer.BadParameter("give a model, --wanted, or --again for all that is stored", param_hint="CONFIG")
    chosen, together = options.measuring(db), ranks.asked(model, ep, op)
    here = together and not ray and ranks.launched(ep)
    if together and not ray and not here and (ended := ranks.start(ep, bool(op))) is not None:
        return ended
    asked = {"tokens": tokens, "routing": routing, "ops": op, "budget": budget, "wanted": wanted, "again": again}
    with Meter(chosen.user_file()) as meter:
        rows, left = ranks.warmed(chosen, model, meter, asked) if model and here else ([], asked)
        apart, failed = ranks.left_out(ep, ray) if together and not here else [], False
        if left is not None:
            measure = fleet.spread if ray else warming.alone
            found, failed = measure(chosen, model, meter, as_json, apart, **left)
            rows = rows + found
    if as_json:
        show.say_json([warming.record(row) for row in rows])
    elif rows:
        show.say(*tables.lines([(row.problem, tables.of_warm_row(row)) for row in rows]), "")
    for line in meter.conclude(rows) if rows or not failed else []:
        (show.note if as_json else show.say)(line)
    return int(failed or meter.lost or any(row.tier != "measured" and SPENT not in row.reason for row in rows))


def _stores(db: Path | None) -> list[Store]:
    chosen = options.settings()
    found = find.stores(chosen, db)
    own = any(file.role != "prebuilt" and file.path.exists() for file in chosen.files())
    if not found or not (db or own or chosen.user_file() is None):
        show.note(f"there is no cache file at {find.user(chosen)} yet; `moecache warm CONFIG` makes one")
    return found


@app.command(epilog="Example: moecache ls arch=sm_90 tokens=16,256 | grep oneshot")
def ls(fields: options.Fields = None, db: Alone = None, as_json: Json = False) -> None:
    """List the winners.

    Fields are op, vendor, arch, units, tokens, experts, topk, routing, dtype, source, policy and environment; a number
    of tokens stands for its bucket, and - for nothing. If they match nothing, the exit code is 1. Files inside the
    package, and stored predictions, which nobody has measured, are listed only if --db names the file.
    """
    wanted, every = find.wanted(fields), _stores(db)
    files = every if db else find.own(every)
    found, foretold = find.winners(files, **wanted), find.predictions(files, **wanted) if db else []
    if as_json:
        show.say_json([show.record(*each) for each in (*found, *foretold)])
    elif found or foretold:
        rows = [(row.problem, tables.of_winner(row, file)) for row, file in found]
        show.say(*tables.lines(rows + [(row.problem, tables.of_prediction(row, file)) for row, file in foretold]))
    if not found and not foretold and wanted:
        raise find.nothing(files, wanted)
    if not found and not foretold and every:
        stored = "; ".join(f"{s['path']} has {tables.scope(s)}" for s in (store.stats() for store in every))
        show.note(f"no winners{'' if db else ' of your own'}: {stored}")


@app.command(epilog="Example: moecache explain config.json --tokens 8192 --routing zipf")
def explain(
    config: options.Config = None,
    key: Annotated[
        str, typer.Option(metavar="KEY", help="Instead of a model: a problem's key or id, or some FIELD=VALUES.")
    ] = "",
    tokens: options.Tokens = "1,16,256,4096",
    routing: options.Routing = "uniform",
    tp: options.Tp = 1,
    ep: options.Ep = 1,
    dtype: options.Dtype = None,
    op: options.OfOp = None,
    db: Db = None,
    as_json: Json = False,
) -> int:
    """Explain what a call is served with, and why.

    Says which tier answers and why, and what else was timed, failures included. For a miss it says in which fields of
    the key the nearest stored problem differs. Nothing is measured.
    """
    chosen = options.settings(db)
    if db and not db.exists():
        show.note(f"moecache: there is no cache file at {db}; `moecache warm` makes one")
    model = given(config, tp=tp, ep=ep, dtype=dtype)
    if (model is None) == (not key):
        raise typer.BadParameter("give either a model or --key", param_hint="CONFIG")
    from moecache.dispatch import using

    failed = False
    with using(options.only_read(chosen)) as serving:
        if model is None:
            asked = find.asked(find.stores(chosen), key)
        else:
            asked, failed = warming.asked(model, as_json, tokens, routing, op)
        found = [_explained(serving, problem) for problem in asked]
    if as_json:
        show.say_json([_record(each) for each in found])
    for each in show.apart([] if as_json else found):
        show.say(*str(each).split("\n"))
    return int(failed)


def _explained(serving: "Dispatcher", problem: Problem) -> "Explanation":
    """What a problem is answered.

    Raises:
        InvalidInput: a key that somebody wrote lacks what its op asks of it, or says what the op never does.
    """
    try:
        return serving.explain(problem)
    except MoecacheError:
        raise
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        told = f"op {problem.op} knows no problem {problem.key}: {error!r}"
        raise InvalidInput(f"{told}; keys with all that it asks stand in `moecache ls --json`") from None


def _record(found: "Explanation") -> dict[str, Any]:
    """An explanation as JSON; on a hit `nearest` is null and `differs` empty."""
    return show.named(found.problem) | {
        "choice": None if found.choice is None else found.choice.model_dump(mode="json"),
        "timings": [show.record(*each) for each in found.timings],
        "nearest": None if found.nearest is None else show.named(found.nearest),
        "differs": [difference._asdict() for difference in found.differs],
        "notes": list(found.notes),
    }


@app.command(epilog="Example: moecache profile config.json --budget 2m")
def profile(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help=options.CONFIG)],
    tp: options.Tp = 1,
    ep: options.Ep = 1,
    dtype: options.Dtype = None,
    budget: Annotated[Any, option("budget", "TIME", "Time for all of it, like 60s or 5m.", duration)] = "2m",
    db: Db = None,
    as_json: Json = False,
) -> None:
    """Teach the cost model a model's MoE layer on this GPU.

    Times a sample of calls of the model's first kind of layer, fits the cost model to it, and keeps the fitted model in
    the cache file. It then answers those problems of the layer that are not tuned. Prints how much slower the configs
    that it chooses are than the best of the sample, before and now.
    """
    chosen, model = options.measuring(db), given(config, tp=tp, ep=ep, dtype=dtype)
    find.writable(chosen).close()
    tell(model, [], as_json)
    assert model is not None
    from moecache.dispatch import using
    from moecache.lab import profile as lab

    with using(chosen):
        found = lab.profile(model.layers[0], budget=budget, progress=show.note)
    if as_json:
        show.say_json(asdict(found))
    else:
        show.say(*text.facts(found.facts()))


@app.command(epilog="Example: moecache doctor")
def doctor(db: Db = None, as_json: Json = False) -> int:
    """Say what is found here, and what of it is wrong.

    Lists versions, backends and why one is absent, settings and what set them, cache files and what they hold. The exit
    code is 1 if something should be put right.
    """
    from moecache.verify.doctor import examine

    seen = examine(os.environ, db)
    if as_json:
        show.say_json(asdict(seen))
    for heading, found in show.apart([] if as_json else tables.of_diagnosis(seen)):
        show.say(heading, *text.facts(found, indent=2))
    return int(bool(seen.findings))


app.add_typer(files.commands)
