"""Replacing a file atomically: whatever happens, either the old or the new one is there.

The new content goes to a temporary file beside the old one, is flushed to the disk, and is then
renamed. A process that is killed half-way leaves its temporary file behind; the next one that
writes the same file removes it, because nobody holds its lock any more.

>>> from pathlib import Path
>>> from tempfile import TemporaryDirectory
>>> with TemporaryDirectory() as folder:
...     path = Path(folder, "run.txt")
...     with replacing(path) as file:
...         _ = file.write(b"new")
...         path.exists()
...     path.read_bytes()
False
b'new'
"""

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_IMODE
from typing import BinaryIO

from xxhash import xxh3_64

if sys.platform != "win32":
    import fcntl

__all__ = ["replacing"]

#: How many bytes are written at once when arrays are small.
BUFFER = 2**20


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a new file that replaces another one once it is complete and on the disk.

    Until then it is called ``.NAME.<16 digits>.tmp``, in the same directory. An error removes it.
    If the process is killed, the next call for the same path removes it.

    Args:
        path: The file to replace. Its mode is kept, and so is a symbolic link to it.

    Raises:
        OSError: The file cannot be written; the old one is unchanged.
    """
    target = Path(os.path.realpath(os.fsdecode(path)))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(target))
    if target.is_dir():
        raise IsADirectoryError(
            errno.EISDIR, "expected a path of a file, not of a directory", str(target)
        )
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "expected a regular file, or nothing there yet", str(target))
    _remove_left_behind(target)
    file = _opened_beside(target)
    try:
        with file:
            yield file
            with suppress(FileNotFoundError):
                Path(file.name).chmod(S_IMODE(target.stat().st_mode))
            file.flush()
            os.fsync(file.fileno())
            if sys.platform == "win32":
                file.close()  # Windows cannot rename an open file
            # Keep the lock until it is renamed, or another process might remove it.
            Path(file.name).replace(target)
    finally:
        Path(file.name).unlink(missing_ok=True)
    _sync_directory(target.parent)


def _opened_beside(target: Path) -> BinaryIO:
    """Open a new temporary file, locked for as long as it is open."""
    while True:
        file = target.with_name(f"{_beginning(target)}{os.urandom(8).hex()}.tmp").open(
            "xb", buffering=BUFFER
        )
        if sys.platform == "win32":
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            return file  # a file system without locks, where temporary files are never removed
        if os.fstat(file.fileno()).st_nlink:
            return file
        # Before we had the lock, another process took it for an abandoned file and removed it.
        file.close()


def _remove_left_behind(target: Path) -> None:
    """Remove the target's temporary files that nobody has locked: their writers are gone."""
    if sys.platform == "win32":
        return
    name = re.compile(re.escape(_beginning(target)) + "[0-9a-f]{16}[.]tmp")
    try:
        beside = list(target.parent.iterdir())
    except PermissionError:
        return  # a directory may be writable without being readable
    for path in beside:
        if name.fullmatch(path.name):
            # Another process may be writing it, or removing it as well.
            with suppress(OSError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                path.unlink()


def _beginning(target: Path) -> str:
    """The prefix of the target's temporary files; a file name may have at most 255 bytes."""
    name = os.fsencode(target.name)
    return f".{target.name if len(name) <= 200 else xxh3_64(name).hexdigest()}."


def _sync_directory(directory: Path) -> None:
    """Flush the file names in a directory to the disk, on systems that can do that."""
    if sys.platform == "win32":
        return
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except PermissionError:
        return  # writable but not readable: there is no way to flush it
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
