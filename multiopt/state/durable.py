"""Replacing a file whole: whatever happens, the old one is there, or the new one."""

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

#: Bytes that are written at once, where arrays are small.
BUFFER = 2**20


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file that takes the place of another when it has been written and is on the disk.

    Until then it has a name of its own, ``.NAME.<16 digits>.tmp``, beside the other. What goes
    wrong removes it; what a process left behind that was killed, the next call removes.

    Args:
        path: The file to replace. It keeps its mode; a link to it stays.

    Raises:
        OSError: The file cannot be written; the old one is untouched.
    """
    target = Path(os.path.realpath(os.fsdecode(path)))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(target))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "expected a file, or none", str(target))
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "expected a regular file, or none", str(target))
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
                file.close()  # an open file has no other name there
            # It is locked until it has its name, or another process might remove it.
            Path(file.name).replace(target)
    finally:
        Path(file.name).unlink(missing_ok=True)
    _sync_directory(target.parent)


def _opened_beside(target: Path) -> BinaryIO:
    """A new temporary file, locked for as long as it is open."""
    while True:
        file = target.with_name(f"{_beginning(target)}{os.urandom(8).hex()}.tmp").open(
            "xb", buffering=BUFFER
        )
        if sys.platform == "win32":
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            return file  # a file system without locks, where nobody removes anything
        if os.fstat(file.fileno()).st_nlink:
            return file
        # Between the opening and the lock, another process took it for left behind.
        file.close()


def _remove_left_behind(target: Path) -> None:
    """Remove temporary files of the target whose writers are gone: nobody holds their locks."""
    if sys.platform == "win32":
        return
    name = re.compile(re.escape(_beginning(target)) + "[0-9a-f]{16}[.]tmp")
    try:
        beside = list(target.parent.iterdir())
    except PermissionError:
        return  # a folder may be one to write to and not to read
    for path in beside:
        if name.fullmatch(path.name):
            # Another process may write it, or remove it too.
            with suppress(OSError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                path.unlink()


def _beginning(target: Path) -> str:
    """What the names of its temporary files begin with; systems allow 255 bytes."""
    name = os.fsencode(target.name)
    return f".{target.name if len(name) <= 200 else xxh3_64(name).hexdigest()}."


def _sync_directory(directory: Path) -> None:
    """Bring the names in a directory to the disk, where a system has a call for it."""
    if sys.platform == "win32":
        return
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except PermissionError:
        return  # a folder may be one to write to and not to read, which there is no way to flush
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
