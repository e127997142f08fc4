"""Chunks: memory in which the slots of small parameters lie side by side.

A chunk has one array for each slot. Parameters that are added together get adjacent
parts of these arrays, so the slots of many parameters can be updated or read as one array. A chunk
is freed when its last parameter is removed. The memory of a removed parameter is never given to
another one, so a view of a slot always shows that slot.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

__all__ = ["LARGE", "LARGEST", "SMALLEST", "Chunk", "stretches"]

#: A parameter with at least this many elements gets a chunk of its own.
LARGE = 4096

#: The smallest and the largest number of elements per slot in a chunk of small parameters. Each new
#: chunk is twice as long as the one before. A parameter that outlives the others of its chunk keeps
#: no more than this chunk in memory.
SMALLEST, LARGEST = 2**10, 2**14


@dataclass(slots=True, eq=False)
class Chunk:
    """The slots of some parameters, side by side.

    Attributes:
        arrays: For each slot a one-dimensional array.
        live: The number of parameters whose slots are here.
    """

    arrays: Sequence[np.ndarray]
    live: int = 0


def stretches(column: np.ndarray) -> Iterator[tuple[int, int]]:
    """Return where each stretch of equal numbers begins and ends. The column must not be empty.

    >>> list(stretches(np.array([3, 3, 7, 3])))
    [(0, 2), (2, 3), (3, 4)]
    """
    return pairwise((0, *(np.flatnonzero(np.diff(column)) + 1).tolist(), len(column)))
