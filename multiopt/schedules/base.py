"""What every schedule is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import nan
from numbers import Integral, Real
from typing import Any, ClassVar

from multiopt.errors import brief
from multiopt.rules.rule import Range

__all__ = ["POSITIVE", "Schedule", "as_tuple", "is_count"]

POSITIVE = Range("a finite number > 0", low=5e-324)


class Schedule(ABC):
    """What the schedules here have in common: frozen dataclasses that are called with a step."""

    #: The range of each field that is a number.
    ranges: ClassVar[Mapping[str, Range]] = {}
    #: The least value of each field that is an integer.
    counts: ClassVar[Mapping[str, int]] = {}

    def __post_init__(self) -> None:
        """Hold the fields to their ranges.

        Raises:
            ValueError: One is out of its range or of another kind.
        """
        for name, allowed in self.ranges.items():
            value = getattr(self, name)
            real = isinstance(value, Real) and not isinstance(value, bool)
            number = float(value) if real else nan
            self._require(allowed.holds(number), name, allowed.words)
            object.__setattr__(self, name, number)
        for name, least in self.counts.items():
            self._require(is_count(getattr(self, name), least), name, f"an integer >= {least}")
            object.__setattr__(self, name, int(getattr(self, name)))

    def _require(self, holds: bool, name: str, words: str) -> None:
        if not holds:
            raise ValueError(
                f"{type(self).__name__}: {name} must be {words}; got {brief(getattr(self, name))}"
            )

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The number for a step, 1 for the first."""


def is_count(value: Any, least: int) -> bool:
    """Whether a value is an integer of at least so much."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def as_tuple(value: Any) -> tuple[Any, ...]:
    """A list or a tuple as a tuple, another value as a tuple of one."""
    return tuple(value) if isinstance(value, tuple | list) else (value,)
