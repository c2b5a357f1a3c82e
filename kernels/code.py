"""The code that a config runs, as a hash: what was measured answers as long as the hash is the same.

Read from the source text, so nothing has to be imported or compiled. What counts are functions and constants, with all
that they name in this package. Comments, docstrings and layout do not count, nor does the file where something stands.
"""

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

_SORT = ("sort.kernels:oneshot", "sort.kernels:count", "sort.kernels:scan", "sort.kernels:place")
_SORTED = (*_SORT, "gemm.tile:combine")  # what stands around the products of a layer
_TILE, _RING = ("gemm.tile:up", "gemm.tile:down"), ("gemm.ring:product",)

# Op -> variant -> the kernels that Triton compiles for it; '' is what the other variants run, which are plain torch.
RUNS: dict[str, dict[str, tuple[str, ...]]] = {
    "moe_sort": {
        "oneshot": _SORT[:1],
        "multiphase": _SORT[1:],
        "": ("sort.cpu:launch",),
    },
    "fused_moe": {
        "decode": ("gemm.vector:up", "gemm.vector:down"),
        "tiles": (*_SORTED, *_TILE),
        "heights": (*_SORTED, *_TILE),
        "ring": (*_SORTED, *_RING),
        "tiles_ring": (*_SORTED, _TILE[0], *_RING),
        "fp8_tiles": (*_SORTED, "gemm.fp8_tile:quantise", "gemm.fp8_tile:up", "gemm.fp8_tile:down"),
        "fp8_ring": (*_SORTED, "gemm.fp8_tile:quantise", "gemm.fp8_ring:product"),
        "": ("fused_moe.cpu:launch",),
    },
    "ep_exchange": {
        "": (
            "ep.dispatch_kernels:dispatch_rows",
            "ep.combine_kernels:push_rows",
            "ep.combine_kernels:pull_rows",
            "ep.dispatch_kernels:dequantise_rows",
        ),
    },
    "grouped_gemm": {
        "tile": ("gemm.tile:lay_out", "gemm.tile:down"),
        "ring": ("gemm.tile:lay_out", *_RING),
        "": ("grouped_gemm.cpu:launch",),
    },
}

_KERNELS = "moecache.kernels."
_ROOMS = (_KERNELS, "moecache.schemas.")
_SILENT = ("ctx", "kind", "type_comment", "type_params")  # fields of a syntax tree that say nothing of what runs


def code_of(op: str, variant: str) -> str:
    """Twelve hex digits of what this variant of an op runs; '' for an op whose code is not ours."""
    runs = RUNS.get(op, {})
    return _code(runs.get(variant, runs[""])) if runs else ""


def whole(op: str, gpus: bool = False) -> str:
    """Twelve hex digits of all that an op of ours runs; of kernels for GPUs alone, if asked."""
    codes = sorted({code_of(op, variant) for variant in RUNS[op] if variant or not gpus})
    return hashlib.sha256(" ".join(codes).encode()).hexdigest()[:12]


def present(op: str, source: str) -> frozenset[str]:
    """What `Timing.code` says where the code of today was run. '' alone where a problem's `source` says it: of ops that
    are not ours, and of ours before format 1005."""
    variants = () if source else RUNS.get(op, ())
    return frozenset(code_of(op, variant) for variant in variants) or frozenset([""])


def reached(op: str, variant: str) -> frozenset[str]:
    """`module:name` of all functions and constants that count for a variant."""
    runs = RUNS[op]
    return frozenset(_reached(runs.get(variant, runs[""])))


@cache
def _code(entries: tuple[str, ...]) -> str:
    told = sorted(f"{at.partition(':')[2]} {text}" for at, text in _reached(entries).items())
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:12]


def _reached(entries: Iterable[str]) -> dict[str, str]:
    """What is defined at each place that these lead to, as text."""
    found: dict[str, str] = {}
    left = [f"{_KERNELS}{entry}" for entry in entries]
    while left:
        if (at := left.pop()) not in found and (defined := _defined(at)):
            found[at], named = defined
            left += named
    return found


@cache
def _defined(at: str) -> tuple[str, list[str]] | None:
    """A definition as text, and the places that it names; None where there is none."""
    file, _, name = at.partition(":")
    module = _module(file)
    node = module.defined.get(name)
    return None if node is None else (_told(node), module.named_in(node))


class _Module:
    """What a file defines and imports."""

    def __init__(self, name: str, tree: ast.Module) -> None:
        self._name = name
        self._imported = dict(_imports(tree.body))
        self.defined = dict(_definitions(tree.body))
        if not name.startswith(_KERNELS):  # of what others say, constants alone reach a kernel
            self.defined = {n: node for n, node in self.defined.items() if isinstance(node, ast.Assign)}

    def named_in(self, node: ast.AST) -> list[str]:
        """`module:name` of everything of this package that a definition names."""
        every = list(ast.walk(node))
        imported = self._imported | dict(_imports(every))
        found = {}
        for each in every:
            if isinstance(each, ast.Name):
                found[imported.get(each.id) or f"{self._name}:{each.id}"] = None
            elif isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id in imported:
                found[f"{imported[each.value.id].replace(':', '.')}:{each.attr}"] = None
        return list(found)


@cache
def _module(name: str) -> _Module:
    """A file of kernels/ or schemas/; an empty one for what is none."""
    path = Path(__file__).parents[1].joinpath(*name.removeprefix("moecache.").split(".")).with_suffix(".py")
    ours = name.startswith(_ROOMS) and path.is_file()
    return _Module(name, ast.parse(path.read_text(encoding="utf-8")) if ours else ast.Module([], []))


def _imports(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, str]]:
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("moecache."):
            for name in node.names:
                yield name.asname or name.name, f"{node.module}:{name.name}"


def _definitions(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in (each for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)):
                yield name.id, node


def _told(node: object) -> str:
    """A syntax tree as text that is the same in every version of Python: `ast.dump` is not."""
    if isinstance(node, list):
        return "[" + ",".join(_told(each) for each in node if not _docstring(each)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = ((name, value) for name, value in ast.iter_fields(node) if name not in _SILENT)
    return f"{type(node).__name__}(" + ",".join(f"{n}={_told(v)}" for n, v in fields if v not in (None, [])) + ")"


def _docstring(node: object) -> bool:
    """A text that stands alone, which does nothing."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
