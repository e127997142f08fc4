"""Chunks: memory in which the slots of small parameters lie side by side.

A new parameter's slots come from a chunk, slot by slot: all first slots of the parameters that came
together, then all second ones. A chunk is let go when its last parameter is; its memory is never
given to another one, so that a view of a slot shows that slot for good.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

__all__ = ["LARGE", "LARGEST", "SMALLEST", "Chunk", "stretches"]

#: Elements of a parameter from which on its slots are an allocation of their own.
LARGE = 4096

#: Elements of a slot in a chunk: each new chunk has twice as many as the last, between these. What
#: one parameter keeps of others that are gone is no more than a chunk.
SMALLEST, LARGEST = 2**10, 2**14


@dataclass(slots=True, eq=False)
class Chunk:
    """Slots of some parameters: for each slot an array of one axis.

    Attributes:
        arrays: The elements.
        live: How many parameters have theirs here.
    """

    arrays: Sequence[np.ndarray]
    live: int = 0


def stretches(column: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where stretches of one number begin and end in a column that has at least one.

    >>> list(stretches(np.array([3, 3, 7, 3])))
    [(0, 2), (2, 3), (3, 4)]
    """
    return pairwise((0, *(np.flatnonzero(np.diff(column)) + 1).tolist(), len(column)))
