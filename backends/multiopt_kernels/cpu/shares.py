"""How the work on some rows is divided into shares for threads.

Shares have about the same number of elements. A share may begin and end inside a row, but only at a
border of two blocks. Elements are updated one by one and sums are exact, so results do not
depend on the number of shares.

The large row of these three has five blocks. The first share is row 0 and two blocks of row 1; the
second begins there and goes on to the end:

>>> borders(np.array([10, 20_000, 10]), shares=2).tolist()
[[0, 0, 1, 2], [1, 2, 3, 0]]
"""

from itertools import pairwise

import numpy as np

__all__ = ["BLOCK", "SHARED", "SHARES", "borders", "places_of_sums"]

#: The number of elements of a block: whole lines of the cache, and little enough to stay in it.
BLOCK = 4096

#: From how many elements on several threads share what takes more than one pass over a row. Other
#: rows fit into a cache, where one thread takes all passes over them at once.
SHARED = 2**16

#: The number of shares for each thread. With many small shares, a thread that the system interrupts
#: does not make the others wait for long.
SHARES = 16

#: The fixed cost of a parameter, in elements.
OVERHEAD = 64


def borders(sizes: np.ndarray, shares: int, whole: bool = False) -> np.ndarray:
    """Divide rows into shares of about the same work.

    Args:
        sizes: The number of elements of each row.
        shares: The number of shares.
        whole: Whether no row may be divided.

    Returns:
        Four numbers for each share: the row and the block in it where it begins, and the row and
        the block before which it ends.
    """
    if shares == 1 or not len(sizes):
        return np.array([[0, 0, len(sizes), 0]])
    ends = np.cumsum(sizes + OVERHEAD)
    cuts = np.arange(1, shares) * int(ends[-1]) // shares
    rows = np.searchsorted(ends, cuts, "right")
    if whole:
        rows += cuts - (ends - sizes - OVERHEAD)[rows] > 0
        stops = [0, *rows.tolist(), len(sizes)]
        return np.array([(a, 0, b, 0) for a, b in pairwise(stops)])
    blocks = np.minimum((cuts - (ends - sizes - OVERHEAD)[rows]) // BLOCK, -(-sizes[rows] // BLOCK))
    stops = [(0, 0), *zip(rows.tolist(), blocks.tolist(), strict=True), (len(sizes), 0)]
    return np.array([(*a, *b) for a, b in pairwise(stops)])


def places_of_sums(cuts: np.ndarray, rows: int) -> np.ndarray:
    """Where the sums of each row begin and end, if that of row k in share s is number s + k.

    With these numbers each share has a sum of its own for each row of which it has a part, and the
    sums of a row lie side by side.

    Args:
        cuts: What ``borders`` returned.
        rows: The number of rows.

    Returns:
        The place of the first sum of each row, and the end of the last.
    """
    ends, places = cuts[:, 2] + (cuts[:, 3] > 0), np.arange(rows + 1)
    return places + np.searchsorted(ends, places, "right")
