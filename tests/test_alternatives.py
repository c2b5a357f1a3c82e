"""Two configs in one captured call: the rule against brute force, who is served them, the gate and the products in
Triton's interpreter, compiled for three architectures, and captured on a GPU."""

import gzip
import json
import sys
from collections import defaultdict
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from drawn import in_turn
from interpreting import INTERPRETED, marked, of_the_cpu_test, poison_workspaces
from launching import ahead, differences, launches
from toy import CapturingBackend, timing

import moecache
from moecache import feedback, routing
from moecache.devices import Places
from moecache.dispatch import Dispatcher
from moecache.dispatch.any_routing import WORTH, by_turns, least_worst
from moecache.kernels import registry as ops
from moecache.kernels import running
from moecache.kernels.compile import compile_source, why_unfit
from moecache.kernels.fused_moe import alternatives
from moecache.kernels.fused_moe.gate import APART, gate
from moecache.kernels.fused_moe.op import FUSED_MOE, call_args
from moecache.kernels.gemm import tile
from moecache.kernels.sort.op import SORT, SortCall
from moecache.kernels.tensors import poison
from moecache.predict import rates
from moecache.predict.rates import alone_us
from moecache.predict.work import Work
from moecache.schemas.config import Alternatives, config
from moecache.schemas.device import KNOWN, by_arch
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import Problem, bucket_index
from moecache.schemas.timing import Choice

moe = of_the_cpu_test("fused_moe")
ARCHS = ("sm_90", "gfx942", "gfx950")
DATA = Path(__file__).parent / "data"


def tiles(block=16, variant="tiles", combine="sum", extra=None, **more):
    params = {"block": block, "group": 1, "combine": combine, "swap": 0, "tma": 0} | more
    for prefix in ("up", "down"):
        params |= {f"{prefix}_n": 16, f"{prefix}_k": 16, f"{prefix}_stages": 2, f"{prefix}_warps": 4}
    return config(variant, extra, **params)


def question(tokens=256, topk=2, experts=8, **more):
    dims = {"hidden": 64, "intermediate": 32} | more
    return Problem(op="fused_moe", vendor="nvidia", arch="sm_90", units=132, tokens=tokens, experts=experts, topk=topk,
                   dtype="bf16", dims=tuple(dims.items()))  # fmt: skip


# --- the rule ---

SUMS = {c.name: c for c in (tiles(16), tiles(32), tiles(64))}
ATOMIC = {c.name: c for c in (tiles(16, combine="atomic"), tiles(32, combine="atomic"))}
OTHER = config("decode", up_n=8, up_k=64, up_warps=4, down_n=8, down_k=64, down_warps=4)
CONFIGS = SUMS | ATOMIC | {OTHER.name: OTHER}
IDLE = {name: alone_us(alternatives.idle(question(), c), KNOWN["h200"]) for name, c in (SUMS | ATOMIC).items()}
micros = st.integers(1, 8).map(lambda us: 50.0 * us)  # few values, so that ties are common
tables = st.dictionaries(
    st.sampled_from(routing.NAMES), st.dictionaries(st.sampled_from(sorted(CONFIGS)), micros), max_size=4
)


def brute(times, single):
    """Every pair, straight from the rule's words: (worst loss, the loss of every bucket) of the best."""
    measured = {bucket: each for bucket, each in times.items() if each}
    if single.worst <= WORTH:
        return None
    found = []
    for some in (SUMS, ATOMIC):
        for a, b in combinations(sorted(some), 2):
            losses = []
            for each in measured.values():
                best = min(each.get(a, float("inf")) + IDLE[b], each.get(b, float("inf")) + IDLE[a])
                losses.append(best / min(each.values()) - 1)
            found.append(max(losses))
    return min(found)


