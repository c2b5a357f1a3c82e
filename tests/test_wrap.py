"""wrap: a user's launcher as a tuned op; its results, its arguments, its key, its name, its source."""

import inspect
import os
import pydoc
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from toy import CapturingBackend

from moecache.dispatch import Dispatcher, using
from moecache.kernels import registry as ops
from moecache.routing import bucket
from moecache.schemas.config import config
from moecache.schemas.errors import InvalidInput, NotTuned
from moecache.wrapping import Wrapped, wrap
from moecache.wrapping.sources import source_of
from moecache.wrapping.wrapped import clone_tensor

ROOT = Path(__file__).parent.parent
SLOW, FAST = {"us": 400}, {"us": 50}


napped = [0.0]  # µs that candidates have taken, whatever the machine took for them


class NapClock:
    """One sample is what the call naps."""

    def copies(self, set_bytes: int) -> int:
        return 1

    def prepare(self, calls: Any) -> Callable[[], float]:
        def sample() -> float:
            before = napped[0]
            calls[0]()
            return max(1.0, napped[0] - before)

        return sample


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    ops._wrapped.clear()


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Dispatcher]:
    backend, db = CapturingBackend(), tmp_path / "c.sqlite"
    with using(db=db, mode="tune", budget=30.0, strict=False, backend=backend, clock=NapClock()) as d:
        yield d


def nap(us: float) -> None:
    napped[0] += us


def double(x: torch.Tensor, *, config: dict[str, int], scale: float = 2.0) -> torch.Tensor:
    """Times two."""
    nap(config["us"])
    return x * scale


def key(x: torch.Tensor, **_: object) -> dict[str, Any]:
    return {"tokens": x.shape[0], "width": x.shape[1], "dtype": x.dtype}


def wrapped(fn: Callable[..., Any] = double, **changes: Any) -> Wrapped:
    settings: dict[str, Any] = {"fn": fn, "op": "double", "configs": [SLOW, FAST], "key": key}
    return wrap(**settings | changes)


def test_same_signature_same_result_faster_config(serving: Dispatcher) -> None:
    fast = wrapped()
    x = torch.randn(5, 4)
    assert torch.equal(fast(x, scale=3.0), x * 3.0)
    told = fast.explain(x)
    assert told.choice is not None and told.choice.tier == "measured" and told.choice.config["us"] == 50
    assert fast.__name__ == "double" and fast.__doc__ == "Times two."
    assert list(inspect.signature(fast).parameters) == ["x", "scale"]
    problem = fast.problem(x)
    assert (problem.op, problem.tokens, problem.dtype, problem.dims) == ("double", 8, "fp32", (("width", 4),))
    assert problem.source == fast.op.source and len(fast.op.source) == 12
    assert {t.config["us"] for t, _ in serving.lookup.timings(problem)} == {50, 400}


