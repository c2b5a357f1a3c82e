"""The devices of this process: the backend of each, and the environment that a timing taken there belongs to."""

import os
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass

import torch
from torch._subclasses import FakeTensor

from moecache.backends import registry
from moecache.backends.contract import Backend
from moecache.schemas.device import Device, by_arch, same_product
from moecache.schemas.errors import InvalidInput, NoDevice
from moecache.schemas.flags import flags_from, installed
from moecache.schemas.frozen import Vendor
from moecache.schemas.problem import Problem
from moecache.schemas.timing import Environment

several: bool | None = None if torch.version.cuda or torch.version.hip else False  # GPUs; None until asked
BACKEND_OF: dict[Vendor, str] = {"nvidia": "cuda", "amd": "hip", "cpu": "cpu"}


@dataclass(frozen=True)
class Place:
    """Without a backend the device is not in this machine: questions are answered, nothing is measured."""

    backend: Backend | None
    device: Device
    index: int
    environment: Environment

    @property
    def torch_device(self) -> torch.device:
        """The device in torch's words; torch on ROCm says cuda too."""
        return torch.device("cpu") if self.device.vendor == "cpu" else torch.device("cuda", self.index)

    def foreign(self, there: Environment) -> str:
        """The product that was measured there, if it is another one than this; else ''."""
        return "" if same_product(there.device_name, self.environment.device_name) else there.device_name

    def current(self) -> AbstractContextManager[object]:
        """Within it this is the current device, to which streams, events and launches belong."""
        return nullcontext() if self.backend is None else self.backend.current(self.index)

    def capturing(self) -> bool:
        """Whether the current stream of this device records a graph."""
        if self.backend is None:
            return False
        with self.current():
            return self.backend.capturing()


def away(index: int) -> bool:
    """Whether the device of that number, −1 for the CPU, is another GPU than the current one.

    Triton launches on the current device, whatever its arguments are on. Where `several` is False nobody need ask.
    """
    global several
    if index < 0:
        return False
    if several is None:
        several = torch.cuda.device_count() > 1
    return several and bool(index != torch._C._cuda_getDevice())  # a third of what torch.cuda.current_device() costs


class Places:
    """The places of this process, each asked of its driver once. `backend` replaces detection, for tests."""

    def __init__(self, backend: Backend | None = None) -> None:
        self._backend = backend
        self._here: dict[tuple[Vendor, int], Place] = {}
        self._spoken: dict[tuple[Vendor, str, int, int], Place] = {}  # what problems speak of

    def here(self, vendor: Vendor, index: int) -> Place:
        """A device of this machine.

        Raises:
            NoDevice: there is none of this vendor and number.
        """
        if (vendor, index) not in self._here:
            backend = self._backend or registry.load(BACKEND_OF[vendor])
            device = backend.device(index)
            self._here[vendor, index] = Place(backend, device, index, environment_of(backend, device))
        return self._here[vendor, index]

    def of_tensor(self, tensor: torch.Tensor | None) -> Place:
        """Where a tensor lives; the CPU for None.

        Raises:
            InvalidInput: on neither CPU nor GPU, or it stands for others (FakeTensor, functorch's).
        """
        if tensor is None:
            return self.here("cpu", 0)
        stands_for_others = isinstance(tensor, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        if not (tensor.is_cuda or tensor.is_cpu) or stands_for_others:
            raise InvalidInput(
                f"a {type(tensor).__name__} on {tensor.device} has no memory that a kernel could read; allowed is a "
                "tensor on cpu or cuda, outside FakeTensorMode and torch.func transforms"
            )
        if not tensor.is_cuda:
            return self.here("cpu", 0)
        return self.here("amd" if torch.version.hip else "nvidia", tensor.get_device())

    def of_problem(self, problem: Problem, index: int = 0) -> Place:
        """The device that a problem speaks of: one of this machine, else one known by its architecture."""
        vendor, arch, units, _ = kind = problem.vendor, problem.arch, problem.units, index
        if kind not in self._spoken:
            with suppress(NoDevice):
                place = self.here(vendor, index)
                if (place.device.vendor, place.device.arch, place.device.units) == (vendor, arch, units):
                    return self._spoken.setdefault(kind, place)
            known = by_arch(arch) or Device(vendor=vendor, arch=arch, name=arch, units=1)
            self._spoken[kind] = Place(None, known.model_copy(update={"units": units}), 0, Environment())
        return self._spoken[kind]

    def first(self, index: int = 0) -> Place:
        """A device of the first vendor that has one."""
        backend = self._backend or registry.detect()
        return self.here(backend.device(index).vendor, index)


def environment_of(backend: Backend, device: Device) -> Environment:
    """What a timing taken on this device now depends on, apart from its key."""
    return Environment(
        device_name=device.name,
        driver=backend.driver(),
        torch=torch.__version__,
        triton=installed("triton"),
        flags=flags_from(os.environ),
    )
