"""Schedules made of other schedules, which may be any callables.

``Join`` puts schedules one after the other; ``Shared`` makes one count the steps of the optimizer.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from multiopt.rules.declared import POSITIVE_INTEGER
from multiopt.rules.rule import is_shared
from multiopt.schedules.base import Schedule, as_tuple

__all__ = ["Join", "Shared"]


@dataclass(frozen=True)
class Join(Schedule):
    """Schedules one after the other, each counting from its own beginning.

    Source: ``optax.join_schedules``; ``torch.optim.lr_scheduler.SequentialLR``.

    Args:
        schedules: The schedules, any callables except ``Shared``.
        boundaries: Numbers of steps in ascending order, one fewer than schedules. After the first
            number of steps the second schedule begins, at its step 1, and so on.

    >>> from multiopt.schedules import Constant, Exponential
    >>> join = Join([Constant(1.0), Exponential(0.8, gamma=0.5)], boundaries=[2])
    >>> [join(step) for step in (1, 2, 3, 4)]
    [1.0, 1.0, 0.8, 0.4]
    """

    schedules: Sequence[Callable[[int], float]]
    boundaries: Sequence[int]

    def __post_init__(self) -> None:
        """Check the arguments."""
        parts, ends = as_tuple(self.schedules), as_tuple(self.boundaries)
        self._require(
            bool(parts) and all(map(callable, parts)) and not any(map(is_shared, parts)),
            "schedules",
            "one or more schedules (Shared goes around the Join)",
        )
        self._require(
            len(ends) == len(parts) - 1
            and all(map(POSITIVE_INTEGER.has, ends))
            and all(a < b for a, b in pairwise(ends)),
            "boundaries",
            f"{len(parts) - 1} integers >= 1 in ascending order, one less than schedules",
        )
        object.__setattr__(self, "schedules", parts)
        object.__setattr__(self, "boundaries", tuple(map(int, ends)))

    def __call__(self, step: int) -> float:
        """The number for a step; the first step is 1."""
        number = bisect_right(self.boundaries, step - 1)
        return self.schedules[number](step - (0, *self.boundaries)[number])


@dataclass(frozen=True)
class Shared(Schedule):
    """A schedule that counts the steps of the optimizer, and so is the same for all parameters.

    The optimizer counts the steps in which it updated anything (``Optimizer.steps``). Without
    ``Shared``, the schedule of a parameter begins with the parameter's first step.

    Args:
        schedule: The schedule, any callable.

    >>> import numpy as np, multiopt as mo
    >>> opt = mo.Optimizer(mo.SGD(lr=mo.schedules.Shared(mo.schedules.InverseTime(1.0))))
    >>> a, b = np.zeros(1), np.zeros(1)
    >>> for params in ({"a": a}, {"a": a, "b": b}):
    ...     _ = opt.step(params, {name: np.ones(1) for name in params})
    >>> a.tolist(), b.tolist()
    ([-1.5], [-0.5])
    """

    schedule: Callable[[int], float]

    #: Marks the schedule, so that ``Rule.at`` calls it with the number of the optimizer's step.
    shared: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the argument."""
        inner = self.schedule
        self._require(callable(inner) and not is_shared(inner), "schedule", "a schedule")

    def __call__(self, step: int) -> float:
        """The number for a step of the optimizer; the first step is 1."""
        return self.schedule(step)
