"""Direct launches of compiled kernels on a GPU: the same bits as through Triton's JIT, whatever is where in memory."""

import threading
from dataclasses import replace

import pytest
import torch

import moecache
from moecache import routing
from moecache.devices import Places
from moecache.dispatch import dispatcher
from moecache.kernels import launchers
from moecache.kernels.fused_moe.op import FUSED_MOE
from moecache.kernels.grouped_gemm.op import GROUPED_GEMM
from moecache.kernels.sort.op import SORT
from moecache.kernels.tensors import poison, tensors
from moecache.schemas.layer import Layer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

LAYERS = [
    Layer(model="toy", experts=32, global_experts=32, topk=4, hidden=1024, intermediate=768, dtype="bf16",
          activation="silu"),
    Layer(model="toy", experts=32, global_experts=32, topk=4, hidden=1024, intermediate=768, dtype="fp8",
          activation="silu", quant="fp8_block"),
    Layer(model="toy", experts=16, global_experts=32, topk=4, hidden=512, intermediate=384, dtype="fp16",
          activation="swiglu_oai"),
]  # fmt: skip


def device():
    return Places().of_tensor(torch.zeros(1, device="cuda")).device


def some(op, layer, tokens):
    """(problem, config): three of each variant."""
    for problem in op.problems(layer, [tokens], device())[:1]:
        variants = {}
        for config in op.space(problem, device()):
            variants.setdefault(config.variant, []).append(config)
        for configs in variants.values():
            yield from ((problem, config) for config in configs[:: max(1, len(configs) // 3)][:3])


def inputs(op, problem, tokens, seed):
    ids = routing.draw("zipf", tokens, problem.experts, problem.topk, seed).cuda()
    return op.inputs(problem, ids, seed)


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


@pytest.mark.parametrize("tokens", [1, 7, 64, 1000])
@pytest.mark.parametrize("op", [SORT, FUSED_MOE, GROUPED_GEMM], ids=lambda op: op.name)
def test_direct_launches_give_the_bits_of_the_jit(op, tokens):
    """The second call of what is bound launches directly; so does a captured graph, and one for other tensors."""
    for layer in LAYERS:
        for problem, config in some(op, layer, tokens):
            first, other = (inputs(op, problem, tokens, seed) for seed in (0, 1))
            through_jit = {id(args): op.launch(config, args, poison(op.outputs(args))) for args in (first, other)}
            same = dict(config.params).get("combine") != "atomic"
            run = op.bind(config, first, op.outputs(first))
            run(first, op.outputs(first))
            assert isinstance(run._direct, launchers._Driven), config.name
            for args in (first, other):
                got = run(args, poison(op.outputs(args)))
                want = through_jit[id(args)]
                assert equal(got, want) if same else op.error(got, want) < 2e-2, (config.name, problem.key)
            out, graph = poison(op.outputs(first)), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run(first, out)
            poison(out)
            graph.replay()
            want = through_jit[id(first)]
            assert equal(out, want) if same else op.error(out, want) < 2e-2, (config.name, problem.key)


@pytest.mark.parametrize("other", [("_sizes", lambda function: []), ("_driver", lambda: None)], ids=["sizes", "older"])
@pytest.mark.parametrize("tokens", [3, 200])
def test_tritons_launcher_gives_the_same(tokens, other, monkeypatch):
    """Where the driver's parameters are not what is packed, or it lacks a call, Triton's own launcher is called."""
    monkeypatch.setattr(launchers, *other)
    for problem, config in some(SORT, LAYERS[0], tokens):
        args = inputs(SORT, problem, tokens, 0)
        want, run = SORT.reference(args), SORT.bind(config, args, SORT.outputs(args))
        run(args, SORT.outputs(args))
        assert run._direct is not None and not isinstance(run._direct, launchers._Driven)
        assert SORT.error(run(args, poison(SORT.outputs(args))), want) == 0.0, config.name


def layer_call(tokens, dtype=torch.bfloat16, experts=16, hidden=512, middle=256):
    x, w1, w2 = (
        torch.randn(shape, device="cuda", dtype=dtype) / shape[-1] ** 0.5
        for shape in ((tokens, hidden), (experts, 2 * middle, hidden), (experts, hidden, middle))
    )
    router, ids = torch.randn(tokens, experts, device="cuda").softmax(1).topk(4)
    return x * hidden**0.5, w1, w2, router, ids.int()


def right(given, got):
    from moecache.kernels.fused_moe.call import call_args

    return FUSED_MOE.error(got, FUSED_MOE.reference(call_args(*given))) < 1e-2


@pytest.fixture
def serving(tmp_path):
    with moecache.using(mode="replay", db=tmp_path / "none.sqlite", path=(), strict=False) as active:
        yield active


@pytest.mark.parametrize("tokens", [2, 100])
def test_weights_may_be_freed_and_others_put_in_their_place(serving, tokens):
    """A tensor map says an address, a shape and strides: other values at the same address are read as they are."""
    for _ in range(4):
        given = layer_call(tokens)
        for _ in range(3):
            assert right(given, moecache.fused_moe(*given))
        starts = [tensor.data_ptr() for tensor in given]
        del given  # the next ones are put where these were
        torch.cuda.synchronize()
    again = layer_call(tokens)
    assert any(a == t.data_ptr() for a, t in zip(starts, again, strict=True))
    other = layer_call(tokens, experts=24)  # another shape at the same addresses
    assert right(other, moecache.fused_moe(*other)) and right(again, moecache.fused_moe(*again))


@pytest.mark.parametrize("tokens", [2, 100])
def test_what_starts_off_sixteen_bytes_is_another_call(serving, tokens):
    given = layer_call(tokens)
    for _ in range(2):
        assert right(given, moecache.fused_moe(*given))
    for which in range(5):
        tensor = given[which]
        room = torch.empty(tensor.numel() + 1, device="cuda", dtype=tensor.dtype)[1:].view(tensor.shape)
        moved = [*given[:which], room.copy_(tensor), *given[which + 1 :]]
        for _ in range(2):
            assert right(moved, moecache.fused_moe(*moved)), which
    wide = torch.zeros(tokens, 3 * 512 + 8, device="cuda", dtype=torch.bfloat16)
    out = wide[:, 512:1024]
    assert right(given, moecache.fused_moe(*given, out=out)) and right(given, moecache.fused_moe(*given, out=out))
    assert not wide[:, :512].any() and not wide[:, 1024:].any()


def test_constants_of_an_activation_are_those_of_the_call(serving):
    given = layer_call(100)
    for limit in (0.5, 7.0, 0.5):
        for _ in range(2):
            got = moecache.fused_moe(*given, activation="swiglu_oai", alpha=1.5, limit=limit)
            from moecache.kernels.fused_moe.call import call_args

            want = FUSED_MOE.reference(call_args(*given, activation="swiglu_oai", alpha=1.5, limit=limit))
            assert FUSED_MOE.error(got, want) < 1e-2, limit


def test_threads_and_streams_share_what_is_bound(serving):
    """Each launch has its own memory for parameters."""
    calls = [layer_call(100) for _ in range(4)]
    for given in calls:
        moecache.fused_moe(*given)
    torch.cuda.synchronize()
    wrong = []

    def work(given):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(100):
                got = moecache.fused_moe(*given)
            torch.cuda.current_stream().synchronize()
            if not right(given, got):
                wrong.append(given)

    threads = [threading.Thread(target=work, args=(given,)) for given in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_hit_keeps_what_is_bound(serving):
    given = layer_call(100)
    for _ in range(3):
        moecache.fused_moe(*given)
    before = dict(dispatcher().hot)
    for _ in range(5):
        moecache.fused_moe(*given)
    assert dict(dispatcher().hot) == before
    moecache.fused_moe(*layer_call(101))
    assert len(dispatcher().hot) == len(before) + 1, "each number of tokens is bound anew"


def test_a_call_is_right_at_every_number_of_tokens(serving):
    """Sizes in the kernels' parameters are those of the call, not of another one of its bucket."""
    whole = layer_call(300)
    for tokens in (*range(1, 40), 63, 64, 65, 127, 128, 129, 255, 299, 300):
        given = [whole[0][:tokens], whole[1], whole[2], whole[3][:tokens], whole[4][:tokens]]
        for _ in range(2):
            assert right(given, moecache.fused_moe(*given)), tokens


def test_replaced_arguments_are_told_apart(serving):
    from moecache.kernels.fused_moe.call import call_args

    given = layer_call(100)
    bias = torch.randn(16, 512, device="cuda", dtype=torch.bfloat16), torch.randn(16, 512, device="cuda").bfloat16()
    mapping = torch.randperm(16, device="cuda").int()
    for more in ({}, {"w1_bias": bias[0], "w2_bias": bias[1]}, {"expert_map": mapping}, {"on_input": True}):
        named = {("apply_router_weight_on_input" if k == "on_input" else k): v for k, v in more.items()}
        want = FUSED_MOE.reference(replace(call_args(*given, **more)))
        for _ in range(2):
            assert FUSED_MOE.error(moecache.fused_moe(*given, **named), want) < 1e-2, list(more)
