"""The cost model taught one layer here: on a toy whose true times are known, from the sample to the served choice."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from tiled_toy import DEVICE, LAYER, SPACE, TiledClock, TiledToy, ToyBackend
from toy import Toy

from moecache.cli import app
from moecache.dispatch import Dispatcher, using
from moecache.kernels.gemm.work import layer
from moecache.lab.profile import Profiled, design, profile
from moecache.predict import ranking
from moecache.predict.calls import cell, representative
from moecache.predict.learned import parse
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import Problem
from moecache.settings import Settings
from moecache.store import Store

TOKENS = (16, 64, 256)


@pytest.fixture
def toy() -> TiledToy:
    return TiledToy()


@pytest.fixture
def serving(db: Path) -> Iterator[Dispatcher]:
    with using(Settings(db=db), backend=ToyBackend()) as made:
        yield made


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the profile is kept."""
    return tmp_path_factory.mktemp("profiled") / "cache.sqlite"


@pytest.fixture(scope="module")
def found(kept: Path) -> Profiled:
    toy = TiledToy()
    with using(Settings(db=kept), backend=ToyBackend()):
        return profile(LAYER, tokens=TOKENS, op=toy, clock=TiledClock(toy), budget=60)


def problem(toy: TiledToy, tokens: int, bucket: str) -> Problem:
    (asked,) = toy.problems(LAYER, [tokens], DEVICE)
    return asked.model_copy(update={"routing": bucket})


def test_a_profile_learns_what_the_constants_got_wrong(found: Profiled) -> None:
    assert found.calls == 3 * len(TOKENS) and found.left == 0 and found.timings == 12 * found.calls
    assert found.before[0] > 5 > 0.5 > found.after[0] and found.after[1] < 5
    assert found.device == "a toy" and found.layer == "16x1024x512"


def test_what_was_learnt_answers_where_nothing_is_measured(found: Profiled, toy: TiledToy, kept: Path) -> None:
    """Calls of buckets and sizes that were not timed get nearly the best config, as `predicted`."""
    lost = []
    with using(Settings(mode="replay", db=kept), backend=ToyBackend()) as serving:
        for tokens in (32, 128, 512):
            for bucket in ("a0e0", "a0e1", "a1e2"):
                asked = problem(toy, tokens, bucket)
                choice = serving.choose(toy, asked)
                assert choice.tier == "predicted" and choice.by == "fitted"
                counts = representative(bucket, tokens, 16, 2)
                took = [toy.took(asked, counts, each) for each in SPACE]
                lost.append(toy.took(asked, counts, choice.config) / min(took) - 1)
    assert np.mean(lost) < 0.01


def test_it_is_kept_by_layer_and_measures_nothing(found: Profiled, kept: Path) -> None:
    with Store.open(kept, readonly=True) as store:
        ((layer, text),) = store.learned("fused_moe", DEVICE)
        learned = parse(text)
        assert learned is not None and layer == found.layer and store.timings() == []
        assert store.learned("moe_sort", DEVICE) == []
        assert store.learned("fused_moe", DEVICE.model_copy(update={"units": 8})) == []
    assert learned.parameters.kernels["ring"].tall == pytest.approx(0.3, rel=0.1)
    about = learned.about
    assert about["model"] == "tiny" and about["calls"] == "9" and about["timings"] == "108" and about["torch"]


def test_a_second_profile_replaces_the_first(found: Profiled, toy: TiledToy, kept: Path, db: Path) -> None:
    db.write_bytes(kept.read_bytes())
    with using(Settings(db=db), backend=ToyBackend()) as serving:
        assert profile(LAYER, tokens=(16, 64), op=toy, clock=TiledClock(toy), budget=60).calls == 6
        ((layer, text),) = serving.lookup.tiers.learned("fused_moe", DEVICE)
    learned = parse(text)
    assert learned is not None and layer == found.layer and learned.about["calls"] == "6"


def test_the_sample_is_likely_configs_and_some_unlike_them(toy: TiledToy) -> None:
    model, asked = ranking.given(DEVICE), cell(problem(toy, 64, ""), (8,) * 16)
    works = [layer(config) for config in SPACE]
    few, theirs = design(SPACE, works, asked, model, 6)
    assert len(set(few)) == 6 and (few, theirs) == design(SPACE, works, asked, model, 6)
    assert theirs == [layer(config) for config in few]
    ranked = ranking.rank(toy, problem(toy, 64, ""), SPACE, DEVICE).us
    best = [SPACE[place] for place in np.argsort(ranked, kind="stable")]
    assert few[:4] == best[:4] and {each.variant for each in few} == {"tiles", "ring"}
    assert len(design(SPACE[:3], works[:3], asked, model, 6)[0]) == 3


def test_what_cannot_be_profiled_is_said(toy: TiledToy, db: Path, serving: Dispatcher) -> None:
    with pytest.raises(InvalidInput, match=r"cannot profile toy in .*fitted to GPU kernels of fused_moe in bf16, fp16"):
        profile(LAYER, op=Toy())
    with pytest.raises(InvalidInput, match=r"0 of 9 calls timed within 0 s; 4 are needed"):
        profile(LAYER, tokens=TOKENS, op=toy, clock=TiledClock(toy), budget=0)
    with using(Settings(mode="replay", db=db), backend=ToyBackend()), pytest.raises(InvalidInput, match="mode=replay"):
        profile(LAYER, op=toy)
    assert serving.lookup.tiers.learned("fused_moe", DEVICE) == []


def test_the_command(toy: TiledToy, db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moecache.backends import registry
    from moecache.kernels import registry as ops
    from moecache.tuning import tuner

    monkeypatch.setattr(registry, "detect", ToyBackend)
    monkeypatch.setattr(registry, "load", lambda name: ToyBackend())
    monkeypatch.setattr(ops, "get", lambda name: toy)
    monkeypatch.setattr(tuner, "DeviceClock", lambda *_, **__: TiledClock(toy))
    model = {"model_type": "qwen3_moe", "num_experts": 16, "hidden_size": 1024, "num_experts_per_tok": 2,
             "moe_intermediate_size": 512, "num_hidden_layers": 2, "torch_dtype": "bfloat16", "hidden_act": "silu",
             "architectures": ["Qwen3MoeForCausalLM"]}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(model))
    call = ["profile", str(tmp_path), "--db", str(db)]
    shown = CliRunner().invoke(app, call)
    assert shown.exit_code == 0, shown.output
    assert "regret" in shown.stdout and "16x1024x512" in shown.stdout and "fitting 16 calls" in shown.stderr
    told = json.loads(CliRunner().invoke(app, [*call, "--json"]).stdout)
    assert told["calls"] == 16 and told["after"][0] < told["before"][0] and told["device"] == "a toy"
    assert CliRunner().invoke(app, [*call, "--budget", "soon"]).exit_code == 2
    assert CliRunner().invoke(app, ["profile", "experts=8"]).exit_code == 2
