"""Files at URLs, wherever fsspec reaches, each with its sha256 beside it: what was cut off is never taken for whole."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moecache.schemas.errors import StoreError
from moecache.store.database import MOST_BYTES

SUM = ".sha256"


def write(url: str, content: bytes) -> None:
    """Write a file and then its checksum, in the form that sha256sum reads.

    Raises:
        StoreError: it cannot be written.
    """
    told = f"{hashlib.sha256(content).hexdigest()}  {url.rpartition('/')[2]}\n"
    for name, text in ((url, content), (url + SUM, told.encode())):
        with _opened(name, "wb") as file:
            file.write(text)


def read(url: str) -> bytes:
    """A file that is what its checksum says.

    Raises:
        StoreError: it cannot be read, has no checksum, or another one.
    """
    with _opened(url, "rb") as file:
        content = bytes(file.read(MOST_BYTES))
    with _opened(url + SUM, "rb") as file:
        told = file.read(MOST_BYTES).split()
    if told[:1] != [hashlib.sha256(content).hexdigest().encode()]:
        why = "it was cut off, changed, or is being written: `moecache push` it again"
        raise StoreError(f"{url} is not what {url}{SUM} says, so it was not taken; {why}")
    return content


@contextmanager
def _opened(url: str, mode: str) -> Iterator[Any]:
    if not url.removesuffix(SUM).rpartition("/")[2]:
        raise StoreError(f"{url.removesuffix(SUM)!r} names no file")
    try:
        import fsspec

        with fsspec.open(url, mode) as file:
            yield file
    except ImportError as error:
        raise StoreError(f"{url}: {error}; `pip install 'moecache[remote]'` brings s3 and hf") from error
    except FileNotFoundError as error:
        advice = "; `moecache push` writes it beside the file" if url.endswith(SUM) else ""
        raise StoreError(f"there is no {url}{advice}") from error
    except IsADirectoryError as error:
        raise StoreError(f"{url!r} is a folder; name a file in it") from error
    except Exception as error:  # each file system has its own
        raise StoreError(f"{url}: {type(error).__name__}: {error}") from error
