"""Small messages between ranks: a few numbers in every step, and what has failed on a rank.

All ranks send one at the same places of a step. A rank on which something fails sends its error
instead, with the next message, whichever it is. So an error on one rank is an error on all, and
none waits for another that has given up.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from multiopt.distributed.transport import Transport

__all__ = ["Messages"]

#: How many numbers a message has; the first says whether something has failed, and the second, if
#: so, how long the text about it is.
LENGTH, FINE, FAILED = 8, 0, 1

#: What a check raises. Such an error has one class on all ranks.
ERRORS = {kind.__name__: kind for kind in (KeyError, TypeError, ValueError)}


class Messages:
    """The messages between the ranks of a process group.

    Args:
        transport: The ranks.
    """

    def __init__(self, transport: Transport) -> None:
        """Start outside of a step."""
        self._transport = transport
        #: Whether a step is running, and whether the others still expect a message of this rank.
        self._is_running = self._is_due = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step, on all ranks: what is raised on one before its last message is raised on all.

        Raises:
            RuntimeError: Another step is running, or was broken off while ranks waited.
        """
        if self._is_running:
            raise RuntimeError(
                "a step has not ended; expected no other from a signal handler, a schedule, a "
                "callable or another thread: set a flag there, and take it afterwards"
            )
        if self._transport.waiting:
            raise RuntimeError(
                "an earlier step was broken off while ranks waited for each other, so they do not "
                "agree on what comes next; expected new processes: load a checkpoint there"
            )
        self._is_running = self._is_due = True
        try:
            yield
        except BaseException as error:
            if self._is_due and not self._transport.waiting:
                self._tell(error)
            raise
        finally:
            self._is_running = False

    def send(self, *numbers: int) -> np.ndarray:
        """Send some int64 numbers to all ranks, at most ``LENGTH - 1``.

        Returns:
            Those of all ranks, one row each.

        Raises:
            KeyError: Something has failed on a rank, with an error of this class.
            RuntimeError: Something has failed on a rank, with an error of another class.
            TypeError: Something has failed on a rank, with an error of this class.
            ValueError: Something has failed on a rank, with an error of this class.
        """
        table = self._gather(FINE, *numbers)
        if failed := self._texts(table, b""):
            self._is_due = False
            rank, text = next(iter(failed.items()))
            kind, what = json.loads(text)
            raise ERRORS.get(kind, RuntimeError)(f"rank {rank} cannot take the step: {what}")
        return table[:, 1:]

    def send_last(self) -> None:
        """Send the last message of a step; after it, an error is this rank's alone.

        Raises:
            Exception: As ``send``.
        """
        self.send()
        self._is_due = False

    @contextmanager
    def alike(self) -> Iterator[None]:
        """What every rank does with the same data: an error is raised on all by itself."""
        try:
            yield
        except Exception:
            self._is_due = False
            raise

    def _tell(self, error: BaseException) -> None:
        kind = type(error).__name__
        what = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        text = json.dumps([kind, what if kind in ERRORS else f"{kind}: {what}"]).encode()
        self._texts(self._gather(FAILED, len(text)), text)

    def _gather(self, *numbers: int) -> np.ndarray:
        return self._transport.gather_numbers([*numbers, *[0] * (LENGTH - len(numbers))])

    def _texts(self, table: np.ndarray, text: bytes) -> dict[int, bytes]:
        """The texts of the ranks on which something has failed."""
        failed = np.flatnonzero(table[:, 0]).tolist()
        return self._transport.send_bytes(text, {rank: int(table[rank, 1]) for rank in failed})
