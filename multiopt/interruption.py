"""Ctrl-C, and whatever else a signal may raise, waits until what has begun is whole."""

# The functions of ``signal`` itself take 25 us to make an enumeration of 60 answers.
import _signal  # type: ignore[import-not-found]
import ctypes
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeAlias

__all__ = ["fails_again", "uninterrupted"]

Handler: TypeAlias = Callable[[int, FrameType | None], Any]

#: Those that a program may handle.
SIGNALS = sorted(int(number) for number in _signal.valid_signals())

#: What a system calls when a signal comes, where that can be read and put back: the handler that
#: ``faulthandler.register`` or a library in C has put before Python's, and its flags. It lets go of
#: no lock, so that no other thread goes first.
SIGACTION: Any = getattr(ctypes.PyDLL(None), "sigaction", None) if os.name == "posix" else None

#: Bytes with room for C's ``struct sigaction``, which has 152 in Linux and 16 in macOS.
ACTION = ctypes.c_char * 256


@dataclass(slots=True)
class Replaced:
    """A handler whose place is taken.

    Attributes:
        number: The signal.
        handler: The handler.
        action: The system's side of it.
    """

    number: int
    handler: Handler
    action: Any = None


def fails_again(call: Callable[..., object], *arguments: Any) -> bool:
    """Whether a call that raised an exception raises one again, so that it is its own.

    Any other was a signal handler's, which runs where it comes and is not to be caught.
    """
    try:
        call(*arguments)
    except Exception:
        return True
    return False


class uninterrupted:  # noqa: N801 -- read as a word: with uninterrupted()
    """A context in which no signal handler runs that is written in Python.

    The handlers run when the context is left, each once if its signal came, and what they raise
    comes out of it. Only in the main thread is there anything to do: in others no handler runs. It
    takes 5 us, and 2 us more for each handler but one.
    """

    __slots__ = ("_came", "_holds", "_replaced", "_stand_in")

    def __init__(self) -> None:
        """Nothing waits yet."""
        self._replaced: list[Replaced] = []
        self._came: list[tuple[Handler, int, FrameType | None]] = []
        self._holds = False
        # One object, by which it is known again; only while it has places, for it knows this one.
        self._stand_in: Handler | None = None

    def __enter__(self) -> None:
        """Take the place of all handlers."""
        if threading.get_ident() != threading.main_thread().ident:
            return
        found = map(_signal.getsignal, SIGNALS)
        self._replaced = [
            Replaced(number, handler)
            for number, handler in zip(SIGNALS, found, strict=True)
            if callable(handler)
        ]
        if not self._replaced:
            return
        self._stand_in = self._remember
        try:
            for each in self._replaced:
                if SIGACTION is not None:
                    action = ACTION()
                    SIGACTION(each.number, None, action)
                    each.action = action
                # A handler that runs now may have put another one in its place.
                each.handler = _signal.signal(each.number, self._stand_in)
            self._holds = True
        except BaseException:
            # A handler raised.
            self._restore()
            raise

    def __exit__(self, *_: object) -> None:
        """Give the places back, and let the handlers run."""
        if self._replaced:
            try:
                self._restore()
            finally:
                self._holds = False
                if self._came:
                    self._answer()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        handler = next(each.handler for each in self._replaced if each.number == number)
        if not self._holds:
            # On the way in nothing has begun.
            handler(number, frame)
        elif all(number != other for _, other, _ in self._came):
            self._came.append((handler, number, frame))

    def _restore(self) -> None:
        """Give all places back, also if a handler that has its own again raises meanwhile."""
        left, raised = list(self._replaced), None
        # Each may raise once or twice. What raises for ever is no handler.
        for _ in range(3 * len(left)):
            try:
                while left:
                    self._give_back(left[-1])
                    left.pop()
                break
            except BaseException as error:
                raised = error
        self._stand_in = None
        if raised is not None:
            raise raised

    def _give_back(self, each: Replaced) -> None:
        """Give a handler its place back, if nobody has put another one there."""
        found = _signal.signal(each.number, each.handler)
        if found is not self._stand_in and found is not each.handler:
            _signal.signal(each.number, found)
        elif each.action is not None:
            SIGACTION(each.number, each.action, None)

    def _answer(self) -> None:
        """Call the handlers of the signals that came, every one, whatever they raise."""
        handler, number, frame = self._came.pop(0)
        try:
            handler(number, frame)
        finally:
            if self._came:
                self._answer()
