"""The commands that measure and look. Each imports what it needs when it runs, so that `ls` is quick."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import BaseModel

from moecache import __version__, text
from moecache.cli import (
    choosing,
    describe,
    files,
    layers,
    lookup,
    profile,
    records,
    regret,
    report,
    show,
    tables,
    verify,
    warming,
)
from moecache.cli.command import (
    Alone,
    Db,
    Dtype,
    Ep,
    Json,
    OfArch,
    OfEnvironment,
    OfExperts,
    OfOp,
    OfRouting,
    OfTokens,
    Routing,
    Tokens,
    Tp,
    app,
    checked,
    filters,
    names,
    numbers,
    settings,
    words,
)
from moecache.cli.progress import Meter
from moecache.schemas.errors import InvalidInput
from moecache.schemas.warm import MOST_BLOCK, MOST_TOKENS, ROUTING, SPENT, TOKENS
from moecache.settings import duration
from moecache.store import Store

__all__ = ["app", "main"]

_TOKENS, _ROUTING = ",".join(map(str, TOKENS)), ",".join(ROUTING)


def main() -> None:
    """The entry point of the `moecache` command."""
    app(prog_name="moecache")


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
    config: layers.File = None,
    wanted: Annotated[
        bool, typer.Option("--wanted", help="Also measure problems that calls met without a measured choice.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Also measure what is measured already; without CONFIG, all that is stored.")
    ] = False,
    tokens: Tokens = _TOKENS,
    routing: Routing = _ROUTING,
    tp: Tp = 1,
    ep: Ep = 1,
    dtype: Dtype = None,
    experts: layers.Experts = None,
    topk: layers.Topk = None,
    hidden: layers.Hidden = None,
    intermediate: layers.Intermediate = None,
    activation: layers.Activation = None,
    block_m: Annotated[
        str, typer.Option("--block-m", metavar="NUMBERS", help="Block sizes of sorting; default: by tokens an expert.")
    ] = "",
    budget: Annotated[str, typer.Option(metavar="TIME", help="Time for the whole run, like 60s or 5m.")] = "",
    op: OfOp = "",
    db: Db = None,
    as_json: Json = False,
) -> int:
    """Measure the problems of a model's MoE layers, and keep the winners.

    First prints what was read of the model, and what is left out of it. --experts, --topk, --hidden and
    --intermediate describe a model without a file. Without --op the ops are moe_sort and fused_moe; grouped_gemm is
    left out, as fused_moe does not call it.
    Ctrl-C stops at any moment: finished problems are kept, and the same command goes on from there.
    """
    counts, draws = numbers(tokens, "--tokens", 1, MOST_TOKENS), names(routing, "--routing")
    blocks = numbers(block_m, "--block-m", 1, MOST_BLOCK) if block_m else []
    seconds = checked("--budget", duration, budget) if budget else None
    sizes = {"experts": experts, "topk": topk, "hidden": hidden, "intermediate": intermediate}
    model = layers.asked(config, activation, sizes, tp=tp, ep=ep, dtype=dtype)
    if model is None and not wanted and not again:
        raise typer.BadParameter(
            "give a model's config.json, its sizes, --wanted, or --again for all that is stored", param_hint="CONFIG"
        )
    chosen = settings(db)
    if chosen.mode != "tune":
        raise InvalidInput(f"MOECACHE_MODE={chosen.mode} forbids to measure; set it to tune, or unset it")
    with Meter(chosen.user_file()) as meter:
        rows, failed = warming.warmed(
            chosen, model, meter, as_json, tokens=counts, routing=draws, ops=words(op) or None, block_m=blocks,
            budget=seconds, wanted=wanted, again=again,
        )  # fmt: skip
    if as_json:
        show.say_json([records.of_warm_row(row) for row in rows])
    elif rows:
        show.say_sections(tables.warmed(rows, show.terminal()))
        show.say()
    for line in meter.conclude(rows) if rows or not failed else []:
        (show.note if as_json else show.say)(line)
    return int(failed or meter.lost or any(row.tier != "measured" and SPENT not in row.reason for row in rows))


def _stores(db: Path | None) -> list[Store]:
    chosen = settings()
    found = lookup.stores(chosen, db)
    own = any(file.role != "prebuilt" and file.path.exists() for file in chosen.files())
    if not found or not (db or own or chosen.user_file() is None):
        show.note(f"there is no cache file at {lookup.user(chosen)} yet; `moecache warm CONFIG` makes one")
    return found


@app.command(epilog="Example: moecache ls --arch sm_90 --tokens 16,256 | grep oneshot")
def ls(
    op: OfOp = "",
    arch: OfArch = "",
    tokens: OfTokens = "",
    experts: OfExperts = "",
    routing: OfRouting = "",
    environment: OfEnvironment = "",
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
    wanted = filters(op=op, arch=arch, tokens=tokens, experts=experts, routing=routing, environment=environment)
    every = _stores(db)
    files = every if db or tier == "predicted" else lookup.own(every)
    wanted = choosing.as_stored(files, wanted)
    found = [] if tier == "predicted" else lookup.winners(files, tier, **wanted)
    foretold = lookup.predictions(files, **wanted) if tier == "predicted" or (db and tier is None) else []
    if as_json:
        show.say_json([*(records.of_winner(*each) for each in found), *(records.of_prediction(*p) for p in foretold)])
    elif found or foretold:
        show.say_sections(tables.winners(found, foretold, show.terminal()))
    if not found and not foretold and wanted:
        raise choosing.nothing(files, wanted)
    if not found and not foretold and every:
        held = [store.stats() for store in every]
        stored = "; ".join(
            f"{s['path']} has {describe.scope(s)}" for s in held if s["winners"] or s["other_code"] or len(held) == 1
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

    Given some fields, like `tokens=256 routing=a0e0`, it shows every problem that has them.
    """
    files = lookup.stores(settings(), db)
    asked = choosing.meant(files, problem)
    found = {each: [(row, str(store.path)) for store in files for row in store.timings(each)] for each in asked}
    if as_json:
        show.say_json([records.of_timing(*row) for rows in found.values() for row in rows])
        return
    for number, (each, rows) in enumerate(found.items()):
        if number:
            show.say()
        show.say_facts(describe.of_problem(each) + describe.of_predictions(lookup.predictions(files, key=each.key)))
        show.say()
        show.say_sections(text.timings(rows, lookup.winning(files, each), "winner", show.terminal()))


