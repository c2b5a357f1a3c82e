"""vLLM offline, a whole MoE model: decode and prefill as it is, with the plugin, and with our kernels.

    python benchmarks/vllm_e2e.py [--db FILE] [--layers 48] [--variants stock plugin kernels stock]

The model is a real config.json with random weights (`load_format=dummy`), so the router's choices are near uniform.
Prompts are random token ids, so no tokenizer is needed. Each variant has a process of its own, in which vLLM starts as
a user starts it: CUDA graphs, torch.compile, asynchronous scheduling. A variant that is named twice runs twice: that is
the spread between processes.

`stock` loads no plugin. `plugin` serves the configs that FILE holds (`vllm_wrap.py --db` fills such a file) to vLLM's
own kernel. `kernels` has MOECACHE_KERNELS=1, and answers with what FILE and the package hold, else with what is
predicted. `tuned` also measures in vLLM's warm-up, with MOECACHE_TUNE=1. Every process says whether its variant is in
effect, and stops where it is not. All take `moe_backend=triton`: where FlashInfer is installed, vLLM may prefer that.

Every phase and every size of a prefill runs before anything is timed. Then phases take turns, forth and back, until
--repeats rounds are done or --budget-s seconds over. `decode` counts the tokens after the first one: the median time of
--new + 1 tokens less that of 1. `prefill` counts the prompt tokens by which 48 prompts are more than 16. `within` is by
which share such a difference may be off: two standard errors of both medians.

`step_us` is the time from one step of the worker to the next, where both have all tokens of the phase. In it the host
is `execute_us` and `sample_us` in vLLM's worker, and `replay_us` of that in launching CUDA graphs. `cores` says which
threads of the machine had the host meanwhile, and `threads` how many each process had before and after all rounds.

`profile` sums the device time of kernels in one call of at most 32 new tokens, and says which share of it is the MoE
layers': top-k, sort, products, activation and sum, without the router's product. `idle_us` is how long the device had
nothing to do between the first kernel and the last.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import record
from vllm_clock import LONG, PROMPT, ROOT, STEP, measured, profiled

MODEL = ROOT / "examples" / "models" / "qwen3-30b-a3b.json"
VARIANTS: dict[str, dict[str, str]] = {
    "stock": {"VLLM_PLUGINS": ""},
    "plugin": {"MOECACHE_KERNELS": "0"},
    "kernels": {"MOECACHE_KERNELS": "1"},
    "tuned": {"MOECACHE_KERNELS": "1", "MOECACHE_TUNE": "1"},
}
IN_EFFECT = {"stock": (False, False), "plugin": (True, False)}  # its configs, our kernels
IN_EFFECT |= {"kernels": (True, True), "tuned": (True, True)}
SAID = ("tokens_per_s", "within", "step_us", "step_mad_us", "execute_us", "sample_us", "replay_us", "cores")
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
OFFLINE |= {"VLLM_USE_FLASHINFER_SAMPLER": "0"}  # tokens are the likeliest ones: nothing is sampled

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if find_spec("vllm") is None:
        raise SystemExit("vLLM cannot be imported: install it, or put its folder in PYTHONPATH")
    if options.run:
        return run(options)
    if not entry_points(group="vllm.general_plugins", name="moecache"):
        raise SystemExit("vLLM does not find moecache's plugin: install moecache where Python finds its metadata")
    from moecache.devices import Places

    place, rows, failed = Places().first(), list[Row](), list[str]()
    with tempfile.TemporaryDirectory() as folder:
        for name in options.variants:
            row = started(name, options, Path(folder))
            if row is None:
                failed.append(name)
                continue
            rows.append(row)
            for key, found in row["phases"].items():
                print(f"{name} {key}: " + "  ".join(f"{what} {found[what]}" for what in SAID if what in found))
            model = {"file": options.model.name, "layers": options.layers, "prompt": PROMPT, "long_prompt": LONG}
            facts = {"peers": {"vllm": version("vllm")}, "model": model | {"step": STEP, "new": options.new}}
            facts |= {"summary": summarise(rows), "steps": summarise(rows, "step_us")}
            where = record.save("vllm_e2e", record.folder_of(place), place, rows, **facts)
            print(json.dumps(facts["summary"]), json.dumps(facts["steps"]), where, sep="\n", flush=True)
    if failed:
        raise SystemExit(f"these ended without figures: {', '.join(failed)}; what they said stands above")


def started(name: str, options: argparse.Namespace, folder: Path) -> Row | None:
    """What a process of this variant measured; None if it failed."""
    out = folder / "row.json"
    out.unlink(missing_ok=True)
    file = str(options.db.absolute()) if options.db else ":memory:"
    environment = os.environ | OFFLINE | {"VLLM_CACHE_ROOT": str(folder / "vllm"), "MOECACHE_DB": file} | VARIANTS[name]
    given = [f"--{key}={getattr(options, key)}" for key in ("model", "layers", "new", "repeats")]
    given.append(f"--budget-s={options.budget_s}")
    batches = ["--batches", *map(str, options.batches)]
    command = [sys.executable, __file__, "--run", name, "--out", str(out), *given, *batches]
    process = subprocess.Popen(command, env=environment, process_group=0)
    try:
        code: int | str = process.wait(options.seconds)
    except subprocess.TimeoutExpired:
        code = "a time-out"
    finally:
        with suppress(ProcessLookupError):  # vLLM's engine is a process of its own, which holds the GPU's memory
            os.killpg(process.pid, signal.SIGKILL)
    if code:
        print(f"the process of variant {name} ended with {code}", flush=True)
    found: Row | None = json.loads(out.read_text()) if out.exists() else None
    return found


def summarise(rows: Sequence[Row], what: str = "tokens_per_s") -> dict[str, Any]:
    """By variant and phase, how many times as fast as stock; medians over processes of one variant."""
    figures: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for phase, found in row["phases"].items():
            if found.get(what):
                rate = found[what] if what == "tokens_per_s" else 1 / found[what]
                figures.setdefault(row["variant"], {}).setdefault(phase, []).append(rate)
    middle = {name: {key: statistics.median(each) for key, each in found.items()} for name, found in figures.items()}
    stock = middle.get("stock", {})
    return {
        name: {phase: round(rate / stock[phase], 4) for phase, rate in found.items() if phase in stock}
        for name, found in middle.items()
        if name != "stock"
    }


# --- in the process of a variant ---


def run(options: argparse.Namespace) -> None:
    """Start vLLM, measure, write the row."""
    from vllm import LLM

    with tempfile.TemporaryDirectory() as folder:
        described = json.loads(options.model.read_text()) | {"num_hidden_layers": options.layers}
        Path(folder, "config.json").write_text(json.dumps(described))
        began = time.monotonic()
        llm = LLM(
            model=folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", seed=0, moe_backend="triton",
            max_model_len=2 * LONG, max_num_batched_tokens=STEP, max_num_seqs=max(options.batches),
            enable_prefix_caching=False, compilation_config={"cudagraph_capture_sizes": sorted(options.batches)},
        )  # fmt: skip
        ready = time.monotonic() - began
        shape = [described[name] for name in ("num_experts", "num_experts_per_tok", "hidden_size")]
        asked = (*shape, described["moe_intermediate_size"], [*sorted(options.batches), STEP])
        (state,) = llm.collective_rpc(state_of, args=asked)
        if (state["configs"], state["kernels"]) != IN_EFFECT[options.run]:
            raise SystemExit(f"variant {options.run} is not in effect: {state}")
        print(f"{options.run} is ready after {ready:.0f} s", flush=True)
        row = {"variant": options.run, "seconds_to_start": round(ready, 1), "state": state}
        row |= measured(llm, options.batches, options.new, options.repeats, options.budget_s)
        options.out.write_text(json.dumps(row | {"profile": {}}))  # a profile that fails takes nothing along
        options.out.write_text(json.dumps(row | {"profile": profiled(llm, options.batches)}))


def state_of(worker: Any, experts: int, topk: int, hidden: int, inner: int, tokens: Sequence[int]) -> dict[str, Any]:
    """What of the plugin is in effect in vLLM's worker, and which of its configs differ from vLLM's own there."""
    from vllm.model_executor.layers.fused_moe import fused_moe
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    chooses = fused_moe.try_get_optimal_moe_config
    own, shapes = getattr(chooses, "__wrapped__", chooses), ((experts, 2 * inner, hidden), (experts, hidden, inner))
    rows = {size: (chooses(*shapes, topk, None, size), own(*shapes, topk, None, size)) for size in tokens}
    return {
        "configs": hasattr(chooses, "moecache"),
        "kernels": hasattr(TritonExperts.apply, "moecache"),
        "served": {str(size): ours for size, (ours, theirs) in rows.items() if ours != theirs},
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, default=MODEL, help="a config.json of a model whose experts are like Qwen3's")
    add("--layers", type=int, help="so many of its layers; all by default")
    add("--db", type=Path, help="the cache file that the plugin serves from; without it, what ships")
    add("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    add("--batches", type=int, nargs="+", default=[1, 16, 64, 256], help="requests that are decoded together")
    add("--new", type=int, default=256, help="tokens that a request decodes after the first")
    add("--repeats", type=int, default=9, help="rounds")
    add("--budget-s", type=float, default=45.0, help="begin no round so long after the start, but for the first three")
    add("--seconds", type=float, default=300.0, help="after which a process of a variant is ended")
    add("--run", choices=VARIANTS, help=argparse.SUPPRESS)
    add("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.layers = options.layers or json.loads(options.model.read_text())["num_hidden_layers"]
    return options


if __name__ == "__main__":
    main()
