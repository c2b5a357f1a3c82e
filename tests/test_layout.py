"""The shape of the repository: rooms, import direction, budgets, light imports, no text of one machine."""

import ast
import io
import re
import statistics
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("backends", "kernels", "schemas")  # real folders at the top, links inside the package

# Lowest first. A room imports only rooms on earlier lines, and itself. A new room is placed here before it is written.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("schemas", "forks", "version"),
    ("backends", "team", "predict"),
    ("kernels",),
    ("routing", "models", "settings", "devices", "feedback", "store", "text", "checks"),
    ("tuning", "report"),
    ("dispatch",),
    ("calls", "traced"),
    ("asked",),
    ("ops",),
    ("ep", "warmup", "receipts", "wrapping", "verify", "lab"),
    ("integrations",),
    ("cli",),
    ("__main__", "__init__"),
)
ROOM = {name: name for rooms in LEVELS for name in rooms}
LEVEL = {name: level for level, rooms in enumerate(LEVELS) for name in rooms}

# These load without torch, Triton, numpy or jinja2: a shell command that only reads a file must start at once.
LIGHT = ("moecache", "moecache.cli", "moecache.store", "moecache.models", "moecache.settings")

FILE_LINES, FILE_MEDIAN, PUBLIC_NAMES = 300, 120, 10
CHAIN = 14  # files of which each imports the next
FUNCTION_LINES, SHORT_FUNCTION, SHORT_SHARE = 60, 25, 0.90


def modules() -> dict[str, Path]:
    """Every module of the package by dotted name, each file once."""
    package = ROOT / "moecache"
    files = [*package.glob("*.py"), *(f for f in package.glob("*/*.py") if f.parent.name not in ROOMS)]
    files += [file for room in ROOMS for file in (ROOT / room).rglob("*.py")]
    named = {}
    for file in files:
        parts = file.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts
        named[".".join(parts if parts[0] == "moecache" else ("moecache", *parts))] = file
    return named


MODULES = modules()


def place(module: str) -> str:
    """The name under which a module stands in LEVELS."""
    return module.split(".")[1] if "." in module else "__init__"


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules of ours that the statements under `tree` import, wherever they stand."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "moecache":
                yield name if name in MODULES else name.rpartition(".")[0] or name


def at_import(tree: ast.Module) -> Iterator[str]:
    """As `imports`, without those inside functions; TYPE_CHECKING blocks count."""
    pending: list[ast.AST] = [tree]
    while pending:
        for node in ast.iter_child_nodes(pending.pop()):
            if isinstance(node, ast.Import | ast.ImportFrom):
                yield from imports(ast.Module([node], []))
            elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                pending.append(node)


TREES = {name: ast.parse(file.read_text()) for name, file in MODULES.items()}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module: str) -> None:
    here = place(module)
    assert here in LEVEL, f"{module} has no place in LEVELS: say which modules it may import"
    for target in imports(TREES[module]):
        there = place(target)
        below = LEVEL.get(there, len(LEVELS)) < LEVEL[here]
        assert below or ROOM.get(there) == ROOM[here], f"{module} imports {target}, which is not below it"


def test_no_import_cycles_and_no_long_chains() -> None:
    """Imports inside functions count: a knot is a knot, whenever it is tied."""
    graph, chain = {module: set(imports(tree)) - {module} for module, tree in TREES.items()}, list[list[str]]()
    while leaves := [module for module, targets in graph.items() if not targets & graph.keys()]:
        chain.append(leaves)
        for module in leaves:
            del graph[module]
    assert not graph, f"these import each other: {sorted(graph)}"
    assert len(chain) <= CHAIN, f"a chain of {len(chain)} imports ends in {chain[-1]}"


@pytest.mark.parametrize(("room", "commands"), [("lab", {"moecache.cli"}), ("report", {"moecache.cli.files"})])
def test_serving_imports_no_research(room: str, commands: set[str]) -> None:
    """Imports inside functions count: one command may use the room when it runs."""
    users = {name for name, tree in TREES.items() for target in imports(tree) if place(target) == room}
    outside = {name for name in users if place(name) != room}
    assert outside == commands


