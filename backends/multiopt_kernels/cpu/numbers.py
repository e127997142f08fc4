"""Exact sums of float64 numbers in compiled code, those of the columns of a matrix side by side.

``sums`` adds squares of elements; here the numbers themselves are added, which must not be
negative. Most are cut into two pieces: a number is a whole number of coarse units, rounded, and a
rest of so many fine units. The pieces of up to ``FEW`` numbers add up as integers of 64 bits. The
coarse unit is 2^-51 of the first power of two above the largest number, and the fine unit 2^-51 of
that, so no bit of a number is lost unless it is less than 2^-49 of the largest. Otherwise, and
where a number is not finite, numbers are deposited in limbs, one by one.

The columns of a matrix share the loop over a row, which the compiler turns into vectors. Each has
units of its own, so there are two loops: the first finds the largest and the smallest number of
each column (``ends``), and the second adds up the pieces.

>>> anchor = np.float64(1.5 * 2.0**2)  # for numbers below 2: the coarse unit is 2^-50
>>> number = 1.0 + 2.0**-52
>>> coarse = number + anchor
>>> int(coarse.view(np.int64) - anchor.view(np.int64)) == 2**50
True
>>> float(number - (coarse - anchor)) == 2.0**-52
True
"""

from types import SimpleNamespace
from typing import Any

import numpy as np

from multiopt_kernels.cpu.sums import FEW, sum_tools
from multiopt_kernels.cpu.toolbox import toolbox

__all__ = ["COLUMN", "LIMBS", "ROOM", "STRIP", "TALL_STRIP", "number_tools"]

#: How many columns are summed side by side, and how many if there are more than ``FEW`` rows. Then
#: each needs limbs of its own.
STRIP, TALL_STRIP = 256, 64

#: The exponent of the last bit of the smallest number; the limbs up to the largest sum of 2^63
#: numbers, and one to carry into; and the words of a sum, which counts infinities and NaN as well.
LOWEST, COUNT = -1074, 56
LENGTH = COUNT + 2

#: Where the arrays for columns are, in words: the bits of the largest and of the smallest number,
#: the anchors of the coarse and of the fine pieces, and the sums of both. Then come the limbs of a
#: sum, of ``TALL_STRIP`` sums if need be, and the numbers of one column; and what all have room in.
TOP, LOW, COARSE, FINE, UPPER, LOWER, LIMBS = range(0, 7 * STRIP, STRIP)
COLUMN = LIMBS + TALL_STRIP * LENGTH
ROOM = COLUMN + FEW

#: The bits of a fraction and of the largest finite number; the bits between the two units; the
#: exponent fields between which both units are normal numbers, with room for a sum.
FRACTION, LARGEST, BITS, RANGE = 52, 2**63 - 1, 51, (200, 2000)


