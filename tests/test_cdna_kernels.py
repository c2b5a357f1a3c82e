"""Every op and variant that the CDNA search spaces offer, executed on the interpreter in tests/cdna: the cases there,
and what no single call shows."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "helpers"))

import tiny_kernels
from cdna import library
from cdna.cases import ARCHS, CASES, Call, Case, call, check
from cdna.device import LATE, MIXED, PLAIN, Mode, interpreted
from drawn import drawn

from moecache.kernels import handshake
from moecache.kernels import registry as ops
from moecache.kernels.tensors import poison
from moecache.schemas.config import Alternatives, Config
from moecache.schemas.device import KNOWN, by_arch
from moecache.schemas.layer import Layer
from moecache.schemas.problem import BUCKETS, Problem
from moecache.store import Store

WITHOUT = "no C compiler named cc, which builds the interpreter of CDNA code"
pytestmark = pytest.mark.skipif(library.compiler() is None, reason=WITHOUT)

SHIPPED = Path(__file__).parent.parent / "moecache" / "prebuilt"
DRAWN = 6  # of the cases that are not always run, on each architecture
NAMED = {case.name: case for case in CASES}
ALWAYS = [case for case in CASES if case.always]


def chosen() -> list[Any]:
    found = []
    for arch in ARCHS:
        here = [case for case in CASES if arch in case.archs]
        drawn_ones = drawn([case for case in here if not case.always], DRAWN)
        found += [pytest.param(case, arch, id=f"{arch} {case.name}") for case in here if case.always]
        found += [pytest.param(case, arch, id=f"{arch} {case.name}") for case in drawn_ones]
    return found


@pytest.mark.parametrize(("case", "arch"), chosen())
def test_the_machine_code_computes_what_the_reference_says(case: Case, arch: str) -> None:
    assert not check(case, arch)


# --- nothing that is offered is left out ---


def executed(arch: str) -> set[tuple[str, ...]]:
    """What the cases that always run make of families."""
    return {family for case in ALWAYS for family in call(case, arch).families}


@pytest.mark.parametrize("arch", ARCHS)
def test_every_shipped_prediction_is_of_a_family_that_is_executed(arch: str) -> None:
    with Store.open(SHIPPED / f"predicted-{arch}.sqlite", shipped=True) as store:
        found = {(row.problem.op, row.config): row.problem for row in store.predictions()}
    assert {op for op, _ in found} == {"moe_sort", "fused_moe", "grouped_gemm"}
    there = executed(arch)
    for (name, config), problem in found.items():
        missing = Call(by_arch(arch), ops.get(name), problem, config, {}).families - there
        assert not missing, f"{problem.key}: {config} runs {missing}, which no case in tests/cdna/cases.py always runs"


def offered(arch: str) -> list[tuple[Any, Problem, Config]]:
    """Candidates for layers with few and many experts, tokens and formats."""
    device, found = next(d for d in KNOWN.values() if d.arch == arch), []
    for dtype, experts, topk in (("bf16", 8, 2), ("bf16", 128, 8), ("fp16", 8, 2), ("fp32", 8, 2), ("fp8", 128, 8)):
        layer = Layer(model="", experts=experts, global_experts=experts, topk=topk, hidden=2048, intermediate=768,
                      dtype=dtype)  # fmt: skip
        for op in map(ops.get, filter(ops.built_in, ops.names())):
            for problem in op.problems(layer, (1, 4096), device):
                found += [(op, problem, config) for config in op.space(problem, device)]
    return found


@pytest.mark.parametrize("arch", ARCHS)
def test_every_candidate_is_of_a_family_that_is_executed_and_each_knob_is_turned_once(arch: str) -> None:
    there, candidates, seen = executed(arch), offered(arch), set()
    for op, problem, config in candidates:
        known = (op.name, config.variant, dict(config.params).get("scan"), dict(config.params).get("fuse"),
                 dict(config.params).get("fused"))  # fmt: skip
        if known not in seen:
            missing = Call(by_arch(arch), op, problem, config, {}).families - there
            assert not missing, f"{problem.key}: {config} runs {missing}, which no case always runs"
            seen.add(known)
    knobs = {name for _, _, config in candidates for name in dict(config.extra)}
    turned = {name for case in CASES if arch in case.archs for name in case.config}
    turned |= {name for case in ALWAYS for name in dict(call(case, arch).config.extra)}
    assert knobs <= turned


# --- what no single call shows ---


@pytest.mark.parametrize("arch", ARCHS)
def test_one_counter_serves_many_handshakes(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is never reset, and may wrap."""
    made = call(NAMED["handshake"], arch)
    want = made.op.reference(made.args)
    with interpreted(arch) as log:
        for start in (0, 0x7FFF0000, -65536):
            counter = torch.tensor([start], dtype=torch.int32)
            monkeypatch.setattr(handshake, "slot", lambda device, counter=counter: counter)
            for mode in (PLAIN, MIXED):
                log.mode = mode
                assert made.op.error(made.launch(log), want) == 0.0 and not log.wrong, (start, mode, log.wrong)
            assert counter.item() == (start + 2 * 65536 + (1 << 31)) % (1 << 32) - (1 << 31)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_alternative_that_does_not_own_the_routing_multiplies_nothing(arch: str) -> None:
    made, other = (call(NAMED[name], arch) for name in ("tiles of 64, products of 16", "two heights"))
    want, steps = made.op.reference(made.args), []
    with interpreted(arch) as log:
        for served in ((), BUCKETS):
            log.clear()
            both = Alternatives(first=made.config, second=other.config, served=served)
            got = made.op.launch(both, made.args, poison(made.op.outputs(made.args)))
            assert made.op.error(got, want) <= made.op.tolerance(made.problem) and not log.wrong
            assert "gate" in log.names and log.names.count("up") == log.names.count("down") == 2
            steps.append([log.each[i] for i, name in enumerate(log.names) if name == "up"])
    assert steps[0][0] > 10 * steps[1][0] and steps[1][1] > 10 * steps[0][1]