def test_absolute_imports_only() -> None:
    bare = re.compile(rf"^\s*(from|import) ({'|'.join(ROOMS)})\b", re.MULTILINE)
    for module, tree in TREES.items():
        relative = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        assert not relative, f"{module} has relative imports in lines {relative}"
        assert not bare.search(MODULES[module].read_text()), f"{module} imports a room by its bare name"


def test_rooms_are_links_without_init() -> None:
    for room in ROOMS:
        link = ROOT / "moecache" / room
        assert link.is_symlink() and str(link.readlink()) == f"../{room}"
        assert (ROOT / room).is_dir() and not (ROOT / room).is_symlink()
        assert not (ROOT / room / "__init__.py").exists(), f"{room}/__init__.py would shadow another package's {room}"


def test_packages_list_names_every_room() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {".".join(name.split(".")[:-1]) for name in MODULES} - {""}
    assert set(setuptools["packages"]) == folders
    assert setuptools["package-dir"] == {
        "": "src",  # for an editable install alone
        "moecache": "moecache",
        **{f"moecache.{room}": room for room in ROOMS},
    }
    deeper = [file for room in ROOMS for file in (ROOT / room).glob("*/*/**/*.py")]
    assert not deeper, f"{deeper} would not be installed: rooms are two folders deep at most"


def code_lines(source: str) -> int:
    """Lines that hold code: no blanks, comments or docstrings."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                docstrings.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    skipped = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def test_code_lines_counts_code_only() -> None:
    source = '"""One\n\ntwo."""\n\n# why\nx = (\n    1\n)\n\n\ndef f():\n    """Doc."""\n    return """a\nb"""\n'
    assert code_lines(source) == 6


def test_files_stay_small() -> None:
    lines = {name: code_lines(file.read_text()) for name, file in MODULES.items()}
    long = {name: n for name, n in lines.items() if n > FILE_LINES and place(name) != "kernels"}
    assert not long, f"over {FILE_LINES} code lines: {long}"
    assert statistics.median(lines.values()) <= FILE_MEDIAN, sorted(lines.items(), key=lambda item: -item[1])


def functions() -> Iterator[tuple[str, int]]:
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and place(module) != "kernels":
                yield f"{module}.{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1


def test_functions_stay_short() -> None:
    spans = list(functions())
    long = [(name, span) for name, span in spans if span > FUNCTION_LINES]
    assert not long, f"over {FUNCTION_LINES} lines: {long}"
    over = sorted((span, name) for name, span in spans if span > SHORT_FUNCTION)
    assert len(over) <= (1 - SHORT_SHARE) * len(spans), f"{len(over)} of {len(spans)} over {SHORT_FUNCTION}: {over}"


def test_every_module_says_what_it_owns() -> None:
    for module, tree in TREES.items():
        said = ast.get_docstring(tree)
        assert said, f"{module} has no docstring"
        assert not module.endswith(("utils", "helpers", "common", "misc")), f"{module}: name what it owns"


def run(code: str) -> str:
    """What a fresh interpreter at the repository's root prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


PUBLIC = """
import pydoc, sys, moecache
print(*moecache.__all__)
print(*dir(moecache))
print("torch" in sys.modules)
print(all(hasattr(moecache, name) for name in moecache.__all__))
print(moecache.Quant.__module__)
print(pydoc.plain(pydoc.render_doc(moecache)))
"""


def test_public_names_exist_and_are_listed_before_anything_is_loaded() -> None:
    public, listed, heavy, found, quant, *page = run(PUBLIC).splitlines()
    names = set(public.split())
    assert 1 <= len(names) <= PUBLIC_NAMES and len(public.split()) == len(names), names
    assert names == {name for name in listed.split() if not name.startswith("_")} and heavy == "False"
    assert found == "True" and quant == "moecache.kernels.formats.contract"
    assert all(re.search(rf"\b{name}\b", "\n".join(page)) for name in names)
    light = "import sys\nfrom moecache import InvalidInput, MoecacheError, NotTuned\nprint('torch' in sys.modules)"
    assert run(light) == "False"