def test_a_hit_is_the_dict_and_the_call(serving: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = wrapped()
    x = torch.randn(5, 4)
    fast(x)
    for poisoned in "lookup", "places", "settings", "_lock":
        monkeypatch.setattr(serving, poisoned, None)
    assert torch.equal(fast(x), x * 2)
    with pytest.raises((AttributeError, TypeError)):
        fast(torch.randn(99, 4))


def test_another_size_of_the_bucket_is_not_tuned_again(serving: Dispatcher) -> None:
    calls: list[int] = []

    def counted(x: torch.Tensor, *, config: dict[str, int]) -> torch.Tensor:
        calls.append(config["us"])
        return double(x, config=config)

    fast = wrapped(counted)
    fast(torch.randn(5, 4))
    before = len(calls)
    fast(torch.randn(6, 4)), fast(torch.randn(8, 4))
    assert calls[before:] == [50, 50]


def test_tuning_never_touches_the_callers_arguments(serving: Dispatcher) -> None:
    seen: list[tuple[int, tuple[int, ...], int]] = []

    def add(acc: torch.Tensor, x: torch.Tensor, *, config: dict[str, int]) -> torch.Tensor:
        nap(config["us"])
        seen.append((acc.data_ptr(), acc.stride(), acc.data_ptr() % 16))
        return acc.add_(x)

    fast = wrap(add, op="add", configs=[SLOW, FAST], key=lambda acc, x: {"n": acc.shape[0]}, mutates=["acc"])
    base = torch.zeros(4, 9)
    acc, x = base[:, 1:8:2], torch.ones(4, 4)
    assert fast(acc, x) is acc
    assert torch.equal(acc, torch.ones(4, 4)) and base.sum() == 16  # once, and nothing beside it
    own = [ptr for ptr, _, _ in seen if ptr == acc.data_ptr()]
    assert len(own) == 1 and len(seen) > 4
    assert {stride for _, stride, _ in seen} == {acc.stride()}
    assert {rest for _, _, rest in seen} == {acc.data_ptr() % 16}
    choice = fast.explain(acc, x).choice
    assert choice is not None and choice.config["us"] == 50


def test_outputs_named_in_writes_are_poisoned_so_that_a_lazy_config_is_found(serving: Dispatcher) -> None:
    def fill(out: torch.Tensor, value: float, *, config: dict[str, int]) -> None:
        nap(config["us"])
        out[: config["rows"]] = value

    configs = [{"us": 400, "rows": 8}, {"us": 50, "rows": 4}]
    fast = wrap(fill, op="fill", configs=configs, key=lambda out, value: {"n": out.shape[0]}, writes=["out"])
    out = torch.full((8,), 3.0)  # holds the right answer already
    fast(out, 3.0)
    told = fast.explain(out, 3.0)
    assert told.choice is not None and told.choice.config["rows"] == 8
    assert {t.config["rows"]: t.status for t, _ in told.timings} == {8: "ok", 4: "wrong"}


def test_an_argument_changed_without_saying_so_is_found(serving: Dispatcher) -> None:
    def sneaky(x: torch.Tensor, *, config: dict[str, int]) -> torch.Tensor:
        nap(config["us"])
        return x.mul_(2)

    fast = wrapped(sneaky)
    x = torch.ones(5, 4)
    assert torch.equal(fast(x), torch.full((5, 4), 2.0))  # once: tuning ran on copies
    told = fast.explain(x)
    assert told.choice is not None and told.choice.config["us"] == 400  # the default: nothing could be proven
    assert all(t.status == "wrong" and "inputs" in t.reason for t, _ in told.timings)


def test_a_returned_buffer_that_is_used_again_does_not_hide_a_wrong_config(serving: Dispatcher) -> None:
    buffer = torch.empty(5, 4)

    def reuses(x: torch.Tensor, *, config: dict[str, int]) -> torch.Tensor:
        nap(config["us"])
        return torch.mul(x, 2 if config["us"] == 400 else 3, out=buffer)

    fast = wrapped(reuses)
    x = torch.randn(5, 4)
    assert torch.equal(fast(x), x * 2)
    assert [t.status for t, _ in fast.explain(x).timings] == ["ok", "wrong"]


def test_a_function_that_returns_nothing_must_name_what_it_writes(serving: Dispatcher) -> None:
    def silent(x: torch.Tensor, *, config: dict[str, int]) -> None:
        nap(config["us"])

    with pytest.warns(RuntimeWarning, match="writes="):
        wrapped(silent)(torch.ones(2, 2))


def test_the_reference_and_the_tolerance_are_the_users(serving: Dispatcher) -> None:
    def rough(x: torch.Tensor, *, config: dict[str, Any]) -> torch.Tensor:
        nap(config["us"])
        return x * (2.0 if config["exact"] else 2.01)

    configs = [{"us": 400, "exact": True}, {"us": 50, "exact": False}]
    x = torch.ones(3, 3)
    strict = wrap(rough, op="strict", configs=configs, key=key)
    strict(x)
    assert [t.status for t, _ in strict.explain(x).timings] == ["ok", "wrong"]  # 5e-3 is over 1e-3 for fp32
    loose = wrap(rough, op="loose", configs=configs, key=key, tolerance=1e-2)
    loose(x)
    told = loose.explain(x)
    assert [t.status for t, _ in told.timings] == ["ok", "ok"]
    assert told.timings[0][0].error == pytest.approx(5e-3, rel=1e-3)
    other = wrap(rough, op="other", configs=configs, key=key, tolerance=1e-2, reference=lambda x: x * 7)
    other(x)
    assert {t.status for t, _ in other.explain(x).timings} == {"wrong"}


def test_apply_says_how_a_config_is_passed(serving: Dispatcher) -> None:
    def launch(x: torch.Tensor, us: int, bias: int = 0) -> torch.Tensor:
        nap(us)
        return x + bias

    fast = wrap(
        launch, op="launch", configs=[config("nap", us=300), config("nap", us=30)],
        key=lambda x, **_: {"n": len(x)},
        apply=lambda fn, chosen, args, kwargs: fn(*args, us=chosen["us"], **kwargs),
    )  # fmt: skip
    assert torch.equal(fast(torch.zeros(3), bias=4), torch.full((3,), 4.0))
    choice = fast.explain(torch.zeros(3), bias=4).choice
    assert choice is not None and choice.config.name == "nap(us=30)"


def test_fits_and_cost_are_asked(serving: Dispatcher) -> None:
    fast = wrapped(
        fits=lambda problem, config, device: "too many tokens" if problem.tokens > 8 and config["us"] == 50 else "",
        cost=lambda problem, config, device: float(config["us"]),
    )
    fast(torch.zeros(16, 4))
    choice = fast.explain(torch.zeros(16, 4)).choice
    assert choice is not None and choice.config["us"] == 400
    choice = fast.explain(torch.zeros(2, 4)).choice
    assert choice is not None and (choice.tier, choice.config["us"]) == ("predicted", 50)
    with using(mode="replay"):
        nothing = wrapped(op="nothing", fits=lambda problem, config, device: False)
        with pytest.raises(InvalidInput, match="no config of its fits"):
            nothing(torch.zeros(2, 4))


def test_modes_strict_and_capture_reach_wrapped_ops(serving: Dispatcher) -> None:
    fast, x = wrapped(), torch.zeros(2, 4)
    serving.places._backend.on = True  # type: ignore[union-attr]
    assert torch.equal(fast(x), x) and serving.hot == {}
    choice = fast.explain(x).choice
    assert choice is not None and (choice.tier, choice.config["us"]) == ("default", 400)
    serving.places._backend.on = False  # type: ignore[union-attr]
    fast(x)
    choice = fast.explain(x).choice
    assert choice is not None and choice.tier == "measured"
    with using(mode="replay", strict=True), pytest.raises(NotTuned):
        fast(torch.zeros(64, 4))


def test_routing_is_part_of_the_key(serving: Dispatcher) -> None:
    seen: list[int] = []

    def run(x: torch.Tensor, counts: list[int], *, config: dict[str, int]) -> torch.Tensor:
        nap(config["us"])
        return x

    def by_counts(x: torch.Tensor, counts: list[int]) -> dict[str, Any]:
        seen.append(1)
        return {"tokens": sum(counts), "counts": counts}

    fast = wrap(run, op="routed", configs=[SLOW, FAST], key=by_counts)
    even, hot = [4] * 8, [32] + [0] * 7
    problems = [fast.problem(torch.zeros(1), counts) for counts in (even, hot)]
    assert [p.routing for p in problems] == [bucket(even), bucket(hot)] and problems[0].key != problems[1].key
    assert problems[0].experts == 8
    fast(torch.zeros(1), even)
    assert serving.peek(fast.op, problems[0]).tier == "measured"
    assert serving.peek(fast.op, problems[1]).tier == "neighbour"
    with pytest.raises(InvalidInput, match="counts is a tensor"):
        fast.problem(torch.zeros(1), torch.tensor(even))  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [{"n": None}, {"n": 1.5}, {"n": [1]}, {"n": "a b"}, {"tokens": -1}, {"experts": 0}])
