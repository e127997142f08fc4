"""The base class of multiopt's schedules.

A schedule of a user's need not derive from it: any callable ``step -> number`` is a schedule.
"""

from abc import ABC, abstractmethod
from typing import Any

from multiopt.rules.declared import Declared

__all__ = ["Schedule", "as_tuple"]


class Schedule(Declared, ABC):
    """A frozen dataclass that is called with the number of a step.

    Its fields are declared like the fields of rules.
    """

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The number for a step; the first step is 1."""


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Convert a list to a tuple; any value that is not a list or tuple becomes a tuple of one."""
    return tuple(value) if isinstance(value, tuple | list) else (value,)
