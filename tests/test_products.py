"""Timings of another product stop no measuring, and give way to a prediction where that is nearer to the best."""

import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from toy import A, B, C, CapturingBackend, Toy, served, stored, timing

from moecache.cli import app
from moecache.devices import Place, Places
from moecache.dispatch import policy
from moecache.dispatch.lookup import Lookup
from moecache.dispatch.policy import Ask
from moecache.kernels import registry as ops
from moecache.schemas.config import config
from moecache.schemas.device import KNOWN, same_product
from moecache.schemas.layer import Layer
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Environment
from moecache.settings import Settings

ANOTHER = Environment(device_name="Another CPU", torch="1.0")
H100 = Environment(device_name="NVIDIA H100 80GB HBM3", driver="580.159.04 (CUDA 13.0)", torch="2.11", triton="3.6.0")
H200 = H100.model_copy(update={"device_name": "NVIDIA H200"})
LAYER = Layer(model="m", experts=8, global_experts=8, topk=2, hidden=4096, intermediate=14336)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("NVIDIA H100 80GB HBM3", "NVIDIA H200", False),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", False),
        ("NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB", False),
        ("NVIDIA H100 80GB HBM3", "H100 80GB HBM3", True),
        ("NVIDIA H200", "nvidia  h200", True),
        ("AMD Instinct MI300X", "AMD Instinct MI325X", False),
        ("AMD Instinct MI300X", "MI300X", True),
        ("Intel(R) Xeon(R) Processor", "Intel Xeon Processor", True),
        ("", "NVIDIA H200", True),
    ],
)
def test_products(a: str, b: str, same: bool) -> None:
    assert same_product(a, b) is same is same_product(b, a)


# --- in mode tune


def test_another_product_is_tuned_as_if_nothing_were_stored(toy: Toy, db: Path, here: Environment) -> None:
    stored(db, *(timing(toy.problem(), c, us, ANOTHER, is_default=c == A) for c, us in ((A, 3.0), (B, 1.0), (C, 2.0))))
    choice = served(toy, db).choose(toy, toy.problem())
    assert (choice.config, choice.tier, choice.product) == (C, "measured", "")
    assert {tried for tried, _ in toy.launches} == {A, B, C}


def test_its_winner_is_raced_whatever_is_predicted_of_it(toy: Toy, db: Path) -> None:
    many = [config("plain", block=n) for n in range(1, 41)]
    toy.times = {c: 100.0 - n for n, c in enumerate(many)}
    toy.costs = {c: float(n) for n, c in enumerate(many)}
    last = many[-1]
    good = [timing(toy.problem(), c, 1.0 + n, ANOTHER) for n, c in enumerate([last, *many[20:30]])]
    stored(db, *good)
    choice = served(toy, db, path=()).choose(toy, toy.problem())
    tried = {tried for tried, _ in toy.launches}
    assert choice.config == last and {many[0], many[1], last} <= tried
    assert len(tried & set(many[:16])) > 10, "what another product found good narrows nothing"


def test_another_driver_of_the_same_product_is_served(toy: Toy, db: Path, here: Environment) -> None:
    stored(db, timing(toy.problem(), B, 20.0, here.model_copy(update={"driver": "old"})))
    choice = served(toy, db).choose(toy, toy.problem())
    assert (choice.config, choice.tier, choice.product, toy.launches) == (B, "unverified", "", [])


def test_the_same_product_goes_before_another_in_an_earlier_file(
    toy: Toy, db: Path, tmp_path: Path, here: Environment
) -> None:
    stored(db, timing(toy.problem(), B, 1.0, ANOTHER))
    stored(tmp_path / "behind.sqlite", timing(toy.problem(), C, 20.0, here.model_copy(update={"driver": "old"})))
    choice = served(toy, db, path=(tmp_path / "behind.sqlite",)).choose(toy, toy.problem())
    assert (choice.config, choice.tier, toy.launches) == (C, "unverified", [])


def test_what_a_capture_is_served_of_another_product_keeps_no_call_from_tuning(toy: Toy, db: Path) -> None:
    stored(db, timing(toy.problem(), B, 1.0, ANOTHER))
    backend = CapturingBackend()
    serving = served(toy, db, backend)
    backend.on = True
    choice = serving.choose(toy, toy.problem())
    assert (choice.config, choice.tier, choice.product) == (B, "unverified", "Another CPU")
    assert not serving.lasts(choice) and toy.launches == []
    backend.on = False
    assert serving.choose(toy, toy.problem()).tier == "measured" and toy.launches


