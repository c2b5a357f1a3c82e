"""The page on expert parallelism shows what its result file holds: `python tests/test_ep_page.py` writes its tables."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
PAGE, FILE = ROOT / "docs" / "expert-parallel.md", ROOT / "benchmarks" / "results" / "h200x2" / "ep.json"
BEGIN, END = "<!-- figures: python tests/test_ep_page.py -->\n", "\n<!-- end of figures -->"


def page() -> str:
    """The page with the tables of the file."""
    import ep_tables

    before, rest = PAGE.read_text().split(BEGIN)
    return before + BEGIN + ep_tables.tables(json.loads(FILE.read_text())["rows"]) + END + rest.split(END)[1]


def test_the_tables_are_those_of_the_file() -> None:
    assert PAGE.read_text() == page()


if __name__ == "__main__":
    PAGE.write_text(page())
