"""Reading files of ``torch.save`` without running code from them.

torch does that with ``weights_only=True``, but refuses the NumPy numbers that people keep beside
the state. Here they are read by stand-ins that only ever make numbers.
"""

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

#: The parts of torch's messages that name what it refuses to call or to make.
REFUSED = re.compile(r"GLOBAL (\S+)|<class '(\S+)'>|unrecognized function (.+)")


def read(path: Source, map_location: Any = None) -> Any:
    """Read a file of ``torch.save``: plain data and tensors, never code (``weights_only=True``).

    Args:
        path: The file, or a binary file object, which is read from its current position.
        map_location: As in ``torch.load``; by default tensors are loaded to the CPU.

    Returns:
        Whatever was saved. Pass the optimizer's part of it to ``from_torch``.

    Raises:
        CheckpointError: The file is damaged, of another kind, or needs code to be run.
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
        # torch needs a file that it can seek.
        file = opened if can_be_sought else BytesIO(opened.read())
        start = file.tell()
        try:
            with _numpy_numbers():
                content = torch.load(file, map_location or "cpu", weights_only=True)
            return _with_arrays(content, {})
        except Exception as error:  # of any kind: damaged files raised 11 in torch 2.13
            # torch's own message recommends weights_only=False, which would run the code.
            is_misleading = "weights_only" in str(error)
            file.seek(start)
            raise CheckpointError(
                f"{label(path)}: expected a checkpoint that torch.load reads with "
                f"weights_only=True, plain data and tensors; {_refusal(file, error, is_misleading)}"
            ) from (None if is_misleading else error)


def is_safetensors(file: Source) -> bool:
    """Whether a file looks like a safetensors file, as multiopt's own files are.

    Args:
        file: The file, or a seekable binary file object, whose position is not changed.

    Raises:
        OSError: The file cannot be read.
        TypeError: It is neither a path nor a binary file object.
    """
    with _opened(file) as opened:
        return _begins_as_safetensors(opened)


def _opened(file: Any) -> AbstractContextManager[BinaryIO]:
    """Open a file for reading. Only a file that was given as a path is closed afterwards."""
    if is_path(file):
        return Path(os.fsdecode(file)).open("rb")
    check_readable(file)
    return nullcontext(file)


def _begins_as_safetensors(opened: BinaryIO) -> bool:
    """Whether the rest of an open file looks like safetensors; its position is not changed."""
    start = opened.tell()
    # The length of the header in 8 bytes, then the header, in JSON.
    beginning = opened.read(9)
    opened.seek(start)
    return beginning[8:] == b"{"


def _refusal(opened: BinaryIO, error: Exception, is_misleading: bool) -> str:
    """Say what is wrong with a file that torch could not read.

    Args:
        opened: The file.
        error: The error that torch raised.
        is_misleading: Whether its message recommends something unsafe.
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
    """A numeric dtype in a file of torch.

    NumPy's own class accepts any flags from a file, and freeing an array of such a dtype may crash.
    """

    def __init__(self, code: str, *_: Any) -> None:
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biufc":
            raise UnpicklingError(f"{type(self.dtype)} is not a numeric dtype")

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


#: torch allows NumPy numbers as settings, and users keep counters and losses beside the state.
#: These replace the functions that a pickle of NumPy 1 or 2 calls to make such numbers.
NUMPY_NUMBERS: list[Any] = [
    (_Dtype, "numpy.dtype"),
    (_Array, "numpy.ndarray"),
    *((_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_Array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    # The contents of an empty array.
    (bytes, "builtins.bytes"),
]


#: torch's list of safe functions belongs to the whole process, so only one file is read at a time.
READING = RLock()


@contextmanager
def _numpy_numbers() -> Iterator[None]:
    """Let torch read NumPy numbers with our stand-ins, even if the user has allowed NumPy's own."""
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
    """The name by which a file refers to an allowed function or class."""
    return (
        allowed[1] if isinstance(allowed, tuple) else f"{allowed.__module__}.{allowed.__qualname__}"
    )


def _with_arrays(value: Any, done: dict[int, tuple[Any, Any]]) -> Any:
    """Replace the stand-ins in plain data with their arrays.

    Args:
        value: The data; lists and dicts are changed in place.
        done: Each value already visited and its replacement, by identity.
    """
    if isinstance(value, _Array):
        return value.array
    if id(value) not in done:
        done[id(value)] = value, value
        if isinstance(value, dict):
            for key, part in value.items():
                # Not with update(), which would add to the values of a Counter.
                value[key] = _with_arrays(part, done)
        elif isinstance(value, list):
            value[:] = [_with_arrays(part, done) for part in value]
        elif type(value) is tuple:
            done[id(value)] = value, tuple(_with_arrays(part, done) for part in value)
    return done[id(value)][1]
