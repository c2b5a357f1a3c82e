"""Weights as they are, in the dtype of the tokens."""

from moecache.kernels.formats.contract import Format
from moecache.kernels.matrix import DTYPES, TOLERANCE

FORMATS = {
    name: Format("", (dtype,), TOLERANCE[name], "bf16" if dtype.itemsize == 2 else name)
    for name, dtype in DTYPES.items()
}
