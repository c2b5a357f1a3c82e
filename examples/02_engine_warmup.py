"""What an engine does before it captures its graphs: warm up, freeze, capture, serve.

python examples/02_engine_warmup.py [examples/models/qwen3-30b-a3b.json]
"""

import sys
from pathlib import Path

import torch

import moecache
from moecache.models import read_model

MODEL = Path(__file__).parent / "models" / "qwen3-30b-a3b.json"
BATCHES = (1, 8, 64)  # the batch sizes that this engine captures
BLOCK_M = 16


def serve(model: Path) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = read_model(model).layers[0]

    # 1. Warm up: this measures what is not measured yet. The second start of the engine measures nothing.
    for row in moecache.warmup(layer, tokens=BATCHES, routing=["uniform"], ops=["moe_sort"], budget="20s"):
        gain = "" if row.margin is None else f", {row.margin:+.0%} against the default"
        asked = f"tokens={row.problem.tokens:<4} {row.problem.dtype}"
        print(f"{asked} {row.tier}: {row.config}{gain} ({row.measured} measured now)")

    # 2. Freeze: from here on nothing is measured or written, and no call compiles by surprise. All ranks must agree.
    with moecache.using(mode="replay") as frozen:
        print(f"digest {frozen.digest(['moe_sort'])[:12]}: compare it between ranks")

        # 3. Capture one graph for each batch size, then replay it.
        for batch in BATCHES:
            ids = torch.stack([torch.randperm(layer.global_experts)[: layer.topk] for _ in range(batch)])
            ids = ids.to(torch.int32).to(device)
            run(ids, layer.global_experts)
        print(f"{len(frozen.wanted())} problems met without a measured choice")


def run(ids: torch.Tensor, experts: int) -> None:
    """One step of the layer. A GPU captures and replays it, a CPU calls it."""
    result = moecache.moe_sort(ids, experts, BLOCK_M)  # compiles now, so that the capture need not
    if ids.is_cuda:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = moecache.moe_sort(ids, experts, BLOCK_M)
        graph.replay()
    rows = int(result.num_tokens_post_padded[0])
    assert int(result.counts.sum()) == ids.numel() and rows % BLOCK_M == 0
    print(f"batch {ids.shape[0]}: {ids.numel()} pairs in {rows // BLOCK_M} blocks")


if __name__ == "__main__":
    serve(Path(sys.argv[1]) if len(sys.argv) > 1 else MODEL)
