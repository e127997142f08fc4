"""The guard: one change of an optimizer at a time, and Ctrl-C waits while it writes.

A step, a load or any other change has two phases. First it checks and prepares everything; errors
and Ctrl-C change nothing then. Afterwards it writes, under the guard, and nothing in that phase can
fail:

>>> from multiopt.guard import Guard
>>> guard, written = Guard(), []
>>> with guard:
...     written.append("parameters")
...     written.append("clocks")

If the handler of another signal raises while a change is writing, parameters and state no longer
belong together: the optimizer is *torn*. The guard remembers that, and refuses everything except a
load. Handlers should set a flag instead.
"""

# The functions of ``signal`` take 25 us longer, to convert their results to enumerations.
from _signal import SIGINT, getsignal, signal  # type: ignore[import-not-found]
from collections.abc import Callable
from functools import wraps
from types import FrameType, TracebackType
from typing import Any, TypeVar, cast

from multiopt.errors import brief
from multiopt.untraced import untraced

__all__ = ["Guard", "exclusive", "mending"]

Method = TypeVar("Method", bound=Callable[..., Any])


class Guard:
    """Keeps the changes of one optimizer apart from each other, and whole.

    Attributes:
        busy: Whether a change is in progress.
        torn: The exception that was raised while a change was writing, or None.
    """

    __slots__ = ("_came", "_depth", "_handler", "busy", "torn")

    def __init__(self) -> None:
        """Create a guard for an optimizer that is not changing."""
        self.busy = False
        self.torn: BaseException | None = None
        self._depth = 0
        self._handler: Any = None
        self._came: tuple[int, FrameType | None] | None = None

    def check(self, name: str) -> None:
        """Refuse a change during another one, or of an optimizer that is torn.

        Schedules, callables of names and signal handlers are the caller's code, and run while an
        optimizer is at work; so may other threads.

        Args:
            name: The name of the method.

        Raises:
            RuntimeError: Another change is in progress, or was broken off in the middle.
        """
        if self.busy or self._handler is not None:
            self.check_idle(name)
        if self.torn is not None:
            self.check_whole(name)

    def check_idle(self, name: str) -> None:
        """Refuse a change during another one, even of an optimizer that is torn."""
        if self.busy:
            raise RuntimeError(
                f"{name}: a step, or another change of this optimizer, has not ended; expected no "
                "change from a signal handler, a schedule, a callable or another thread: set a "
                "flag there, and do it afterwards"
            )
        if self._handler is not None:
            # The handler of another signal raised on the way in or out, so either nothing was
            # written or everything.
            self._depth = 0
            self._give_back()

    def check_whole(self, name: str) -> None:
        """Refuse to use an optimizer that is torn."""
        if self.torn is not None:
            raise RuntimeError(
                f"{name}: {brief(self.torn)} was raised while a step, or another change, was "
                "writing, so parameters and state no longer belong together; expected handlers "
                "that set a flag: load the state and the parameters of an earlier step"
            ) from self.torn

    def __enter__(self) -> None:
        """Begin to write: from here on Ctrl-C waits. This takes 0.5 us."""
        if self._depth == 0:
            handler = getsignal(SIGINT)
            # ``_wait`` is still set if the handler of another signal raised on the way in or out.
            if callable(handler) and handler != self._wait:
                self._came = None
                try:
                    self._handler = handler
                    signal(SIGINT, self._wait)
                except ValueError:
                    self._handler = None  # handlers run in the main thread only, and this is not it
        self._depth += 1

    def __exit__(
        self, kind: object, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End writing: an interrupt that has waited is delivered now."""
        if error is not None:
            self.torn = error
        self._depth -= 1
        if self._depth == 0 and self._handler is not None:
            self._give_back()

    def _give_back(self) -> None:
        handler = self._handler
        if getsignal(SIGINT) == self._wait:
            signal(SIGINT, handler)
        self._handler = None
        if self._came is not None:
            handler(*self._came)

    def _wait(self, number: int, frame: FrameType | None) -> None:
        self._came = number, frame


def exclusive(method: Method) -> Method:
    """Make a method refuse to start while its object is changing, or if it is torn.

    The object must have a ``Guard`` as ``_guard``.
    """
    return _excluding(method, Guard.check)


def mending(method: Method) -> Method:
    """Make a method refuse to start while its object is changing; it may mend what is torn."""
    return _excluding(method, Guard.check_idle)


def _excluding(method: Method, check: Callable[[Guard, str], None]) -> Method:
    @wraps(method)
    def changing(self: Any, *args: Any, **kwargs: Any) -> Any:
        guard = self._guard
        check(guard, method.__name__.lstrip("_"))
        # No ``finally``: Ctrl-C may come before its first operation. This way it comes either
        # within the ``try``, or after everything is done.
        try:
            guard.busy = True
            result = untraced(method)(self, *args, **kwargs)
            guard.busy = False
            return result
        except BaseException:
            guard.busy = False
            raise

    return cast("Method", changing)
