"""What the ops of this package share: candidates of a CPU in one module, those of GPUs in modules that need Triton."""

from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any

from moecache.kernels.contract import Bound, Source, made_up
from moecache.kernels.launch import Plan
from moecache.kernels.matrix import TOO_MUCH
from moecache.predict.ranking import rank
from moecache.predict.work import Work
from moecache.schemas.config import Alternatives, Config
from moecache.schemas.device import Device
from moecache.schemas.errors import InvalidInput
from moecache.schemas.layer import Layer
from moecache.schemas.problem import Problem, token_bucket


class BuiltIn:
    """An op whose folder holds its variants.

    Attributes:
        cpu: the module of the CPU's variants: VARIANTS, space, fits, work, launch.
        bodies: the modules of the GPU's variants, each with its VARIANTS: space, every, fits, work, plan.
        open: fields of a problem that do not matter to which configs may answer it.
        starts: names of the tensors whose addresses a call may bring along; `out` is one.
    """

    name = ""
    source = ""
    cpu: Any = None
    bodies: Sequence[str] = ()
    open: Mapping[str, Any] = {"tokens": 0, "routing": ""}
    starts: Sequence[str] = ()

    def module(self, name: str) -> Any:
        """One of kernels/ that needs Triton; a machine without it never gets here."""
        return import_module(f"moecache.kernels.{name}")

    def _bodies(self) -> list[Any]:
        return list(map(self.module, self.bodies))

    def body(self, variant: str) -> Any:
        """The module of a variant for GPUs.

        Raises:
            InvalidInput: there is no such variant; the message lists those that exist.
        """
        found = {name: body for body in self._bodies() for name in body.VARIANTS}
        if variant not in found:
            raise InvalidInput(f"variant {variant!r} does not exist; allowed are {', '.join(found)}")
        return found[variant]

    def question(
        self, device: Device, tokens: int, experts: int, topk: int, dtype: str, routing: str, dims: Mapping[str, Any]
    ) -> Problem:
        """The problem of this op on that device."""
        sizes = {"tokens": token_bucket(tokens), "experts": experts, "topk": topk, "dims": tuple(dims.items())}
        where = {"vendor": device.vendor, "arch": device.arch, "units": device.units}
        return Problem(op=self.name, routing=routing, dtype=dtype, **where, **sizes)

    def space(self, problem: Problem, device: Device) -> list[Config]:
        """Every config worth trying; the first is the default, on a GPU the one with the lowest predicted time."""
        if device.vendor == "cpu":
            return [c for c in self.cpu.space(problem) if not self._unfit(problem, c, device)]
        found = dict.fromkeys(c for body in self._bodies() for c in body.space(problem, device))
        fitting = [c for c in found if not self._unfit(problem, c, device)]
        times = dict(zip(fitting, rank(self, problem, fitting, device).us, strict=True))
        return sorted(fitting, key=times.__getitem__)

    def fits(self, problem: Problem, config: Config, device: Device) -> str:
        """Why not, or ''."""
        near = problem.model_copy(update=self.open)
        return self._unfit(problem, config, device) or made_up(self._every, near, config, device)

    def _unfit(self, problem: Problem, config: Config, device: Device) -> str:
        try:
            if device.vendor == "cpu":
                return str(self.cpu.fits(problem, config))
            return str(self.body(config.variant).fits(problem, config, device))
        except (KeyError, TypeError, ValueError) as wrong:
            return f"{config.name} is no config of {self.name}: {wrong!r}"

    def _every(self, problem: Problem, device: Device) -> list[Config]:
        """What the space holds for problems near this one."""
        if device.vendor == "cpu":
            return list(self.cpu.space(problem))
        return [c for body in self._bodies() for c in body.every(problem, device)]

    def work(self, problem: Problem, config: Config, device: Device) -> Work:
        """What a config makes the device do."""
        where = self.cpu if device.vendor == "cpu" else self.body(config.variant)
        found: Work = where.work(problem, config, device)
        return found

    def bind(self, what: Config | Alternatives, call: Any, out: Any) -> Bound:
        """What runs a config for calls like this one."""
        if isinstance(what, Config) and what.variant in self.cpu.VARIANTS:
            return partial(self.cpu.launch, what)
        from moecache.kernels.running import Running, described, device_of

        return Running(self.plan(what, described(call), described(out, "out"), device_of(out)), self.starts)

    def launch(self, what: Config | Alternatives, call: Any, out: Any) -> Any:
        """Run once into `out`, whatever lies how in memory."""
        call = self.side_by_side(call)
        return self.bind(what, call, out)(call, out)

    def sources(self, problem: Problem, what: Config | Alternatives, device: Device) -> list[Source]:
        """All Triton kernels that a call of this problem launches; none for plain torch."""
        if isinstance(what, Config) and what.variant in self.cpu.VARIANTS:
            return []
        return self.plan(what, *self.operands(problem), device).sources()

    def plan(self, what: Any, call: Any, out: Any, device: Device) -> Plan:
        """What is launched on a GPU, for a call and an output of Operands."""
        found: Plan = self.body(what.variant).plan(what, call, out, device)
        return found

    # --- what an op's folder says ---

    def lacks(self, layer: Layer) -> str:
        """Why it has no problem of a layer; '' where it has."""
        raise NotImplementedError

    def problems(self, layer: Layer, tokens: Sequence[int], device: Device) -> list[Problem]:
        """One problem or more for each token bucket; on a CPU none of what would take minutes."""
        raise NotImplementedError

    def left_out(self, layer: Layer, tokens: Sequence[int], device: Device) -> str:
        """What `problems` leaves out of a layer and why; '' for nothing."""
        if why := self.lacks(layer):
            return why
        gone = ", ".join(str(count) for count in tokens if not self.problems(layer, [count], device))
        return f"tokens {gone}: {TOO_MUCH}" if gone else ""

    def operands(self, problem: Problem) -> tuple[Any, Any]:
        """A call of a problem and its output, of Operands: as `inputs` makes them."""
        raise NotImplementedError

    def side_by_side(self, call: Any) -> Any:
        """A call as kernels read it, with copies of what lies otherwise; here it is read as it is."""
        return call

    def outputs(self, call: Any) -> Any:
        """Uninitialised outputs."""
        raise NotImplementedError
