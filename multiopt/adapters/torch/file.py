"""Files of ``torch.save``, read without running code."""

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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


def read(path: Source, map_location: Any = None) -> Any:
    """Read a file of ``torch.save``: plain data and tensors, never code (``weights_only=True``).

    Args:
        path: The file, or a binary file object, which is read from where it is.
        map_location: As in ``torch.load``; by default tensors come to the CPU.

    Returns:
        What was saved, whatever it is. ``from_torch`` wants the optimizer's part of it.

    Raises:
        CheckpointError: The file is damaged, of another kind, or would run code.
        OSError: The file cannot be read.
        TypeError: It is neither a path nor a binary file object.

    >>> import torch
    >>> from multiopt.adapters.torch_optim import read
    >>> torch.save({"epoch": 3, "optimizer": {"state": {}, "param_groups": []}}, "run.pt")
    >>> read("run.pt")["optimizer"]
    {'state': {}, 'param_groups': []}
    """
    with _opened(path) as opened:
        can_be_sought = getattr(opened, "seekable", lambda: False)()
        # As torch needs it.
        file = opened if can_be_sought else BytesIO(opened.read())
        start = file.tell()
        try:
            with _numpy_numbers():
                content = torch.load(file, map_location or "cpu", weights_only=True)
            return _with_arrays(content, {})
        except Exception as error:  # of any kind: damaged files raised 11 in torch 2.13
            # torch's own words advise to read the file with weights_only=False.
            is_misleading = "weights_only" in str(error)
            file.seek(start)
            raise CheckpointError(
                f"{label(path)}: expected a checkpoint that torch.load reads with "
                f"weights_only=True, plain data and tensors; {_refusal(file, error, is_misleading)}"
            ) from (None if is_misleading else error)


def is_safetensors(file: Source) -> bool:
    """Whether a file looks like one of safetensors, as multiopt's are.

    Args:
        file: As for ``read``; a file object must be one that can be sought.

    Raises:
        OSError: The file cannot be read.
        TypeError: It is neither a path nor a binary file object.
    """
    with _opened(file) as opened:
        return _begins_as_safetensors(opened)


def _opened(file: Any) -> AbstractContextManager[BinaryIO]:
    """A file to read from, which is closed afterwards if it was given by its path."""
    if is_path(file):
        return Path(os.fsdecode(file)).open("rb")
    check_readable(file)
    return nullcontext(file)


def _begins_as_safetensors(opened: BinaryIO) -> bool:
    """Whether what follows does, without moving on."""
    start = opened.tell()
    # The length of the header in 8 bytes, then the header, in JSON.
    beginning = opened.read(9)
    opened.seek(start)
    return beginning[8:] == b"{"


def _refusal(opened: BinaryIO, error: Exception, is_misleading: bool) -> str:
    """What is wrong with a file that torch did not read.

    Args:
        opened: The file.
        error: What torch raised.
        is_misleading: Whether that gives advice that is not ours.
    """
    if _begins_as_safetensors(opened):
        return "got a file of safetensors: if multiopt wrote it, use Optimizer.load"
    if is_misleading and (match := REFUSED.search(str(error))):
        what = next(filter(None, match.groups()))
        return (
            f"got one that needs {what}, which is neither. Nothing was run: save it again with "
            "tensors and numbers only, such as a state_dict()"
        )
    text = "" if is_misleading else f": {error}"
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
    (number,) = np.frombuffer(data, kind.dtype)
    return number


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


#: What torch allows is the same for the whole process: one file is read at a time.
READING = RLock()


@contextmanager
def _numpy_numbers() -> Iterator[None]:
    """Let torch read NumPy numbers, by our functions even where users have allowed NumPy's own."""
    names = {name for _, name in NUMPY_NUMBERS}
    with READING:
        before = torch.serialization.get_safe_globals()
        _allow([f for f in before if _name_of(f) not in names] + NUMPY_NUMBERS)
        try:
            yield
        finally:
            _allow(before)


def _allow(allowed: list[Any]) -> None:
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(allowed)


def _name_of(allowed: Any) -> str:
    """The name under which a file may have what is allowed."""
    return (
        allowed[1] if isinstance(allowed, tuple) else f"{allowed.__module__}.{allowed.__qualname__}"
    )


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
