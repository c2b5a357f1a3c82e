"""Instructions that are taken out of a kernel: what the cases would notice if the compiler, or a kernel, had left out a
wait or a barrier."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from cdna.assembly import Kernel, mnemonic
from cdna.cases import Case, call, equal
from cdna.device import LATE, MIXED, PLAIN, Mode, interpreted
from cdna.library import codes

LONGER = 3  # times the instructions of a launch, after which it hangs
ORDERS = (LATE, MIXED, replace(MIXED, seed=4, quantum=5), replace(MIXED, seed=6, quantum=2000))  # the last: far ahead


@dataclass(frozen=True)
class Found:
    """What became of dropped instructions: how many were noticed, and the text of those that were not."""

    noticed: int
    missed: Sequence[str]


@contextmanager
def dropped(kernel: Kernel, place: int) -> Iterator[None]:
    """Within the block that instruction does nothing."""
    kept = kernel.code[place].code
    kernel.code[place].code = codes()["s_nop"]
    try:
        yield
    finally:
        kernel.code[place].code = kept


def campaign(case: Case, arch: str, kernel_name: str, what: str, most: int) -> Found:
    """Drop up to `most` executed instructions named `what` from one kernel of a case, each alone."""
    made = call(case, arch)
    with interpreted(arch) as log:
        made.launch(log)
        kernel = log.kernels[log.names.index(kernel_name)]
        for instruction in kernel.code:
            instruction.ran = 0  # another test may have gone astray in it
        first = made.launch(log)
        assert not log.wrong
        most_steps = LONGER * max(log.each)
        places = [i for i, (_, line) in enumerate(kernel.lines) if kernel.code[i].ran and mnemonic(line) == what]
        chosen = random.Random(f"{case.name} {arch} {kernel_name} {what}").sample(places, min(most, len(places)))
        missed = []
        for place in chosen:
            made = call(case, arch)  # whose arguments a kernel without a wait may have overwritten
            with dropped(kernel, place):
                if not any(_notices(made, log, replace(mode, most_steps=most_steps), first) for mode in ORDERS):
                    missed.append(f"{arch} {case.name}, {kernel_name}, line {kernel.lines[place]}")
        log.mode = PLAIN
        assert equal(call(case, arch).launch(log), first) and not log.wrong, "something is still dropped"
    return Found(len(chosen) - len(missed), missed)


def _notices(made: Any, log: Any, mode: Mode, first: Any) -> bool:
    """Whether a launch goes wrong, or gives other bits."""
    log.mode = mode
    got = made.launch(log)
    return bool(log.wrong) or not equal(got, first)
