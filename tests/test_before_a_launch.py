"""What an untuned answer does: the fitted model goes before a neighbour, and kernels compile side by side."""

from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path

import pytest

pytest.importorskip("triton")

from moecache import routing
from moecache.devices import Place, Places
from moecache.dispatch import Dispatcher
from moecache.kernels import registry as ops
from moecache.kernels.code import code_of
from moecache.kernels.contract import Source
from moecache.kernels.fused_moe.op import FUSED_MOE
from moecache.schemas.config import Config
from moecache.schemas.device import KNOWN, Device
from moecache.schemas.layer import Layer
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Environment, Timing
from moecache.settings import Settings
from moecache.store import Store
from moecache.tuning.workers import Workers

DEVICE, ELSEWHERE = KNOWN["h200"], Environment(device_name="NVIDIA H200", driver="1", torch="2", triton="3")
LAYER = Layer(model="", experts=128, global_experts=128, topk=8, hidden=2048, intermediate=768)


def asked(tokens: int, dtype: str = "bf16") -> Problem:
    (found,) = FUSED_MOE.problems(LAYER.model_copy(update={"dtype": dtype}), [tokens], DEVICE)
    counts = routing.histogram(routing.draw("uniform", tokens, 128, 8), 128)
    return found.model_copy(update={"routing": routing.bucket(counts)})


def answered(db: Path, stored: Problem, problem: Problem) -> tuple[str, Config, Config]:
    """(tier, config, config of the neighbour) with one stored timing of another problem."""
    near = FUSED_MOE.space(stored, DEVICE)[-1]
    with Store.open(db) as store:
        told = {"median_us": 9.0, "mad_us": 0.1, "n": 9, "code": code_of(stored.op, near.variant)}
        store.put([Timing(problem=stored, config=near, environment=ELSEWHERE, **told)])
    choice = Dispatcher(Settings(mode="replay", db=db)).choose(FUSED_MOE, problem)
    return choice.tier, choice.config, near


def test_a_fitted_model_goes_before_a_neighbour(tmp_path: Path) -> None:
    tier, config, near = answered(tmp_path / "a.sqlite", asked(1024), asked(2048))
    assert tier == "predicted" and config != near


def test_where_nothing_was_fitted_the_neighbour_answers(tmp_path: Path) -> None:
    tier, config, near = answered(tmp_path / "b.sqlite", asked(1024, "fp8"), asked(2048, "fp8"))
    assert (tier, config) == ("neighbour", near)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_untuned_answer_compiles_its_kernels_together(
    compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_for: list[object] = []

    class Pool(Workers):
        def compile(self, sources: Iterable[Source], device: Device, seconds: float = 60.0) -> "list[Future[None]]":
            asked_for.extend(sources)
            done: Future[None] = Future()
            done.set_result(None)
            return [done]

    def helpers(self: Dispatcher, place: Place) -> Pool:
        return Pool()

    monkeypatch.setattr(Dispatcher, "helpers", helpers)
    monkeypatch.setattr("moecache.tuning.workers.is_compiled", lambda kernel, device: compiled)
    problem = asked(2048)
    dispatcher = Dispatcher(Settings(mode="replay", db=tmp_path / "c.sqlite"))
    choice = dispatcher.choose(FUSED_MOE, problem, key=("call",))
    wanted = list(FUSED_MOE.sources(problem, choice.config, DEVICE))
    assert len(wanted) >= 3 and len(asked_for) == (0 if compiled else len(wanted))
    asked_for.clear()
    dispatcher.choose(FUSED_MOE, problem)  # not for a call
    dispatcher.ahead = False  # nor in a server
    dispatcher.choose(FUSED_MOE, problem, key=("other",))
    assert not asked_for


def test_helpers_start_while_a_new_cache_file_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making one can take half a second, in which they could have started; an existing file may answer without them."""
    file, made = tmp_path / "c.sqlite", list[bool]()

    class Pool(Workers):
        def start(self, device: Device, most: int = 0) -> None:
            made.append(file.exists())

    monkeypatch.setattr(Dispatcher, "helpers", lambda self, place: Pool())
    here, op = Places().here("cpu", 0), ops.get("moe_sort")
    problem, _ = op.problems(LAYER, [64], here.device)
    ids = routing.draw("uniform", 64, 128, 8)
    assert Dispatcher(Settings(db=file, budget=0.3)).choose(op, problem, topk_ids=ids).tier == "measured"
    assert made[0] is False and file.exists()
    made.clear()
    assert Dispatcher(Settings(db=file, budget=0.3)).choose(op, problem, topk_ids=ids).tier == "measured"
    assert not made