@settings(max_examples=300)
@given(tables)
def test_the_rule_against_brute_force(times):
    single = least_worst(times)
    if single is None:
        return
    found, want = by_turns(alternatives, question(), times, CONFIGS, single), brute(times, single)
    assert (found is None) == (want is None or want >= single.worst - WORTH)
    if found is None:
        return
    both, measured = found.both, {bucket: each for bucket, each in times.items() if each}
    assert found.worst == pytest.approx(want) and both.first["combine"] == both.second["combine"]
    for bucket, each in measured.items():
        us = {c: each.get(c.name, float("inf")) for c in (both.first, both.second)}
        owner, other = (both.second, both.first) if bucket in both.served else (both.first, both.second)
        assert us[owner] + IDLE[other.name] <= us[other] + IDLE[owner.name]
        assert (us[owner] + IDLE[other.name]) / min(each.values()) - 1 <= found.worst + 1e-9
    assert 2 * len(set(both.served) & set(measured)) <= len(measured), "the first one owns at least half"


A, B, C = SUMS.values()
WANTING = {"a0e0": {A.name: 400.0, B.name: 600.0, C.name: 500.0}, "a2e3": {A.name: 600.0, B.name: 400.0, C.name: 500.0},
           "a2e2": {A.name: 600.0, B.name: 400.0, C.name: 500.0}}  # fmt: skip


def turns(times=WANTING, configs=CONFIGS, failed=(), **asked):
    return by_turns(alternatives, question(**asked), times, configs, least_worst(times), failed)


def test_a_bucket_that_nobody_measured_goes_with_the_nearest():
    both = turns().both
    assert (both.first, both.second) == (B, A)
    assert both.served == ("a0e0", "a0e1", "a1e0"), "a0e2 and a1e1 are as near to both: the first one's"
    assert turns().worst == pytest.approx(max(IDLE[A.name], IDLE[B.name]) / 400)


def scaled(factor):
    return {bucket: {name: us * factor for name, us in each.items()} for bucket, each in WANTING.items()}


def test_where_one_config_is_enough_or_two_cannot_be():
    near = {bucket: dict.fromkeys(each, 400.0) | {A.name: 403.9} for bucket, each in WANTING.items()}
    for times in (near, {bucket: {C.name: 500.0} for bucket in WANTING}, {"a0e0": {A.name: 400.0, B.name: 900.0}}):
        assert turns(times) is None
    assert turns(scaled(0.1)).worst == pytest.approx(max(IDLE[A.name], IDLE[B.name]) / 40)
    assert turns(scaled(0.05)) is None, "the second one costs more than it gains"
    assert turns(tokens=32) is None, "few pairs: eager calls share the answer"
    assert turns(mapped=1, **{"global": 16}) is None and turns(quant="fp8_block") is None
    assert by_turns(ops.alternating("moe_sort"), question(), WANTING, CONFIGS, least_worst(WANTING)) is None


def test_two_that_failed_together_are_left_out():
    both = turns().both
    for name in (both.name, f"{both.second.name} | {both.first.name}"):
        again = turns(failed=(name,))
        assert again is None or {again.both.first, again.both.second} != {A, B}
    assert turns(failed=("another | name",)) == turns()


def test_of_very_many_configs_those_near_the_best_are_paired():
    many = {c.name: c for c in (tiles(16, group=group) for group in range(1, 400))}
    times = {bucket: {name: 1000.0 for name in many} for bucket in ("a0e0", "a2e3")}
    one, other = list(many)[300], list(many)[7]
    times["a0e0"][one], times["a2e3"][other] = 500.0, 500.0
    found = turns(times, many)
    assert {found.both.first.name, found.both.second.name} == {one, other}


