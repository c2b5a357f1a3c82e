"""The commands that measure and look. Each imports what it needs when it runs, so that `ls` is quick."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moecache import text
from moecache.cli import files, find, options, ranks, records, show, tables, verify, warming
from moecache.cli.options import Alone, Db, Json, app
from moecache.cli.progress import Meter
from moecache.schemas.errors import InvalidInput, MoecacheError
from moecache.schemas.problem import Problem
from moecache.schemas.warm import ROUTING, SPENT, TOKENS
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
    experts: options.Experts = None,
    topk: options.Topk = None,
    hidden: options.Hidden = None,
    intermediate: options.Intermediate = None,
    activation: options.Activation = None,
    block_m: options.BlockM = None,
    budget: Annotated[Any, options.budget("Time for the whole run, like 60s or 5m.")] = None,
    op: options.OfOp = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Spread the problems over the free GPUs of a Ray cluster.")
    ] = False,
    db: Db = None,
    as_json: Json = False,
) -> int:
    """Measure the problems of a model's MoE layers, and keep the winners.

    First prints what was read of the model, and what is left out of it. --experts, --topk, --hidden and
    --intermediate describe a model without a file. Without --op the ops are moe_sort and fused_moe; grouped_gemm is
    left out, as fused_moe does not call it. With --ep N and N GPUs, N processes also measure how they exchange tokens
    (ep_exchange); torchrun may start them instead. --ray takes a model: a worker for each free GPU of the cluster.
    Ctrl-C stops at any moment: finished problems are kept, and the same command goes on from there.
    """
    sizes = {"experts": experts, "topk": topk, "hidden": hidden, "intermediate": intermediate}
    model = warming.model(config, activation, sizes, tp=tp, ep=ep, dtype=dtype)
    if model is None and not wanted and not again:
        raise typer.BadParameter(
            "give a model's config.json, its sizes, --wanted, or --again for all that is stored", param_hint="CONFIG"
        )
    chosen = options.measuring(db)
    together = ranks.asked(model, ep, op)
    if together and not ray and not ranks.launched(ep) and (ended := ranks.start(ep, bool(op))) is not None:
        return ended
    asked = {"tokens": tokens, "routing": routing, "ops": op or None, "block_m": block_m or []}
    asked |= {"budget": budget, "wanted": wanted, "again": again}
    with Meter(chosen.user_file()) as meter:
        rows, failed = warming.warmed(chosen, model, meter, as_json, ep if together else 1, ray, **asked)
    if as_json:
        show.say_json([records.of_warm_row(row) for row in rows])
    elif rows:
        show.say_sections(tables.warmed(rows, show.terminal()))
        show.say()
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


@app.command(epilog="Example: moecache ls --arch sm_90 --tokens 16,256 | grep oneshot")
def ls(
    op: options.OfOp = None,
    arch: options.OfArch = None,
    tokens: options.OfTokens = None,
    experts: options.OfExperts = None,
    routing: options.OfRouting = None,
    environment: options.OfEnvironment = None,
    tier: Annotated[
        Literal["measured", "unverified", "predicted"] | None,
        typer.Option(metavar="TIER", help="Only this tier: measured (in this environment), unverified or predicted."),
    ] = None,
    db: Alone = None,
    as_json: Json = False,
) -> int:
    """List the winners.

    Filters take the words of `warm` too: a number of tokens stands for its bucket, and uniform or zipf for the buckets
    that they fall in. If the filters match nothing, the exit code is 1. Stored predictions, which nobody has measured,
    are listed only with --tier predicted, or for a file that --db names. Files inside the package are listed only if
    --db names one, or with --tier predicted.
    """
    every = _stores(db)
    files = every if db or tier == "predicted" else find.own(every)
    wanted = find.as_stored(
        files, op=op, arch=arch, tokens=tokens, experts=experts, routing=routing, environment=environment
    )
    found = [] if tier == "predicted" else find.winners(files, tier, **wanted)
    foretold = find.predictions(files, **wanted) if tier == "predicted" or (db and tier is None) else []
    if as_json:
        show.say_json([*(records.of_winner(*each) for each in found), *(records.of_prediction(*p) for p in foretold)])
    elif found or foretold:
        show.say_sections(tables.winners(found, foretold, show.terminal()))
    if not found and not foretold and wanted:
        raise find.nothing(files, wanted)
    if not found and not foretold and every:
        held = [store.stats() for store in every]
        stored = "; ".join(
            f"{s['path']} has {tables.scope(s)}" for s in held if s["winners"] or s["other_code"] or len(held) == 1
        )
        such = f" that are {tier} here" if tier else "" if db else " of your own"
        show.note(f"no winners{such}: {stored or f'{len(held)} cache files have none'}")
    return int(bool(tier) and not found and not foretold)


@app.command("show", epilog="Example: moecache show 'tokens=256 routing=a0e0'")
def show_one(
    problem: Annotated[
        str,
        typer.Argument(metavar="PROBLEM", help="The beginning of an id (see ls) or of a key, or some fields of a key."),
    ],
    db: Alone = None,
    as_json: Json = False,
) -> None:
    """Show all timings of a problem, failures included.

    It shows every problem that is meant: by fields, like `tokens=256 routing=a0e0`, all that have them.
    """
    files = find.stores(options.settings(), db)
    asked = find.meant(files, problem)
    found = {each: [(row, str(store.path)) for store in files for row in store.timings(each)] for each in asked}
    if as_json:
        show.say_json([records.of_timing(*row) for rows in found.values() for row in rows])
        return
    for each, rows in show.apart(found.items()):
        show.say_facts(tables.of_problem(each) + tables.of_predictions(find.predictions(files, key=each.key)))
        show.say()
        show.say_sections(text.timings(rows, find.winning(files, each), "winner", show.terminal()))


@app.command(epilog="Example: moecache explain config.json --tokens 8192 --routing zipf")
def explain(
    config: options.Config = None,
    key: Annotated[str, typer.Option(metavar="KEY", help="A problem's key or id, instead of a model.")] = "",
    tokens: options.Tokens = "1,16,256,4096",
    routing: options.Routing = "uniform",
    tp: options.Tp = 1,
    ep: options.Ep = 1,
    dtype: options.Dtype = None,
    experts: options.Experts = None,
    topk: options.Topk = None,
    hidden: options.Hidden = None,
    intermediate: options.Intermediate = None,
    activation: options.Activation = None,
    op: options.OfOp = None,
    db: Db = None,
    as_json: Json = False,
) -> int:
    """Explain what a call is served with, and why.

    Says which tier answers and why, and what else was timed. For a miss it says in which fields of the key the
    nearest stored problem differs. Nothing is measured.
    """
    chosen = options.settings(db)
    sizes = {"experts": experts, "topk": topk, "hidden": hidden, "intermediate": intermediate}
    model = warming.model(config, activation, sizes, tp=tp, ep=ep, dtype=dtype)
    if (model is None) == (not key):
        raise typer.BadParameter("give either a model's config.json, or its sizes, or --key", param_hint="CONFIG")
    from moecache.dispatch import using

    failed = False
    with using(options.only_read(chosen)) as serving:
        if model is None:
            asked = find.asked(find.stores(chosen), key)
        else:
            asked, failed = warming.asked(model, as_json, tokens, routing, op or None)
        found = [_explained(serving, problem) for problem in asked]
    if as_json:
        show.say_json([records.of_explanation(each) for each in found])
        return int(failed)
    for each in show.apart(found):
        show.say_facts(each.facts())
        if each.timings:
            show.say()
            show.say_sections(each.tables(fitted=show.terminal()))
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
        raise InvalidInput(f"{told}; keys with all that it asks stand in `moecache show`") from None


@app.command(epilog="Example: moecache stats --json")
def stats(db: Alone = None, as_json: Json = False) -> None:
    """Count what the cache files hold."""
    figures = [store.stats() for store in _stores(db)]
    if as_json:
        show.say_json(figures)
    for each in show.apart([] if as_json else figures):
        show.say_facts(tables.of_stats(each))


@app.command(epilog="Example: moecache doctor")
def doctor(db: Db = None, as_json: Json = False) -> int:
    """Say what is found here, and what of it is wrong.

    Lists versions, backends and why one is absent, settings and what set them, cache files and their state. The exit
    code is 1 if something should be put right.
    """
    from moecache.verify.doctor import examine

    seen = examine(os.environ, db)
    if as_json:
        show.say_json(asdict(seen))
    else:
        for heading, found in show.apart(tables.of_diagnosis(seen)):
            show.say_heading(heading)
            show.say_facts(found, indent=2)
    return int(bool(seen.findings))


@app.command(epilog="Example: moecache schema timing > timing.schema.json")
def schema(
    name: Annotated[
        Literal["problem", "config", "timing", "exchange"] | None,
        typer.Argument(metavar="NAME", help="problem, config, timing or exchange; default: all."),
    ] = None,
) -> None:
    """Print the JSON Schema of what is stored and exchanged."""
    from moecache.schemas.config import Config
    from moecache.schemas.exchange import Exchange
    from moecache.schemas.timing import Timing

    models: dict[str, Any] = {"problem": Problem, "config": Config, "timing": Timing, "exchange": Exchange}
    schemas = {each: model.model_json_schema(mode="serialization") for each, model in models.items()}
    show.say_json(schemas if name is None else schemas[name])


app.command(cls=verify.Sampling, epilog="Example: moecache verify --db h200.sqlite --sample 40")(verify.verify)
app.add_typer(files.commands)
