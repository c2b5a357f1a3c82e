"""Predicts the time of an MoE layer from its exact routing: to rank configs where nothing was measured.

`zero_shot` takes a device's constants, `learn` fits them to timings and keeps what they leave over, as files hold it.
"""

from moecache.costmodel.fitting import fit
from moecache.costmodel.learned import Learned, learn
from moecache.costmodel.model import times
from moecache.costmodel.parameters import Parameters, zero_shot
from moecache.costmodel.smoothing import Smoothed
from moecache.costmodel.work import Candidates, Cell, candidates, cell

__all__ = [
    "Candidates",
    "Cell",
    "Learned",
    "Parameters",
    "Smoothed",
    "candidates",
    "cell",
    "fit",
    "learn",
    "times",
    "zero_shot",
]