def test_kernels_import_no_torch() -> None:
    """A process that only compiles them starts in half a second; with torch it would take four."""
    kernels = [name for name, file in MODULES.items() if re.search(r"^@(triton|gluon)\.jit", file.read_text(), re.M)]
    assert len(kernels) > 5
    probe = "import sys, importlib\n[importlib.import_module(name) for name in {}]\nprint('torch' in sys.modules)"
    assert run(probe.format(kernels)) == "False"


# Runs before the import: notes every environment read, file opened and connection made by one of our frames.
SPY = """
import os, sys
seen = []
rooms = ("/moecache/", "/backends/", "/kernels/", "/schemas/")
through = ("os.py", "<frozen os>", "_collections_abc.py", "<frozen _collections_abc>", "pathlib.py", "/io.py")
def ours():
    frame = sys._getframe(2)
    while frame and frame.f_code.co_filename.endswith(through):
        frame = frame.f_back
    name = frame.f_code.co_filename if frame else ""
    return "site-packages" not in name and any(room in name for room in rooms)
def audit(event, args):
    if event in ("open", "sqlite3.connect", "socket.connect", "subprocess.Popen") and ours():
        seen.append(f"{event} {args[0]}")
read = os._Environ.__getitem__
def getitem(self, key):
    if ours():
        seen.append(f"environ {key}")
    return read(self, key)
os._Environ.__getitem__ = getitem
sys.addaudithook(audit)
"""


def test_the_spy_sees() -> None:
    code = "open('pyproject.toml'); os.environ.get('HOME'); os.getenv('PATH')"
    probe = SPY + f"exec(compile({code!r}, '/x/moecache/probe.py', 'exec')); print(*seen, sep=';')"
    assert run(probe) == "open pyproject.toml;environ HOME;environ PATH"


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy_and_touch_nothing(module: str) -> None:
    heavy = "{'torch', 'triton', 'numpy', 'sqlite_utils', 'jinja2'} & set(sys.modules)"
    found = run(SPY + f"import {module}; print('imports', *{heavy}); print('touches', *seen, sep=';')")
    assert found == "imports\ntouches", f"{module} {found}"


def test_no_module_reads_the_environment_or_connects_at_import() -> None:
    names = sorted(name for name in MODULES if place(name) != "integrations" and not name.endswith("__main__"))
    seen = run(SPY + f"import importlib\nfor name in {names}: importlib.import_module(name)\nprint(*seen, sep=';')")
    assert not [what for what in seen.split(";") if what and not what.startswith("open ")], seen


TEXT = {".py", ".md", ".toml", ".txt", ".json", ".yml", ".c", ".h", ".sh", ""}
GENERATED = {"__pycache__", "build", "dist", "out"}
# One machine's folders and package hosts, in pieces so that this file does not name them itself.
PLACES = re.compile(r"(?<![\w.$}~])/(?:" + "|".join(("work", "farm", "tmp", "root", "home", "Users")) + r")/[\w.]")
HOSTS = re.compile(
    r"\b(?:files\.)?" + "python" + r"hosted\.|\bpypi" + r"\.org|--(?:extra-)?index" + "-url|--find" + "-links"
)


def project_files() -> Iterator[Path]:
    for file in sorted(ROOT.rglob("*")):
        parts = file.relative_to(ROOT).parts
        hidden = any(part.startswith(".") and part != ".ci" for part in parts[:-1]) or parts[0].endswith(".egg-info")
        if file.is_file() and file.suffix in TEXT and not hidden and not GENERATED & set(parts):
            yield file


def test_no_file_names_one_machine() -> None:
    found = []
    for file in project_files():
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
            if PLACES.search(line) or HOSTS.search(line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def test_the_patterns_find_what_they_should() -> None:
    assert PLACES.search("see " + "/home" + "/x") and PLACES.search("'" + "/tmp" + "/bash'")
    assert not PLACES.search("~/.cache/moecache") and not PLACES.search(
        "https://example.com/home/x".replace("/home", "/page")
    )
    assert HOSTS.search("pip install --" + "index-url x") and not HOSTS.search("the index of an expert")