def test_without_a_budget_it_is_served_and_wanted(toy: Toy, db: Path) -> None:
    stored(db, timing(toy.problem(), B, 1.0, ANOTHER))
    serving = served(toy, db, budget=0.0)
    choice = serving.choose(toy, toy.problem())
    assert (choice.config, choice.product, toy.launches) == (B, "Another CPU", [])
    assert serving.lookup.tiers.user.wanted() == [(toy.problem(), 1)]


def test_any_routing_of_another_product(toy: Toy, db: Path, here: Environment) -> None:
    for bucket in ("a0e0", "a1e1"):
        stored(db, timing(toy.problem(routing=bucket), B, 1.0, ANOTHER))
    choice = served(toy, db, mode="replay").choose(toy, toy.problem(routing=""))
    assert (choice.config, choice.tier, choice.product) == (B, "unverified", "Another CPU")
    stored(db, timing(toy.problem(), C, 9.0, here))
    choice = served(toy, db, mode="replay").choose(toy, toy.problem(routing=""))
    assert (choice.config, choice.tier, choice.product) == (C, "measured", "")


# --- where nothing may be measured: against a prediction for this device


def asked(name: str, tokens: int = 256) -> Problem:
    (found,) = ops.get(name).problems(LAYER, [tokens], KNOWN["h200"])[:1]
    return found.model_copy(update={"routing": "a0e0"})


def answer(problem: Problem, db: Path, where: Environment, device: str = "h200") -> policy.Choice:
    op, place = ops.get(problem.op), Place(None, KNOWN[device], 0, where)
    lookup = Lookup(Settings(db=db, mode="replay"))
    choice = policy.decide(Ask(op, problem, place), lookup)
    lookup.close()
    return choice


@pytest.mark.parametrize("name", ["fused_moe", "moe_sort"])
def test_where_a_prediction_is_nearer_to_the_best_it_answers(
    name: str, db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Settings, "shipped", lambda self: [])
    problem = asked(name)
    slow = ops.get(name).space(problem, KNOWN["h200"])[-1]
    stored(db, timing(problem, slow, 50.0, H100))
    choice = answer(problem, db, H200)
    assert choice.tier == "predicted" and choice.product == ""
    assert "on NVIDIA H100 80GB HBM3, which is another product" in choice.reason and slow.name in choice.reason
    told = answer(problem, db, H200.model_copy(update={"device_name": "H100 80GB HBM3", "driver": "1"}), "h100")
    assert (told.config, told.tier, told.product) == (slow, "unverified", "")


def test_where_nobody_compared_the_two_another_product_answers(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "shipped", lambda self: [])
    problem = asked("grouped_gemm")
    slow = ops.get("grouped_gemm").space(problem, KNOWN["h200"])[-1]
    stored(db, timing(problem, slow, 50.0, H100))
    choice = answer(problem, db, H200)
    assert (choice.config, choice.tier, choice.product) == (slow, "unverified", "NVIDIA H100 80GB HBM3")
    assert "device_name NVIDIA H100 80GB HBM3 (here NVIDIA H200)" in choice.reason


# --- what is shown


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.stdout


def test_ls_explain_and_doctor_name_the_product(db: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Settings, "shipped", lambda self: list(self.path))
    problem = asked("grouped_gemm")
    stored(db, timing(problem, ops.get("grouped_gemm").space(problem, KNOWN["h200"])[-1], 50.0, H100))
    assert "NVIDIA_H100_80GB_HBM3" in run("ls", "--db", db)
    assert "timed on NVIDIA H100 80GB HBM3" in run("explain", "--db", db, "--key", problem.key)
    assert "measured on NVIDIA H100 80GB HBM3" in run("doctor", "--db", db)


@pytest.mark.gpu
def test_on_a_gpu_another_product_is_measured_again(db: Path) -> None:
    """What an H100 took, whatever this is, is tuned anew at the first call."""
    from moecache.dispatch import using

    device = Places().first().device
    foreign = Environment(device_name="NVIDIA H100 PCIe", driver="1", torch="1", triton="1")
    op = ops.get("moe_sort")
    with using(db=db, path=(), mode="tune", budget=5.0) as serving:
        small = LAYER.model_copy(update={"hidden": 1024, "intermediate": 512})
        problem = op.problems(small, [64], device)[0].model_copy(update={"routing": "a0e0"})
        slow = op.space(problem, device)[-1]
        stored(db, timing(problem, slow, 0.5, foreign))
        ids = torch.randint(0, 8, (64, 2), dtype=torch.int32, device="cuda")
        choice = serving.choose(op, problem, topk_ids=ids)
        assert choice.tier == "measured" and choice.expected_us != 0.5
