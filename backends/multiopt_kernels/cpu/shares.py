"""Work on rows, cut into shares for threads."""

from itertools import pairwise

import numpy as np

from multiopt.rules.arithmetic import BLOCK

__all__ = ["SHARES", "borders"]

#: Shares of large work for each thread: one that is held up then holds nobody up for long.
SHARES = 16

#: What a parameter costs beside its elements, in elements.
OVERHEAD = 64


def borders(sizes: np.ndarray, shares: int) -> np.ndarray:
    """Cut rows into shares of about the same work.

    Args:
        sizes: The elements of each row.
        shares: How many shares.

    Returns:
        For each share the row and the block in it where it begins, and those where it ends.
    """
    if shares == 1:
        return np.array([[0, 0, len(sizes), 0]])
    ends = np.cumsum(sizes + OVERHEAD)
    cuts = np.arange(1, shares) * int(ends[-1]) // shares
    rows = np.searchsorted(ends, cuts, "right")
    blocks = np.minimum((cuts - (ends - sizes - OVERHEAD)[rows]) // BLOCK, -(-sizes[rows] // BLOCK))
    stops = [(0, 0), *zip(rows.tolist(), blocks.tolist(), strict=True), (len(sizes), 0)]
    return np.array([(*a, *b) for a, b in pairwise(stops)])
