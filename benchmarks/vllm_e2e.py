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

`decode` counts the tokens after the first one: the time of --new + 1 tokens less the time of 1. `prefill` counts prompt
tokens, one new token each. Figures are medians over --repeats, spreads are median absolute deviations. `profile` sums
the device time of kernels in one such call, and says which share of it is the MoE layers': top-k, sort, products,
activation and sum, without the router's product. `idle_us` is how long the device had nothing to do between the first
kernel and the last.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import record

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "examples" / "models" / "qwen3-30b-a3b.json"
VARIANTS: dict[str, dict[str, str]] = {
    "stock": {"VLLM_PLUGINS": ""},
    "plugin": {"MOECACHE_KERNELS": "0"},
    "kernels": {"MOECACHE_KERNELS": "1"},
    "tuned": {"MOECACHE_KERNELS": "1", "MOECACHE_TUNE": "1"},
}
IN_EFFECT = {"stock": (False, False), "plugin": (True, False)}  # its configs, our kernels
IN_EFFECT |= {"kernels": (True, True), "tuned": (True, True)}
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
OFFLINE |= {"VLLM_USE_FLASHINFER_SAMPLER": "0"}  # tokens are the likeliest ones: nothing is sampled
PROMPT, LONG = 16, 1024  # tokens of a prompt that is decoded, and of one that is prefilled
STEP = 4096  # tokens of a prefill step
THEIRS = (  # parts of names; for eight rows a token, vLLM's moe_sum is torch's sum
    "fused_moe_kernel", "moe_align", "count_and_sort_expert", "act_and_mul", "moe_sum", "topkGating", "moeSoftmax",
    "moeTopK", "sum_functor",
)  # fmt: skip
JIT = re.compile(r"^@(?:triton|gluon)\.jit.*\n(?:@.*\n)*def (\w+)", re.MULTILINE)
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories in a profiler's trace
SHOWN = 12  # kernels that a profile names

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

    place, rows = Places().first(), list[Row]()
    with tempfile.TemporaryDirectory() as folder:
        for name in options.variants:
            row = started(name, options, Path(folder))
            rows.append(row)
            print(f"{name}: " + "  ".join(f"{key} {value['tokens_per_s']}" for key, value in row["phases"].items()))
            model = {"file": options.model.name, "layers": options.layers, "prompt": PROMPT, "long_prompt": LONG}
            facts = {"peers": {"vllm": version("vllm")}, "model": model | {"step": STEP, "new": options.new}}
            where = record.save("vllm_e2e", record.folder_of(place), place, rows, **facts, summary=summarise(rows))
    print(json.dumps(summarise(rows), indent=1), where, sep="\n")


def started(name: str, options: argparse.Namespace, folder: Path) -> Row:
    """What a process of this variant measured.

    Raises:
        SystemExit: it failed.
    """
    out = folder / "row.json"
    out.unlink(missing_ok=True)
    file = str(options.db.absolute()) if options.db else ":memory:"
    environment = os.environ | OFFLINE | {"VLLM_CACHE_ROOT": str(folder / "vllm"), "MOECACHE_DB": file} | VARIANTS[name]
    given = [f"--{key}={getattr(options, key)}" for key in ("model", "layers", "new", "repeats")]
    batches = ["--batches", *map(str, options.batches)]
    command = [sys.executable, __file__, "--run", name, "--out", str(out), *given, *batches]
    code = subprocess.run(command, env=environment, timeout=options.seconds).returncode
    if code or not out.exists():
        raise SystemExit(f"the process of variant {name} ended with {code}; what it said stands above")
    found: Row = json.loads(out.read_text())
    return found


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """By variant and phase, tokens per second over those of stock; medians over processes of one variant."""
    rates: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for phase, found in row["phases"].items():
            rates.setdefault(row["variant"], {}).setdefault(phase, []).append(found["tokens_per_s"])
    middle = {name: {phase: statistics.median(each) for phase, each in found.items()} for name, found in rates.items()}
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
        phases, profiles = measured(llm, options)
    row = {"variant": options.run, "seconds_to_start": round(ready, 1), "state": state}
    options.out.write_text(json.dumps(row | {"phases": phases, "profile": profiles}))


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


