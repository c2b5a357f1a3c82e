"""Predicts the time of an MoE layer from its exact routing: to rank configs where nothing was measured.

`zero_shot` takes a device's constants, `learn` fits them to timings and keeps what they leave over, as files hold it.
`ramp` is the published form to compare with.
"""

from moecache.costmodel.fitting import fit
from moecache.costmodel.learned import Learned, learn
from moecache.costmodel.model import Prediction, predict, times
from moecache.costmodel.parameters import Parameters, zero_shot
from moecache.costmodel.ramp import regions
from moecache.costmodel.smoothing import Smoothed
from moecache.costmodel.work import Candidates, Cell, candidates, cell

__all__ = [
    "Candidates",
    "Cell",
    "Learned",
    "Parameters",
    "Prediction",
    "Smoothed",
    "candidates",
    "cell",
    "fit",
    "learn",
    "predict",
    "regions",
    "times",
    "zero_shot",
]
