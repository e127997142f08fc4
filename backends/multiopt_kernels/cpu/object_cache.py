"""Machine code kept on disk: compiled once on a machine, and never wrong.

A file is named after everything that its machine code depends on, so a change of anything gives
another name, and nothing is ever compared or invalidated. What is read here is executed: see
``cached`` for what is trusted.
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

#: Names the form of the files, and is part of what they are named after.
FORM = b"multiopt object code 1"

SUFFIX = ".multiopt"
UNFINISHED = ".multiopt-unfinished"

#: How many files stay. A program needs one for each kind of rule and dtype that it uses, so this is
#: room for several programs, at some KiB a file.
KEPT = 128

#: Writing takes milliseconds. An unfinished file as old as this, in seconds, has lost its writer.
ABANDONED = 3600.0

#: What executes the code that was linked: it must live as long as the addresses are in use, which
#: nobody can know.
_engines: list[Any] = []


class ObjectCode(NamedTuple):
    """Compiled functions, as the linker takes them.

    The objects may call one another and the C library. A symbol that numba would have to provide
    must not occur: it is missing in a process that found the code on the disk, and LLVM ends the
    process.

    Attributes:
        symbols: From our name of a function to its symbol in the objects.
        objects: The object files.
    """

    symbols: dict[str, str]
    objects: tuple[bytes, ...]


def cached(
    label: str, identity: Iterable[str | bytes], make: Callable[[], ObjectCode]
) -> ObjectCode:
    """The object code of an earlier process, or else made now and kept for later ones.

    The files lie in the directory that the environment variable ``MULTIOPT_CACHE_DIR`` names, or
    else in ``multiopt`` in the user's directory for caches; it is made with access for its user
    only. Whoever can write there can execute code as this user. On POSIX a directory or a file
    that belongs to another user, or that its group or others may write, is therefore not used:
    such a directory is neither read nor written, such a file is replaced. A damaged file is
    replaced too. Where nothing can be kept, the code is made in every process.

    Args:
        label: Begins the name of the file, for people.
        identity: What the code depends on: sources, options. The versions of numba, llvmlite,
            NumPy and Python, numba's settings and the processor are added here.
        make: Compiles. Its errors pass.

    Raises:
        ImportError: numba or llvmlite is not installed.
    """
    key = hashlib.sha256()
    for part in (FORM, *_surroundings(), *_settings(), *identity):
        raw = part if isinstance(part, bytes) else part.encode()
        # The length keeps ("ab", "c") from being ("a", "bc").
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
    """Load object code into this process, for its whole life.

    Args:
        code: Made now or read back: both take this way.

    Returns:
        The addresses of the functions, by our names.
    """
    import llvmlite.binding as llvm

    # Safe in threads: llvmlite locks each of these calls, and they share nothing but the list.
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
    """What machine code depends on beside its source: the tools that made it and the processor."""
    # Imported here: a process without kernels need not wait for either.
    from importlib.metadata import version

    import llvmlite.binding as llvm

    try:
        features = llvm.get_host_cpu_features().flatten()
    except RuntimeError:  # LLVM does not know them for every processor
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
    """Numba's environment variables, some of which change what it compiles."""
    for name in sorted(os.environ):
        if name.startswith("NUMBA_"):
            yield f"{name}={os.environ[name]}"


def _directory() -> Path | None:
    """Where the files lie: a directory that exists and is safe, or None."""
    try:
        directory = _place()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Resolved before it is judged: a link might point elsewhere a moment later.
        directory = directory.resolve()
        return directory if _safe(directory.stat()) else None
    except (OSError, RuntimeError):  # RuntimeError: nobody knows this user's home
        return None


def _place() -> Path:
    """Where the files should lie."""
    if chosen := os.environ.get("MULTIOPT_CACHE_DIR"):
        return Path(chosen).expanduser()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        caches = Path(local) if local else Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        caches = Path.home() / "Library" / "Caches"
    else:
        # A relative path counts for nothing, says the XDG specification.
        caches = xdg if xdg.is_absolute() else Path.home() / ".cache"
    return caches / "multiopt"


def _safe(status: os.stat_result) -> bool:
    """Whether only this user can write a file or directory, as far as the system can tell."""
    if not hasattr(os, "geteuid"):
        return True  # on Windows the directory of the user's caches is private by inheritance
    others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return status.st_uid == os.geteuid() and not others_write


def _read(path: Path) -> ObjectCode | None:
    """What the file holds, or None if it is missing, unsafe, damaged or of other form."""
    try:
        with path.open("rb") as file:
            if not _safe(os.fstat(file.fileno())):
                return None
            digest, content = file.read(32), file.read()
    except OSError:
        return None
    if digest != _digest(path, content):
        return None
    # From here on it is what _write wrote in this form, under this name.
    with suppress(OSError):
        os.utime(path)  # _clear_out deletes what was not used for longest
    head, _, joined = content.partition(b"\n")
    header = json.loads(head)
    objects = []
    for size in header["sizes"]:
        objects.append(joined[:size])
        joined = joined[size:]
    return ObjectCode(header["symbols"], tuple(objects))


def _write(path: Path, code: ObjectCode) -> None:
    """Write a file in one step, so that a reader finds all of it or none; no error if it fails."""
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
            # Whatever interrupted the writing; after the replacement there is nothing to delete.
            unfinished.unlink(missing_ok=True)


def _digest(path: Path, content: bytes) -> bytes:
    """Binds the content to the name: intact machine code of another kernel is as wrong as any."""
    return hashlib.sha256(path.name.encode() + b"\n" + content).digest()


def _clear_out(directory: Path) -> None:
    """Delete what was not used for longest, and what writers that were killed left behind."""
    kept: list[tuple[float, Path]] = []
    for path in directory.glob(f"*{SUFFIX}*"):
        with suppress(OSError):  # another process may delete the same files right now
            used = path.stat().st_mtime
            if path.suffix == SUFFIX:
                kept.append((used, path))
            elif path.suffix == UNFINISHED and used < time.time() - ABANDONED:
                path.unlink()
    for _, path in sorted(kept, reverse=True)[KEPT:]:
        with suppress(OSError):
            path.unlink()
