"""The page on expert parallelism shows what its result files hold: `python tests/test_ep_page.py` writes its tables."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
PAGE, RESULTS = ROOT / "docs" / "expert-parallel.md", ROOT / "benchmarks" / "results" / "h200x2"
FILE, LATER, BESIDE = RESULTS / "ep.json", RESULTS / "ep_layers.json", RESULTS / "ep_beside.json"
BEGIN, END = "<!-- figures: python tests/test_ep_page.py -->\n", "\n<!-- end of figures -->"


def page() -> str:
    """The page with the tables of the files: layers that the later one has are its. What was not measured has none."""
    import ep_tables

    before, rest = PAGE.read_text().split(BEGIN)
    rows, later = json.loads(FILE.read_text())["rows"], json.loads(LATER.read_text())["rows"]
    again = {(row["model"], row["T"]): row for row in later if row["phase"] == "layer"}
    made = ep_tables.tables([again.get((row.get("model"), row["T"]), row) for row in rows])
    if BESIDE.exists():
        made += "\n\n" + ep_tables.beside(json.loads(BESIDE.read_text()))
    return before + BEGIN + made + END + rest.split(END)[1]


def test_the_tables_are_those_of_the_files() -> None:
    assert PAGE.read_text() == page()


if __name__ == "__main__":
    PAGE.write_text(page())
