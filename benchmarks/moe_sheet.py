"""The rows of an MoE benchmark: kept, merged with those of an earlier run of the same code, written, summed up."""

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import record

from moecache.devices import Place
from moecache.kernels import code

Row = dict[str, Any]
SAME = ("commit", "device", "sources", "torch", "triton")  # what rows of one file have in common


class Sheet:
    """Rows of one result file.

    Args:
        keys: the fields that tell one row from another.
        merge: begin with the rows that the file holds.

    Raises:
        SystemExit: the file holds rows of other code, or of another device or environment.
    """

    def __init__(self, name: str, place: Place, op: str, keys: Sequence[str], *, merge: bool) -> None:
        self.name, self.place, self._keys = name, place, keys
        self.folder = record.folder_of(place)
        self.facts: dict[str, Any] = {"sources": {op: code.whole(op)}}
        self.rows: list[Row] = []
        self._commands = ["python " + " ".join(sys.argv)]
        found = record.load(name, self.folder) if merge else None
        if found is not None:
            self._check(found)
            self.rows = list(found["rows"])
            self.facts = {key: found[key] for key in ("peers", "bandwidth_gbs") if key in found} | self.facts
            self._commands = [*found["command"].split(" && "), *self._commands]

    def _check(self, found: dict[str, Any]) -> None:
        here, environment = self.place.environment, found["environment"]
        now = (record.commit(), self.place.device.name, self.facts["sources"], here.torch, here.triton)
        then = (found["commit"], found["device"], found["sources"], environment["torch"], environment["triton"])
        changed = [f"{what}: {a} there, {b} here" for what, a, b in zip(SAME, then, now, strict=True) if a != b]
        if changed:
            raise SystemExit(f"{self.folder}/{self.name}.json cannot be merged with ({'; '.join(changed)})")

    def add(self, row: Row) -> None:
        """Replaces the row with the same keys."""
        self.rows = [r for r in self.rows if self.key(r) != self.key(row)] + [row]

    def has(self, row: Row) -> bool:
        """Whether there is a row with these fields."""
        return any(row.items() <= r.items() for r in self.rows)

    def key(self, row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in self._keys)

    def save(self, order: dict[str, Sequence[Any]], summary: dict[str, Any]) -> Path:
        """Write the file, the rows in the given order of a key's values, ascending where none is given."""

        def place(row: Row) -> list[tuple[int, Any]]:
            return [_rank(row[name], order.get(name, ())) for name in self._keys]

        facts = {"command": " && ".join(dict.fromkeys(self._commands)), **self.facts, "summary": summary}
        return record.save(self.name, self.folder, self.place, sorted(self.rows, key=place), **facts)


def _rank(value: Any, known: Sequence[Any]) -> tuple[int, Any]:
    return (known.index(value), "") if value in known else (len(known), value)


def geomean(values: Iterable[float]) -> float:
    """Of at least one value, to four digits."""
    logs = [math.log(value) for value in values]
    return round(math.exp(sum(logs) / len(logs)), 4)


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Ours and every peer as multiples of the limit and of each other, over the cells that both have.

    The fastest peer is that of each cell. Cells in which ours has no time count for nothing else.
    """
    cells = [row for row in rows if row["us"].get("ours")]
    out: dict[str, Any] = {"cells": len(cells), "cells_without_ours": len(rows) - len(cells)}
    if not cells:
        return out
    out["ours_over_limit_geomean"] = geomean(row["us"]["ours"] / row["limit_us"] for row in cells)
    names = list(dict.fromkeys(name for row in cells for name in row["us"] if name != "ours"))
    against = {name: {id(row): row["us"][name] for row in cells if row["us"].get(name)} for name in names}
    out["peers"] = {name: _against(cells, times) for name, times in against.items() if times}
    fastest = {id(row): min(t for n, t in row["us"].items() if n != "ours" and t) for row in cells if _peers(row)}
    if fastest:
        out["fastest_peer"] = _against(cells, fastest)
    return out


def _peers(row: Row) -> list[str]:
    return [name for name, us in row["us"].items() if name != "ours" and us]


def _against(cells: Sequence[Row], times: dict[int, float]) -> dict[str, Any]:
    both = [(row["us"]["ours"], times[id(row)], row["limit_us"]) for row in cells if id(row) in times]
    gain = [ours / theirs for ours, theirs, _ in both]
    return {
        "cells": len(both),
        "over_limit_geomean": geomean(theirs / limit for _, theirs, limit in both),
        "ours_over_limit_geomean": geomean(ours / limit for ours, _, limit in both),
        "ours_over_it_geomean": geomean(gain),
        "ours_over_it_max": round(max(gain), 4),
        "cells_ours_slower": sum(g > 1 for g in gain),
    }