def measured(llm: Any, options: argparse.Namespace) -> tuple[dict[str, Row], dict[str, Row]]:
    """Phases and profiles, by name like `decode 16`."""
    rng = random.Random(0)
    phases: dict[str, Row] = {}
    profiles: dict[str, Row] = {}
    for batch in options.batches:
        took = [
            taken(llm, rng, batch, PROMPT, options.new + 1) - taken(llm, rng, batch, PROMPT, 1)
            for _ in range(options.repeats + 1)
        ][1:]  # the first warms up
        phases[f"decode {batch}"] = spread([batch * options.new / each for each in took])
    requests = 4 * STEP // LONG
    took = [taken(llm, rng, requests, LONG, 1) for _ in range(options.repeats + 1)][1:]
    phases["prefill"] = spread([requests * LONG / each for each in took])
    for name, size in {f"decode {batch}": (batch, PROMPT, options.new) for batch in options.batches}.items():
        profiles[name] = profile(llm, rng, *size)
    return phases, profiles | {"prefill": profile(llm, rng, requests, LONG, 1)}


def taken(llm: Any, rng: random.Random, batch: int, prompt: int, new: int) -> float:
    """Seconds for fresh prompts."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": [rng.randrange(1000, 100_000) for _ in range(prompt)]} for _ in range(batch)]
    sampling = SamplingParams(max_tokens=new, ignore_eos=True, temperature=0.0, detokenize=False)
    began = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - began
    short = [len(each.outputs[0].token_ids) for each in outputs if len(each.outputs[0].token_ids) != new]
    if short or len(outputs) != batch:
        raise SystemExit(f"{batch} prompts of {new} new tokens gave {len(outputs)}, of which {len(short)} are short")
    return seconds


def spread(rates: Sequence[float]) -> Row:
    """Median, median absolute deviation and samples."""
    middle = statistics.median(rates)
    return {
        "tokens_per_s": round(middle, 1),
        "mad": round(statistics.median(abs(each - middle) for each in rates), 1),
        "samples": [round(each, 1) for each in rates],
    }


def profile(llm: Any, rng: random.Random, batch: int, prompt: int, new: int) -> Row:
    """Where the device's time goes in one call."""
    llm.collective_rpc(profile_on)
    taken(llm, rng, batch, prompt, new)
    ((kernels, idle),) = llm.collective_rpc(profile_off)
    return shares(kernels, set(our_kernels())) | {"idle_us": round(idle, 1)}


def profile_on(worker: Any) -> None:
    """Begin a profile in vLLM's worker."""
    import torch

    torch.cuda.synchronize()
    worker.moecache_profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    worker.moecache_profile.start()


def profile_off(worker: Any) -> tuple[dict[str, float], float]:
    """µs of each kernel, copy and fill since `profile_on`, and µs in which none of them ran."""
    import torch

    torch.cuda.synchronize()
    worker.moecache_profile.stop()
    with tempfile.TemporaryDirectory() as folder:
        worker.moecache_profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    kernels: dict[str, float] = {}
    idle = until = 0.0
    for event in sorted((each for each in events if each.get("cat") in ON_DEVICE), key=lambda each: each["ts"]):
        kernels[event["name"]] = kernels.get(event["name"], 0.0) + event["dur"]
        idle += max(0.0, event["ts"] - until) if until else 0.0
        until = max(until, event["ts"] + event["dur"])
    return kernels, idle


def our_kernels() -> Iterator[str]:
    """Names of the functions in our kernels that a device runs."""
    for file in sorted((ROOT / "kernels").rglob("*.py")):
        yield from JIT.findall(file.read_text())


def shares(kernels: Mapping[str, float], ours: Collection[str]) -> Row:
    """Sums of a profile. The MoE layers' kernels are those with a name in `ours` or with one of `THEIRS` in it."""
    total = sum(kernels.values())
    moe = {key: us for key, us in kernels.items() if key in ours or any(name in key for name in THEIRS)}
    most = sorted(kernels.items(), key=lambda item: -item[1])[:SHOWN]
    return {
        "device_us": round(total, 1),
        "moe_us": round(sum(moe.values()), 1),
        "moe_share": round(sum(moe.values()) / total, 4) if total else None,
        "kernels_us": {("moe: " if key in moe else "") + key[:80]: round(us, 1) for key, us in most},
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, default=MODEL, help="a config.json of a model whose experts are like Qwen3's")
    add("--layers", type=int, help="so many of its layers; all by default")
    add("--db", type=Path, help="the cache file that the plugin serves from; without it, what ships")
    add("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    add("--batches", type=int, nargs="+", default=[1, 16, 64, 256], help="requests that are decoded together")
    add("--new", type=int, default=64, help="tokens that a request decodes after the first")
    add("--repeats", type=int, default=5)
    add("--seconds", type=float, default=300.0, help="after which a process of a variant is ended")
    add("--run", choices=VARIANTS, help=argparse.SUPPRESS)
    add("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.layers = options.layers or json.loads(options.model.read_text())["num_hidden_layers"]
    return options


if __name__ == "__main__":
    main()