def test_on_a_measured_grid_two_are_never_worse_than_one():
    grid = json.loads(gzip.decompress((DATA / "h100-moecache-grid.json.gz").read_bytes()))
    every = [config(c["variant"], c["extra"], **c["params"]) for c in grid["configs"]]
    cells, near, gained = defaultdict(list), {"one": 0, "both": 0}, 0
    for row in grid["rows"]:
        cells[row["shape"], row["T"]].append(row)
    for rows in cells.values():
        times = {routing.NAMES[bucket_index(row["counts"])]: named(every, row["moe_us"]) for row in rows[::-1]}
        single = least_worst(times)
        layer = {"hidden": rows[0]["hidden"], "intermediate": rows[0]["inter"]}
        asked = question(rows[0]["T"], rows[0]["topk"], rows[0]["E"], **layer)
        found = by_turns(alternatives, asked, times, {c.name: c for c in every}, single)
        gained += found is not None
        for row in rows:  # chosen on one run of the clock, judged by the other
            judge, bucket = named(every, row["moe_us_again"]), routing.NAMES[bucket_index(row["counts"])]
            taken = found and (found.both.second if bucket in found.both.served else found.both.first)
            allowed = 1.03 * min(judge.values()) + 1
            near["one"] += judge[single.name] <= allowed
            other = found and (found.both.first if taken == found.both.second else found.both.second)
            idle = alone_us(alternatives.idle(asked, other), KNOWN["h200"]) if other else 0.0
            near["both"] += (judge[taken.name] + idle if taken else judge[single.name]) <= allowed
    assert gained >= 2 and near["both"] > near["one"], near


def named(every, column):
    return {c.name: us for c, us in zip(every, column, strict=True) if us is not None}


# --- who is served them ---


@pytest.fixture
def fake(monkeypatch):
    """Alternatives on a CPU: any two configs; what is launched is noted, and `broken` raises."""
    seen = SimpleNamespace(taken=[], broken=set(), on=CapturingBackend())
    read, real = feedback.read, type(FUSED_MOE).bind

    def bind(self, what, args, out):
        parts = (what.first, what.second) if isinstance(what, Alternatives) else (what,)
        run = real(self, parts[0], args, out)

        def launch(args, out):
            seen.taken.append(what)
            if seen.broken & {what, *parts}:
                raise RuntimeError("no kernel image")
            return run(args, out)

        return launch

    module = SimpleNamespace(idle=lambda problem, config: Work(launches=4, idle=2), kind=lambda problem, cfg: "any")
    monkeypatch.setattr(ops, "alternating", lambda name: module if name == "fused_moe" else None)
    monkeypatch.setattr(type(FUSED_MOE), "bind", bind)
    monkeypatch.setattr(feedback, "read", lambda slot, device: feedback.ANY if seen.on.on else read(slot, device))
    return seen


def call(tokens=80, experts=8, topk=1, ids=None):
    ids = torch.arange(tokens * topk, dtype=torch.int32).reshape(tokens, topk) % experts if ids is None else ids
    x, w1, w2 = torch.randn(tokens, 16), torch.randn(experts, 16, 16), torch.randn(experts, 16, 8)
    return x, w1, w2, torch.rand(ids.shape), ids


def filled(active, given, table):
    """Store µs of the first configs of the space, by routing bucket; which these are."""
    place, args = active.places.of_tensor(given[0]), call_args(*given)
    space = FUSED_MOE.space(FUSED_MOE.problem(args, place.device, ""), place.device)[: len(next(iter(table.values())))]
    for bucket, times in table.items():
        problem = FUSED_MOE.problem(args, place.device, bucket)
        rows = [timing(problem, c, us, place.environment) for c, us in zip(space, times, strict=True)]
        active.lookup.put(rows, place)
    return space


TABLE = {"a0e0": (400.0, 600.0, 500.0), "a2e3": (600.0, 400.0, 500.0)}


@pytest.fixture
def active(tmp_path, fake):
    with moecache.using(db=tmp_path / "c.sqlite", path=(), mode="replay", backend=fake.on) as found:
        yield found


def taken(fake, given, layer, captured=False):
    """What one call launches."""
    fake.on.on, fake.taken = captured, []
    moecache.fused_moe(*given, layer=layer)
    fake.on.on = False
    return fake.taken


def of_first(space):
    return Alternatives(first=space[0], second=space[1], served=("a0e3", "a1e2", "a1e3", "a2e1", "a2e2", "a2e3"))


