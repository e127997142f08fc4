"""The one exception class of multiopt, and what messages are made with.

All other errors are built-in ones: ``ValueError`` for values and shapes, ``TypeError`` for what is
not a usable array, ``KeyError`` for names.
"""

import reprlib
import sys
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["CheckpointError", "answer", "brief", "caller_level"]

#: What a library answers.
Answer = TypeVar("Answer")


class CheckpointError(ValueError):
    """A checkpoint file is damaged, is not ours, or does not fit the optimizer that loads it.

    >>> issubclass(CheckpointError, ValueError)
    True
    """


#: The longest that a value may be in a message.
LONGEST = 100

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxother, _REPR.maxstring = 2, LONGEST, LONGEST


def brief(value: Any) -> str:
    """A value as a message shows it: in one line, whatever it is.

    >>> brief(0.5), brief([1.0] * 1000), brief(10**5000)
    ('0.5', '[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, ...]', '<int>')
    """
    try:
        text = " ".join(_REPR.repr(value).split())
    except (
        Exception
    ):  # of any kind: classes may be users' own, and a large int has no decimal digits
        return f"<{type(value).__name__}>"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def answer(fault: str, ask: Callable[..., Answer], *arguments: Any) -> Answer:
    """What a library answers.

    Args:
        fault: What its error means.
        ask: What asks it.
        *arguments: What that takes.

    Raises:
        TypeError: It raises an error of its own.
    """
    try:
        return ask(*arguments)
    except MemoryError:
        raise
    except Exception as error:  # of any kind: libraries have their own
        raise TypeError(
            f"{fault}: {brief(error)}; expected an array of NumPy, PyTorch, JAX or another library "
            "with the whole Array API: convert it"
        ) from error


def caller_level() -> int:
    """The ``stacklevel`` of a warning that the caller of this gives about the user's own line."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in (
        "multiopt",
        "torch",
    ):
        frame, level = frame.f_back, level + 1
    return level