def number_tools() -> SimpleNamespace:
    """Numba functions for sums of numbers.

    Of one sum: ``clear(limbs)``; ``add(limbs, address, n)`` adds up to ``FEW`` numbers and carries;
    ``rounded(limbs)`` is the sum; ``few(limbs, address, n)`` is that of up to ``FEW`` numbers, and
    uses the limbs if it must.

    Of a strip of columns, whose arrays are at ``room``: ``begin_strip(room, n, is_tall)`` begins n
    sums, which are in limbs if there are more than ``FEW`` rows. For some rows of them,
    ``begin_rows(room, n)``; ``seen(state, k, x)`` looks at a number of column k;
    ``anchored(room, n)`` chooses the units; ``added(state, numbers, k, x)`` adds a number;
    ``settled(room, k, rows, is_tall)`` adds all of them to the sum, unless it returns False, and
    then ``settle(room, k, rows, is_tall)`` adds those at ``COLUMN``. Last,
    ``sum_of_column(room, k, is_tall)``.
    """
    tools, known = toolbox(), sum_tools()
    njit, words, doubles = tools.njit, tools.words, tools.doubles
    unit, deposit, carry, total = known.unit, known.deposit, known.carry, known.total
    i64: Any = np.int64
    f64: Any = np.float64
    hidden, field, (least, most) = 1 << FRACTION, 2047, RANGE
    half, mask = 1 << (FRACTION - 1), (1 << BITS) - 1

    @njit
    def magnitude(x):  # type: ignore[no-untyped-def]
        return f64(x).view(i64) & LARGEST

    @njit
    def clear(limbs):  # type: ignore[no-untyped-def]
        for i in range(LENGTH):
            limbs[i] = 0

    @njit
    def fits(top, low):  # type: ignore[no-untyped-def]
        """Whether two pieces hold all bits of numbers between these."""
        exponent = top >> FRACTION
        near = exponent - ((low + 1) >> FRACTION) <= 2 * BITS - FRACTION - 1
        return (least <= exponent) & (exponent <= most) & near

    @njit
    def anchors(top):  # type: ignore[no-untyped-def]
        """The numbers that are added for the coarse and for the fine pieces."""
        exponent = (top >> FRACTION) + 2
        coarse = i64((exponent << FRACTION) | half)
        fine = i64(((exponent - BITS) << FRACTION) | half)
        return coarse, fine

    @njit
    def exponent_of(top):  # type: ignore[no-untyped-def]
        """The exponent of the fine unit."""
        return (top >> FRACTION) - 1023 + 1 - 2 * BITS

    @njit
    def together(upper, lower, exponent):  # type: ignore[no-untyped-def]
        """Round ``upper * 2**BITS + lower`` fine units."""
        upper += lower >> BITS
        lower &= mask
        if upper == 0:
            return f64(lower) * unit(exponent)
        # As many bits as an integer has; the last one is set if lower ones are. So float64 rounds
        # it as it would round the sum.
        size = (f64(upper).view(i64) >> FRACTION) - 1022
        shift = min(max(63 - size, 0), BITS)
        high = (upper << shift) | (lower >> (BITS - shift))
        rest = lower & ((i64(1) << (BITS - shift)) - 1)
        return f64(high | i64(rest != 0)) * unit(exponent + BITS - shift)

    @njit
    def ends(address, n):  # type: ignore[no-untyped-def]
        """The bits of the largest number, and those of the smallest but zero, less one."""
        x, top, low = words(address), 0, LARGEST
        for j in range(n):
            b = x[j] & LARGEST
            top, low = max(top, b), min(low, (b - 1) & LARGEST)
        return top, low

    @njit
    def pieces(address, n, top):  # type: ignore[no-untyped-def]
        """The sums of the coarse and of the fine pieces."""
        x, upper, lower = doubles(address), i64(0), i64(0)
        coarse_bits, fine_bits = anchors(top)
        c, d = i64(coarse_bits).view(f64), i64(fine_bits).view(f64)
        for j in range(n):
            near = x[j] + c
            upper += f64(near).view(i64)
            lower += f64((x[j] - (near - c)) + d).view(i64)
        return upper - n * coarse_bits, lower - n * fine_bits

    @njit
    def deposit_both(limbs, upper, lower, exponent):  # type: ignore[no-untyped-def]
        deposit(limbs, upper, exponent + BITS - LOWEST)
        deposit(limbs, lower, exponent - LOWEST)

    @njit
    def one_by_one(limbs, address, n):  # type: ignore[no-untyped-def]
        x = words(address)
        for j in range(n):
            b = x[j] & LARGEST
            exponent, fraction = b >> FRACTION, b & (hidden - 1)
            if exponent == field:
                limbs[COUNT + (fraction != 0)] += 1
            else:
                place = max(exponent, 1) - 1
                deposit(limbs, fraction | (hidden if exponent else 0), place)

    @njit
    def add(limbs, address, n):  # type: ignore[no-untyped-def]
        top, low = ends(address, n)
        if top == 0:
            return
        if fits(top, low):
            upper, lower = pieces(address, n, top)
            deposit_both(limbs, upper, lower, exponent_of(top))
        else:
            one_by_one(limbs, address, n)
        carry(limbs, COUNT)

    @njit
    def rounded(limbs):  # type: ignore[no-untyped-def]
        return total(limbs, COUNT, LOWEST)

    @njit
    def few(limbs, address, n):  # type: ignore[no-untyped-def]
        top, low = ends(address, n)
        if top == 0:
            return 0.0
        if fits(top, low):
            upper, lower = pieces(address, n, top)
            return together(upper, lower, exponent_of(top))
        clear(limbs)
        one_by_one(limbs, address, n)
        carry(limbs, COUNT)
        return rounded(limbs)

    @njit
    def begin_rows(room, n):  # type: ignore[no-untyped-def]
        state = words(room)
        for k in range(n):
            state[TOP + k] = state[UPPER + k] = state[LOWER + k] = 0
            state[LOW + k] = LARGEST

    @njit
    def seen(state, k, x):  # type: ignore[no-untyped-def]
        b = magnitude(x)
        state[TOP + k] = max(state[TOP + k], b)
        state[LOW + k] = min(state[LOW + k], (b - 1) & LARGEST)

    @njit
    def anchored(room, n):  # type: ignore[no-untyped-def]
        state = words(room)
        for k in range(n):
            top = state[TOP + k]
            # Of a column that needs limbs the pieces are not used.
            coarse, fine = anchors(top if fits(top, state[LOW + k]) else i64(1023) << FRACTION)
            state[COARSE + k], state[FINE + k] = coarse, fine

    @njit
    def added(state, numbers, k, x):  # type: ignore[no-untyped-def]
        c, d = numbers[COARSE + k], numbers[FINE + k]
        near = x + c
        state[UPPER + k] += f64(near).view(i64)
        state[LOWER + k] += f64((x - (near - c)) + d).view(i64)

    @njit
    def limbs_of(room, k):  # type: ignore[no-untyped-def]
        return words(room + 8 * (LIMBS + k * LENGTH))

    @njit
    def begin_strip(room, n, is_tall):  # type: ignore[no-untyped-def]
        for k in range(n if is_tall else 0):
            clear(limbs_of(room, k))

    @njit
    def settled(room, k, rows, is_tall):  # type: ignore[no-untyped-def]
        state, sums = words(room), doubles(room + 8 * COARSE)
        top, upper, lower = state[TOP + k], state[UPPER + k], state[LOWER + k]
        if top != 0 and not fits(top, state[LOW + k]):
            return False
        upper -= rows * state[COARSE + k]
        lower -= rows * state[FINE + k]
        if is_tall and top != 0:
            limbs = limbs_of(room, k)
            deposit_both(limbs, upper, lower, exponent_of(top))
            carry(limbs, COUNT)
        elif not is_tall:
            # The anchor is not needed any more.
            sums[k] = together(upper, lower, exponent_of(top)) if top != 0 else 0.0
        return True

    @njit
    def settle(room, k, rows, is_tall):  # type: ignore[no-untyped-def]
        sums, numbers_at = doubles(room + 8 * COARSE), room + 8 * COLUMN
        if is_tall:
            add(limbs_of(room, k), numbers_at, rows)
        else:
            sums[k] = few(limbs_of(room, 0), numbers_at, rows)

    @njit
    def sum_of_column(room, k, is_tall):  # type: ignore[no-untyped-def]
        return rounded(limbs_of(room, k)) if is_tall else doubles(room + 8 * COARSE)[k]

    functions = (
        *(clear, add, rounded, few, begin_strip, begin_rows, seen, anchored, added),
        *(settled, settle, sum_of_column),
    )
    return SimpleNamespace(**{function.__name__: function for function in functions})