def test_a_capture_is_served_both_and_eager_calls_one(active, fake, monkeypatch):
    given = call()
    space = filled(active, given, TABLE)
    assert taken(fake, given, "both") == [of_first(space), space[2]], "loaded for a capture; no routing is posted yet"
    assert taken(fake, given, "both") == [of_first(space), space[0]], "loaded, then served its own routing"
    monkeypatch.setattr(Dispatcher, "choose", lambda *a, **k: pytest.fail("a hit asked the policy"))
    assert taken(fake, given, "both") == [space[0]] and taken(fake, given, "another") == [space[2]]
    monkeypatch.undo()


def test_captures_are_hits_too(active, fake):
    given = call()
    space = filled(active, given, TABLE)
    for _ in range(2):
        assert taken(fake, given, "hits", captured=True) == [of_first(space)]
    assert taken(fake, given, "hits") == [of_first(space), space[0]], "a capture does not decide for eager calls"


@pytest.mark.parametrize("change", ["off", "few pairs", "one config suffices", "measured elsewhere, strict"])
def test_captures_that_get_one_config(tmp_path, fake, change):
    given, more = call(tokens=32 if change == "few pairs" else 80), {"mode": "off" if change == "off" else "replay"}
    table = {bucket: (400.0, 405.0, 500.0) for bucket in TABLE} if change == "one config suffices" else TABLE
    if "strict" in change:
        table, more = {"a0e0": TABLE["a0e0"]}, more | {"strict": True}
    with moecache.using(db=tmp_path / "c.sqlite", path=(), backend=fake.on, **more) as active:
        filled(active, given, table)
        for captured in (False, True):
            assert all(not isinstance(each, Alternatives) for each in taken(fake, given, change, captured))


def test_the_one_that_raises_is_left_out(active, fake):
    given = call()
    space = filled(active, given, TABLE)
    fake.broken = {space[1]}
    assert taken(fake, given, "breaks")[-1] == space[2], "the eager call is served"
    fake.broken = set()
    (served,) = taken(fake, given, "breaks", captured=True)
    assert space[1] not in (served, *vars(served).values()), "neither alone nor as one of two"


def test_two_that_raise_together_serve_no_more(active, fake):
    given = call()
    space = filled(active, given, TABLE)
    fake.broken = {of_first(space)}
    assert taken(fake, given, "together")[-1] == space[2]
    (served,) = taken(fake, given, "together", captured=True)
    assert served != of_first(space)
    names = active._failed[any_problem(active, given).key]
    assert names == {of_first(space).name}, "neither config is at fault"


def any_problem(active, given):
    return FUSED_MOE.problem(call_args(*given), active.places.of_tensor(None).device, "")


def test_an_error_under_capture_surfaces(active, fake):
    given = call()
    fake.broken = {of_first(filled(active, given, TABLE))}
    with pytest.raises(RuntimeError, match="no kernel image"):
        taken(fake, given, "surfaces", captured=True)


def test_the_answer_says_so_and_so_do_explain_and_the_digest(active, fake, monkeypatch):
    given = call()
    space, asked = filled(active, given, TABLE), any_problem(active, given)
    choice = active.peek(FUSED_MOE, asked)
    assert (choice.config, choice.alternatives, choice.tier) == (space[2], of_first(space), "measured")
    assert choice.configs == (space[2], space[0], space[1])
    assert choice.reason == (
        "any routing: at most 25.0 % behind the best in each of 2 measured routing buckets; captured: "
        f"{space[0].name}, except in a0e3, a1e2, a1e3, a2e1, a2e2, a2e3, where {space[1].name}, at most 2.2 % behind"
    )
    assert Choice.model_validate_json(choice.model_dump_json()) == choice
    older = choice.model_dump(mode="json", exclude={"alternatives"})
    assert Choice.model_validate(older).alternatives is None
    (note,) = [n for n in active.explain(asked.model_copy(update={"routing": "a0e0"})).notes if "nobody knows" in n]
    assert note.startswith("calls whose routing nobody knows get") and "captured: " in note
    before = active.digest(["fused_moe"])
    monkeypatch.setattr(rates, "IDLE_US", 100.0)
    assert active.digest(["fused_moe"]) != before, "ranks that capture something else differ"


