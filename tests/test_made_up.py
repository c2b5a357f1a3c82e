"""Configs that a stranger made up: none is served, tried or compiled unless the op's own space makes it."""

import random
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

import moecache
from moecache.backends.cpu import CpuBackend
from moecache.dispatch import Dispatcher
from moecache.kernels import registry as ops
from moecache.kernels.code import code_of
from moecache.kernels.fused_moe.op import FUSED_MOE
from moecache.kernels.grouped_gemm.op import GROUPED_GEMM
from moecache.kernels.sort.op import SORT
from moecache.schemas.config import Config, config
from moecache.schemas.device import Device, by_arch
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Environment, Prediction, Timing
from moecache.settings import Settings
from moecache.store import Store
from moecache.tuning.candidates import PROVEN, shortlist

H200 = Environment(device_name="NVIDIA H200", driver="580.1", torch="2.12.0", triton="3.9.0")
LADDER = tuple(1 << k for k in range(18))  # every token bucket
LAYER = {"hidden": 2048, "intermediate": 768}
CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "layer": (FUSED_MOE, "bf16", LAYER),
    "wide": (FUSED_MOE, "fp16", {"hidden": 7168, "intermediate": 256}),
    "blocks": (FUSED_MOE, "bf16", LAYER | {"quant": "fp8_block"}),
    "channels": (FUSED_MOE, "bf16", LAYER | {"quant": "fp8_channel"}),
    "odd": (FUSED_MOE, "bf16", {"hidden": 2047, "intermediate": 768, "unaligned": 1}),
    "fp32": (FUSED_MOE, "fp32", LAYER),
    "no gate": (FUSED_MOE, "bf16", LAYER | {"activation": "relu2", "gated": 0}),
    "no gate in blocks": (FUSED_MOE, "bf16", LAYER | {"activation": "relu2", "gated": 0, "quant": "fp8_block"}),
    "product": (GROUPED_GEMM, "bf16", LAYER),
    "sort": (SORT, "int32", {"block_m": 64}),
}
ODD = (0, 1, 2, 3, 5, 7, 8, 16, 64, 128, 4096, -1, -64, 1 << 20, 2**63, -(2**70), True, False, "", "1", "4", "sum", "x")
NAMES = ("ir_override", "num_stages", "num_warps", "maxnreg", "launch_pdl", "xcds", "waves_per_eu", "kpack", "group",
         "parts", "programs", "low", "tma", "num_ctas", "options", "allow_fp8e4nv", "debug", "arch")  # fmt: skip


@cache
def device(arch: str) -> Device:
    return CpuBackend().device() if arch == "cpu" else by_arch(arch) or pytest.fail(arch)


def problem(name: str, arch: str, tokens: int = 256, **dims: Any) -> Problem:
    op, dtype, own = CASES[name]
    where, topk = device(arch), 1 if op is GROUPED_GEMM else 8
    return Problem(
        op=op.name, vendor=where.vendor, arch=where.arch, units=where.units, tokens=tokens, experts=64, topk=topk,
        routing="a0e1", dtype=dtype, dims=tuple((own | dims).items()), source=op.source,
    )  # fmt: skip


@cache
def makeable(name: str, arch: str) -> set[str]:
    """All that the op's space holds for any number of tokens."""
    blocks: list[dict[str, Any]] = [{"block_m": 16 << k} for k in range(5)] if name == "sort" else [{}]
    asked = [problem(name, arch, tokens, **dims) for tokens in LADDER for dims in blocks]
    return {repr(each) for p in asked for each in CASES[name][0].space(p, device(arch))}


