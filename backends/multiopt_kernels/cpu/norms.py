"""Kernels that measure gradients: sums of squares, norms, and whether all elements are finite.

Sums are exact (``sums``), so they are the same however the blocks of a gradient are divided among
threads, and the same as those of every other engine.
"""

import math
from typing import Any

import numpy as np

from multiopt.rules.arithmetic import clip_coefficient
from multiopt.rules.sums import RANGES, length
from multiopt_kernels.cpu.narrow import reader
from multiopt_kernels.cpu.object_cache import ObjectCode
from multiopt_kernels.cpu.rows import GRAD, SIZE, WIDE
from multiopt_kernels.cpu.shares import BLOCK
from multiopt_kernels.cpu.source import Source
from multiopt_kernels.cpu.sums import FEW, adder, sum_tools
from multiopt_kernels.cpu.toolbox import compiled, object_code, toolbox
from multiopt_kernels.trace import trace_function

__all__ = ["compile_norms", "norms_source"]


def norms_source() -> str:
    """Print the function that turns a norm into a factor, as text to compile."""
    return Source().function(trace_function(clip_coefficient, ["bound", "norm", "eps"]))


def compile_norms(text: str, dtype: str, storage_dtype: str) -> ObjectCode:
    """Compile the kernels ``squares``, ``norms``, ``measure`` and ``finite``.

    Args:
        text: The text from ``norms_source``.
        dtype: The compute dtype: ``"float32"`` or ``"float64"``.
        storage_dtype: The dtype of the gradients.
    """
    tools, coefficient = toolbox(), compiled(text)["clip_coefficient"]
    njit, words, doubles, flags = tools.njit, tools.words, tools.doubles, tools.bytes
    prefetch, number = tools.prefetch, getattr(tools.types, dtype)
    known, count, (lowest, limb_count) = sum_tools(), length(dtype), RANGES[dtype]
    carry, norm = known.carry, known.norm
    wide, narrow = _readers(dtype, dtype), _readers(dtype, storage_dtype)
    (add_wide, few_wide, find_wide), (add_narrow, few_narrow, find_narrow) = wide, narrow
    itemsize, narrow_itemsize = np.dtype(dtype).itemsize, 2
    has_narrow = storage_dtype != dtype

    @njit
    def add(limbs, row, first, n, own):  # type: ignore[no-untyped-def]
        """Add the squares of up to ``BLOCK`` elements of a row."""
        if has_narrow and row[WIDE] == 0:
            add_narrow(limbs, row[GRAD] + first * narrow_itemsize, n, own)
        else:
            add_wide(limbs, row[GRAD] + first * itemsize, n, own)

    @njit
    def few(scratch, row):  # type: ignore[no-untyped-def]
        """The norm of a row with up to ``FEW`` elements; -1 if only ``add`` can sum them."""
        if has_narrow and row[WIDE] == 0:
            return few_narrow(scratch, row[GRAD], row[SIZE], number(1.0), True)
        return few_wide(scratch, row[GRAD], row[SIZE], number(1.0), True)

    @njit
    def is_bad(row, low, high):  # type: ignore[no-untyped-def]
        """Whether some of a range of elements of a row are infinite or NaN."""
        if has_narrow and row[WIDE] == 0:
            return find_narrow(row[GRAD], low, high)
        return find_wide(row[GRAD], low, high)

    def squares(arguments_at):  # type: ignore[no-untyped-def]
        """Add the squares of a share to a sum, or to one sum for each of its rows."""
        a = words(arguments_at)
        index, k0, b0, k1, b1, table_at, width = words(a[0]), a[1], a[2], a[3], a[4], a[5], a[6]
        owns, separate, sums_at, added = doubles(a[7]), a[8], a[9], 0
        limbs = words(sums_at)
        for k in range(k0, k1 + 1 if b1 > 0 else k1):
            r = index[k]
            row, own = words(table_at + r * width * 8), number(owns[r])
            if k + 8 < k1:
                prefetch(words(table_at + index[k + 8] * width * 8)[GRAD])
            if separate != 0:
                limbs = words(sums_at + k * count * 8)
            first = b0 * BLOCK if k == k0 else 0
            end = min(b1 * BLOCK, row[SIZE]) if k == k1 else row[SIZE]
            while first < end:
                add(limbs, row, first, min(BLOCK, end - first), own)
                first += BLOCK
                added += 1
                if added % 2**16 == 0:  # long before 2^23 additions, which would be too many
                    carry(limbs, limb_count)
            if separate != 0:
                carry(limbs, limb_count)
        carry(limbs, limb_count)
        return 0

    @njit
    def clip(r, found, bounds, eps, norms, owns):  # type: ignore[no-untyped-def]
        """Write the norm of a row and its factor."""
        norms[r] = found
        owns[r] = number(coefficient(bounds[r], found, eps[r]))

    def norms(arguments_at):  # type: ignore[no-untyped-def]
        """The norms of rows, and their factors, from the sums of their parts."""
        a = words(arguments_at)
        index, n, first, sums_at = words(a[0]), a[1], words(a[2]), a[3]
        bounds, eps, norms, owns = doubles(a[4]), doubles(a[5]), doubles(a[6]), doubles(a[7])
        for k in range(n):
            limbs = words(sums_at + first[k] * count * 8)
            for other in range(first[k] + 1, first[k + 1]):
                more = words(sums_at + other * count * 8)
                for i in range(count):
                    limbs[i] += more[i]
            carry(limbs, limb_count)
            clip(index[k], norm(limbs, limb_count, lowest), bounds, eps, norms, owns)
        return 0

    def measure(arguments_at):  # type: ignore[no-untyped-def]
        """The norms of the rows that have a bound, and the factors that bring them down to it."""
        a = words(arguments_at)
        index, n, table_at, width = words(a[0]), a[1], a[2], a[3]
        bounds, eps, norms, owns = doubles(a[4]), doubles(a[5]), doubles(a[6]), doubles(a[7])
        limbs = words(a[8])
        for k in range(n):
            r = index[k]
            if k + 8 < n:
                prefetch(words(table_at + index[k + 8] * width * 8)[GRAD])
            if math.isnan(bounds[r]):
                continue
            row = words(table_at + r * width * 8)
            found = few(limbs, row) if row[SIZE] <= FEW else -1.0
            if found < 0.0:
                for i in range(count):
                    limbs[i] = 0
                for begin in range(0, row[SIZE], BLOCK):
                    add(limbs, row, begin, min(BLOCK, row[SIZE] - begin), number(1.0))
                carry(limbs, limb_count)
                found = norm(limbs, limb_count, lowest)
            clip(r, found, bounds, eps, norms, owns)
        return 0

    def finite(arguments_at):  # type: ignore[no-untyped-def]
        """Mark the rows of a share in which an element is infinite or NaN."""
        a = words(arguments_at)
        index, k0, b0, k1, b1, table_at, width = words(a[0]), a[1], a[2], a[3], a[4], a[5], a[6]
        bad = flags(a[7])
        for k in range(k0, k1 + 1 if b1 > 0 else k1):
            r = index[k]
            row = words(table_at + r * width * 8)
            low = b0 * BLOCK if k == k0 else 0
            high = min(b1 * BLOCK, row[SIZE]) if k == k1 else row[SIZE]
            if is_bad(row, low, high) != 0:
                bad[r] = 1
        return 0

    return object_code(
        squares=njit(squares), norms=njit(norms), measure=njit(measure), finite=njit(finite)
    )


def _readers(dtype: str, storage_dtype: str) -> tuple[Any, Any, Any]:
    """Make the functions that read a gradient: ``add``, ``few`` and ``is_bad``.

    Args:
        dtype: The compute dtype.
        storage_dtype: The dtype of the gradient in memory.
    """
    at, load, _ = reader(dtype, storage_dtype)

    @toolbox().njit
    def is_bad(address, low, high):  # type: ignore[no-untyped-def]
        """Whether some of a range of elements are infinite or NaN."""
        g, found = at(address), 0
        for i in range(low, high):
            x = load(g[i])
            found |= x - x != 0
        return found

    return *adder(dtype, storage_dtype), is_bad
