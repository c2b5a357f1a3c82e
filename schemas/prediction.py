"""What a model predicts for one problem on one kind of device, where nobody has measured it."""

from pydantic import Field

from moecache.schemas.config import Config
from moecache.schemas.frozen import Frozen
from moecache.schemas.problem import Problem


class Prediction(Frozen):
    """The config with the lowest predicted time. It is no timing: it has no environment and no samples, and it never
    answers as measured."""

    problem: Problem
    device: str = Field(min_length=1, description="the product whose rates were put in, as in schemas.device.KNOWN")
    config: Config
    predicted_us: float = Field(gt=0, allow_inf_nan=False)
    model: str = Field(default="", description="what predicted it")
