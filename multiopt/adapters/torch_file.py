"""Files of ``torch.save``, read without running code."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from threading import RLock
from typing import Any, BinaryIO

import numpy as np
import torch

from multiopt.errors import CheckpointError
from multiopt.state.file_objects import Source, check_readable, is_path, label

__all__ = ["is_safetensors", "read"]

#: How torch says what it refuses to call or to make.
REFUSED = re.compile(r"GLOBAL (\S+)|<class '(\S+)'>|unrecognized function (.+)")


def read(file: Source, map_location: Any = None) -> Any:
    """What ``torch.save`` wrote to a file: plain data and tensors, read with ``weights_only=True``.

    Args:
        file: The path of the file, or a binary file object, read from where it is.
        map_location: As in ``torch.load``; by default tensors come to the CPU.

    Raises:
        CheckpointError: The file is damaged, of another kind, or would run code.
        OSError: The file cannot be read.
        TypeError: It is neither a path nor a binary file object.
    """
    with _opened(file) as opened:
        start = opened.tell()
        try:
            with _numpy_numbers():
                found = torch.load(opened, map_location or "cpu", weights_only=True)
            return _with_arrays(found, {})
        except Exception as error:  # of any kind: damaged files raised 11 in torch 2.13
            # torch's own words advise to read the file with weights_only=False.
            advises = "weights_only" in str(error)
            opened.seek(start)
            raise CheckpointError(
                f"{label(file)}: expected a checkpoint that torch.load reads with "
                f"weights_only=True, plain data and tensors; {_refusal(opened, error, advises)}"
            ) from (None if advises else error)


def is_safetensors(file: Source) -> bool:
    """Whether a file looks like one of safetensors, as multiopt's are.

    Args:
        file: As for ``read``; a file object must be one that can be sought.

    Raises:
        OSError: The file cannot be read.
        TypeError: It is neither a path nor a binary file object.
    """
    if is_path(file):
        with Path(os.fsdecode(file)).open("rb") as opened:
            return _begins_as_safetensors(opened)
    source: Any = file
    check_readable(source)
    return _begins_as_safetensors(source)


def _begins_as_safetensors(opened: BinaryIO) -> bool:
    """Whether what follows does, without moving on."""
    start = opened.tell()
    # The length of the header in 8 bytes, then the header, in JSON.
    beginning = opened.read(9)
    opened.seek(start)
    return beginning[8:] == b"{"


@contextmanager
def _opened(file: Source) -> Iterator[BinaryIO]:
    """A file that can be sought, as torch needs it."""
    if is_path(file):
        with Path(os.fsdecode(file)).open("rb") as opened:
            yield opened
        return
    source: Any = file
    check_readable(source)
    can_be_sought = getattr(source, "seekable", lambda: False)()
    yield source if can_be_sought else BytesIO(source.read())


def _refusal(opened: BinaryIO, error: Exception, advises: bool) -> str:
    """What is wrong with a file that torch did not read.

    Args:
        opened: The file.
        error: What torch raised.
        advises: Whether that gives advice that is not ours.
    """
    if _begins_as_safetensors(opened):
        return "got a file of safetensors: if multiopt wrote it, use Optimizer.load"
    if advises and (found := REFUSED.search(str(error))):
        what = next(filter(None, found.groups()))
        return (
            f"got one that needs {what}, which is neither. Nothing was run: save it again with "
            "tensors and numbers only, such as a state_dict()"
        )
    text = "" if advises else f": {error}"
    return f"it is damaged, or of another kind ({type(error).__name__}{text})"


class _Dtype:
    """A dtype of numbers in a file of torch.

    NumPy's own takes whatever flags a file gives it, and an array of it may fail when it is freed.
    """

    def __init__(self, code: str, *_: Any) -> None:
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biufc":
            raise UnpicklingError(f"{type(self.dtype)} is no dtype of numbers")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array of numbers in a file of torch."""

    def __init__(self, *_: Any) -> None:
        self.array = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, is_fortran, data = state
        flat = np.frombuffer(data, kind.dtype).astype(kind.dtype.newbyteorder("="))
        self.array = flat.reshape(shape, order="F" if is_fortran else "C")


def _number(kind: _Dtype, data: bytes) -> Any:
    """A NumPy number in a file of torch."""
    (found,) = np.frombuffer(data, kind.dtype)
    return found


#: torch allows a NumPy number for a setting, and users keep counters and losses beside the state.
#: What NumPy calls to make them, of versions 1 and 2, and what is called in its place.
NUMPY_NUMBERS: list[Any] = [
    (_Dtype, "numpy.dtype"),
    (_Array, "numpy.ndarray"),
    *((_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_Array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    # The contents of an empty array.
    (bytes, "builtins.bytes"),
]


_READING = RLock()


@contextmanager
def _numpy_numbers() -> Iterator[None]:
    """Let torch read NumPy numbers, by our functions even where users have allowed NumPy's own.

    What is allowed is the same for the whole process: one file is read at a time.
    """
    names = {name for _, name in NUMPY_NUMBERS}
    with _READING:
        before = torch.serialization.get_safe_globals()
        others = [
            f
            for f in before
            if (f[1] if isinstance(f, tuple) else f"{f.__module__}.{f.__qualname__}") not in names
        ]
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals([*others, *NUMPY_NUMBERS])
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(before)


def _with_arrays(value: Any, done: dict[int, tuple[Any, Any]]) -> Any:
    """Plain data with arrays for what stands for them.

    Args:
        value: The data; lists and dicts are changed.
        done: By identity what was looked at, and what became of it.
    """
    if isinstance(value, _Array):
        return value.array
    if id(value) not in done:
        done[id(value)] = value, value
        if isinstance(value, dict):
            for key, part in value.items():
                # Not by update(), which adds to what is in a Counter.
                value[key] = _with_arrays(part, done)
        elif isinstance(value, list):
            value[:] = [_with_arrays(part, done) for part in value]
        elif type(value) is tuple:
            done[id(value)] = value, tuple(_with_arrays(part, done) for part in value)
    return done[id(value)][1]
