"""The cache of machine code on disk, which saves later processes the seconds of compiling.

The name of a file contains a hash of everything that its machine code depends on. If any of that
changes, the name is another one, so no file is ever out of date and none has to be invalidated.
What is read from a file is executed; ``cached`` says which files are trusted.
"""

import hashlib
import json
import os
import platform
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["ObjectCode", "cached", "linked"]

#: The version of the file format; it is part of what the names are hashes of.
FORM = b"multiopt object code 1"

SUFFIX = ".multiopt"
UNFINISHED = ".multiopt-unfinished"

#: How many files are kept. A program needs one for each kind of rule and dtype that it uses, at
#: 20 to 170 KiB per file; the tests of multiopt, which use nearly all, leave 360.
KEPT = 1024

#: The age in seconds at which an unfinished file is deleted. Writing takes milliseconds, so the
#: process that wrote it no longer exists.
ABANDONED = 3600.0

#: LLVM's owners of linked code. They must live as long as its addresses are in use, which nobody
#: can know, so they are kept until the process ends.
_engines: list[Any] = []


class ObjectCode(NamedTuple):
    """Compiled functions, in the form that the linker takes.

    The objects may call one another and the C library. They must not use a symbol that numba would
    have to provide: in a process that found the code on disk the symbol would be missing, and LLVM
    would end the process.

    Attributes:
        symbols: From our name of each function to its symbol in the objects.
        objects: The object files.
    """

    symbols: dict[str, str]
    objects: tuple[bytes, ...]


def cached(
    label: str, identity: Iterable[str | bytes], make: Callable[[], ObjectCode]
) -> ObjectCode:
    """Return object code that an earlier process has compiled, or compile it and keep it.

    The files are in the directory that the environment variable ``MULTIOPT_CACHE_DIR`` names, or
    otherwise in ``multiopt`` in the user's directory for caches. The directory is created with
    access for its user only, because anybody who can write to it can execute code as this user. For
    this reason, on POSIX, a directory is neither read nor written if it belongs to another user, or
    if its group or others may write to it; a file of this sort is replaced, and so is a damaged
    one. If nothing can be kept, every process compiles the code.

    Args:
        label: The beginning of the name of the file, for people.
        identity: What the code depends on, such as sources and options. The versions of numba,
            llvmlite, NumPy and Python, numba's settings and the processor are added here.
        make: Compiles the code. Its errors are passed on.

    Raises:
        ImportError: numba or llvmlite is not installed.
    """
    key = hashlib.sha256()
    for part in (FORM, *_surroundings(), *_settings(), *identity):
        raw = part if isinstance(part, bytes) else part.encode()
        # The length tells ("ab", "c") from ("a", "bc").
        key.update(b"%d:" % len(raw) + raw)
    directory = _directory()
    if directory is None:
        return make()
    path = directory / f"{label}-{key.hexdigest()}{SUFFIX}"
    code = _read(path)
    if code is None:
        code = make()
        _write(path, code)
        _clear_out(directory)
    return code


def linked(code: ObjectCode) -> dict[str, int]:
    """Load object code into this process, where it stays until the process ends.

    Args:
        code: The object code, just compiled or read from disk.

    Returns:
        The addresses of the functions, by our names.

    Raises:
        LookupError: A symbol is missing.
    """
    import llvmlite.binding as llvm

    # This is thread-safe: llvmlite locks each of these calls, and they share only the list.
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    for data in code.objects:
        engine.add_object_file(llvm.ObjectFileRef.from_data(data))
    engine.finalize_object()
    _engines.append(engine)
    addresses = {n: engine.get_function_address(symbol) for n, symbol in code.symbols.items()}
    for name, address in addresses.items():
        if not address:
            raise LookupError(f"the object code has no symbol {code.symbols[name]!r} for {name!r}")
    return addresses


