"""Exact sums: the real sum of squares, or of non-negative numbers, rounded once at the very end.

A sum of floating-point numbers depends on the order in which it is added up. An ``Accumulator``
holds the exact sum as an integer instead, so it has the same bits for any order, any split of the
numbers over arrays, threads or machines, and any library:

>>> import numpy as np
>>> from multiopt.exact import Accumulator
>>> x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
>>> whole, front, back = (Accumulator("float32") for _ in range(3))
>>> whole.add(x), front.add(x[:17]), back.add(x[17:][::-1])
(None, None, None)
>>> whole.norm() == (front + back).norm() == (back + front).norm()
True

The norms of clipping and of rules are such sums: ``spec/arithmetic.md``.
"""

from typing import Any

from multiopt.backend import backend_for
from multiopt.rules.sums import Sum

__all__ = ["Accumulator"]


class Accumulator(Sum):
    """An exact sum of the squares of numbers, or of the numbers themselves.

    Two are added with ``+``; between processes they travel as integers (``to_integers``,
    ``from_integers``). ``rounded`` is the sum as a number, ``norm`` the root of a sum of squares.

    Args:
        dtype: ``"float32"``, for arrays of 32 and 16 bits, or ``"float64"``.
        squares: Whether squares are summed; otherwise the numbers, which must not be negative.

    Attributes:
        infinities: How many infinite elements were added. They are not part of the sum.
        nans: How many elements that are not a number were added.

    Raises:
        ValueError: ``dtype`` is neither of the two.

    >>> import numpy as np
    >>> total = Accumulator("float64")
    >>> total.add(np.full(4, 1e200))
    >>> total.norm(), total.rounded()
    (2e+200, inf)
    >>> one = Accumulator("float32")
    >>> one.add(np.float32([3.0, 4.0]))
    >>> Accumulator.from_integers(one.to_integers() + one.to_integers(), "float32").rounded()
    50.0
    """

    __slots__ = ()

    def add(self, array: Any) -> None:
        """Add all elements of an array; of a complex one, the squares of both parts.

        Args:
            array: An array of any library and shape: float16, bfloat16, float32 or complex64 for an
                accumulator of float32, float64 or complex128 for one of float64.

        Raises:
            TypeError: It is not an array, or its dtype is for the other accumulator.
            ValueError: An element is negative, and numbers are summed instead of squares.
        """
        backend = backend_for(array, "the array")
        layout = backend.layout(array, "the array")
        if layout.compute_dtype != self._dtype:
            raise TypeError(
                f"the array has dtype {layout.dtype}, which needs Accumulator"
                f"({layout.compute_dtype!r}); this one is for {self._dtype}"
            )
        if layout.is_complex and not self._squares:
            raise TypeError(f"the array has dtype {layout.dtype}; expected real numbers")
        xp = backend.namespace(layout)
        values = backend.to_compute(backend.as_real(array, layout), layout)
        if not self._squares and bool(xp.any(values < 0.0)):
            raise ValueError("the array has negative elements; expected numbers >= 0")
        self.add_values(xp, values)