def test_a_key_that_cannot_be_compared_is_an_error(serving: Dispatcher, bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="key of op 'double'"):
        wrapped(key=lambda x: bad)(torch.zeros(2, 2))


async def promising(x: torch.Tensor, *, config: Any) -> torch.Tensor:
    return x


def yielding(x: torch.Tensor, *, config: Any) -> Iterator[torch.Tensor]:
    yield x


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"configs": []}, "empty"),
        ({"configs": [{"a": 1}, {"a": 1}]}, "twice"),
        ({"configs": [{"a": 1.5}]}, "int, str or bool"),
        ({"configs": [{"a": "x y"}]}, "int, str or bool"),
        ({"configs": ["fast"]}, "'fast' is no mapping"),
        ({"configs": {"a": 1}}, "'a' is no mapping"),
        ({"op": "moe_sort"}, "taken"),
        ({"op": ""}, "op='' is no name"),
        ({"op": "my gemm"}, "op='my gemm' is no name; allowed are letters"),
        ({"op": "my_gemm\n"}, "is no name"),
        ({"op": 3}, "op=3 is no name"),
        ({"fn": 3}, "fn=3 of op 'double' cannot be called"),
        ({"key": None}, "key=None of op 'double' cannot be called"),
        ({"key": "tokens"}, "key='tokens' .* cannot be called"),
        ({"key": lambda y, z: {}}, r"key .* takes \(y, z\), and a call of double has x, scale; they must fit"),
        ({"key": lambda: {}}, "they must fit"),
        ({"reference": 1}, "reference=1 .* cannot be called"),
        ({"fits": True}, "fits=True .* cannot be called"),
        ({"cost": 2.0}, "cost=2.0 .* cannot be called"),
        ({"mutates": ["acc"]}, r"writes \['acc'\]; arguments of double are x, scale"),
        ({"writes": ["config"]}, r"writes \['config'\]"),
        ({"mutates": "x"}, "mutates='x' .* is no list of names"),
        ({"writes": [0]}, r"writes=\[0\] .* is no list of names"),
        ({"soft_dims": "width"}, "soft_dims='width' .* is no list of names"),
        ({"mutates": ["x", "x"]}, "names one thing twice"),
        ({"mutates": ["x"], "writes": ["x"]}, "stand in mutates and in writes"),
        ({"tolerance": -1.0}, "tolerance=-1.0"),
        ({"tolerance": "loose"}, "tolerance='loose'"),
        ({"tolerance": float("nan")}, "tolerance=nan"),
        ({"version": 1}, "version=1 of op '.*' is no text"),
        ({"fn": promising}, "promising only promises to work"),
        ({"fn": yielding}, "yielding only promises to work"),
        ({"fn": lambda x: x}, "has no argument 'config'; add it, or give apply="),
    ],
)
def test_what_cannot_be_wrapped_says_why(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        wrapped(**bad)


def test_what_a_key_may_look_like() -> None:
    for fits in (key, lambda x: {}, lambda *args, **kwargs: {}, lambda x, scale: {}, lambda rows, scale=1: {}):
        assert isinstance(wrapped(key=fits), Wrapped)
    assert isinstance(wrapped(lambda x, **options: x, op="open", mutates=["anything"]), Wrapped)
    assert isinstance(wrapped(lambda x: x, op="applied", apply=lambda fn, config, args, kwargs: fn(*args)), Wrapped)


def test_wrap_is_a_decorator_too_and_keeps_what_the_function_says(serving: Dispatcher) -> None:
    @wrap(op="triple", configs=[SLOW, FAST], key=lambda x: {"tokens": x.shape[0]})
    def triple(x: torch.Tensor, *, config: dict[str, int]) -> torch.Tensor:
        """Times three."""
        nap(config["us"])
        return x * 3

    x = torch.ones(4, 2)
    assert isinstance(triple, Wrapped) and torch.equal(triple(x), x * 3) and triple.op.name == "triple"
    assert (triple.__name__, triple.__doc__, triple.__module__) == ("triple", "Times three.", __name__)
    assert str(inspect.signature(triple)) == "(x: torch.Tensor) -> torch.Tensor"
    assert get_type_hints(triple) == {"x": torch.Tensor, "return": torch.Tensor}
    assert "config" in double.__annotations__ and "config" not in wrapped().__annotations__
    assert "Times three." in pydoc.render_doc(triple)
    with pytest.raises(InvalidInput, match="op='a b' is no name"):
        wrap(op="a b", configs=[FAST], key=key)(double)


def test_a_function_of_a_class_is_bound_to_its_object(serving: Dispatcher) -> None:
    class Layer:
        scale = 3

        @wrap(op="of_a_class", configs=[{"a": 1}, {"a": 2}], key=lambda self, x: {"tokens": len(x)}, version="1")
        def run(self, x: torch.Tensor, *, config: dict[str, int]) -> torch.Tensor:
            return self.scale * x

    x = torch.ones(8)
    assert torch.equal(Layer().run(x), 3 * x) and torch.equal(Layer.run(Layer(), x), 3 * x)
    assert Layer.run.explain(Layer(), x).choice.tier == "measured"


def test_the_log_tells_each_choice_once(serving: Dispatcher, caplog: pytest.LogCaptureFixture) -> None:
    fast, x = wrapped(), torch.ones(4, 2)
    with caplog.at_level("DEBUG", "moecache"):
        fast(x), fast(x), fast(torch.ones(3, 2))
    told = [each.getMessage() for each in caplog.records if each.levelname == "INFO"]
    (line,) = [line for line in told if "tokens=4 " in line]
    assert fast.problem(x).key in line and "gets double(us=50), measured: " in line and "c.sqlite" in line
    timed = [each.getMessage() for each in caplog.records if each.levelname == "DEBUG"]
    assert len(timed) == 2 and all(" µs" in line for line in timed)
    caplog.clear()
    with caplog.at_level("WARNING", "moecache"):
        fast(torch.ones(64, 2))
    assert not caplog.records


def test_the_log_goes_to_stderr_where_nobody_listens(tmp_path: Path) -> None:
    code = "import torch, moecache; moecache.moe_sort(torch.zeros(4, 2, dtype=torch.int32), 8, 16)"
    env = {name: value for name, value in os.environ.items() if not name.startswith("MOECACHE_")}
    env |= {"MOECACHE_LOG": "info", "MOECACHE_MODE": "replay", "MOECACHE_DB": str(tmp_path / "x.sqlite")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if " moecache: op=moe_sort " in line]
    assert "tokens=4 " in line and " gets " in line


def test_a_name_belongs_to_one_function() -> None:
    first = wrapped()
    again = wrapped(configs=[FAST])  # the same function: a reload
    assert ops.get("double") is again.op and first.op is not again.op
    with pytest.raises(InvalidInput, match=r"taken by .*double; choose another"):
        wrapped(lambda x, config: x)


def test_a_config_that_raises_later_gives_way_to_the_runner_up(serving: Dispatcher) -> None:
    broken = False

    def fragile(x: torch.Tensor, *, config: dict[str, int]) -> torch.Tensor:
        nap(config["us"])
        if (broken and config["us"] == 50) or x.shape[1] == 3:
            raise RuntimeError("illegal memory access")
        return x * 2

    fast = wrapped(fragile, configs=[{"us": 600}, {"us": 200}, {"us": 50}], key=lambda x: {"n": len(x)})
    x = torch.ones(4, 4)
    fast(x)
    with pytest.raises(RuntimeError, match="illegal"):
        fast(torch.ones(4, 3))  # every config raises: the call is at fault, nothing is recorded
    choice = fast.explain(x).choice
    assert choice is not None and choice.config["us"] == 50
    broken = True
    assert torch.equal(fast(x), x * 2)
    told = fast.explain(x)
    assert told.choice is not None and (told.choice.config["us"], told.choice.tier) == (200, "measured")
    assert {t.config["us"]: t.status for t, _ in told.timings}[50] == "raised"
    assert torch.equal(fast(x), x * 2)


def test_an_error_of_the_default_or_under_capture_is_raised_at_once(serving: Dispatcher) -> None:
    calls: list[int] = []
    broken = False

    def fragile(x: torch.Tensor, *, config: dict[str, int]) -> torch.Tensor:
        calls.append(config["us"])
        nap(config["us"])
        if broken:
            raise RuntimeError("no")
        return x

    only = wrapped(fragile, op="only", configs=[SLOW])
    both = wrapped(fragile, op="both")
    x = torch.ones(2, 2)
    only(x), both(x)
    broken = True
    calls.clear()
    with pytest.raises(RuntimeError, match="no"):
        only(x)
    serving.places._backend.on = True  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="no"):
        both(x)
    assert calls == [400, 50]


