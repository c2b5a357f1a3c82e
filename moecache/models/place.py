"""Where a model's config.json lies, and what people call the model."""

import os
import re
from pathlib import Path

from moecache.schemas.errors import InvalidInput, typed

_HUB = re.compile(r"[\w.-]+/[\w.-]+")


def located(path: Path | str) -> Path:
    """The file that is meant by it or by its folder.

    Raises:
        InvalidInput: it reads like a model of the Hugging Face hub; the message says how to get the file.
    """
    given = Path(typed("path", path, str, os.PathLike))
    if given.is_dir():
        return given / "config.json"
    text = str(path)
    if _HUB.fullmatch(text) and not given.exists() and given.suffix != ".json" and not given.parent.is_dir():
        held = _held(text)
        how = f"give {held}" if held else f"fetch it (hf download {text} config.json) and give the path that it prints"
        raise InvalidInput(f"{text} is no file here; a model of the hub is read from its config.json: {how}")
    return given


def _held(model: str) -> Path | None:
    """Its newest config.json in the hub's cache folder."""
    env = os.environ
    try:
        cache = Path(env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface")
        hub = Path(env.get("HF_HUB_CACHE") or cache / "hub")
        found = list((hub / f"models--{model.replace('/', '--')}" / "snapshots").glob("*/config.json"))
        return max(found, key=lambda file: file.stat().st_mtime, default=None)
    except (OSError, RuntimeError):  # the second: nobody knows where home is
        return None


def named(file: Path) -> str:
    """The file's name, or for a config.json its folder's. A hub cache names the folder by a hash, and one above it
    `models--org--name`."""
    for part in file.parts:
        if part.startswith("models--"):
            return part.rsplit("--", 1)[1]
    return file.absolute().parent.name if file.stem == "config" else file.stem
