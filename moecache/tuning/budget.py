"""What tuning one problem may take."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """What tuning one problem may take.

    Attributes:
        seconds: in all; the default and the best predicted other are tried even when it is 0.
        candidates: tried at most, the default and the incumbent among them.
        call_seconds: limit of one call, or one sample.
        compile_seconds: limit of one compilation.
        memory_bytes: of all input sets together, unless a single set takes more.
        hurry: once the seconds are over, the likely winner is enough: see `candidates.leader`.
    """

    seconds: float = 30.0
    candidates: int = 16
    call_seconds: float = 10.0
    compile_seconds: float = 60.0
    memory_bytes: int = 2 << 30
    hurry: bool = False


DEFAULT_BUDGET = Budget()