def test_a_failed_run_on_mutated_arguments_is_not_repeated_on_them(serving: Dispatcher) -> None:
    broken = False

    def add(acc: torch.Tensor, *, config: dict[str, int]) -> torch.Tensor:
        nap(config["us"])
        acc.add_(1)
        if broken and config["us"] == 50:
            raise RuntimeError("half way")
        return acc

    fast = wrap(add, op="add", configs=[SLOW, FAST], key=lambda acc: {}, mutates=["acc"])
    acc = torch.zeros(3)
    fast(acc)
    broken = True
    with pytest.raises(RuntimeError, match="half way"):
        fast(acc)
    assert acc.tolist() == [2.0, 2.0, 2.0]
    fast(acc)
    assert acc.tolist() == [3.0, 3.0, 3.0]


def test_a_candidate_may_call_another_op(serving: Dispatcher) -> None:
    inner = wrapped(op="inner")

    def outer(x: torch.Tensor, *, config: dict[str, int]) -> torch.Tensor:
        nap(config["us"])
        return inner(x)  # type: ignore[no-any-return]

    fast, x = wrap(outer, op="outer", configs=[SLOW, FAST], key=key), torch.ones(4, 4)
    assert torch.equal(fast(x), x * 2)
    choice = fast.explain(x).choice
    assert choice is not None and choice.tier == "measured"
    inner(x)
    choice = inner.explain(x).choice
    assert choice is not None and choice.tier == "measured"


