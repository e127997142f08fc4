"""Means of many rows at once, from exact sums: ``spec/arithmetic.md``.

A ``Sum`` is one integer. Here every row has a sum of its own, so the sums stay arrays: numbers are
split on grids, as in ``pieces``, and what each grid holds is added up without an error. That leaves
a few numbers for each row, whose exact sum is rounded once.
"""

from math import frexp, prod
from typing import Any

import numpy as np
from array_api_compat import device

from multiopt.rules.pieces import LARGEST, bits, on_grid
from multiopt.rules.sums import Sum

__all__ = ["means"]


def means(xp: Any, x: Any) -> Any:
    """The means along the last axis, from the rounded sums; 0 if it has no elements.

    Args:
        xp: The namespace of ``x``.
        x: A float64 array of numbers that are not negative.

    A trace of an update records the means as one operation (NEP 18), as it does a norm.

    >>> import numpy as np
    >>> means(np, np.asarray([[1.0, 2.0, 6.0], [1e16, 1.0, 1.0]])).tolist()
    [3.0, 3333333333333334.0]
    """
    if not isinstance(x, np.ndarray) and hasattr(x, "__array_function__"):
        return x.__array_function__(means, (type(x),), (xp, x), {})
    return (1.0 / max(x.shape[-1], 1)) * _row_sums(xp, x)


def _row_sums(xp: Any, x: Any) -> Any:
    """The exact sums along the last axis of float64 numbers >= 0, each rounded once."""
    plain = xp.sum(x, axis=-1)
    if not prod(x.shape):
        return plain
    left = xp.where(xp.isfinite(x), x, 0.0)
    largest, more = float(xp.max(left)), bits(x.shape[-1])
    if frexp(largest)[1] + more >= LARGEST - 1:
        rows = [Sum("float64", squares=False) for _ in range(prod(plain.shape))]
        flat = xp.reshape(x, (len(rows), -1))
        for k, row in enumerate(rows):
            row.add_values(xp, flat[k, :])
        numbers = [row.rounded() for row in rows]
        return xp.reshape(xp.asarray(numbers, dtype=x.dtype, device=device(x)), plain.shape)
    found: list[Any] = []
    while largest > 0:
        upper = on_grid(left, frexp(largest)[1] + more - 53)
        left = left - upper
        carry = xp.sum(upper, axis=-1)
        for k, part in enumerate(found):
            carry, found[k] = _two_sum(carry, part)
        found.append(carry)
        largest = float(xp.max(xp.abs(left)))
    sums = _rounded(xp, found) if found else plain
    return xp.where(xp.isfinite(plain), sums, plain)


def _two_sum(a: Any, b: Any) -> tuple[Any, Any]:
    """The rounded sum and its error (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _rounded(xp: Any, parts: list[Any]) -> Any:
    """Round exact sums of parts that do not overlap, smallest first: the end of ``math.fsum``."""
    total, error, rest = parts[-1], 0.0 * parts[-1], 0.0 * parts[-1]
    for part in reversed(parts[:-1]):
        goes_on = error == 0.0
        longer = total + part
        rest = xp.where(goes_on | (rest != 0.0), rest, part)
        total, error = (
            xp.where(goes_on, longer, total),
            xp.where(goes_on, part - (longer - total), error),
        )
    # A tie that the rest breaks: the error is half of the last bit, and the rest goes on from it.
    twice = 2.0 * error
    beyond = total + twice
    agrees = ((error > 0.0) & (rest > 0.0)) | ((error < 0.0) & (rest < 0.0))
    return xp.where(agrees & (beyond - total == twice), beyond, total)
