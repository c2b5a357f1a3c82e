"""What `moecache regret` and `moecache profile` say of what they found, as records and as tables."""

from dataclasses import asdict

from moecache.lab.profile import Profiled
from moecache.lab.regret import WAYS, Score, Scores
from moecache.text import Column, Table

COLUMNS = ("way", "mean %", "p95 %", "max %", "calls")


def record(found: Scores) -> dict[str, object]:
    """Scores by way of choosing, over all calls and by model."""

    def scores(part: dict[str, Score | None]) -> dict[str, object]:
        return {way: asdict(score) if score else None for way, score in part.items()}

    models = {model: scores(part) for model, part in found.models.items()}
    size = {"cells": found.cells, "configs": found.configs, "splits": found.splits, "alone": found.alone}
    return {**size, **scores(found.scores), "models": models}


def calls(found: Scores) -> str:
    """What was scored, as a sentence."""
    alone = f"{found.alone:g} % share their routing bucket with no other"
    return f"{found.cells} with {found.configs} configs each; {alone}"


def ways(found: Scores) -> Table:
    """A row for each way that the grid allows."""
    rows = [
        [way, *(f"{value:.2f}" for value in (score.mean, score.p95, score.max)), str(score.calls)]
        for way, score in found.scores.items()
        if score is not None
    ]
    return Table([Column(title, right=title != "way") for title in COLUMNS], rows)


def models(found: Scores) -> Table:
    """A row for each model, a column for each way."""
    ways = [way for way, score in found.scores.items() if score is not None and way != "oracle"]
    columns = [Column("model"), *(Column(way, right=True) for way in ways)]
    rows = []
    for model, scores in found.models.items():
        rows.append([model, *(f"{score.mean:.2f}" if (score := scores[way]) else "-" for way in ways)])
    return Table(columns, rows)


def meanings(found: Scores) -> list[tuple[str, str]]:
    """What each way may know."""
    return [(way, told) for way, told in WAYS.items() if found.scores[way] is not None]


def profiled(found: Profiled) -> list[tuple[str, str]]:
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


def kernels(found: Profiled) -> Table:
    """What was fitted for each kernel."""
    p = found.learned.parameters
    fields = list(type(next(iter(p.kernels.values()))).model_fields)
    columns = [Column("kernel"), *(Column(name, right=True) for name in fields)]
    rows = [[name, *(f"{getattr(kernel, field):.3g}" for field in fields)] for name, kernel in p.kernels.items()]
    return Table(columns, rows)
