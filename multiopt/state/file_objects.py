"""Paths and binary file objects: whatever takes a path also takes an open file.

A file object needs no more than ``read`` or ``write``, so a socket or a cloud object will do. What
is read from one is first copied to a temporary file, because safetensors needs a path:

>>> import io
>>> buffer = io.BytesIO()
>>> write_whole(buffer, [b"header", memoryview(b"data")])
>>> buffer.seek(6)
6
>>> with on_disk(buffer) as path:
...     pathlib.Path(path).read_bytes()
b'data'
"""

import errno
import io
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any, Protocol, TypeAlias, TypeGuard

__all__ = ["Source", "Target", "check_readable", "is_path", "label", "on_disk", "write_whole"]

Path: TypeAlias = str | os.PathLike[str]


class Readable(Protocol):
    """A binary file object to read from."""

    def read(self, size: int, /) -> bytes:
        """Return the next bytes, at most ``size`` of them; none at the end."""


class Writable(Protocol):
    """A binary file object to write to."""

    def write(self, data: bytes, /) -> object:
        """Write all of the bytes."""


Source: TypeAlias = Path | Readable
Target: TypeAlias = Path | Writable

#: How many bytes are passed on at once.
PIECE = 2**20


def is_path(file: Any) -> TypeGuard[Path]:
    """Whether a file is given as a path."""
    return isinstance(file, str | bytes | os.PathLike)


def label(file: Any) -> str:
    """The name of a file in messages."""
    if is_path(file):
        return os.fsdecode(file)
    name = getattr(file, "name", None)
    return name if isinstance(name, str) else repr(file)


def write_whole(file: Any, parts: Iterable[bytes | memoryview]) -> None:
    """Write bytes to a file object, in order. It is neither flushed nor closed.

    Args:
        file: The file object. Only its ``write`` is used, with at most 2 MiB at a time.
        parts: The bytes.

    Raises:
        OSError: It cannot take them.
        TypeError: It is not a binary file object.
    """
    try:
        file.write(b"")
    except (AttributeError, TypeError) as error:
        raise _no_file(file, "write") from error
    for piece in _pieces(parts):
        while piece:
            count = file.write(piece)
            # Only raw files write less than they are given; others may return anything.
            if not isinstance(file, io.RawIOBase):
                break
            if count is None:
                raise BlockingIOError(errno.EAGAIN, "the file object cannot take bytes now")
            piece = piece[count:]


def _pieces(parts: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """Copy bytes into pieces of similar size: small parts are joined, and large ones split."""
    waiting = bytearray()
    for part in parts:
        for start in range(0, len(part), PIECE):
            waiting += part[start : start + PIECE]
            if len(waiting) >= PIECE:
                yield bytes(waiting)
                waiting.clear()
    yield bytes(waiting)


def check_readable(file: Any) -> None:
    """Raise an error unless a value is a binary file object to read from.

    Raises:
        TypeError: It is not.
    """
    try:
        nothing = file.read(0)
    except (AttributeError, TypeError) as error:
        raise _no_file(file, "read") from error
    if isinstance(nothing, str):
        raise _no_file(file, "read")


def _no_file(file: Any, method: str) -> TypeError:
    mode = f"{method[0]}b"
    if hasattr(file, method):
        return TypeError(f"{label(file)} is not a binary file object: open it with mode {mode!r}")
    return TypeError(
        f"expected a path, or a binary file object, which has {method}(); got {file!r}"
    )


@contextmanager
def on_disk(file: Source) -> Iterator[str]:
    """Give the path of a file; the rest of a file object is copied to a temporary one.

    Raises:
        OSError: It cannot be read, or there is no room for the copy.
        TypeError: It is neither a path nor a binary file object.
    """
    if is_path(file):
        yield os.fsdecode(file)
        return
    source: Any = file
    check_readable(source)
    with TemporaryDirectory(prefix="multiopt-") as folder:
        path = pathlib.Path(folder, "copy")
        with path.open("wb") as copy:
            shutil.copyfileobj(source, copy, PIECE)
        yield str(path)
