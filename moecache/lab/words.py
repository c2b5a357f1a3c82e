"""What `moecache regret` says of its scores, as records and as tables."""

from dataclasses import asdict

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
