"""docs/file-format.md says what the schema is."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from samples import failed, prediction, problem, sql, timing

from moecache.schemas.device import KNOWN
from moecache.schemas.rule import ENOUGH, ERROR, TIE_BAND
from moecache.schemas.timing import Status
from moecache.settings import default_path
from moecache.store import Store, schema

PAGE = (Path(__file__).parent.parent / "docs" / "file-format.md").read_text()


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "cache.sqlite"
    with Store.open(path) as store:
        store.put([timing("a", 8.0), timing("b", is_default=True), failed("c")])
        store.want([problem(tokens=1)])
        store.predict([prediction("d")])
        store.learn("fused_moe", KNOWN["h100"], "128x2048x768", 2, "")
        store.keep_receipt("asked", "covered")
    yield path


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def sections() -> dict[str, list[str]]:
    """Heading of a table or view -> the columns that the page lists under it, in order."""
    found = {}
    for name, body in re.findall(r"^### `(\w+)`\n(.*?)(?=^##)", PAGE, re.DOTALL | re.MULTILINE):
        cells = re.findall(r"^\| (`[^|]*`) \|", body, re.MULTILINE)
        found[name] = [column for cell in cells for column in re.findall(r"`(\w+)`", cell)]
    return found


def test_every_table_and_view_is_described_column_by_column(path: Path) -> None:
    kinds = sql(
        path, "SELECT name FROM sqlite_schema WHERE type IN ('table', 'view') AND name NOT LIKE '\\_%' ESCAPE '\\'"
    )
    there = {name: [row[1] for row in sql(path, f"PRAGMA table_info({name})")] for (name,) in kinds}
    assert sections() == there


def test_its_queries_run(path: Path) -> None:
    queries = [query for block in blocks("sql") for query in block.split(";") if query.strip()]
    shell = re.findall(r'^\$ sqlite3 \S+ "(.*)"$', PAGE, re.MULTILINE)
    assert len(queries) == 4 and len(shell) == 1
    for query in [*queries, *shell]:
        assert sql(path, query), query


def test_its_numbers_and_names(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"| {schema.APPLICATION_ID}, the letters `moec`" in PAGE
    assert f"| {schema.FORMAT}: the thousands" in PAGE
    assert f"by more than {100 * TIE_BAND:g} % and" in PAGE and f"{ERROR / 1.4826:.4f} · σ" in PAGE and ENOUGH == 3
    statuses = re.search(r"^\| `status` \| (.*) \|$", PAGE, re.MULTILINE)
    assert statuses and re.findall(r"`(\w+)`", statuses[1]) == list(get_args(Status))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert "`moecache/moecache.sqlite`" in PAGE and default_path() == Path.home() / ".cache/moecache/moecache.sqlite"