def mutated(real: Config, rng: random.Random) -> Config:
    """A config with one to three changes: other values, other types, names added, left out, moved or renamed."""
    parts: list[dict[str, Any]] = [dict(real.params), dict(real.extra)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        mine, other = rng.sample(parts, 2)
        name = rng.choice([*mine, "none"])
        how = rng.choice(("value", "value", "type", "add", "drop", "move", "near"))
        if how == "add" or name not in mine:
            mine[rng.choice(NAMES)] = rng.choice(ODD)
        elif how == "value":
            mine[name] = rng.choice(ODD)
        elif how == "type":
            mine[name] = rng.choice((str(mine[name]), bool(mine[name])))
        elif how == "near" and type(mine[name]) is int:
            mine[name] = rng.choice((mine[name] * 2, mine[name] // 2, mine[name] + 1, -mine[name]))
        elif how == "move":
            other[name] = mine.pop(name)
        else:
            del mine[name]
    return config(real.variant, parts[1], **parts[0])


@pytest.mark.parametrize("arch", ["cpu", "sm_90", "gfx942", "gfx950"])
@pytest.mark.parametrize("name", CASES)
def test_nothing_fits_that_no_space_makes(name: str, arch: str) -> None:
    if arch != "cpu":
        pytest.importorskip("triton")
    op, rng = CASES[name][0], random.Random(f"{name} {arch}")
    asked = [problem(name, arch, tokens) for tokens in (1, 64, 1024, 16384)]
    real = [each for p in asked for each in op.space(p, device(arch))]
    tried = [(rng.choice(asked), mutated(rng.choice(real), rng)) for _ in range(400)]
    admitted = [made for p, made in tried if not op.fits(p, made, device(arch))]
    assert [made.name for made in admitted if repr(made) not in makeable(name, arch)] == []
    assert len({repr(made) for _, made in tried} - makeable(name, arch)) > 300  # it was put to the test


@pytest.mark.parametrize("arch", ["cpu", "sm_90", "gfx942", "gfx950"])
@pytest.mark.parametrize("name", CASES)
def test_all_that_a_space_makes_fits_and_serves_as_a_neighbour(name: str, arch: str) -> None:
    if arch != "cpu":
        pytest.importorskip("triton")
    op = CASES[name][0]
    for tokens in LADDER:
        asked = problem(name, arch, tokens)
        space = op.space(asked, device(arch))
        assert space and not any(op.fits(asked, each, device(arch)) for each in space)
    fewer = op.space(problem(name, arch, 64), device(arch))
    near = [op.fits(problem(name, arch, 256), each, device(arch)) for each in fewer]
    assert not any("no search space" in why for why in near)


@pytest.mark.parametrize("change", [True, "1"])
def test_a_value_of_another_type_is_another_value(change: Any) -> None:
    """True equals 1 and is written alike in a config's name, but it is not what the kernels were compiled with."""
    pytest.importorskip("triton")
    asked, where = problem("layer", "sm_90"), device("sm_90")
    good = next(c for c in FUSED_MOE.space(asked, where) if dict(c.params).get("tma") == 1)
    bad = config(good.variant, dict(good.extra), **dict(good.params) | {"tma": change})
    assert bad.name == good.name and FUSED_MOE.fits(asked, good, where) == ""
    assert FUSED_MOE.fits(asked, bad, where)


EXTRAS = [{"ir_override": "kernel.ptx"}, {"num_ctas": 2}, {"launch_pdl": 2}, {"debug": True}]


@pytest.mark.parametrize("extra", EXTRAS, ids=str)
@pytest.mark.parametrize("name", ["layer", "blocks", "product", "sort"])
def test_a_strangers_compiler_options_reach_no_compiler(name: str, extra: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("triton")
    op, asked, where = CASES[name][0], problem(name, "sm_90"), device("sm_90")
    base = op.space(asked, where)[0]
    evil = config(base.variant, dict(base.extra) | extra, **dict(base.params))
    path = tmp_path / "stranger.sqlite"
    told: dict[str, Any] = dict(median_us=0.001, mad_us=0.0, n=99, error=0.0, code=code_of(op.name, evil.variant))
    with Store.open(path) as store:
        store.put([Timing(problem=asked, config=evil, environment=H200, **told)])
        store.predict([Prediction(problem=asked, device="NVIDIA H200", config=evil, predicted_us=0.001)])
        near = asked.model_copy(update={"tokens": 128})
        store.put([Timing(problem=near, config=evil, environment=H200, **told)])
    serving = Dispatcher(Settings(mode="replay", db=tmp_path / "mine.sqlite", path=(path,)))
    for problem_ in (asked, asked.model_copy(update={"routing": ""}), near):
        choice = serving.choose(op, problem_)
        assert all(repr(each) in makeable(name, "sm_90") for each in choice.configs), choice
    serving.close()


def test_what_a_file_names_is_not_raced(tmp_path: Path) -> None:
    """Neither as what serves now nor as what was good under another routing."""
    pytest.importorskip("triton")
    asked, where = problem("layer", "sm_90"), device("sm_90")
    space = FUSED_MOE.space(asked, where)
    made = [config(c.variant, dict(c.extra) | {"ir_override": "k.ptx"}, **dict(c.params)) for c in space]
    alike = [Config(variant=c.variant, extra=c.extra, params=tuple((k, bool(v) if v == 1 else v) for k, v in c.params))
             for c in space]  # fmt: skip
    for proven in (made, alike):
        assert len(proven) > PROVEN
        tried = shortlist(FUSED_MOE, asked, where, 100, proven[-1], proven)
        assert tried and {repr(each) for each in tried} <= {repr(each) for each in space}


def test_a_wrapped_op_runs_the_users_configs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_wrapped", {})  # no other test finds it

    def double(x: Any, *, config: dict[str, Any]) -> Any:
        return 2 * x

    moecache.wrap(double, op="made_up_double", configs=[{"rows": 1}, {"rows": 4}], key=lambda x: {"tokens": 1})
    op, where = ops.get("made_up_double"), device("cpu")
    asked = Problem(op=op.name, vendor="cpu", arch=where.arch, units=where.units, tokens=1, experts=1, topk=1)
    mine = op.space(asked, where)
    assert len(mine) == 2 and not any(op.fits(asked, each, where) for each in mine)
    variant = mine[0].variant
    for rows in (True, 2, "1", -1):
        assert op.fits(asked, config(variant, rows=rows), where), rows
    assert op.fits(asked, config(variant, {"rows": 1}), where)
    assert op.fits(asked, config(variant, {"num_warps": 4}, rows=1), where)
