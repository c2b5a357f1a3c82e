"""What a user gets: an sdist with the real folders, and from it a wheel with `moecache` and nothing else."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("backends", "kernels", "schemas")
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")

pytestmark = pytest.mark.slow


def python(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def build(kind: str, source: Path, out: Path) -> Path:
    """What a frontend does without build isolation: one hook of the backend, so nothing is downloaded."""
    code = f"import setuptools.build_meta as hooks; hooks.build_{kind}({str(out)!r})"
    python("-c", code, cwd=source)
    return max(out.iterdir(), key=lambda file: file.stat().st_mtime)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the working tree keeps no build folder."""
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=LEFT_OUT)
    (source / "moecache" / "prebuilt").mkdir(exist_ok=True)
    (source / "moecache" / "prebuilt" / "probe.sqlite").write_bytes(b"")
    (folder / "out").mkdir()
    return build("sdist", source, folder / "out")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, as an installer does when it finds no wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (folder / "out").mkdir()
    return build("wheel", folder / sdist.name.removesuffix(".tar.gz"), folder / "out")


def sources() -> set[str]:
    """The modules of the working tree, as paths inside an installation."""
    package = ROOT / "moecache"
    files = {f"moecache/{file.relative_to(package)}" for file in package.glob("*.py")}
    inner = (file for file in package.glob("*/*.py") if file.parent.name not in ROOMS)
    files |= {f"moecache/{file.relative_to(package)}" for file in inner}
    return files | {f"moecache/{file.relative_to(ROOT)}" for room in ROOMS for file in (ROOT / room).rglob("*.py")}


def test_sdist_holds_the_real_folders(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = {name.partition("/")[2]: member for name, member in zip(archive.getnames(), archive, strict=True)}
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        assert members[file].isfile(), file
    for room in ROOMS:
        names = {str(file.relative_to(ROOT)) for file in (ROOT / room).rglob("*.py")}
        assert names <= {name for name, member in members.items() if member.isfile()}


def test_wheel_holds_moecache_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    info = f"{wheel.name.split('-py3')[0]}.dist-info"
    assert {name.split("/")[0] for name in names} == {"moecache", info}
    assert {name for name in names if name.endswith(".py")} == sources()
    data = {f"moecache/prebuilt/{name}" for name in ("probe.sqlite", "predicted-gfx942.sqlite", "README.md")}
    data.add("moecache/predict/learned/sm_90.json.gz")
    data |= {f"moecache/report/templates/{file.name}" for file in (ROOT / "moecache/report/templates").iterdir()}
    assert {"moecache/py.typed", *data} <= set(names)


def test_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = f"{wheel.name.split('-py3')[0]}.dist-info"
    metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    assert metadata["Name"] == "moecache" and metadata["License-Expression"] == "Apache-2.0"
    version = archive.read("moecache/version.py").decode()
    assert f'__version__ = "{metadata["Version"]}"' in version
    assert set(metadata.get_all("Provides-Extra", [])) == {"cuda", "rocm", "ray", "remote", "dev"}
    plain = [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert sorted(need.split(">")[0] for need in plain) == [
        "jinja2",
        "numpy",
        "pydantic",
        "sqlite-utils",
        "torch",
        "typer",
    ]
    assert "moecache = moecache.__main__:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert f"{info}/licenses/LICENSE" in archive.namelist()


def test_the_changelog_begins_with_this_version() -> None:
    first = re.search(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert first is not None and re.fullmatch(rf"\[{re.escape(version)}\] - (unreleased|\d{{4}}-\d\d-\d\d)", first[1])


def test_installed_copy_imports_from_elsewhere(wheel: Path, tmp_path: Path) -> None:
    """-I keeps working tree, user site and PYTHON* variables out; dependencies come from this environment."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    python(*pip, cwd=elsewhere)
    assert {entry.name.split("-")[0] for entry in site.iterdir()} <= {"moecache", "bin"}
    names = [
        "moecache.schemas.problem",
        "moecache.backends.registry",
        "moecache.kernels.registry",
        "moecache.cli",
        "moecache.store",
    ]
    code = (
        f"import sys, importlib.util; sys.path.insert(0, {str(site)!r})\n"
        f"for name in {names}: print(importlib.import_module(name).__file__)\n"
        "print(importlib.util.find_spec('schemas'), importlib.util.find_spec('backends'))"
    )
    *files, rooms = python("-I", "-c", code, cwd=elsewhere).splitlines()
    assert all(Path(file).is_relative_to(site) for file in files), files
    assert rooms == "None None"


def test_installed_command_runs_from_elsewhere(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = f"import sys; sys.path.insert(0, {str(site)!r}); sys.argv = ['moecache', '--help']\n"
    shown = python("-I", "-c", code + "import moecache.cli; moecache.cli.app()", cwd=tmp_path)
    for command in ("warm", "ls", "explain", "export", "verify"):
        assert command in shown


USER = """
import moecache
from moecache import InvalidInput, NotTuned, Quant


@moecache.wrap(op="double", configs=[{"rows": 4}], key=lambda x: {"tokens": x})
def double(x: int, *, config: dict[str, int]) -> str:
    return str(x)


def print_it(x: int, *, config: dict[str, int]) -> None: ...


reveal_type(double(3))
reveal_type(moecache.wrap(print_it, op="it", configs=[{}], key=lambda x: {}))
reveal_type(moecache.fused_moe)
moecache.fused_mo
moecache.wrap(print_it, op=3, configs=[{}], key=lambda x: {})
"""


def test_a_type_checker_finds_an_editable_install(tmp_path: Path) -> None:
    """As mypy sees a user's program: by the path that the installation adds."""
    source, site, user = tmp_path / "source", tmp_path / "site", tmp_path / "user"
    shutil.copytree(ROOT, source, symlinks=True, ignore=LEFT_OUT)
    user.mkdir()
    (tmp_path / "out").mkdir()
    zipfile.ZipFile(build("editable", source, tmp_path / "out")).extractall(site)
    (added,) = [line for file in site.glob("*.pth") for line in file.read_text().splitlines()]
    assert [each.name for each in Path(added).iterdir()] == ["moecache"]
    (user / "program.py").write_text(USER)
    code = f"import sys; sys.path.insert(0, {added!r}); import moecache; print(moecache.NotTuned.__module__)"
    assert python("-I", "-c", code, cwd=user) == "moecache.schemas.errors"
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    (packages,) = environment.glob("lib/python*/site-packages")
    shutil.copytree(site, packages, dirs_exist_ok=True)
    mypy = [sys.executable, "-m", "mypy", "--python-executable", str(environment / "bin" / "python"), "program.py"]
    told = subprocess.run(mypy, cwd=user, capture_output=True, text=True, timeout=300).stdout
    kinds = re.findall(r"Revealed type is \"(.+)\"", told)
    assert kinds[:2] == ["str", "moecache.wrapping.Wrapped[None]"] and kinds[2].startswith("def (hidden_states: "), told
    wrong = re.findall(r"program.py:(\d+): error: (.+)", told)
    last = len(USER.splitlines())
    assert [int(line) for line, _ in wrong] == [last - 1, last] and "fused_mo" in wrong[0][1] and "wrap" in wrong[1][1]