@app.command(epilog="Example: moecache explain config.json --tokens 8192 --routing zipf")
def explain(
    config: layers.File = None,
    key: Annotated[str, typer.Option(metavar="KEY", help="A problem's key or id, instead of a model.")] = "",
    tokens: Tokens = "1,16,256,4096",
    routing: Routing = "uniform",
    tp: Tp = 1,
    ep: Ep = 1,
    dtype: Dtype = None,
    experts: layers.Experts = None,
    topk: layers.Topk = None,
    hidden: layers.Hidden = None,
    intermediate: layers.Intermediate = None,
    activation: layers.Activation = None,
    op: OfOp = "",
    db: Db = None,
    as_json: Json = False,
) -> int:
    """Explain what a call is served with, and why.

    Says which tier answers and why, and what else was timed. For a miss it says in which fields of the key the
    nearest stored problem differs. Nothing is measured.
    """
    counts, draws, chosen = numbers(tokens, "--tokens", 1, MOST_TOKENS), names(routing, "--routing"), settings(db)
    sizes = {"experts": experts, "topk": topk, "hidden": hidden, "intermediate": intermediate}
    model = layers.asked(config, activation, sizes, tp=tp, ep=ep, dtype=dtype)
    if (model is None) == (not key):
        raise typer.BadParameter("give either a model's config.json, or its sizes, or --key", param_hint="CONFIG")
    from moecache.dispatch import using

    failed = False
    with using(chosen) as serving:
        if model is None:
            asked = choosing.asked(lookup.stores(chosen), key)
        else:
            asked, failed = warming.asked(model, as_json, counts, draws, words(op) or None)
        found = [choosing.explained(serving, problem) for problem in asked]
    if as_json:
        show.say_json([records.of_explanation(each) for each in found])
        return int(failed)
    for number, each in enumerate(found):
        if number:
            show.say()
        show.say_facts(each.facts())
        if each.timings:
            show.say()
            show.say_sections(each.tables(fitted=show.terminal()))
    return int(failed)


@app.command(epilog="Example: moecache stats --json")
def stats(db: Alone = None, as_json: Json = False) -> None:
    """Count what the cache files hold."""
    figures = [store.stats() for store in _stores(db)]
    if as_json:
        show.say_json(figures)
    for number, each in enumerate([] if as_json else figures):
        if number:
            show.say()
        show.say_facts(describe.of_stats(each))


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
        for number, (heading, found) in enumerate(describe.of_diagnosis(seen)):
            if number:
                show.say()
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
    from moecache.schemas.problem import Problem
    from moecache.schemas.timing import Timing

    models: dict[str, type[BaseModel]] = {
        "problem": Problem,
        "config": Config,
        "timing": Timing,
        "exchange": Exchange,
    }
    schemas = {each: model.model_json_schema(mode="serialization") for each, model in models.items()}
    show.say_json(schemas if name is None else schemas[name])


app.command(epilog="Example: moecache profile config.json --budget 120s")(profile.profile)
app.command(epilog="Example: moecache regret grid.json --fit-on other.json")(regret.regret)
app.command(epilog="Example: moecache report h200.html --arch sm_90")(report.report)
app.command(cls=verify.Sampling, epilog="Example: moecache verify --db h200.sqlite --sample 40")(verify.verify)
app.add_typer(files.commands)
