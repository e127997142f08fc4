"""Exact sums of squares in compiled code: the integers of ``multiopt.rules.sums``.

A sum is kept in limbs of 40 bits, lowest first, followed by the counts of infinities and of NaNs.
A block of elements is summed in two passes. The first finds the largest and the smallest of them,
and so the bits between which all squares lie. The second cuts each square into pieces of a fixed
unit, and adds up the pieces as integers, whose sum does not depend on the order, so the compiler
may use vectors. A block whose elements differ by too many powers of two is summed band by band, the
largest elements first.

The pieces come from adding ``1.5 * 2**52`` units to a number: the last bits of the result are then
the number of units, rounded.

>>> anchor = np.float64(1.5 * 2**52)  # the unit is 1
>>> int((5.4 + anchor).view(np.int64) - anchor.view(np.int64))
5
"""

from types import SimpleNamespace
from typing import Any

import numpy as np

from multiopt.rules.sums import LIMB, RANGES
from multiopt_kernels.cpu.narrow import reader
from multiopt_kernels.cpu.toolbox import toolbox

__all__ = ["FEW", "adder", "sum_tools"]

#: How many elements are summed at once: so few that they stay in the fastest cache, and that sums
#: of integers of 53 bits have 63. A float32 row of so few is mostly summed without limbs.
FEW = 1024

MASK = (1 << LIMB) - 1

#: The mantissa bits of the compute dtype, the largest exponent field, the exponent of the last bit
#: of a subnormal number, and the most powers of two between elements that are cut into pieces of
#: the same units: two pieces of 51 bits of a square, or three of 26 bits of a float64 number.
FORMATS = {"float32": (23, 255, -149, 27), "float64": (52, 2047, -1074, 25)}


