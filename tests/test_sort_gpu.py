"""MoE sorting on a GPU: every candidate exact, in graphs, on several streams, at the limits of size."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from placed import placed

import moecache
from moecache import routing
from moecache.devices import Places
from moecache.kernels.sort.op import SORT, SortCall
from moecache.kernels.tensors import poison
from moecache.ops import moe_align_block_size, moe_sorting
from moecache.schemas.config import config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def device():
    return Places().of_tensor(torch.empty(1, device="cuda")).device


def exact(cfg, args, want=None):
    """Both ways: the first launch goes through Triton's JIT, the second one does not."""
    outs = [poison(SORT.outputs(args)) for _ in range(2)]
    run = SORT.bind(cfg, args, outs[0])
    for out in outs:
        run(args, out)
    torch.cuda.synchronize()
    want = want or SORT.reference(args)
    assert [SORT.error(out, want) for out in outs] == [0.0, 0.0], cfg.name


def calls():
    """The cases of the CPU test, and sizes that only a GPU reaches."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("cpu_cases", Path(__file__).with_name("test_sort.py"))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.cases()


@pytest.mark.parametrize("name", calls())
def test_every_candidate_on_every_case(name):
    args = placed(calls()[name], "cuda")
    for cfg in SORT.space(SORT.problem(args, device(), ""), device()):
        exact(cfg, args)


@pytest.mark.parametrize("experts, topk", [(8, 2), (64, 8), (128, 8), (512, 10)])
@pytest.mark.parametrize("tokens", [1, 100, 1000, 5000])
def test_every_candidate_at_serving_sizes(experts, topk, tokens):
    for generator in ("uniform", "hot1"):
        ids = routing.draw(generator, tokens, experts, topk, int(torch.randint(1 << 30, ()))).cuda()
        args = SortCall(ids, experts, 64)
        want = SORT.reference(args)
        for cfg in SORT.space(SORT.problem(args, device(), ""), device()):
            exact(cfg, args, want)


@pytest.mark.parametrize(
    "tokens, experts, topk", [(131072, 8, 2), (131072, 256, 8), (20000, 1024, 32), (131072, 64, 32)]
)
def test_largest_sizes(tokens, experts, topk):
    args = SortCall(torch.randint(0, experts, (tokens, topk), dtype=torch.int32, device="cuda"), experts, 128)
    space = SORT.space(SORT.problem(args, device(), ""), device())
    want = SORT.reference(args)
    for cfg in space[:3] + space[-1:]:
        exact(cfg, args, want)


CAPTURED = [
    config("oneshot", {"launch_pdl": 1}, programs=128, step=16, num_warps=8),
    config("multiphase", {"launch_pdl": 1}, chunks=16, block=128, step=128, scan=1, fused=0, num_warps=4),
    config("multiphase", {"launch_pdl": 1}, chunks=16, block=128, step=128, scan=0, fused=0, num_warps=4),
    config("multiphase", chunks=16, block=128, step=128, scan=0, fused=1, num_warps=4),
]


@pytest.mark.parametrize("cfg", CAPTURED, ids=lambda c: c.name)
def test_replays_follow_changing_inputs(cfg):
    experts, tokens, topk = 64, 256, 8
    ids = routing.draw("uniform", tokens, experts, topk).cuda()
    limit = torch.tensor([tokens], dtype=torch.int32, device="cuda")
    args = SortCall(ids, experts, 32, num_tokens=limit)
    out = SORT.outputs(args)
    run = SORT.bind(cfg, args, out)
    run(args, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):  # neighbours in a chain must not disturb each other
            run(args, out)
    generators = ("uniform", "zipf", "hot1", "dir2")
    for step in range(1000):
        if step % 20 == 0:
            ids.copy_(routing.draw(generators[step // 20 % 4], tokens, experts, topk, step))
            limit.fill_(tokens - step % 100)
            poison(out)
        graph.replay()
        if step % 20 == 19 or step % 20 == 0:
            torch.cuda.synchronize()
            assert SORT.error(out, SORT.reference(args)) == 0.0, step


def test_handshakes_on_several_streams_at_once():
    cfg = CAPTURED[-1]
    streams = [torch.cuda.Stream() for _ in range(4)]
    args = [SortCall(routing.draw("zipf", 256, 64, 8, s).cuda(), 64, 32) for s in range(4)]
    want, run = [SORT.reference(a) for a in args], SORT.bind(cfg, args[0], SORT.outputs(args[0]))
    torch.cuda.synchronize()
    outs = []
    for _ in range(50):
        for stream, a in zip(streams, args, strict=True):
            with torch.cuda.stream(stream):
                outs.append(run(a, SORT.outputs(a)))
    torch.cuda.synchronize()
    assert all(SORT.error(out, want[i % 4]) == 0.0 for i, out in enumerate(outs))


def test_public_path_tunes_stores_and_posts(tmp_path):
    with moecache.using(db=tmp_path / "cache.sqlite", mode="tune", budget=20.0) as serving:
        ids = routing.draw("zipf", 512, 128, 8, 5).cuda()
        args = SortCall(ids, 128, 32)
        want = SORT.reference(args)
        for _ in range(3):
            got = moecache.moe_sort(ids, 128, 32, layer="posts")
            torch.cuda.synchronize()
            assert SORT.error(got, want) == 0.0
        assert int(got.posted) == int(want.posted) and not got.posted.is_cuda
        problem = SORT.problem(args, device(), routing.bucket_name(int(want.posted)))
        choice = serving.peek(SORT, problem)
        assert choice.tier == "measured", choice
        rows = [t for t, _ in serving.lookup.timings(problem)]
        assert rows and all(t.status == "ok" for t in rows), [t for t in rows if t.status != "ok"]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = moecache.moe_sort(ids, 128, 32, layer="posts")
        ids.copy_(routing.draw("hot1", 512, 128, 8, 6))
        graph.replay()
        torch.cuda.synchronize()
        assert SORT.error(captured, SORT.reference(args)) == 0.0


def test_capture_before_any_tuning_never_measures(tmp_path):
    with moecache.using(db=tmp_path / "cache.sqlite", mode="tune") as serving:
        ids = routing.draw("uniform", 48, 96, 6, 5).cuda()
        args = SortCall(ids, 96, 16)
        default = SORT.space(SORT.problem(args, device(), ""), device())[0]
        SORT.launch(default, args, SORT.outputs(args))  # compiled: a capture cannot load a module on every driver
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = moecache.moe_sort(ids, 96, 16, layer="never seen")
        graph.replay()
        torch.cuda.synchronize()
        assert SORT.error(out, SORT.reference(args)) == 0.0
        assert len(serving.wanted()) == 1


def test_faces_on_the_device(tmp_path):
    with moecache.using(db=tmp_path / "cache.sqlite", mode="off"):
        ids = routing.draw("zipf", 200, 32, 4, 1).cuda()
        sorted_ids, blocks, total = moe_align_block_size(ids, 16, 32)
        want = SORT.reference(SortCall(ids, 32, 16))
        assert torch.equal(sorted_ids.cpu(), want.sorted_token_ids) and torch.equal(blocks.cpu(), want.expert_ids)
        assert total.tolist() == want.num_tokens_post_padded[:1].tolist()
        weights = torch.rand(200, 4, device="cuda")
        mask = (torch.arange(32, device="cuda") % 2 == 0).int()
        results = {p: moe_sorting(ids, weights, 32, 64, torch.bfloat16, 32, mask, None, p) for p in (0, 1, 2)}
        for policy in (1, 2):
            assert all(torch.equal(a, b) for a, b in zip(results[0], results[policy], strict=True))
