"""Where the predicted time of one call goes."""

from dataclasses import dataclass

from moecache.predict.model import GemmTime, around_us, halves
from moecache.predict.parameters import Parameters
from moecache.predict.products import candidates
from moecache.predict.work import Cell, Work
from moecache.schemas.device import Device


@dataclass(frozen=True)
class Spent:
    """µs of one call with one config. `up`, `down` and `other` add up to it; their parts are named as in `GemmTime`."""

    us: float
    up: dict[str, float]
    down: dict[str, float]
    other: float


def spent(p: Parameters, device: Device, cell: Cell, work: Work) -> Spent:
    """The time of one call with its parts.

    Raises:
        InvalidInput: the work has no product, or its kernel is not known.
    """
    among = candidates([work])
    up, down = (
        {name: float(getattr(part, name)[0, 0]) for name in ("us", *GemmTime.__dataclass_fields__)}
        for part in halves(p, device, [cell], among)
    )
    other = float(around_us(p.early, [cell], among, device)[0, 0])
    return Spent(up["us"] + cell.whole * down["us"] + other, up, down, other)