# --- the gate ---


def test_a_mask_has_the_bits_that_the_sort_posts():
    for number, name in enumerate(routing.NAMES):
        assert alternatives.mask((name,)) == 1 << number
    assert alternatives.mask(()) == 0 and alternatives.mask(routing.NAMES) == (1 << len(routing.NAMES)) - 1
    with pytest.raises(ValueError):
        alternatives.mask(("a9e9",))


@marked
@settings(max_examples=60)
@given(st.integers(0, (1 << 12) - 1), st.integers(0, 11), st.integers(0, 1 << 20), st.integers(0, 1 << 20))
def test_one_of_two_gets_its_rows(mask, bucket, one, other):
    totals, posted = poison(torch.empty(2, 4, dtype=torch.int32)), torch.tensor([-1], dtype=torch.int32)
    first, second = torch.tensor([one, 5], dtype=torch.int32), torch.tensor([other, 5], dtype=torch.int32)
    gate[(1,)](torch.tensor([bucket], dtype=torch.int32), first, second, totals, posted, mask, PDL=False, num_warps=1)
    assert totals[:, 0].tolist() == ([0, other] if mask >> bucket & 1 else [one, 0]) and int(posted) == bucket


@marked
@settings(max_examples=20)
@given(st.data())
def test_the_sort_and_the_gate_agree_with_the_host(data):
    """Random histograms, also of no pair at all, of one expert and of 512."""
    experts = data.draw(st.sampled_from([1, 2, 5, 8, 33, 512]))
    hot = data.draw(st.integers(1, experts))
    ids = data.draw(st.lists(st.integers(-1, hot - 1), min_size=1, max_size=48))
    if data.draw(st.booleans()):
        ids = [-1] * len(ids) if data.draw(st.booleans()) else [ids[0]] * len(ids)
    served = tuple(data.draw(st.sets(st.sampled_from(routing.NAMES))))
    ids = torch.tensor(ids, dtype=torch.int32).reshape(-1, 1)
    args = moe.call(hidden=1, middle=1, experts=experts, ids=ids, dtype=torch.float32)
    args.posted = torch.tensor([-1], dtype=torch.int32)
    one, other = tiles(16), tiles(data.draw(st.sampled_from([16, 64])))
    with pytest.MonkeyPatch.context() as patch:
        seen = noted(patch, run=False)
        FUSED_MOE.launch(Alternatives(first=one, second=other, served=served), args, FUSED_MOE.outputs(args))
    name = routing.bucket(routing.histogram(ids, experts))
    wanted = [int(SORT.reference(SortCall(ids, experts, c["block"])).num_tokens_post_padded[0]) for c in (one, other)]
    wanted[0 if name in served else 1] = 0
    assert seen == [wanted[0], wanted[0], wanted[1], wanted[1]]
    assert routing.bucket_name(int(args.posted)) == name


# --- the launch, interpreted ---


CLOSE = {torch.float16: 2e-3, torch.float32: 2e-6}
PAIRS = {
    "heights": (tiles(16), tiles(64, "heights", low=16)),
    "one height": (tiles(32, swap=1), tiles(32, programs=3, group=2)),
    "atomic": (tiles(32, combine="atomic", programs=3), tiles(16, combine="atomic", swap=1)),
    "few programs": (tiles(64, programs=2), tiles(16, programs=3, swap=1)),
}


def calls():
    half, single = {"dtype": torch.float16}, {"dtype": torch.float32}
    return {
        "odd": moe.call(21, 5, 2, 33, 50, **half),
        "odd, fp32, biases": moe.biased(moe.call(13, 3, 3, 40, 24, **single)),
        "one expert takes all": moe.call(ids=torch.full((37, 1), 3), **single),
        "nothing valid": moe.call(ids=torch.full((7, 2), -1), **half),
        "on input": moe.call(9, on_input=True, activation="gelu", **half),
        "transposed ids": moe.call(ids=torch.randint(0, 5, (3, 9), dtype=torch.int32).T, **half),
        "one token": moe.call(1, **single),
    }


