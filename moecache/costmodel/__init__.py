"""Predicts the time of an MoE layer from its exact routing: to rank configs where nothing was measured.

`zero_shot` takes a device's constants, `fit` timings, `Smoothed` both; `ramp` is the published form to compare with.
"""

from moecache.costmodel.fitting import Smoothed, fit
from moecache.costmodel.model import Parameters, Prediction, predict, times, zero_shot
from moecache.costmodel.ramp import regions
from moecache.costmodel.work import Candidates, Cell, candidates, cell

__all__ = [
    "Candidates",
    "Cell",
    "Parameters",
    "Prediction",
    "Smoothed",
    "candidates",
    "cell",
    "fit",
    "predict",
    "regions",
    "times",
    "zero_shot",
]
