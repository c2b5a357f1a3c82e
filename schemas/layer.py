"""The MoE layer of a model as one GPU sees it."""

from pydantic import BaseModel, ConfigDict, Field


class Layer(BaseModel):
    """Shapes of one MoE layer on one rank: w1 is [experts, 2·intermediate, hidden], w2 [experts, hidden, intermediate].

    With expert parallelism `experts` is the local count and `global_experts` the router's.
    """

    model_config = ConfigDict(frozen=True)

    model: str = Field(description="name of the model, for people")
    experts: int = Field(ge=1)
    global_experts: int = Field(ge=1)
    topk: int = Field(ge=1)
    hidden: int = Field(ge=1)
    intermediate: int = Field(ge=1, description="per rank, after tensor parallelism")
    activation: str = "silu"
    dtype: str = "bf16"
    layers: int = Field(default=1, ge=1, description="MoE layers of the model, for people")