def parameters(launch):
    """What a launch gives for each parameter that is no constexpr."""
    names = [name for name in launch.fn.arg_names if name not in launch.constexprs]
    return dict(zip(names, launch.args, strict=True))


def noted(patch, run=True):
    """The used rows that products see, in launch order. Without `run` no product and no sum is computed."""
    seen, real = [], running._through_jit

    def through_jit(launch, named):
        if launch.fn in (tile.up, tile.down):
            seen.append(int(running._tensor(parameters(launch)["TOTAL"], named)[0]))
        return real(launch, named) if run or launch.fn not in (tile.up, tile.down, tile.combine) else None

    patch.setattr(running, "_through_jit", through_jit)
    return seen


@marked
@pytest.mark.parametrize(
    "pair, name", [(pair, name) for number, pair in enumerate(PAIRS) for name in in_turn(list(calls()), number, 2)]
)
def test_the_owner_of_a_routing_does_the_work(pair, name, monkeypatch):
    args, (one, other) = calls()[name], PAIRS[pair]
    seen = noted(monkeypatch)
    poison_workspaces(monkeypatch)
    bucket = routing.bucket(routing.histogram(args.topk_ids, len(args.w1)))
    want, pairs = moe.model(args), sum(routing.histogram(args.topk_ids, len(args.w1)))
    for served in ((bucket,), tuple(each for each in routing.NAMES if each != bucket)):
        posted = torch.full((1,), -77, dtype=torch.int32) if len(served) == 1 else None
        both = Alternatives(first=one, second=other, served=served)
        out = poison(FUSED_MOE.outputs(args))
        got = FUSED_MOE.launch(both, replace(args, posted=posted), out)
        assert got is out and FUSED_MOE.error(got, want) <= CLOSE[args.hidden_states.dtype], served
        assert posted is None or routing.bucket_name(int(posted)) == bucket
        working, idle = (seen[2:], seen[:2]) if bucket in served else (seen[:2], seen[2:])
        assert idle == [0, 0] and working[0] == working[1] >= pairs, "the other one sees no rows"
        seen.clear()


@marked
def test_what_cannot_be_launched_by_turns_is_refused():
    args = calls()["odd"]
    both = Alternatives(first=tiles(16), second=tiles(16, combine="atomic"), served=())
    with pytest.raises(InvalidInput, match="one way to add up"):
        FUSED_MOE.launch(both, args, FUSED_MOE.outputs(args))
    with pytest.raises(InvalidInput, match="no expert_map"):
        FUSED_MOE.launch(of_two(), moe.mapped(args), FUSED_MOE.outputs(args))
    with pytest.raises(InvalidInput, match="last strides"):
        FUSED_MOE.launch(of_two(), replace(args, w2=args.w2.mT.contiguous().mT), FUSED_MOE.outputs(args))
    none = moe.call(ids=torch.empty(0, 2, dtype=torch.int32))
    assert FUSED_MOE.launch(of_two(), none, FUSED_MOE.outputs(none)).shape[0] == 0


def of_two(pair="heights", served=("a2e3",)):
    return Alternatives(first=PAIRS[pair][0], second=PAIRS[pair][1], served=served)


