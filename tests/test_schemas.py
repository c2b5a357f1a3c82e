"""Values: round trips, files of later versions, and the one key builder."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from pydantic import BaseModel, ValidationError

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

import samples

from moecache.schemas.config import Config, config
from moecache.schemas.device import KNOWN, Device, by_arch
from moecache.schemas.errors import InvalidInput, MoecacheError, NoDevice, NotTuned, StoreError
from moecache.schemas.frozen import as_word
from moecache.schemas.layer import Layer
from moecache.schemas.problem import Problem, problem_from_key, token_bucket
from moecache.schemas.timing import Choice, Environment, Timing, Winner

WINNER = Winner(
    problem=samples.problem(), config=config("a"), environment=samples.HERE, median_us=8.0, mad_us=0.1, n=50
)
LAYER = Layer(model="m", experts=8, global_experts=16, topk=2, hidden=64, intermediate=32)
CHOICE = Choice(config=config("a"), tier="measured", reason="because")
EXAMPLES = [
    samples.problem(),
    config("a", extra={"kpack": 2}, b=1),
    samples.HERE,
    samples.timing("a"),
    WINNER,
]
EXAMPLES += [LAYER, CHOICE, *KNOWN.values()]


@pytest.mark.parametrize("value", EXAMPLES, ids=lambda value: type(value).__name__)
def test_round_trip_and_later_fields(value: BaseModel) -> None:
    text = value.model_dump_json()
    assert type(value).model_validate_json(text) == value
    assert type(value).model_validate(value.model_dump()) == value
    later = json.loads(text) | {"a_field_of_a_later_version": [1]}
    assert type(value).model_validate(later) == value


@pytest.mark.parametrize("value", EXAMPLES, ids=lambda value: type(value).__name__)
def test_values_are_frozen(value: BaseModel) -> None:
    with pytest.raises(ValidationError):
        setattr(value, next(iter(type(value).model_fields)), None)


@given(samples.timings)
def test_timings_survive_json(timing: Timing) -> None:
    again = Timing.model_validate_json(timing.model_dump_json())
    assert again == timing
    assert (again.problem.key, again.config.name) == (timing.problem.key, timing.config.name)
    assert again.environment.id == timing.environment.id


def test_infinite_error_survives_json() -> None:
    wrong = samples.failed("a", "wrong", error=float("inf"))
    assert json.loads(wrong.model_dump_json())["error"] == "Infinity"
    assert Timing.model_validate_json(wrong.model_dump_json()).error == float("inf")


def as_said(problem: Problem) -> tuple[Any, ...]:
    """A problem's fields as text, which is what tells two problems apart."""
    fields = problem.model_dump()
    return tuple((name, as_word(v)) for name, v in fields.pop("dims").items()), *map(str, fields.values())


@given(samples.problems, samples.problems)
def test_keys_are_injective(one: Problem, other: Problem) -> None:
    assert (one.key == other.key) == (as_said(one) == as_said(other))
    assert (one == other) == (one.key == other.key)
    if one == other:
        assert hash(one) == hash(other)


@given(samples.problems)
def test_every_field_tells_problems_apart(one: Problem) -> None:
    for name in Problem.model_fields:
        if name == "dims":
            changed: Any = {**dict(one.dims), "zz": 1}
        elif name == "vendor":
            changed = "amd" if one.vendor == "cpu" else "cpu"
        else:
            value = getattr(one, name)
            changed = value + 1 if isinstance(value, int) else value + "x"
        other = Problem(**(one.model_dump() | {name: changed}))
        assert other.key != one.key, name


@given(samples.problems)
def test_key_says_all_of_the_problem(one: Problem) -> None:
    assert problem_from_key(one.key) == one
    fields = dict(part.split("=") for part in one.key.split(" "))
    named = {n: as_word(getattr(one, n)) for n in ("op", "vendor", "arch", "units", "tokens", "experts", "topk")}
    assert named.items() <= fields.items()