@cache
def _surroundings() -> tuple[str, ...]:
    """What machine code depends on besides its source: the tools that made it and the processor."""
    # Imported here because a process without kernels needs neither.
    from importlib.metadata import version

    import llvmlite.binding as llvm

    try:
        features = llvm.get_host_cpu_features().flatten()
    except RuntimeError:  # LLVM does not know the features of every processor
        features = "unknown"
    return (
        *(version(package) for package in ("numba", "llvmlite", "numpy")),
        sys.version,
        sys.platform,
        platform.machine(),
        llvm.get_host_cpu_name(),
        features,
    )


def _settings() -> Iterator[str]:
    """Yield numba's environment variables, some of which change the code that it compiles."""
    for name in sorted(os.environ):
        if name.startswith("NUMBA_"):
            yield f"{name}={os.environ[name]}"


def _directory() -> Path | None:
    """The directory of the files, which exists and is safe; None if there is no such directory."""
    try:
        directory = _place()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Links are resolved before the check, because they could point elsewhere a moment later.
        directory = directory.resolve()
        return directory if _safe(directory.stat()) else None
    except (OSError, RuntimeError):  # RuntimeError: nobody knows this user's home
        return None


def _place() -> Path:
    """The directory in which the files should be."""
    if chosen := os.environ.get("MULTIOPT_CACHE_DIR"):
        return Path(chosen).expanduser()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        caches = Path(local) if local else Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        caches = Path.home() / "Library" / "Caches"
    else:
        # The XDG specification says that a relative path is to be ignored.
        caches = xdg if xdg.is_absolute() else Path.home() / ".cache"
    return caches / "multiopt"


def _safe(status: os.stat_result) -> bool:
    """Whether only this user can write a file or directory, as far as the system can tell."""
    if not hasattr(os, "geteuid"):
        return True  # on Windows, the user's directory for caches is private by inheritance
    others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return status.st_uid == os.geteuid() and not others_write


def _read(path: Path) -> ObjectCode | None:
    """Read a file; None if it is missing, unsafe, damaged or of another format."""
    try:
        with path.open("rb") as file:
            if not _safe(os.fstat(file.fileno())):
                return None
            digest, content = file.read(32), file.read()
    except OSError:
        return None
    if digest != _digest(path, content):
        return None
    # The content is now known to be what ``_write`` wrote in this format, under this name.
    with suppress(OSError):
        os.utime(path)  # ``_clear_out`` deletes the files that have not been used for longest
    head, _, joined = content.partition(b"\n")
    header = json.loads(head)
    objects = []
    for size in header["sizes"]:
        objects.append(joined[:size])
        joined = joined[size:]
    return ObjectCode(header["symbols"], tuple(objects))


def _write(path: Path, code: ObjectCode) -> None:
    """Write a file atomically, so that readers find all of it or nothing. Failure is no error."""
    header = {"symbols": code.symbols, "sizes": [len(data) for data in code.objects]}
    content = b"\n".join([json.dumps(header).encode(), b"".join(code.objects)])
    with suppress(OSError):
        descriptor, name = tempfile.mkstemp(UNFINISHED, dir=path.parent)
        unfinished = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(_digest(path, content) + content)
            unfinished.replace(path)
        finally:
            # If anything interrupted the writing. After the replacement there is nothing to delete.
            unfinished.unlink(missing_ok=True)


def _digest(path: Path, content: bytes) -> bytes:
    """A hash of content and name: intact machine code of another kernel must be refused too."""
    return hashlib.sha256(path.name.encode() + b"\n" + content).digest()


def _clear_out(directory: Path) -> None:
    """Delete the files unused for longest, and those that killed processes left unfinished."""
    kept: list[tuple[float, Path]] = []
    for path in directory.glob(f"*{SUFFIX}*"):
        with suppress(OSError):  # another process may be deleting the same files
            used = path.stat().st_mtime
            if path.suffix == SUFFIX:
                kept.append((used, path))
            elif path.suffix == UNFINISHED and used < time.time() - ABANDONED:
                path.unlink()
    for _, path in sorted(kept, reverse=True)[KEPT:]:
        with suppress(OSError):
            path.unlink()
