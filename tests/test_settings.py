"""Settings: every variable, every malformed value, durations."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecache.dispatch import using
from moecache.schemas.errors import InvalidInput
from moecache.settings import MEMORY, PREBUILT, Settings, duration, settings_from


def test_an_empty_environment_gives_the_defaults() -> None:
    assert settings_from({}) == Settings()
    assert settings_from({"MOECACHE_MODE": "", "MOECACHE_DB": " ", "MOECACHE_BUDGET": ""}) == Settings()
    assert (Settings().mode, Settings().strict, Settings().db, Settings().budget) == (
        "tune",
        False,
        None,
        1.5,
    )


def test_every_variable_is_read() -> None:
    got = settings_from(
        {
            "MOECACHE_MODE": "replay",
            "MOECACHE_STRICT": "yes",
            "MOECACHE_DB": "~/x.sqlite",
            "MOECACHE_PATH": os.pathsep.join(["/a.sqlite", "", "~/b.sqlite"]),
            "MOECACHE_BUDGET": "1m30s",
            "MOECACHE_ISOLATE": "0",
            "MOECACHE_LOG": "INFO",
        }
    )
    home = Path.home()
    assert got == Settings(
        "replay", True, home / "x.sqlite", (Path("/a.sqlite"), home / "b.sqlite"), 90.0, False, log="info"
    )
    assert got.shipped()[:2] == [Path("/a.sqlite"), home / "b.sqlite"]
    assert all(file.parent == PREBUILT for file in got.shipped()[2:])


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("MODE", "tuned", "tune, replay, off"),
        ("MODE", "TUNE", "tune, replay, off"),
        ("STRICT", "maybe", "1 or 0"),
        ("ISOLATE", "2", "1 or 0"),
        ("LOG", "loud", "info, debug"),
        ("BUDGET", "soon", "60s"),
        ("BUDGET", "-5s", "60s"),
    ],
)
def test_a_malformed_value_is_an_error_that_names_it(name: str, value: str, allowed: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        settings_from({f"MOECACHE_{name}": value})
    message = str(caught.value)
    assert f"MOECACHE_{name}" in message and allowed in message and value.lower() in message.lower()


@pytest.mark.parametrize("bad", [{"mode": "x"}, {"budget": -1.0}, {"budget": float("nan")}, {"budget": float("inf")}])
def test_settings_refuse_values_that_are_not_allowed(bad: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        Settings(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("500ms", 0.5),
        ("60s", 60),
        ("2m", 120),
        ("1h", 3600),
        ("1m30s", 90),
        ("7", 7),
        ("0", 0),
        ("1.5 ", 1.5),
        ("2M", 120),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == pytest.approx(seconds)


@given(st.integers(0, 99), st.integers(0, 59), st.integers(0, 59), st.integers(0, 999))
def test_a_composed_duration_is_the_sum_of_its_parts(h: int, m: int, s: int, ms: int) -> None:
    assert duration(f"{h}h{m}m{s}s{ms}ms") == pytest.approx(h * 3600 + m * 60 + s + ms / 1000)


@given(st.text(max_size=12))
def test_any_text_is_a_duration_or_one_clear_error(text: str) -> None:
    try:
        assert duration(text) >= 0
    except InvalidInput as error:
        assert "no duration" in str(error)


def test_settings_take_what_python_users_write() -> None:
    got = Settings(db="x.sqlite", path="y.sqlite", budget="500ms")  # type: ignore[arg-type]
    assert got == Settings(db=Path("x.sqlite"), path=(Path("y.sqlite"),), budget=0.5)
    assert Settings(db=":memory:").db == MEMORY  # type: ignore[arg-type]
    assert Settings(path=["a", Path("b")]).path == (Path("a"), Path("b"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "allowed"),
    [
        ({"strict": "yes"}, "strict='yes'.*True and False"),
        ({"isolate": 1}, "isolate=1.*True and False"),
        ({"budget": None}, "budget=None.*seconds"),
        ({"budget": "soon"}, "'soon'.*500ms"),
        ({"db": 3}, "db=3 is no path"),
        ({"path": [3]}, "path=3 is no path"),
        ({"path": 3}, "path=3 is no path"),
        ({"log": "warn"}, "log='warn'.*info, debug"),
        ({"mode": None}, "mode=None.*tune, replay, off"),
        ({"mode": np.zeros((40, 40))}, "mode=array.*tune, replay, off"),
        ({"log": ["info", "x" * 999]}, "log=.{,220}is not allowed"),
    ],
)
def test_a_wrong_type_names_its_setting(wrong: dict[str, object], allowed: str) -> None:
    with pytest.raises(InvalidInput, match=allowed):
        Settings(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"budget_s": 2}, "budget_s"), ({"modes": "tune", "db": None}, "modes"), ({"a": 1, "b": 2}, "a, b")],
)
def test_using_names_the_setting_that_does_not_exist(wrong: dict[str, object], named: str) -> None:
    allowed = ", ".join(Settings.__dataclass_fields__)
    with (
        pytest.raises(InvalidInput, match=rf"using\(\) has no setting {named}; allowed are {allowed}$"),
        using(**wrong),
    ):
        pass


@pytest.mark.parametrize("given", [{"settings": True}, {"backend": True}, {"budget": True}, {"budget": -1}])
def test_using_names_what_is_no_setting(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=f"{next(iter(given))}="), using(**given):
        pass