# --- compiled ---


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("arch", ARCHS)
def test_the_gate_compiles(arch):
    device = by_arch(arch)
    for extra in ({}, {"launch_pdl": 1}) if arch == "sm_90" else ({},):
        both = Alternatives(first=tiles(extra=extra), second=tiles(32, extra=extra), served=())
        (source,) = (each for each in FUSED_MOE.sources(question(), both, device) if each.fn is gate)
        found = compile_source(source, device)
        assert why_unfit(found, device) == ""
        assert ("griddepcontrol.wait" in found.text) == bool(extra)


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("extra", [{}, {"launch_pdl": 1}], ids=["plain", "pdl"])
def test_all_that_is_launched_was_compiled_for_its_configs(extra, monkeypatch):
    device = by_arch("sm_90")
    launched = launches(monkeypatch, device)

    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    args = call_args(meta(256, 2048), meta(64, 1536, 2048), meta(64, 2048, 768), meta(256, 8, dtype=torch.float32),
                     routing.draw("uniform", 256, 64, 8).to("meta"))  # fmt: skip
    problem = FUSED_MOE.problem(args, device, "")
    found = [
        c for c in FUSED_MOE.space(problem, device) if c["combine"] == "sum" and dict(c.extra) == {"launch_pdl": 1}
    ]
    one = next(c for c in found if c.variant == "ring" and c["block"] < 64)
    other = next(c for c in found if c.variant == "tiles" and c["block"] < one["block"])
    one, other = (c.model_copy(update={"extra": tuple(extra.items())}) for c in (one, other))
    both = Alternatives(first=one, second=other, served=("a0e0",))
    FUSED_MOE.launch(both, args, FUSED_MOE.outputs(args))
    names = [each[0] for each in launched]
    assert names.count("gate") == 1 and names.index("gate") < min(
        names.index(n) for n in names if n in ("up", "product")
    )
    assert not differences(launched, ahead(FUSED_MOE.sources(problem, both, device), device))


# --- on a GPU ---

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
EXPERTS, TOPK, HIDDEN, MIDDLE = 16, 4, 256, 128


def gpu(test):
    for mark in on_gpu:
        test = mark(test)
    return test


def gpu_call(tokens=255, dtype=torch.bfloat16):
    def rows(*shape):
        return torch.randn(shape, device="cuda") * shape[-1] ** -0.5

    ids = routing.draw("uniform", tokens, EXPERTS, TOPK).cuda()
    x, w1, w2 = (
        torch.randn(tokens, HIDDEN, device="cuda"),
        rows(EXPERTS, 2 * MIDDLE, HIDDEN),
        rows(EXPERTS, HIDDEN, MIDDLE),
    )
    return call_args(*(t.to(dtype) for t in (x, w1, w2)), torch.rand(tokens, TOPK, device="cuda"), ids)


def routings(tokens):
    """Uniform, all on one expert, none, few experts, and uniform with some that name none."""
    uniform = routing.draw("uniform", tokens, EXPERTS, TOPK, 3)
    return [uniform, torch.full_like(uniform, 3), torch.full_like(uniform, -1), uniform % 2 + 5,
            torch.where(torch.rand(uniform.shape) < 0.3, -1, uniform)]  # fmt: skip


def gpu_pairs(args):
    """Neighbours in a list of one candidate of each variant and block height, by how they add up."""
    device = Places().of_tensor(args.w1).device
    problem, kinds = FUSED_MOE.problem(args, device, ""), {}
    for c in FUSED_MOE.space(problem, device):
        if how := alternatives.kind(problem, c):
            kinds.setdefault(how, {}).setdefault((c.variant, c["block"], c.extra), c)
    for found in kinds.values():
        each = list(found.values())
        yield from zip(each, each[1:] + each[:1], strict=True)


