"""The MoE layer of a model as one GPU sees it."""

from pydantic import Field

from moecache.schemas.frozen import Frozen


class Layer(Frozen):
    """Shapes of one MoE layer on one rank: w1 is [experts, 2·intermediate, hidden], w2 [experts, hidden, intermediate].

    With expert parallelism `experts` is the local count, and `global_experts` is the router's. gated, limit and
    on_input are arguments of `moecache.fused_moe`, which says what they do. There on_input is
    apply_router_weight_on_input. `biased`: both products add a bias; None means with swiglu_oai, as in gpt-oss. `dtype`
    is bf16, fp16, fp32, fp8 (tokens in bf16), or names weights that have no kernels, like int4.
    """

    model: str = Field(description="name of the model, for people")
    experts: int = Field(ge=1)
    global_experts: int = Field(ge=1)
    topk: int = Field(ge=1)
    hidden: int = Field(ge=1)
    intermediate: int = Field(ge=1, description="per rank, after tensor parallelism")
    activation: str = Field(default="silu", description="silu, gelu, gelu_tanh, relu2 or swiglu_oai")
    gated: bool = Field(default=True, description="without a gate w1 is [experts, intermediate, hidden]")
    limit: float | None = Field(default=None, description="gate and up are clamped to it")
    biased: bool | None = None
    on_input: bool = Field(default=False, description="the router's weight is applied to the token")
    dtype: str = "bf16"
    quant: str = Field(default="", description="kind of quantised weights, as in Quant; '' with dtype fp8 is fp8_block")
    layers: int = Field(default=1, ge=1, description="MoE layers of the model, for people")
