"""What every backend of a vendor offers."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from moecache.schemas.device import Device


class Event(Protocol):
    """A point on the current stream."""

    def record(self) -> None:
        """Mark the current stream here."""

    def done(self) -> bool:
        """Whether the device has passed it. Never blocks."""

    def elapsed_us(self, end: "Event") -> float:
        """Microseconds from this event to `end`; both must be done."""


class Backend(Protocol):
    """Identity, limits, events and capture state of one vendor. Importing a backend touches no driver."""

    name: str  # "cuda", "hip", "cpu"

    def count(self) -> int:
        """Devices that can be used now.

        Raises:
            NoDevice: with the reason, when driver, package or device is absent.
        """

    def device(self, index: int = 0) -> Device:
        """Identity and limits of one device."""

    def driver(self) -> str:
        """Driver and runtime version, as text."""

    def current(self, index: int) -> AbstractContextManager[object]:
        """Within it the device of that number is the current one, of which streams, events and graphs speak."""

    def capturing(self) -> bool:
        """Whether the current stream of the current device is recording a graph."""

    def event(self) -> Event:
        """A new event."""

    def synchronize(self) -> None:
        """Wait for the current stream of the current device."""

    def graph(self, call: Callable[[], object]) -> Callable[[], None] | None:
        """`call` recorded into a graph, as a replay function; None where graphs do not exist or refuse it."""