@gpu
@pytest.mark.parametrize("poisoned", [False, True])
@pytest.mark.parametrize("tokens", [33, 255])
def test_replays_follow_their_routing(tokens, poisoned, monkeypatch):
    """Poisoned workspaces are filled anew in every replay; as they are, dependent launches follow each other."""
    args, real, kept = gpu_call(tokens), running._through_jit, []

    def through_jit(launch, named):
        if launch.fn is gate:
            kept.append(running._tensor(parameters(launch)["TOTALS"], named))
        return real(launch, named)

    monkeypatch.setattr(running, "_through_jit", through_jit)
    if poisoned:
        poison_workspaces(monkeypatch)
    cases = [(ids.cuda(), routing.bucket(routing.histogram(ids, EXPERTS))) for ids in routings(len(args.topk_ids))]
    wants = [FUSED_MOE.reference(replace(args, topk_ids=ids)) for ids, _ in cases]
    pairs = list(gpu_pairs(args))
    assert [bucket == cases[1][1] for _, bucket in cases] == [False, True, False, True, False]
    assert {one["combine"] for one, _ in pairs} == {"sum", "atomic"}
    for one, other in pairs:
        served = (cases[1][1],)  # all on one expert and few experts are the second's, the rest the first's
        kept.clear()
        both, out = Alternatives(first=one, second=other, served=served), FUSED_MOE.outputs(args)
        FUSED_MOE.launch(both, args, out)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            FUSED_MOE.launch(both, args, out)
        for turn in range(4):
            for (ids, bucket), want in zip(cases[:: 1 - 2 * (turn % 2)], wants[:: 1 - 2 * (turn % 2)], strict=True):
                args.topk_ids.copy_(ids)
                poison(out)
                graph.replay()
                torch.cuda.synchronize()
                assert FUSED_MOE.error(out, want) < 2e-2, (both.name, bucket)
                used = kept[-1][:: APART.value].tolist()
                owner = bucket in served
                assert used[1 - owner] == 0, (both.name, bucket)
                assert (used[owner] > 0) == bool((ids >= 0).any()), (both.name, bucket)


@gpu
@pytest.mark.parametrize("tokens", [33, 255])
def test_many_replays_in_a_row_do_not_disturb_each_other(tokens):
    """Several calls a graph, no host in between, each with another routing."""
    args = gpu_call(tokens)
    cases = [ids.cuda() for ids in routings(len(args.topk_ids))]
    wants = [FUSED_MOE.reference(replace(args, topk_ids=ids)) for ids in cases]
    bucket = routing.bucket(routing.histogram(cases[1].cpu(), EXPERTS))
    for one, other in gpu_pairs(args):
        both, outs = Alternatives(first=one, second=other, served=(bucket,)), [FUSED_MOE.outputs(args) for _ in cases]
        FUSED_MOE.launch(both, args, outs[0])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for ids, out in zip(cases, outs, strict=True):
                args.topk_ids.copy_(ids)
                FUSED_MOE.launch(both, args, out)
        for _ in range(50):
            graph.replay()
        torch.cuda.synchronize()
        for out, want in zip(outs, wants, strict=True):
            assert FUSED_MOE.error(out, want) < 2e-2, both.name


@gpu
def test_a_captured_public_call_is_served_both(tmp_path):
    args = gpu_call()
    given = [getattr(args, name) for name in ("hidden_states", "w1", "w2", "topk_weights", "topk_ids")]
    cases = [ids.cuda() for ids in routings(len(args.topk_ids))]
    with moecache.using(db=tmp_path / "c.sqlite", path=(), mode="replay") as active:
        one, other = next(gpu_pairs(args))
        place = active.places.of_tensor(given[0])
        for bucket, times in {"a0e0": (400.0, 600.0), "a2e3": (600.0, 400.0)}.items():
            problem = FUSED_MOE.problem(args, place.device, bucket)
            rows = [timing(problem, c, us, place.environment) for c, us in zip((one, other), times, strict=True)]
            active.lookup.put(rows, place)
        for _ in range(2):
            moecache.fused_moe(*given, layer="alternatives")
            torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = moecache.fused_moe(*given, layer="alternatives")
        assert [served for served in active.hot.values() if isinstance(served.what, Alternatives)]
        for ids in cases:
            args.topk_ids.copy_(ids)
            graph.replay()
            torch.cuda.synchronize()
            assert FUSED_MOE.error(out, FUSED_MOE.reference(args)) < 2e-2
            slot = feedback.post("alternatives", 256, EXPERTS, given[0].device)
            assert slot.word.value == bucket_index(routing.histogram(ids.cpu(), EXPERTS)), "posted by the gate"
