"""One change at a time: what comes in the middle of a change may look, but not change as well."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from multiopt.untraced import untraced

__all__ = ["check_free", "exclusive", "in_the_middle"]

Method = TypeVar("Method", bound=Callable[..., Any])


def exclusive(method: Method) -> Method:
    """A method that refuses to begin while another such method of its object has not ended.

    Schedules, callables of names and signal handlers are the caller's code, and run in the middle
    of what the object does. It says in ``_changing`` whether it does something.
    """

    @wraps(method)
    def changing(self: Any, *args: Any, **kwargs: Any) -> Any:
        check_free(self, method.__name__)
        # No ``finally``: a signal may come before its first operation. Here either it comes within
        # the ``try``, or all is done.
        try:
            self._changing = True
            result = untraced(method)(self, *args, **kwargs)
            self._changing = False
            return result
        except BaseException:
            self._changing = False
            raise

    return cast("Method", changing)


def check_free(owner: Any, name: str) -> None:
    """Refuse a method in the middle of another one.

    Args:
        owner: The object.
        name: The name of the method.

    Raises:
        RuntimeError: Another one has not ended.
    """
    if owner._changing:
        raise in_the_middle(name)


def in_the_middle(name: str) -> RuntimeError:
    """The error of a method that is called in the middle of another one.

    Args:
        name: That of the method.
    """
    return RuntimeError(
        f"{name}: a step, or another change of this optimizer, has not ended; expected nothing but "
        "looking from a signal handler, a schedule, a callable or another thread: set a flag "
        "there, and do it afterwards"
    )