def sum_tools() -> SimpleNamespace:
    """Numba functions for sums in limbs.

    ``unit(t)`` is ``2**t``. ``deposit(limbs, m, place)`` adds ``m * 2**place``, a whole number.
    ``carry(limbs, count)`` makes all limbs numbers of 40 bits again. ``norm(limbs, count, lowest)``
    is the root of a carried sum in units of ``2**lowest``, rounded before and after, and ``total``
    is the rounded sum.
    """
    njit: Any = toolbox().njit
    i64: Any = np.int64
    f64: Any = np.float64
    u64: Any = np.uint64
    numbers = np.finfo(np.float64)
    tiny, smallest = float(numbers.smallest_normal), float(numbers.smallest_subnormal)
    least, _ = RANGES["float64"]

    @njit
    def unit(t):  # type: ignore[no-untyped-def]
        return i64((t + 1023) << 52).view(f64)

    @njit
    def deposit(limbs, m, place):  # type: ignore[no-untyped-def]
        if place < 0:  # the bits below are zero
            m >>= -place
            place = 0
        k, shift = place // LIMB, place % LIMB
        limbs[k] += (m << shift) & MASK
        m >>= LIMB - shift
        limbs[k + 1] += m & MASK
        limbs[k + 2] += m >> LIMB

    @njit
    def carry(limbs, count):  # type: ignore[no-untyped-def]
        for k in range(count - 1):
            limbs[k + 1] += limbs[k] >> LIMB
            limbs[k] &= MASK

    @njit
    def subnormal_root(square):  # type: ignore[no-untyped-def]
        """The root of an integer of 53 bits, rounded to a whole number of smallest numbers.

        Rounding the root of ``np.sqrt`` again would round twice.
        """
        root = np.round(np.sqrt(square))
        # The exact square of the root, as a product of halves and its error (Veltkamp, Dekker).
        wide = root * (2.0**27 + 1)
        high = wide - (wide - root)
        low = root - high
        product = root * root
        error = ((high * high - product) + 2.0 * high * low) + low * low
        beyond = (square - product) - error
        # (root + 1/2)^2 is root^2 + root + 1/4, and all numbers here are integers.
        root += (1.0 if beyond > root else 0.0) - (1.0 if beyond <= -root else 0.0)
        return root * smallest

    @njit
    def leading(limbs, count):  # type: ignore[no-untyped-def]
        """A carried sum in units, rounded: a number of up to 64 bits, and its exponent."""
        k = count - 1
        while k >= 0 and limbs[k] == 0:
            k -= 1
        if k < 0:
            return 0.0, 0
        # The highest 64 bits of the sum, with a last one that is set if lower ones are: float64
        # rounds them as it would round the sum.
        size = (f64(limbs[k]).view(i64) >> 52) - 1022
        room = 64 - size
        high, more = u64(limbs[k]) << u64(room), False
        for j in range(k - 1, -1, -1):
            limb = u64(limbs[j])
            if room >= LIMB:
                room -= LIMB
                high |= limb << u64(room)
            else:
                high |= limb >> u64(LIMB - room)
                more |= limb & u64((u64(1) << u64(LIMB - room)) - u64(1)) != u64(0)
                room = 0
        return f64(high | u64(more)), LIMB * k + size - 64

    @njit
    def total(limbs, count, lowest):  # type: ignore[no-untyped-def]
        if limbs[count + 1] != 0:
            return np.nan
        if limbs[count] != 0:
            return np.inf
        rounded, exponent = leading(limbs, count)
        # In two factors: only the second product leaves the normal range, and infinity and zero
        # are reached well before these bounds.
        exponent = min(max(exponent + lowest, -1300), 1100)
        return rounded * unit(exponent // 2) * unit(exponent - exponent // 2)

    @njit
    def norm(limbs, count, lowest):  # type: ignore[no-untyped-def]
        if limbs[count + 1] != 0:
            return np.nan
        if limbs[count] != 0:
            return np.inf
        rounded, exponent = leading(limbs, count)
        if rounded == 0.0:
            return 0.0
        exponent += lowest
        if exponent % 2:
            rounded *= 2.0
            exponent -= 1
        half = exponent // 2
        root = np.sqrt(rounded) * unit(half // 2) * unit(half - half // 2)
        return root if root > tiny else subnormal_root(rounded * unit(exponent - least))

    return SimpleNamespace(unit=unit, deposit=deposit, carry=carry, total=total, norm=norm)


def adder(dtype: str, storage_dtype: str) -> tuple[Any, Any]:
    """Make the functions that sum the squares of elements, multiplied by a number first.

    Args:
        dtype: The compute dtype.
        storage_dtype: The dtype of the elements in memory.

    Returns:
        ``add(limbs, address, n, own)`` adds to a sum and does not always carry: it adds to a limb
        at most five times for every ``FEW`` elements, and 2^23 additions are too many.
        ``few(scratch, address, n, own, is_norm)`` returns the norm of up to ``FEW`` elements, or
        their rounded sum, or -1 if they are too far apart or not finite, and only ``add`` can sum
        them.
    """
    tools, known = toolbox(), sum_tools()
    njit: Any = tools.njit
    i64: Any = np.int64
    f64: Any = np.float64
    unit, deposit, carry = known.unit, known.deposit, known.carry
    total, norm = known.total, known.norm
    at, load, itemsize = reader(dtype, storage_dtype)
    number, bits_type = getattr(np, dtype), np.uint32 if dtype == "float32" else np.uint64
    mantissa, special, smallest, apart = FORMATS[dtype]
    lowest, count = RANGES[dtype]
    above, size_mask = bits_type(mantissa), bits_type(2 ** (8 * np.dtype(dtype).itemsize - 1) - 1)
    one, none = bits_type(1), bits_type(0)
    infinite = bits_type(special << mantissa)
    anchor = 1.5 * 2.0**52

    @njit
    def bits(x):  # type: ignore[no-untyped-def]
        """The bits of the magnitude of a number: larger ones for larger numbers."""
        return bits_type(number(x).view(bits_type) & size_mask)

    @njit
    def exponent(b):  # type: ignore[no-untyped-def]
        """The exponent of the last bit of a number, given its bits."""
        return max(i64(b >> above), 1) - 1 + smallest

    @tools.inlined
    def piece(x, exponent):  # type: ignore[no-untyped-def]
        """The units of ``2**exponent`` in a number, rounded, and the rest."""
        c = anchor * 2.0**exponent
        upper = x + c
        # 32 bits, so that the product of two is one instruction.
        return i64(np.int32(f64(upper).view(i64) - f64(c).view(i64))), x - (upper - c)

    @njit
    def deposits(limbs, sums, place):  # type: ignore[no-untyped-def]
        deposit(limbs, sums[0], place + 104)
        deposit(limbs, sums[1], place + 78)
        deposit(limbs, sums[2], place + 52)
        deposit(limbs, sums[3], place + 26)
        deposit(limbs, sums[4], place)

    def readers(is_banded: bool) -> tuple[Any, Any, Any]:
        """Make the functions that read a block: ``ends``, ``pieces`` and ``add_pieces``.

        Args:
            is_banded: Whether elements count as zero unless their bits are at least ``floor`` and
                below ``ceiling``. Otherwise all elements count.
        """

        @tools.inlined
        def element(x, floor, ceiling):  # type: ignore[no-untyped-def]
            if is_banded:
                b = bits(x)
                return x if (floor <= b) & (b < ceiling) else number(0.0)
            return x

        @njit
        def ends(address, n, own, ceiling):  # type: ignore[no-untyped-def]
            """The bits of the largest element, and those of the smallest but zero, less one."""
            g, top, low = at(address), none, bits_type(~none)
            for j in range(n):
                b = bits(element(own * load(g[j]), none, ceiling))
                top, low = max(top, b), min(low, bits_type(b - one))
            return top, low

        if dtype == "float32":

            @njit
            def pieces(address, n, own, coarse, fine, floor, ceiling):  # type: ignore[no-untyped-def]
                """The sums of two pieces of the squares, in units of ``2**coarse`` and ``2**fine``.

                A square of float32 numbers is exact in float64.
                """
                g = at(address)
                c, d, a, b = anchor * unit(coarse), anchor * unit(fine), i64(0), i64(0)
                c_bits, d_bits = f64(c).view(i64), f64(d).view(i64)
                for j in range(n):
                    x = f64(element(own * load(g[j]), floor, ceiling))
                    square = x * x
                    upper = square + c
                    rest = (square - (upper - c)) + d
                    a += f64(upper).view(i64)
                    b += f64(rest).view(i64)
                return a - n * c_bits, b - n * d_bits

            @njit
            def add_pieces(limbs, address, n, own, top, floor, ceiling):  # type: ignore[no-untyped-def]
                """Add the squares in two pieces of 51 bits."""
                fine, coarse = 2 * exponent(floor), max(2 * (exponent(top) + 24) - 51, lowest)
                a, b = pieces(address, n, own, coarse, fine, floor, ceiling)
                deposit(limbs, a, coarse - lowest)
                deposit(limbs, b, fine - lowest)

        else:

            @njit
            def pieces(address, n, own, reach, floor, ceiling):  # type: ignore[no-untyped-def]
                """The sums of the products of three pieces, in units of 2^-52, 2^-78 ... 2^-156.

                Elements are divided by ``2**reach`` first, so that they are below 1.
                """
                g = at(address)
                first, second = unit(-(reach // 2)), unit(-(reach - reach // 2))
                s0, s1, s2, s3, s4 = i64(0), i64(0), i64(0), i64(0), i64(0)
                for j in range(n):
                    x = element(own * load(g[j]), floor, ceiling) * first * second
                    a, x = piece(x, -26)
                    b, x = piece(x, -52)
                    c, x = piece(x, -78)
                    s0 += a * a
                    s1 += 2 * a * b
                    s2 += 2 * a * c + b * b
                    s3 += 2 * b * c
                    s4 += c * c
                return s0, s1, s2, s3, s4

            @njit
            def add_pieces(limbs, address, n, own, top, floor, ceiling):  # type: ignore[no-untyped-def]
                """Add the squares of elements in three pieces of 26 bits."""
                reach = exponent(top) + 53
                sums = pieces(address, n, own, reach, floor, ceiling)
                deposits(limbs, sums, 2 * reach - 156 - lowest)

        return ends, pieces, add_pieces

    ends, pieces, add_pieces = readers(is_banded=False)
    ends_of_band, _, add_band = readers(is_banded=True)

    if dtype == "float32":

        @njit
        def few(scratch, address, n, own, is_norm):  # type: ignore[no-untyped-def]
            top, low = ends(address, n, own, none)
            if top == none:
                return 0.0
            fine, coarse = 2 * exponent(low + one), 2 * (exponent(top) + 24) - 43
            if top >= infinite or fine < coarse - 44:
                return -1.0
            a, b = pieces(address, n, own, coarse, fine, none, none)
            # Both have at most 53 bits, so their sum is rounded once.
            square = f64(a) * unit(coarse) + f64(b) * unit(fine)
            return np.sqrt(square) if is_norm else square

    else:

        @njit
        def few(scratch, address, n, own, is_norm):  # type: ignore[no-untyped-def]
            top, low = ends(address, n, own, none)
            if top == none:
                return 0.0
            reach = exponent(top) + 53
            if top >= infinite or exponent(low + one) < exponent(top) - apart:
                return -1.0
            # Six limbs are enough, and have the form of a sum.
            for k in range(8):
                scratch[k] = 0
            deposits(scratch, pieces(address, n, own, reach, none, none), 0)
            carry(scratch, 6)
            lowest = 2 * reach - 156
            return norm(scratch, 6, lowest) if is_norm else total(scratch, 6, lowest)

    @njit
    def in_bands(limbs, address, n, own):  # type: ignore[no-untyped-def]
        """Add the squares of elements that are far apart, and count those that are not finite."""
        g, ceiling, infinities, nans = at(address), infinite, 0, 0
        for j in range(n):
            b = bits(own * load(g[j]))
            infinities += b == infinite
            nans += b > infinite
        limbs[count] += infinities
        limbs[count + 1] += nans
        top, _ = ends_of_band(address, n, own, ceiling)
        while top != none:
            floor = bits_type(max(i64(top >> above) - apart, 0) << mantissa)
            add_band(limbs, address, n, own, top, floor, ceiling)
            ceiling = floor
            top, _ = ends_of_band(address, n, own, ceiling)
        carry(limbs, count)

    @njit
    def add(limbs, address, n, own):  # type: ignore[no-untyped-def]
        for first in range(0, n, FEW):
            begin, some = address + first * itemsize, min(FEW, n - first)
            top, low = ends(begin, some, own, none)
            floor = bits_type(low + one)
            if top >= infinite or exponent(floor) < exponent(top) - apart:
                in_bands(limbs, begin, some, own)
            elif top != none:
                add_pieces(limbs, begin, some, own, top, floor, none)

    return add, few
