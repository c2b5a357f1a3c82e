"""What the backend of every vendor offers."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, Self

from moecache.schemas.device import Device


class Event(Protocol):
    """A point on a stream."""

    def record(self) -> None:
        """Put the event on the current stream."""

    def done(self) -> bool:
        """Whether the device has passed the event. Never blocks."""

    def elapsed_us(self, end: Self) -> float:
        """Microseconds from this event to `end`. Both must be done."""


class Backend(Protocol):
    """Identity, limits, events and capture state of one vendor. Importing a backend touches no driver."""

    name: str  # "cuda", "hip", "cpu"

    def count(self) -> int:
        """Number of devices that can be used now.

        Raises:
            NoDevice: driver, package or device is absent; the message says why.
        """

    def device(self, index: int = 0) -> Device:
        """Identity and limits of one device."""

    def driver(self) -> str:
        """Driver and runtime version, as text."""

    def current(self, index: int) -> AbstractContextManager[object]:
        """A block in which the device of that number is the current one, for streams, events and graphs."""

    def link(self, index: int, other: int) -> str:
        """What joins two devices that this process sees: `nvlink18` (and how many), `xgmi1` (and its hops), `pcie`;
        `peer` or `none` where only that is known, whether they reach each other's memory; `cpu`."""

    def capturing(self) -> bool:
        """Whether the current stream of the current device is recording a graph."""

    def event(self) -> Event:
        """A new event."""

    def synchronize(self) -> None:
        """Wait for the current stream of the current device."""

    def graph(self, call: Callable[[], object]) -> Callable[[], None] | None:
        """A function that replays `call`, which is recorded into a graph; None where no graph can record it."""
