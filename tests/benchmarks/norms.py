"""An exact norm of one array without compiled code, and a sum of squares that is not exact."""

from collections.abc import Callable
from math import sqrt

import numpy as np

from multiopt.bench.paired import Run, Side
from multiopt.bench.work import Arrays, Work
from multiopt.exact import Accumulator

__all__ = ["accumulated", "dot"]


def accumulated() -> Side:
    """``multiopt.exact.Accumulator``, which uses no engine."""

    def norm(x: np.ndarray) -> float:
        total = Accumulator("float32")
        total.add(x)
        return total.norm()

    return _side("Accumulator", norm)


def dot() -> Side:
    """A scalar product in float64, by BLAS."""

    def norm(x: np.ndarray) -> float:
        return sqrt(np.dot(x.astype(np.float64), x.astype(np.float64)))

    return _side("np.dot in float64", norm)


def _side(name: str, norm: Callable[[np.ndarray], float]) -> Side:
    def begin(work: Work, threads: int) -> Run:
        # As gradients are: the more powers of two they span, the more passes an exact sum takes.
        (shape,) = work.shapes
        x = np.random.default_rng(0).standard_normal(shape, np.float32)
        found: Arrays = {}

        def step() -> None:
            found["norm"] = np.asarray(norm(x))

        return Run(step, lambda: found)

    return Side(name, begin)
