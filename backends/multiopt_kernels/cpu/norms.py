"""Kernels that measure gradients: sums of squares, norms, and whether all elements are finite.

Squares are added in float64 over the summation tree of ``spec/arithmetic.md``, here as loops. The
tree fixes the order of the additions, so the sums are the same however the blocks of a gradient are
divided among threads, and the same as those of every other engine.
"""

import math
from typing import Any

import numpy as np

from multiopt.rules.arithmetic import BLOCK, clip_coefficient, fold, rescaling
from multiopt_kernels.cpu.narrow import conversions
from multiopt_kernels.cpu.object_cache import ObjectCode
from multiopt_kernels.cpu.rows import GRAD, SIZE, WIDE
from multiopt_kernels.cpu.source import Source
from multiopt_kernels.cpu.toolbox import compiled, object_code, toolbox
from multiopt_kernels.trace import trace_function

__all__ = ["compile_norms", "norms_source"]


def norms_source() -> str:
    """Print the functions that turn a norm into a factor, as text to compile."""
    source = Source()
    return source.function(trace_function(clip_coefficient, ["bound", "norm", "eps"])) + (
        source.function(trace_function(rescaling, ["total"]))
    )


def compile_norms(text: str, dtype: str, storage_dtype: str) -> ObjectCode:
    """Compile the kernels ``squares``, ``totals``, ``sums``, ``measure`` and ``finite``.

    Args:
        text: The text from ``norms_source``.
        dtype: The compute dtype: ``"float32"`` or ``"float64"``.
        storage_dtype: The dtype of the gradients.
    """
    tools, known = toolbox(), compiled(text)
    coefficient, factor_for = known["clip_coefficient"], known["rescaling"]
    njit, words, doubles, flags = tools.njit, tools.words, tools.doubles, tools.bytes
    prefetch, number = tools.prefetch, getattr(tools.types, dtype)
    folded, (sum_wide, find_wide) = njit(fold), _readers(dtype, dtype)
    block_sum, is_bad = sum_wide, find_wide

    if storage_dtype != dtype:
        sum_narrow, find_narrow = _readers(dtype, storage_dtype)

        @njit
        def block_sum(row, b, own, factor, s):  # type: ignore[no-untyped-def]
            """The sum of squares of a block of a row; ``s`` is memory for one block."""
            if row[WIDE] == 0:
                return sum_narrow(row, b, own, factor, s)
            return sum_wide(row, b, own, factor, s)

        @njit
        def is_bad(row, low, high):  # type: ignore[no-untyped-def]
            """Whether some of a range of elements of a row are infinite or NaN."""
            if row[WIDE] == 0:
                return find_narrow(row, low, high)
            return find_wide(row, low, high)

    def squares(arguments_at):  # type: ignore[no-untyped-def]
        """The sums of squares of the blocks in a share."""
        a = words(arguments_at)
        index, k0, b0, k1, b1, table_at, width = words(a[0]), a[1], a[2], a[3], a[4], a[5], a[6]
        own, factor, first, sums_at = doubles(a[7]), doubles(a[8])[0], words(a[9]), a[10]
        scratch = doubles(a[11])
        for k in range(k0, k1 + 1 if b1 > 0 else k1):
            r = index[k]
            row, sums = words(table_at + r * width * 8), doubles(sums_at + first[k] * 8)
            x = number(own[r])
            for b in range(
                b0 if k == k0 else 0,
                min(b1, first[k + 1] - first[k]) if k == k1 else first[k + 1] - first[k],
            ):
                sums[b] = block_sum(row, b, x, factor, scratch)
        return 0

    @njit
    def total(row, own, factor, sums, scratch):  # type: ignore[no-untyped-def]
        """The sum of squares of one gradient."""
        blocks = -(-row[SIZE] // BLOCK)
        for b in range(blocks):
            sums[b] = block_sum(row, b, own, factor, scratch)
        return folded(sums, blocks) if blocks > 0 else 0.0

    def sums(arguments_at):  # type: ignore[no-untyped-def]
        """The sums of squares of some rows, in their order."""
        a = words(arguments_at)
        index, n, table_at, width = words(a[0]), a[1], a[2], a[3]
        own, factor = doubles(a[4]), doubles(a[5])[0]
        scratch, blocks, out = doubles(a[6]), doubles(a[6] + BLOCK * 8), doubles(a[7])
        for k in range(n):
            row = words(table_at + index[k] * width * 8)
            if k + 8 < n:
                prefetch(words(table_at + index[k + 8] * width * 8)[GRAD])
            out[k] = total(row, number(own[index[k]]), factor, blocks, scratch)
        return 0

    def measure(arguments_at):  # type: ignore[no-untyped-def]
        """The norms of the rows that have a bound, and the factors that bring them down to it."""
        a = words(arguments_at)
        index, n, table_at, width = words(a[0]), a[1], a[2], a[3]
        bounds, eps, norms, own = doubles(a[4]), doubles(a[5]), doubles(a[6]), doubles(a[7])
        scratch, sums = doubles(a[8]), doubles(a[8] + BLOCK * 8)
        for k in range(n):
            r = index[k]
            if k + 8 < n:
                prefetch(words(table_at + index[k + 8] * width * 8)[GRAD])
            bound = bounds[r]
            if not math.isnan(bound):
                row = words(table_at + r * width * 8)
                squares = total(row, number(1.0), 1.0, sums, scratch)
                factor = factor_for(squares)
                if factor != 1.0:
                    squares = total(row, number(1.0), factor, sums, scratch)
                norms[r] = math.sqrt(squares) / factor
                own[r] = number(coefficient(bound, norms[r], eps[r]))
        return 0

    def totals(arguments_at):  # type: ignore[no-untyped-def]
        """The sum of squares of each row, from the sums of its blocks."""
        a = words(arguments_at)
        n, first, sums_at, out = a[0], words(a[1]), a[2], doubles(a[3])
        for k in range(n):
            blocks = first[k + 1] - first[k]
            out[k] = folded(doubles(sums_at + first[k] * 8), blocks) if blocks > 0 else 0.0
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
        squares=njit(squares),
        totals=njit(totals),
        sums=njit(sums),
        measure=njit(measure),
        finite=njit(finite),
    )


