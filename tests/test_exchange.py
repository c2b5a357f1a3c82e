"""The exchange format: round trip, checksum, files of later versions, and clear refusals."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

import samples

from moecache.schemas.errors import InvalidInput
from moecache.schemas.exchange import VERSION, Exchange, dump, load
from moecache.schemas.timing import Timing

TIMINGS = [
    samples.timing("a"),
    samples.timing("b", 9.5, environment=samples.UPGRADED, is_default=True),
    samples.failed("c", "wrong", error=float("inf")),
]


def changed(change: Callable[[dict[str, Any]], object], keep_sha256: bool = False) -> str:
    """The export of TIMINGS after somebody edited it."""
    raw = json.loads(dump(TIMINGS))
    change(raw)
    if not keep_sha256:
        raw.pop("sha256", None)
    return json.dumps(raw)


@given(st.lists(samples.timings, max_size=6))
@settings(max_examples=50)
def test_round_trip(timings: list[Timing]) -> None:
    text = dump(timings, "2026-11-20T12:05:00+00:00")
    again = load(text)
    assert again == (timings, 0) == load(text.encode())
    assert dump(again.timings, "2026-11-20T12:05:00+00:00") == text


def test_the_file_is_compact_and_readable() -> None:
    text = dump(TIMINGS)
    raw = json.loads(text)
    assert list(raw) == ["format", "version", "created", "sha256", "environments", "timings"]
    assert (raw["format"], raw["version"]) == ("moecache", VERSION)
    assert set(raw["environments"]) == {samples.HERE.id, samples.UPGRADED.id}
    first, _, wrong = raw["timings"]
    assert first["environment"] == samples.HERE.id and first["key"] == samples.problem().key
    assert first["problem"]["dims"] == {"block_m": 64} and wrong["error"] == "Infinity"
    assert "status" not in first and "is_default" not in first, "defaults are left out"
    assert sum('"median_us"' in line for line in text.splitlines()) == 2, "one timing a line"


def test_an_empty_export_is_one_too() -> None:
    assert load(dump([])).timings == []


def test_json_schema_describes_the_file() -> None:
    for mode in ("validation", "serialization"):
        schema = Exchange.model_json_schema(mode=mode)  # type: ignore[arg-type]
        row = schema["$defs"][schema["properties"]["timings"]["items"]["$ref"].split("/")[-1]]
        assert row["properties"]["environment"]["type"] == "string"
        assert {"problem", "config", "environment"} <= set(row["required"])
        for written in json.loads(dump(TIMINGS))["timings"]:
            assert set(written) <= set(row["properties"])
        assert set(json.loads(dump([]))) == set(schema["properties"])


def test_a_changed_file_is_refused_unless_its_checksum_is_gone() -> None:
    def faster(raw: dict[str, Any]) -> None:
        raw["timings"][0]["median_us"] = 0.5

    with pytest.raises(InvalidInput, match="does not match its sha256"):
        load(changed(faster, keep_sha256=True))
    assert load(changed(faster)).timings[0].median_us == 0.5
    assert load(changed(lambda raw: raw.update(created="yesterday"), keep_sha256=True)).timings == TIMINGS


def test_additions_within_a_version_are_ignored() -> None:
    def add(raw: dict[str, Any]) -> None:
        raw["licence"] = "CC0"
        raw["timings"][0] |= {"watts": 700}
        raw["timings"][0]["config"] |= {"cluster": 2}
        next(iter(raw["environments"].values()))["firmware"] = "1"

    loaded = load(changed(add))
    assert list(loaded.timings) == TIMINGS and loaded.skipped == 0


@pytest.mark.parametrize("version", [VERSION, VERSION + 1])
def test_a_problem_with_an_unknown_field_is_left_out(version: int) -> None:
    """It is another problem: read without the field it would answer for the wrong one."""

    def add(raw: dict[str, Any]) -> None:
        raw["version"] = version
        raw["timings"][0]["problem"]["ep_mode"] = "low_latency"
        raw["timings"][0]["key"] += " ep_mode=low_latency"

    loaded = load(changed(add))
    assert list(loaded.timings) == TIMINGS[1:] and loaded.skipped == 1


def test_a_later_version_is_read_as_far_as_it_is_understood() -> None:
    def later(raw: dict[str, Any]) -> None:
        raw["version"] = VERSION + 1
        raw["timings"][1]["status"] = "throttled"
        raw["timings"][2] = "a timing in some other form"

    loaded = load(changed(later))
    assert list(loaded.timings) == TIMINGS[:1] and loaded.skipped == 2


BAD: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another format": (lambda raw: raw.update(format="csv"), "no export of moecache"),
    "no version": (lambda raw: raw.pop("version"), "version None; versions are whole numbers"),
    "version 0": (lambda raw: raw.update(version=0), "version 0"),
    "timings no list": (lambda raw: raw.update(timings={}), "`timings` a list"),
    "unknown environment": (
        lambda raw: raw["environments"].clear(),
        r"timings\[0\] is malformed at environment",
    ),
    "bad environment": (lambda raw: raw["environments"].update(x=1), r"environments\['x'\] is malformed"),
    "negative time": (
        lambda raw: raw["timings"][1].update(median_us=-1),
        r"timings\[1\] .* median_us.*greater",
    ),
    "no time at all": (lambda raw: raw["timings"][0].update(median_us="NaN"), r"timings\[0\] .* median_us"),
    "bad dims": (lambda raw: raw["timings"][0]["problem"].update(dims=[1]), r"timings\[0\] .* problem.dims"),
    "unknown status": (lambda raw: raw["timings"][0].update(status="?"), r"timings\[0\] .* status"),
    "a row that is none": (lambda raw: raw["timings"].append(7), r"timings\[3\] is malformed at its top"),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals_say_what_and_where(name: str) -> None:
    change, message = BAD[name]
    with pytest.raises(InvalidInput, match=message):
        load(changed(change))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"timings": []}', b"\xff\xfe", "[" * 100_000])
def test_what_is_no_export(text: str | bytes) -> None:
    with pytest.raises(InvalidInput, match="no export of moecache"):
        load(text)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda x: (
            st.lists(x)
            | st.dictionaries(st.sampled_from(["problem", "config", "environment", "key", "dims", "op", "x"]), x)
        ),
    )
)
@settings(max_examples=100)
def test_any_json_is_an_export_or_invalid_input(content: Any) -> None:
    for raw in ({"timings": content}, {"environments": content}, {"timings": [content]}, {"sha256": content}):
        try:
            load(json.dumps({"format": "moecache", "version": 1, **raw}))
        except InvalidInput as error:
            assert str(error)
