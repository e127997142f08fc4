"""Files that the caller has opened, in the place of a path.

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
        """The next bytes, at most as many; none at the end."""


class Writable(Protocol):
    """A binary file object to write to."""

    def write(self, data: bytes, /) -> object:
        """Take all of the bytes."""


Source: TypeAlias = Path | Readable
Target: TypeAlias = Path | Writable

#: Bytes that are handed over at once.
PIECE = 2**20


def is_path(file: Any) -> TypeGuard[Path]:
    """Whether a file is given by its path."""
    return isinstance(file, str | bytes | os.PathLike)


def label(file: Any) -> str:
    """What a file is called in messages."""
    if is_path(file):
        return os.fsdecode(file)
    name = getattr(file, "name", None)
    return name if isinstance(name, str) else repr(file)


def write_whole(file: Any, parts: Iterable[bytes | memoryview]) -> None:
    """Hand all bytes over to a file object, in their order. It is neither flushed nor closed.

    Args:
        file: The file object; all that is asked of it is ``write``, of at most 2 MiB at a time.
        parts: The bytes.

    Raises:
        OSError: It cannot take them.
        TypeError: It is no binary file object.
    """
    try:
        file.write(b"")
    except (AttributeError, TypeError) as error:
        raise _no_file(file, "write") from error
    for piece in _pieces(parts):
        while piece:
            count = file.write(piece)
            # Others say what they like, and have taken all.
            if not isinstance(file, io.RawIOBase):
                break
            if count is None:
                raise BlockingIOError(errno.EAGAIN, "the file object takes no bytes now")
            piece = piece[count:]


def _pieces(parts: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """The same bytes, small parts together and large ones apart, copied."""
    waiting = bytearray()
    for part in parts:
        for start in range(0, len(part), PIECE):
            waiting += part[start : start + PIECE]
            if len(waiting) >= PIECE:
                yield bytes(waiting)
                waiting.clear()
    yield bytes(waiting)


def check_readable(file: Any) -> None:
    """Refuse what is no binary file object.

    Raises:
        TypeError: It is none.
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
        return TypeError(
            f"{label(file)} is a file object of text, or of another kind; expected one of bytes: "
            f"open it with mode {mode!r}"
        )
    return TypeError(
        f"expected a path, or a binary file object, which has {method}(); got {file!r}"
    )


@contextmanager
def on_disk(file: Source) -> Iterator[str]:
    """The path of a file. What a file object has, from where it is to its end, is copied to one.

    Raises:
        OSError: It cannot be read, or there is no room for the copy.
        TypeError: It is no binary file object.
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
