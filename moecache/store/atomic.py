"""Files written whole or not at all, over nothing that is not ours, and through no link."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moecache.schemas.errors import StoreError

BEGINNING = 4096  # bytes in which a file's mark stands


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A fresh, empty file beside `path`, under a name that nobody can foresee; at the end it takes the place of what is
    there, of a link and not of what it leads to. Nothing changes where the block raises."""
    draft = path.with_name(f".moecache-{secrets.token_hex(8)}")
    try:
        handle = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            yield draft
            os.fsync(handle)
            draft.replace(path)
        finally:
            os.close(handle)
            draft.unlink(missing_ok=True)
    except OSError as error:
        error.filename = str(path)  # the name that somebody knows
        raise


def write(path: Path, text: str, mark: str) -> None:
    """Write a text file in place of none, or of one that has `mark` near its beginning.

    Raises:
        StoreError: there is something else of that name, which was left as it is.
        OSError: it cannot be written.
    """
    ours = not os.path.lexists(path)
    if path.is_file():  # no folder, device or pipe, and no link to nothing
        with path.open("rb") as file:
            ours = mark.encode() in file.read(BEGINNING)
    if not ours:
        raise StoreError(f"{path} was not made by moecache; it was left as it is: remove it, or choose another name")
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")
