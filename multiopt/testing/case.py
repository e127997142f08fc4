"""What is known of a gradient that departs: what a cause is recognized by."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Arrays", "Case"]

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A gradient that departs, and all that is known around it, in float64.

    Attributes:
        step: The step, counted from 1.
        name: The parameter.
        expected: All gradients of the prototype in this step that the port gives too.
        found: Those of the port.
        params: The parameters at which they were computed.
        earlier: The gradients of the prototype in each step before.
        again: From a number of steps and a step to the gradients of the prototype in that step, at
            its parameters of that many steps ago; None if it has none.
        tolerance: How far gradients may be off.
        dtype: The dtype of the port's gradient.
    """

    step: int
    name: str
    expected: Arrays
    found: Arrays
    params: Arrays
    earlier: Sequence[Arrays]
    again: Callable[[int, int], Arrays | None]
    tolerance: float
    dtype: str

    @property
    def a(self) -> np.ndarray:
        """The gradient of the prototype."""
        return self.expected[self.name]

    @property
    def b(self) -> np.ndarray:
        """The gradient of the port."""
        return self.found[self.name]

    def alike(self, x: np.ndarray, y: np.ndarray) -> bool:
        """Whether two arrays are the same but for rounding."""
        if x.shape != y.shape or not x.size:
            return False
        bound = 10 * self.tolerance * max(np.abs(x).max(), np.abs(y).max())
        return bool(np.isfinite(bound) and (np.abs(x - y) <= bound).all())

    def everything(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All gradients of both sides, and the parameters, as three vectors.

        Empty ones if the shapes of a gradient differ.
        """
        if any(self.expected[n].shape != self.found[n].shape for n in self.expected):
            return (np.zeros(0),) * 3
        vectors = [
            np.concatenate([x[n].ravel() for n in self.expected])
            for x in (self.expected, self.found, self.params)
        ]
        return vectors[0], vectors[1], vectors[2]
