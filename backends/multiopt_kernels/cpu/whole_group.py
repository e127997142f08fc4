"""Groups of rules that treat a parameter as a whole, in compiled kernels (``whole``)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from multiopt.layout import address
from multiopt.rules.sums import length
from multiopt_kernels.cpu.group import CompiledGroup
from multiopt_kernels.cpu.rows import NDIM
from multiopt_kernels.cpu.shares import SHARED, places_of_sums
from multiopt_kernels.cpu.team import Runnable, Shares
from multiopt_kernels.cpu.whole import Whole

__all__ = ["WholeGroup"]


class WholeGroup(CompiledGroup):
    """Parameters that one compiled kernel updates in several passes.

    Args:
        arguments: Those of ``CompiledGroup``.
        whole: What is known about the text of the kernel.
    """

    def __init__(self, *arguments: Any, whole: Whole) -> None:
        """Create a group without rows."""
        self.side_by_side = self.follows = whole.divisible
        super().__init__(*arguments)
        self._passes, self._divisible, self.walks = whole.passes, whole.divisible, False
        # The words of a row's sums and norms, and of a thread's buffers.
        self._words = whole.sums * (length(self.layout.compute_dtype) + 1), whole.words
        self._scratch = np.zeros(sum(self._words), np.int64)
        sums_at = address(self._scratch)
        self._update.array[14:] = [-1, sums_at, sums_at, sums_at + 8 * self._words[0], 0]

    def _divided(self, rows: np.ndarray, threads: int, leave_clipped: bool) -> Runnable:
        """Divide large rows, which take one pass after the other; small ones take all at once."""
        is_large = self.size[rows] >= SHARED
        if not self._divisible:
            is_large &= self._table[rows, NDIM] < 2
        large, small = rows[is_large], rows[~is_large]
        tail = self._update.array[7:]
        divided = self._split(large, threads, tail, 0)
        whole = self._split(small, threads, tail, 0, whole=True)
        # A share without rows needs no room.
        whole = whole[whole[:, 1] < whole[:, 3]]
        words, buffer = self._words
        shares = len(divided)
        rooms = np.zeros((shares + len(whole), words + buffer), np.int64)
        rooms_at = address(rooms) + rooms.strides[0] * np.arange(len(rooms))
        whole[:, 15] = whole[:, 16] = rooms_at[shares:]
        whole[:, 17] = rooms_at[shares:] + 8 * words
        known = np.zeros((len(large), words), np.int64)
        adding = np.zeros((shares + len(large), words), np.int64)
        divided[:, 15], divided[:, 18] = address(known), 8 * words
        divided[:, 16] = address(adding) + 8 * words * np.arange(shares)
        divided[:, 17] = rooms_at[:shares]
        turns = []
        for number in range(self._passes):
            divided[:, 14] = number
            blocks = divided.copy() if number else np.concatenate([divided, whole])
            turns.append(self._kernel.shares(blocks, threads))
        starts = places_of_sums(divided[:, 1:5], len(large))[:-1]
        return Passes(turns, known, adding, starts, (large, small, rooms))


class Passes:
    """Passes that several threads take one after the other.

    Args:
        turns: The shares of each pass.
        known: The sums of each row that are complete.
        adding: Those that the shares of a pass add to.
        starts: Where the sums of each row begin in ``adding``.
        kept: Memory that the shares use besides.
    """

    def __init__(
        self,
        turns: Sequence[Shares],
        known: np.ndarray,
        adding: np.ndarray,
        starts: np.ndarray,
        kept: tuple[np.ndarray, ...],
    ) -> None:
        """Do everything that can fail."""
        self._turns, self._known, self._adding = turns, known, adding
        self._starts, self._kept, self._of_pass = starts, kept, np.empty_like(known)

    def run(self) -> None:
        """Take the passes, and add up the sums of the shares in between."""
        # An interrupt may have left something in them.
        self._known.fill(0)
        self._adding.fill(0)
        for turn in self._turns:
            turn.run()
            if len(self._starts):
                np.add.reduceat(self._adding, self._starts, axis=0, out=self._of_pass)
                self._known += self._of_pass
                self._adding.fill(0)
