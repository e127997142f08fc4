"""What every schedule is."""

from abc import ABC, abstractmethod
from typing import Any

from multiopt.rules.declared import Declared

__all__ = ["Schedule", "as_tuple"]


class Schedule(Declared, ABC):
    """What the schedules here have in common: frozen dataclasses that are called with a step.

    Fields are declared as those of rules are.
    """

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The number for a step, 1 for the first."""


def as_tuple(value: Any) -> tuple[Any, ...]:
    """A list or a tuple as a tuple, another value as a tuple of one."""
    return tuple(value) if isinstance(value, tuple | list) else (value,)