# --- the source hash ---


def module(text: str) -> Any:
    """A module of this text, as inspect sees it."""
    import linecache

    name = f"kernels_{abs(hash(text))}"
    made = types.ModuleType(name)
    linecache.cache[f"{name}.py"] = (len(text), None, text.splitlines(True), f"{name}.py")
    exec(compile(text, f"{name}.py", "exec"), made.__dict__)
    return made


BODY = """
import torch
def helper(x):
    return x + {n}
def launch(x, config):
    return helper(x)
def free():
    return {m}
"""


def test_the_source_covers_what_the_function_calls_from_its_module() -> None:
    first = source_of(module(BODY.format(n=1, m=1)).launch)
    assert source_of(module(BODY.format(n=1, m=2)).launch) == first  # not called
    assert source_of(module("\n\n# moved\n" + BODY.format(n=1, m=1)).launch) == first
    assert source_of(module(BODY.format(n=2, m=1)).launch) != first


def test_the_source_covers_a_triton_kernel() -> None:
    pytest.importorskip("triton")
    import tiny_kernels

    names = [n for n in dir(tiny_kernels) if hasattr(getattr(tiny_kernels, n), "arg_names")]
    hashes = {source_of(getattr(tiny_kernels, name)) for name in names}
    assert len(names) > 1 and len(hashes) == len(names)