def _readers(dtype: str, storage_dtype: str) -> tuple[Any, Any]:
    """Make the functions that read a gradient: ``block_sum`` and ``is_bad``.

    Args:
        dtype: The compute dtype.
        storage_dtype: The dtype of the gradient in memory.
    """
    tools = toolbox()
    njit, prefetch, double = tools.njit, tools.prefetch, tools.types.float64
    if storage_dtype == dtype:
        at, load, itemsize = tools.at[dtype], tools.inlined(lambda x: x), np.dtype(dtype).itemsize
    else:
        at, load, itemsize = tools.shorts, conversions(storage_dtype)[0], 2
    folded = njit(fold)

    @njit
    def eight(g, j, q):  # type: ignore[no-untyped-def]
        """The squares of eight elements at distances of ``q``, folded to one number."""
        x0, x1 = double(load(g[j])), double(load(g[j + q]))
        x2, x3 = double(load(g[j + 2 * q])), double(load(g[j + 3 * q]))
        j += 4 * q
        x4, x5 = double(load(g[j])), double(load(g[j + q]))
        x6, x7 = double(load(g[j + 2 * q])), double(load(g[j + 3 * q]))
        even = (x0 * x0 + x4 * x4) + (x2 * x2 + x6 * x6)
        return even + ((x1 * x1 + x5 * x5) + (x3 * x3 + x7 * x7))

    @njit
    def leaves(g, n, s):  # type: ignore[no-untyped-def]
        """Write the squares of a block of ``n`` elements to ``s``; return how many numbers it has.

        The squares of a whole block are folded four times before they are written.
        """
        if n < BLOCK:
            for j in range(n):
                x = double(load(g[j]))
                s[j] = x * x
            return n
        q = BLOCK // 16
        for j in range(q):
            s[j] = eight(g, j, 2 * q) + eight(g, j + q, 2 * q)
        return q

    @njit
    def scaled_leaves(g, n, own, factor, s):  # type: ignore[no-untyped-def]
        """Like ``leaves``, with elements that are scaled first, and without folding."""
        for j in range(n):
            x = double(own * load(g[j])) * factor
            s[j] = x * x
        return n

    @njit
    def block_sum(row, b, own, factor, s):  # type: ignore[no-untyped-def]
        """The sum of squares of a block of a row; ``s`` is memory for one block."""
        begin, size = row[GRAD] + b * BLOCK * itemsize, row[SIZE]
        if (b + 1) * BLOCK < size:
            # Prefetch the next block while this one is added: 1e7 elements take 3.6 ms, not 3.8.
            for line in range(0, BLOCK * itemsize, 64):
                prefetch(begin + BLOCK * itemsize + line)
        g, n = at(begin), min(BLOCK, size - b * BLOCK)
        if own == 1 and factor == 1:
            return folded(s, leaves(g, n, s))
        return folded(s, scaled_leaves(g, n, own, factor, s))

    @njit
    def is_bad(row, low, high):  # type: ignore[no-untyped-def]
        """Whether some of a range of elements of a row are infinite or NaN."""
        g, found = at(row[GRAD]), 0
        for i in range(low, high):
            x = load(g[i])
            found |= x - x != 0
        return found

    return block_sum, is_bad