@pytest.mark.parametrize("name", ["decode", "tiles of 16", "fp8, fused"])
@pytest.mark.parametrize("arch", ARCHS)
def test_what_is_no_number_stays_in_its_token(arch: str, name: str) -> None:
    made = call(NAMED[name], arch)
    ids = made.args.topk_ids.clone()
    ids[1], ids[3] = torch.tensor([2, 5]), torch.tensor([5, 2])
    args, x = replace(made.args, topk_ids=ids), made.args.hidden_states.clone()
    x[1], x[3, 7] = float("nan"), float("inf")
    with interpreted(arch) as log:
        want, got = (replace(made, args=each).launch(log) for each in (args, replace(args, hidden_states=x)))
    assert not log.wrong and not got[[1, 3]].isfinite().any()
    others = [row for row in range(len(x)) if row not in (1, 3)]
    assert torch.equal(got[others], want[others]) and want.isfinite().all()


BLOCK = 256


def passed_on(arch: str, world: int, warps: int, mode: Mode) -> torch.Tensor:
    """What each GPU has read from the box that the one before wrote to: a launch and a region of memory each, all at a
    time."""
    boxes = [torch.zeros(16 + BLOCK, dtype=torch.int32) for _ in range(world)]
    out = torch.full((world, BLOCK), -1, dtype=torch.int32)
    addresses = torch.tensor([box.data_ptr() for box in boxes])
    with interpreted(arch) as log:
        log.mode, log.peers = mode, boxes
        with log.together():
            for rank in range(world):
                tiny_kernels.pass_on[(1,)](addresses, out[rank], rank, WORLD=world, BLOCK=BLOCK, num_warps=warps)
    assert not log.wrong and log.names == ["pass_on"] * world
    return out


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("arch", ARCHS)
def test_peers_hand_over_through_a_flag_that_is_polled(arch: str, world: int) -> None:
    want = torch.arange(world * BLOCK, dtype=torch.int32).view(world, BLOCK).roll(1, 0)
    for mode in (LATE, MIXED, replace(MIXED, seed=4, quantum=7)):
        assert torch.equal(passed_on(arch, world, 1, mode), want)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_flag_that_one_wave_raises_says_nothing_of_the_stores_of_others(arch: str) -> None:
    """They wait for nothing before the barrier: the compiler adds no wait, so a kernel has to."""
    want = torch.arange(2 * BLOCK, dtype=torch.int32).view(2, BLOCK).roll(1, 0)
    assert torch.equal(passed_on(arch, 2, 4, PLAIN), want) and not torch.equal(passed_on(arch, 2, 4, MIXED), want)


def test_a_peer_that_nobody_answers_is_given_up() -> None:
    boxes = [torch.zeros(16 + BLOCK, dtype=torch.int32) for _ in range(2)]
    addresses, out = torch.tensor([box.data_ptr() for box in boxes]), torch.zeros(BLOCK, dtype=torch.int32)
    with interpreted("gfx942") as log:
        log.mode, log.peers = replace(PLAIN, most_steps=100_000), boxes
        tiny_kernels.pass_on[(1,)](addresses, out, 0, WORLD=2, BLOCK=BLOCK, num_warps=4)
    assert "pass_on: gave up after steps" in log.wrong[0]