def test_what_has_no_source_needs_a_version() -> None:
    with pytest.raises(InvalidInput, match="version="):
        wrapped(torch.add)
    assert wrapped(torch.add, version="2026 a").op.source == "2026_a"


# --- copies ---


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t,
        lambda t: t.t(),
        lambda t: t[:, 1:5],
        lambda t: t[::2, ::3],
        lambda t: t[0].expand(7, 8),
        lambda t: t[3, 5],
        lambda t: t[:0],
        lambda t: t.to(torch.bfloat16)[1:, 1:],
    ],
)
def test_a_copy_has_the_values_strides_and_alignment_and_other_memory(
    view: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    original = view(torch.arange(64.0).reshape(8, 8).requires_grad_())
    copy = clone_tensor(original)
    assert torch.equal(copy, original) and copy.dtype == original.dtype and not copy.requires_grad
    assert copy.stride() == original.stride()
    if original.numel():
        assert copy.data_ptr() != original.data_ptr() and copy.data_ptr() % 16 == original.data_ptr() % 16


@pytest.mark.parametrize("gave", [None, 3, [1], "tokens", {"tokens": 1.5}, {"tokens": True}, {"tokens": torch.ones(2)},
    {"tokens": -1}, {"experts": 0}, {"experts": "x"}, {"tokens": [1]}, {"counts": 3}])  # fmt: skip
def test_what_a_key_gives_is_checked_in_plain_words(gave) -> None:
    def scaled(x: torch.Tensor, *, config: Any) -> torch.Tensor:
        return x * 2

    name = "odd_key"
    fast = wrap(scaled, op=name, configs=[{"rows": 1}, {"rows": 2}], key=lambda x: gave, version="1")
    with pytest.raises(InvalidInput, match=f"key of op '{name}' gave ") as caught:
        fast(torch.ones(4))
    assert "allowed" in str(caught.value) and "Input should" not in str(caught.value)


def test_configs_that_are_no_sequence_are_named() -> None:
    for wrong in (None, 3):
        with pytest.raises(InvalidInput, match=r"configs=.* is no sequence"):
            wrap(lambda x, *, config: x, op="odd_configs", configs=wrong, key=lambda x: {}, version="1")


def test_counts_below_zero_are_refused(serving: Dispatcher) -> None:
    fast = wrapped(key=lambda x: {"counts": [-1, 5]})
    with pytest.raises(InvalidInput, match=r"counts=\[-1, 5\]"):
        fast(torch.ones(2, 4))
