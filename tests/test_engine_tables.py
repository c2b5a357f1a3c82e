"""Tables of engines: read as seeds that answer nothing, written so that an engine finds them."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moecache.cli import app
from moecache.integrations import aiter_tables as aiter
from moecache.integrations import sglang_tables as sglang
from moecache.integrations import tables
from moecache.integrations import vllm_tables as vllm
from moecache.integrations.tables import GRID
from moecache.schemas.config import Config
from moecache.schemas.device import KNOWN
from moecache.schemas.errors import InvalidInput
from moecache.schemas.timing import Environment, Timing
from moecache.store import Store, Tiers

ROW = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1, "num_warps": 4, "num_stages": 3}
H200 = Environment(device_name="NVIDIA H200", driver="580.1", torch="2.11.0", triton="3.6.0")


def row(**changes: int) -> dict[str, int]:
    return {**ROW, **changes}


def timing(tokens: int, us: float, routing: str = "a0e0", **config: int) -> Timing:
    dims = tables.dims(128, 768, tokens, 2048, 8)
    problem = tables.problem(vllm.OP, KNOWN["h200"], dims, routing=routing, source="abc")
    made = tables.config_of(row(**config))
    assert made is not None
    return Timing(problem=problem, config=made, environment=H200, median_us=us, mad_us=0.01, n=20)


def every_size(us: float = 10.0, **config: int) -> list[Timing]:
    return [timing(1 << power, us, **config) for power in range(13)]


def no_default(*asked: Any) -> dict[str, int]:
    raise ImportError("No module named 'vllm'")


# --- names and rows


@pytest.mark.parametrize(
    ("device", "dims", "ours", "theirs"),
    [
        (
            "NVIDIA H200",
            tables.dims(128, 768, 1),
            "E=128,N=768,device_name=NVIDIA_H200.json",
            "E=128,N=768,device_name=NVIDIA_H200.json",
        ),
        (
            "NVIDIA H200 NVL",
            tables.dims(8, 64, 1, dtype="fp8_w8a8", block_n=128, block_k=128),
            "E=8,N=64,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json",
            "E=8,N=64,device_name=NVIDIA_H200_NVL,dtype=fp8_w8a8,block_shape=[128, 128].json",
        ),
        (
            "AMD Instinct MI300X",
            tables.dims(8, 64, 1, dtype="int8_w8a8", per_channel=True),
            "E=8,N=64,device_name=AMD_Instinct_MI300X,dtype=int8_w8a8,per_channel_quant=True.json",
            "E=8,N=64,device_name=AMD_Instinct_MI300X,dtype=int8_w8a8,per_channel_quant=True.json",
        ),
    ],
)
def test_names_are_those_that_the_engines_look_for(device: str, dims: Any, ours: str, theirs: str) -> None:
    problem = tables.problem(vllm.OP, KNOWN["h200"], dims)
    there = Environment(device_name=device, triton="3.6.0+gitabc")
    assert vllm.path(Path("x"), problem, there) == Path("x") / ours
    assert sglang.path(Path("x"), problem, there) == Path("x/configs/triton_3_6_0") / theirs


@pytest.mark.parametrize(
    "wrong",
    [
        {"tile_m": 64, "tile_n": 128},  # another kernel's row in the same folder
        {**ROW, "USE_TMA": 1},
        {**ROW, "BLOCK_SIZE_M": "16"},
        {**ROW, "num_warps": True},
        {name: value for name, value in ROW.items() if name != "BLOCK_SIZE_N"},
        16,
    ],
)
def test_a_row_that_would_crash_the_kernel_is_no_config(wrong: Any) -> None:
    assert tables.config_of(wrong) is None


@pytest.mark.parametrize(
    "wrong", [row(BLOCK_SIZE_M=24), row(BLOCK_SIZE_N=512), row(num_warps=0), row(num_stages=9), row(GROUP_SIZE_M=0)]
)
def test_a_config_out_of_range_is_refused(wrong: dict[str, int]) -> None:
    found = tables.config_of(wrong)
    assert found is not None and tables.refused(found)
    assert not tables.refused(Config(variant=tables.VARIANT, params=tuple(ROW.items())))


def test_tiles_and_scales_divide_each_other() -> None:
    found = tables.config_of(row(BLOCK_SIZE_K=256))
    assert found is not None
    assert not tables.refused(found, 128) and "192 do not divide" in tables.refused(found, 192)


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("NVIDIA_H100_80GB_HBM3", "h100"), ("NVIDIA_H200", "h200"), ("NVIDIA_H20", ""), ("NVIDIA_H20-3e", ""),
        ("AMD_Instinct_MI300X", "mi300x"), ("AMD_Instinct_MI325_OAM", "mi325x"), ("AMD_Instinct_MI308X", ""),
        ("AMD_Instinct_MI355_OAM", "mi355x"), ("NVIDIA_GB200", ""), ("AMD_Radeon_Graphics", ""), ("", ""),
    ],
)  # fmt: skip
def test_devices_that_names_mean(name: str, device: str) -> None:
    assert tables.device_of(name) == KNOWN.get(device)


# --- reading


def a_folder(folder: Path) -> Path:
    tuned = {"triton_version": "3.4.0", "1": ROW, "16": row(BLOCK_SIZE_N=128), "64": {"tile_m": 64}, "0": ROW}
    (folder / "E=128,N=768,device_name=NVIDIA_H200.json").write_text(json.dumps(tuned))
    (folder / "E=128,N=768,device_name=NVIDIA_B200.json").write_text(json.dumps({"1": ROW}))
    (folder / "E=128,N=768,device_name=NVIDIA_H200_down.json").write_text(json.dumps({"1": {**ROW, "USE_TMA": True}}))
    (folder / "README").write_text("no table")
    return folder


def test_seeds_have_no_time_and_answer_nothing(tmp_path: Path) -> None:
    seeds, others = vllm.seeds(a_folder(tmp_path))
    assert others == 4 and [seed.problem.tokens for seed in seeds] == [1, 16]  # a device, two configs, no tokens
    assert all(seed.told and seed.median_us is None and seed.environment.triton == "3.4.0" for seed in seeds)
    measured = timing(1, 10.0)
    assert tables.told(measured.problem) == seeds[0].problem
    with Store.memory() as store:
        store.put([*seeds, measured])
        assert store.check() == []
        figures = store.stats()
        assert figures["status"] == {"named by tables": 2, "ok": 1} and figures["winners"] == 1
        assert figures["devices"] == ["NVIDIA H200"]
        assert [winner.problem for winner in store.winners()] == [measured.problem]
        here = H200.model_copy(update={"flags": "from=vllm-tables"})
        tiers = Tiers(store, [])
        assert [found[0].problem for found in tiers.winners(H200, op=vllm.OP).values()] == [measured.problem]
        assert tiers.winners(here, op=vllm.OP).values() == []


def test_what_is_no_table_is_named(tmp_path: Path) -> None:
    (file := tmp_path / "E=1,N=2,device_name=NVIDIA_H200.json").write_text("[1")
    with pytest.raises(InvalidInput, match="no table of configs by tokens"):
        vllm.seeds(file)
    with pytest.raises(InvalidInput, match="nowhere is no file and no folder"):
        sglang.seeds(tmp_path / "nowhere")
    with pytest.raises(InvalidInput, match="vllm is not installed here"):
        vllm.seeds(None)


AITER = {
    "cu_num": "304", "token": "16", "model_dim": "2048", "inter_dim": "192", "expert": "128", "topk": "8",
    "act_type": "ActivationType.Silu", "dtype": "torch.bfloat16", "q_dtype_a": "torch.float8_e4m3fnuz",
    "q_dtype_w": "torch.float8_e4m3fnuz", "q_type": "QuantType.per_Token", "use_g1u1": "1", "doweight_stage1": "0",
    "block_m": "32", "ksplit": "0", "us1": "38.6", "kernelName1": "one_32x64", "err1": "0.0%", "us2": "33.9",
    "kernelName2": "two_32x64", "err2": "0.0%", "us": "72.59", "run_1stage": "0", "tflops": "4", "bw": "4", "_tag": "",
}  # fmt: skip


def test_aiter_rows_have_whole_problems(tmp_path: Path) -> None:
    rows = [AITER, {**AITER, "cu_num": "17"}, {**AITER, "kernelName1": "a b"}, {**AITER, "cu_num": "256", "token": "3"}]
    with (tmp_path / "tuned_fmoe.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(AITER))
        table.writeheader()
        table.writerows(rows)
    (first, last), others = aiter.seeds(tmp_path)
    assert others == 2  # an unknown device, and a name that cannot stand in a config
    assert first.problem.key == (
        "op=aiter.fused_moe vendor=amd arch=gfx942 units=304 tokens=16 experts=128 topk=8 dtype=bf16 "
        "dims.a=float8_e4m3fnuz dims.act=Silu dims.gated=1 dims.hidden=2048 dims.intermediate=192 dims.on_input=0 "
        "dims.quant=per_Token dims.w=float8_e4m3fnuz"
    )
    assert first.config.name == "two_stage(block_m=32,kernel1=one_32x64,kernel2=two_32x64,ksplit=0)"
    assert first.told and first.median_us is None and "72.6 µs there" in first.reason
    assert (last.problem.arch, last.problem.tokens) == ("gfx950", 4)
    (tmp_path / "tuned_fmoe.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InvalidInput, match="no table of tuned layers: it has no act_type"):
        aiter.seeds(tmp_path)


# --- writing


def test_every_size_of_the_grid_has_the_winner_of_its_bucket() -> None:
    found = tables.table([*every_size(), *every_size(9.0, BLOCK_SIZE_N=128)], no_default)
    assert tuple(found) == GRID and all(each == row(BLOCK_SIZE_N=128) for each in found.values())
    larger = tables.table([*every_size(), timing(8192, 5.0, BLOCK_SIZE_M=128)], no_default)
    assert larger[8192] == row(BLOCK_SIZE_M=128) and larger[4096] == ROW


def test_one_table_serves_every_layer_and_routing_that_share_it() -> None:
    """The first config is best for one routing and far behind for the other; the second is never far behind."""
    rows = [
        timing(16, 10.0), timing(16, 10.5, BLOCK_SIZE_N=128), timing(16, 99.0, BLOCK_SIZE_N=256),
        timing(16, 30.0, routing="a2e3"), timing(16, 21.0, routing="a2e3", BLOCK_SIZE_N=128),
        timing(16, 20.0, routing="a2e3", BLOCK_SIZE_N=256),
    ]  # fmt: skip
    rows += [each for each in every_size() if each.problem.tokens != 16]
    assert tables.table(rows, no_default)[16] == row(BLOCK_SIZE_N=128)


def test_sizes_that_nobody_measured_get_what_the_engine_would_take() -> None:
    asked: list[tuple[Any, ...]] = []

    def default(*question: Any) -> dict[str, int]:
        asked.append(question)
        return row(num_stages=2)

    found = tables.table([timing(16, 10.0)], default)
    assert found[16] == ROW and [size for size in GRID if found[size]["num_stages"] == 3] == [16]
    assert asked[0] == (1, timing(16, 10.0).problem) and len(asked) == len(GRID) - 1
    with pytest.raises(
        InvalidInput, match="1 tokens were not measured, and the engine does not say what it would take"
    ):
        tables.table([timing(16, 10.0)], no_default)


def run(*args: str) -> str:
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == 0, result.output
    return result.output


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECACHE_DB", str(tmp_path / "db.sqlite"))
    (tmp_path / "theirs").mkdir()
    said = run("import", "--from", "vllm", str(a_folder(tmp_path / "theirs")))
    assert "2 configs of vllm taken into" in said and "4 tables or rows are of devices" in said
    assert "named for NVIDIA H200 by tables of vllm-tables" in run("explain", "--key", "op=vllm.fused_experts tokens=1")
    with Store.open(tmp_path / "db.sqlite") as store:
        assert store.stats()["devices"] == []
        store.put(every_size())
    assert "1 table from" in run("export", str(tmp_path / "ours"), "--format", "vllm")
    (file,) = (tmp_path / "ours").iterdir()
    written = json.loads(file.read_text())
    assert written.pop("triton_version") == "3.6.0"
    assert {int(size): each for size, each in written.items()} == dict.fromkeys(GRID, ROW)
    result = CliRunner().invoke(app, ["export", str(tmp_path / "x"), "--format", "sglang"])
    assert result.exit_code == 1 and not (tmp_path / "x").exists()
    for wrong in (["export", "x", "--format", "trt"], ["import"], ["import", "--from", "x"]):
        assert CliRunner().invoke(app, wrong).exit_code == 2
