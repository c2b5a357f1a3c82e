"""Which candidates of a problem are tried, and in which order."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moecache.kernels.contract import Op
from moecache.predict.ranking import rank
from moecache.predict.work import Work
from moecache.schemas.config import Config
from moecache.schemas.device import Device
from moecache.schemas.errors import InvalidInput
from moecache.schemas.problem import Problem
from moecache.tuning.run import SURE

PROVEN = 6  # candidates that suffice where they were the best of the same call with another routing


def shortlist(
    op: Op,
    problem: Problem,
    device: Device,
    count: int,
    incumbent: Config | None,
    proven: Sequence[Config] = (),
) -> list[Config]:
    """Configs to try, the most important first: default, best predicted other, incumbent, the rest.

    Args:
        proven: the configs that were tried on the same call with another routing, the best first; where they are
            enough, the best PROVEN of them are the rest.

    Raises:
        InvalidInput: no config of the op fits.
    """
    space = op.space(problem, device)
    if not space:
        raise InvalidInput(f"no config of {op.name} fits {problem.key} on {device.arch}")
    default, *others = space
    times = dict(zip(others, rank(op, problem, others, device).us, strict=True))
    others.sort(key=times.__getitem__)
    own = {config: config for config in others}  # a file's True equals 1: what is tried comes from the space
    if len(known := [own[config] for config in proven if config in own][:PROVEN]) == PROVEN:
        others = [*others[:1], *(config for config in known if config != others[0])]
    if incumbent is not None and incumbent != default and not op.fits(problem, incumbent, device):
        others = [config for config in others if config != incumbent]
        others.insert(1, incumbent)
    return [default, *others][: max(count, SURE if incumbent is None else SURE + 1)]


@dataclass(frozen=True)
class Only:
    """An op that has these candidates and no others; to the tuner the first is the default."""

    op: Op
    configs: tuple[Config, ...]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.op, name)

    def space(self, problem: Problem, device: Device) -> list[Config]:
        return list(self.configs)

    def work(self, problem: Problem, config: Config, device: Device) -> Work:
        return Work(us=float(self.configs.index(config)))  # tried in this order
