"""What a config launches on a GPU, as a description: the same one is run, compiled ahead, cross-compiled and hashed.

An op turns a call into a `Plan`. In the call it reads, tensors are `Operand`s: shape, strides and dtype without memory.
So a plan can be made from the tensors of a call, and from a problem that nobody has called yet.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from moecache.kernels.contract import Source

SIZES = dict.fromkeys(("i1", "i8", "u8", "fp8e4nv", "fp8e4b8", "fp8e5"), 1)
SIZES |= {"bf16": 2, "fp16": 2, "i16": 2, "i32": 4, "fp32": 4, "i64": 8, "fp64": 8}
WORKSPACE, SLOT = "workspace", "handshake"  # operands that no caller gives
ALIGNED = 256  # bytes: where the parts of a workspace start


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor of a call, or a part of it.

    Attributes:
        name: the attribute of the call that holds it, `out` for the output, `workspace` for memory of the call's own.
        dtype: as Triton writes it: bf16, i32, …
        shape, strides: in elements.
        offset: bytes from the tensor's first element.
        aligned: whether it starts on 16 bytes.
        held: bytes of the memory that the tensor is a view of; of a workspace `Plan.workspace` says it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    aligned: bool = True
    held: int = 0

    def __len__(self) -> int:
        return self.shape[0]

    def stride(self, dim: int) -> int:
        """Elements from one index of a dimension to the next."""
        return self.strides[dim]

    def numel(self) -> int:
        """How many elements it has."""
        return prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return SIZES[self.dtype]


@dataclass(frozen=True, slots=True)
class Box:
    """A tensor descriptor: blocks of a matrix that the hardware copies.

    Attributes:
        of: where the matrix begins.
        shape, strides: of the matrix, in elements; the last stride is 1.
        block: rows and columns of a copy.
        layout: how a Gluon kernel keeps a block in shared memory; None for Triton's.
    """

    of: Operand
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]
    layout: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class Launch:
    """One launch of one kernel.

    Attributes:
        fn: the triton.jit or gluon.jit function.
        grid: programs in each dimension.
        args: Operand, Box, int or float for every parameter that is no constexpr, in their order.
        constexprs, options: by name; options are num_warps, num_stages, launch_pdl, …
    """

    fn: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    options: dict[str, Any]

    @property
    def named(self) -> dict[str, Any]:
        """The arguments by parameter."""
        names = (name for name in self.fn.arg_names if name not in self.constexprs)
        return dict(zip(names, self.args, strict=True))


@dataclass(frozen=True, slots=True)
class Plan:
    """All launches of one call, in order.

    Attributes:
        launches: may be none, where there is nothing to do.
        workspace: bytes of memory that the call takes.
        zeroed: whether the output is set to zero before.
        without: the same work where no slot for a handshake of the whole grid is free.
    """

    launches: tuple[Launch, ...] = ()
    workspace: int = 0
    zeroed: bool = False
    without: "Plan | None" = None

    def sources(self) -> list[Source]:
        """What Triton compiles for it."""
        return [source(launch, self.workspace) for launch in self.launches]


@dataclass
class Workspace:
    """Memory of one call, handed out in parts."""

    nbytes: int = 0

    def take(self, dtype: str, *shape: int) -> Operand:
        """An uninitialised part, row after row."""
        part = replace(rows_of(WORKSPACE, dtype, *shape), offset=self.nbytes)
        self.nbytes += -(-part.held // ALIGNED) * ALIGNED
        return part


def planned(build: Callable[[Workspace, bool], Sequence[Launch]], zeroed: bool = False) -> Plan:
    """The plan of what `build(workspace, free)` launches, where `free` says whether a slot for a handshake of the whole
    grid is."""

    def plan(free: bool) -> Plan:
        work = Workspace()
        found = tuple(build(work, free))
        return Plan(found, work.nbytes, zeroed)

    free = plan(True)
    fused = any(operand.name == SLOT for each in free.launches for operand in operands(each))
    return replace(free, without=plan(False)) if fused else free


def operands(launch: Launch) -> Iterator[Operand]:
    """The tensors that a launch names."""
    for value in launch.args:
        if isinstance(value, Operand | Box):
            yield value.of if isinstance(value, Box) else value


def part(whole: Operand, first: int, *shape: int) -> Operand:
    """Elements of `whole` from number `first` on, row after row."""
    offset = whole.offset + first * whole.size
    new = rows_of(whole.name, whole.dtype, *shape)
    return replace(new, offset=offset, aligned=whole.aligned and offset % 16 == 0, held=whole.held)


def rows_of(name: str, dtype: str, *shape: int, behind: int = 0) -> Operand:
    """A tensor of a call: row after row, so many elements behind each."""
    steps = [1]
    for i in range(len(shape) - 1, 0, -1):
        steps.insert(0, steps[0] * (shape[i] + (behind if i == len(shape) - 1 else 0)))
    return Operand(name, dtype, shape, tuple(steps), held=shape[0] * steps[0] * SIZES[dtype])


def launch(
    fn: Any, grid: int | tuple[int, ...], args: Sequence[Any], constexprs: dict[str, Any], options: dict[str, Any]
) -> Launch:
    """A Launch; constexprs that the kernel has not are left out."""
    own = {name: value for name, value in constexprs.items() if name in fn.arg_names}
    return Launch(fn, grid if isinstance(grid, tuple) else (grid,), tuple(args), own, options)


def source(launch: Launch, workspace: int = 0) -> Source:
    """What Triton compiles for a launch: its types, and what it makes a constant of or takes to be aligned.

    A 1 becomes a constant. What 16 divides is noted, and memory past 2 GiB, which AMD cannot address with 32-bit
    offsets.
    """
    free = {p.name for p in getattr(launch.fn, "params", ()) if p.do_not_specialize}
    kinds: dict[str, str] = {}
    constexprs, aligned, large = dict(launch.constexprs), [], []
    for name, value in launch.named.items():
        if isinstance(value, Operand):
            kinds[name] = f"*{value.dtype}"
            aligned += [name] if value.aligned and name not in free else []
            large += [name] if (workspace if value.name == WORKSPACE else value.held) >= 1 << 31 else []
        elif isinstance(value, Box):
            layout = "" if value.layout is None else f",{value.layout!r}"
            kinds[name] = f"tensordesc<{value.of.dtype}[{', '.join(map(str, value.block))}]{layout}>"
        elif isinstance(value, float):
            kinds[name] = "fp32"
        elif value == 1 and name not in free:
            constexprs[name] = 1
        else:
            kinds[name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            aligned += [name] if value % 16 == 0 and name not in free else []
    signature = {name: kinds.get(name, "constexpr") for name in launch.fn.arg_names}
    return Source(launch.fn, signature, constexprs, launch.options, aligned=tuple(aligned), large=tuple(large))
