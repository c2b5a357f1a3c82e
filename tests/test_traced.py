"""The ops under torch.compile: one graph, the same bits, no new one for another number of tokens; and no gradients."""

import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import moecache
from moecache import checks
from moecache.dispatch import using
from moecache.ops import Quant, moe_align_block_size, moe_sorting

E, K, N, TOPK = 4, 32, 48, 2
# inductor writes C++ for what is around the op
BACKENDS = ["aot_eager", *(["inductor"] if shutil.which("g++") else [])]


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    with using(mode="replay", db=":memory:"), torch.no_grad():
        yield


def routed(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.stack([torch.randperm(E)[:TOPK] for _ in range(tokens)]).int()
    return torch.randn(tokens, K), torch.randn(tokens, TOPK).softmax(1), ids


def weights(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return (torch.randn(E, 2 * N, K) / 6).to(dtype), (torch.randn(E, K, N) / 7).to(dtype)


class Layer(torch.nn.Module):
    """As an engine's: something before, the layer, something after."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.w1, self.w2 = (torch.nn.Parameter(each) for each in weights())
        self.options = options

    def forward(self, x: torch.Tensor, router: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return moecache.fused_moe(x * 2, self.w1, self.w2, router, ids, **self.options) + 1


def compiled(fn: Callable[..., Any], backend: str = "aot_eager", **how: Any) -> tuple[Callable[..., Any], Any]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(fn, fullgraph=True, backend=counter, **how), counter


def graphs(counter: Any) -> int:
    """How many were compiled. A trace that torch begins anew, as it specialises a float, leaves one that is empty or,
    with torch 2.8, asks for the float."""
    nodes = [list(made.graph.nodes) for made in counter.graphs]
    return sum(any(n.op == "call_function" for n in each) and all(n.target != "item" for n in each) for each in nodes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_one_graph_and_the_same_bits_whatever_the_number_of_tokens(backend: str, mode: Any) -> None:
    layer = Layer()
    fast, counter = compiled(layer, backend, dynamic=True)
    with mode():
        for tokens in (24, 5, 33, 100):
            call = routed(tokens)
            assert torch.equal(fast(*call), layer(*call))
    assert graphs(counter) == 1


def test_without_dynamic_the_second_number_of_tokens_is_the_last_that_compiles() -> None:
    layer = Layer()
    fast, counter = compiled(layer)
    for tokens in (24, 5, 33, 100, 7):
        call = routed(tokens)
        assert torch.equal(fast(*call), layer(*call))
    assert graphs(counter) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "gelu"},
        {
            "activation": "swiglu_oai",
            "alpha": 1.5,
            "limit": 6.0,
            "w1_bias": torch.ones(E, 2 * N),
            "w2_bias": torch.ones(E, K),
        },
        {"apply_router_weight_on_input": True, "layer": "model.layers.3", "variant": "padded_bmm"},
        {"expert_map": torch.tensor([0, -1, 2, 3], dtype=torch.int32), "layer": 7},
        {"global_num_experts": E},
    ],
)
def test_every_option_goes_through(options: dict[str, Any]) -> None:
    layer = Layer(**options)
    call = routed(24)
    assert torch.equal(compiled(layer)[0](*call), layer(*call))


def test_scales_go_through() -> None:
    w1, w2 = weights(torch.float8_e4m3fn)
    scales = Quant("fp8_channel", torch.rand(E, 2 * N), torch.rand(E, K))

    def layer(x: torch.Tensor, router: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return moecache.fused_moe(x.bfloat16(), w1, w2, router, ids, quant=scales)

    call = routed(24)
    assert torch.equal(compiled(layer)[0](*call), layer(*call))


def test_an_output_is_written_to() -> None:
    w1, w2 = weights()

    def layer(x: torch.Tensor, router: torch.Tensor, ids: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return moecache.fused_moe(x, w1, w2, router, ids, out=out)

    call = routed(24)
    out, want = torch.zeros(24, K), torch.zeros(24, K)
    assert compiled(layer)[0](*call, out) is out
    assert torch.equal(out, layer(*call, want)) and bool(out.any())


def test_sorting_and_products() -> None:
    w1, _ = weights()
    offsets = torch.tensor([0, 4, 8, 12, 24], dtype=torch.int32)

    def sort(ids: torch.Tensor, router: torch.Tensor) -> list[torch.Tensor]:
        done = moecache.moe_sort(ids, E, 16, topk_weights=router)
        assert done.sorted_weights is not None
        return [done.sorted_token_ids + 1, done.expert_ids, done.counts, done.sorted_weights]

    def multiply(a: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        moecache.grouped_gemm(a, w1, offsets, out=out)
        return moecache.grouped_gemm(a, w1, offsets) * 2, out + 0

    fast, counter = compiled(sort, dynamic=True)
    for tokens in (24, 5, 33):
        _, router, ids = routed(tokens)
        assert all(map(torch.equal, fast(ids, router), sort(ids, router)))
    assert graphs(counter) == 1
    a = torch.randn(24, K)
    ours, theirs = (fn(a, torch.empty(24, 2 * N)) for fn in (compiled(multiply)[0], multiply))
    assert all(map(torch.equal, ours, theirs))


def test_the_functions_of_engines() -> None:
    def align(ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return moe_align_block_size(ids, 16, E, pad_sorted_ids=True)

    def pack(ids: torch.Tensor, router: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return moe_sorting(ids, router, E, K, torch.float32)

    _, router, ids = routed(24)
    assert all(map(torch.equal, compiled(align)[0](ids), align(ids)))
    assert all(map(torch.equal, compiled(pack)[0](ids, router), pack(ids, router)))


def test_a_wrong_argument_is_named_in_a_graph_too() -> None:
    fast = compiled(Layer(activation="tanh"))[0]
    with pytest.raises(Exception, match=r"activation='tanh'|\(InvalidInput\)"):  # torch 2.8 names no more than its kind
        fast(*routed(24))


def test_opcheck() -> None:
    tensors = torch.ops.moecache
    x, router, ids = routed(24)
    w1, w2 = weights()
    offsets = torch.tensor([0, 4, 8, 12, 24], dtype=torch.int32)
    product = (x, w1, offsets, None, None, "", "")
    layer = (x, w1, w2, router, ids, "silu", 0.0, 0.0, None, None, False, None, E, "", None, None, None, "", "")
    with torch.enable_grad():
        opcheck(tensors.fused_moe.default, layer)
        opcheck(tensors.fused_moe_out.default, (*layer, torch.empty(24, K)))
        opcheck(tensors.grouped_gemm.default, product)
        opcheck(tensors.grouped_gemm_out.default, (*product, torch.empty(24, 2 * N)))
        for given, room in ((None, None), (router, 200)):
            opcheck(tensors.moe_sort.default, (ids, E, 16, given, None, None, False, False, room, "", ""))


# --- gradients


def test_an_input_that_wants_a_gradient_is_said_once() -> None:
    layer, call = Layer(), routed(24)
    checks.warn_of_gradients.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(*call)  # under no_grad
    with torch.enable_grad():
        with pytest.warns(RuntimeWarning, match="have no gradient: call them under torch.no_grad"):
            layer(*call)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layer(*call)


def test_in_a_graph_it_raises() -> None:
    """Or a graph of both ways would be made, with a result that has none."""
    with torch.enable_grad(), pytest.raises(Exception, match="have no gradient: call them under"):
        compiled(Layer())[0](*routed(24))