def test_a_field_left_at_its_default_is_not_in_the_key() -> None:
    class Later(Problem):
        ep_mode: str = ""
        ranks: int = 1

    fields = samples.problem().model_dump()
    assert Later(**fields).key == samples.problem().key
    assert Later(**fields, ep_mode="low_latency").key == samples.problem().key.replace(
        " dims.block_m=64", " ep_mode=low_latency dims.block_m=64"
    )
    assert "policy" not in samples.problem().key and "policy=2" in samples.problem(policy=2).key


def test_key_is_pinned() -> None:
    """Keys are in files that people keep: this text must never change."""
    assert samples.problem(dims={"flag": True, "block_m": 64}, dtype="bf16").key == (
        "op=moe_sort vendor=nvidia arch=sm_90 units=132 tokens=256 experts=64 topk=8 routing=a0e1 dtype=bf16"
        " source=0123456789ab dims.block_m=64 dims.flag=1"
    )
    assert config("oneshot", extra={"kpack": 2}, num_warps=4, block=256).name == (
        "oneshot(block=256,num_warps=4,kpack=2)"
    )
    assert Environment(torch="2.8.0").id == "7d41e1985d1f"


@pytest.mark.parametrize("bad", ["a b", "a=b", "a\n", "ä", "a,b", "(", 'a"'])
def test_what_cannot_stand_in_a_key(bad: str) -> None:
    with pytest.raises(ValueError, match="allowed are letters"):
        as_word(bad)
    for field in ("op", "arch", "routing", "dtype", "source"):
        with pytest.raises(ValidationError):
            samples.problem(**{field: bad})
    for dims in ({"a": bad}, {bad: 1}):
        with pytest.raises(ValidationError):
            samples.problem(dims=dims)
        with pytest.raises(ValidationError):
            Config(variant="a", params=dims)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [1, None, [1], "ab", [["a", 1], ["a", "x"]], [[["x"], 1]], {"a": 1.5}, {"a": None}])
def test_malformed_dims_and_params_are_validation_errors(bad: Any) -> None:
    with pytest.raises(ValidationError):
        samples.problem(dims=bad)
    with pytest.raises(ValidationError):
        Config(variant="a", params=bad)


def test_order_and_type_of_values() -> None:
    assert samples.problem(dims={"b": 1, "a": 2}) == samples.problem(dims=[("a", 2), ("b", True)])
    assert samples.problem(dims={"b": True}).dim("b") is True
    assert samples.problem().dim("absent", 7) == 7
    assert config("a", b=1, c="x")["c"] == "x" and str(config("a", b=1)) == "a(b=1)"


def test_environments_differ_by_content_and_ids_outlive_new_fields() -> None:
    class Later(Environment):
        firmware: str = ""

    assert Later(**samples.HERE.model_dump()).id == samples.HERE.id
    assert len({samples.HERE.id, samples.UPGRADED.id, samples.ELSEWHERE.id, Environment().id}) == 4


@pytest.mark.parametrize("field", [{"median_us": 0}, {"median_us": -1}, {"mad_us": -1}, {"n": -1}, {"status": "?"}])
def test_timings_out_of_range(field: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Timing(**(samples.timing("a").model_dump() | field))


def test_margin() -> None:
    assert WINNER.margin is None
    assert WINNER.model_copy(update={"default_us": 10.0}).margin == pytest.approx(0.25)


@pytest.mark.parametrize(("tokens", "bucket"), [(0, 0), (1, 1), (2, 2), (3, 4), (4096, 4096), (4097, 8192)])
def test_token_bucket(tokens: int, bucket: int) -> None:
    assert token_bucket(tokens) == bucket


def test_known_devices_serve_their_architectures() -> None:
    for arch in ("sm_90", "gfx942", "gfx950"):
        device = by_arch(arch)
        assert isinstance(device, Device) and device.arch == arch and device.bandwidth_gbs > 0
    assert by_arch("sm_70") is None


def test_errors_are_ours_and_what_others_expect() -> None:
    for error, base in ((InvalidInput, ValueError), (NoDevice, RuntimeError), (StoreError, OSError)):
        assert issubclass(error, MoecacheError) and issubclass(error, base)
    assert issubclass(NotTuned, LookupError)
