"""The definition of exact sums and norms, in integers and fractions of Python."""

import math
from collections.abc import Iterable
from fractions import Fraction

import numpy as np

#: The exponent of the last bit of the smallest float64.
LAST = -1074


def exact_sum(arrays: Iterable[np.ndarray], squares: bool = True) -> Fraction:
    """The sum of all elements, or of their squares."""
    power, total = 1 + squares, 0
    for x in arrays:
        significands, exponents = np.frexp(np.asarray(x, np.float64).reshape(-1))
        integers = np.ldexp(significands, 53).astype(np.int64).tolist()
        for integer, exponent in zip(integers, (exponents - 53 - LAST).tolist(), strict=True):
            # The last bits of a subnormal number are zero.
            units = integer << exponent if exponent >= 0 else integer >> -exponent
            total += units**power
    return Fraction(total) * Fraction(2) ** (power * LAST)


def rounded_to_53_bits(value: Fraction) -> Fraction:
    """Ties to even, with an unbounded exponent."""
    if not value:
        return value
    exponent = value.numerator.bit_length() - value.denominator.bit_length() - 53
    for unit in (Fraction(2) ** exponent, Fraction(2) ** (exponent + 1)):
        if value < unit * 2**53:
            return round(value / unit) * unit
    raise AssertionError


def to_float(value: Fraction) -> float:
    """A fraction rounded to 53 bits, infinite where that is too large."""
    try:
        return float(rounded_to_53_bits(value))
    except OverflowError:
        return math.inf


def root_to_float(value: Fraction) -> float:
    """The root, rounded once to float64: 1200 bits of it, and one that says whether more follow."""
    scaled = value * 4**1200
    root = math.isqrt(scaled.__floor__())
    more = root * root != scaled
    try:
        return float(Fraction(2 * root + more, 2**1201))
    except OverflowError:
        return math.inf


def exact_norm(*arrays: np.ndarray) -> float:
    """The norm over all elements of arrays, as ``spec/arithmetic.md`` defines it."""
    wide = [np.asarray(x, np.float64) for x in arrays]
    if any(np.isnan(x).any() for x in wide):
        return math.nan
    if any(np.isinf(x).any() for x in wide):
        return math.inf
    return root_to_float(rounded_to_53_bits(exact_sum(wide)))
