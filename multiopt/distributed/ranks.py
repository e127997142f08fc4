"""The ranks of a step in which each holds parts of parameters, or some of them.

``Across`` of ``multiopt.step`` decides what is added up; here it travels. Names are told when they
change, and only then; in every other step there is one message, a few numbers long, and one
``all_reduce`` of integers for each stage.
"""

import json
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import astuple
from typing import Any

import numpy as np
import torch

from multiopt.distributed.messages import Messages
from multiopt.distributed.transport import Transport
from multiopt.step.across import Names, Told
from multiopt.step.clip import Clip

__all__ = ["Ranks"]


class Ranks:
    """The ranks of a process group, as ``multiopt.step.across.Ranks`` wants them.

    Args:
        group: The process group; None for the default one.

    Attributes:
        messages: The messages of steps; a step is within ``messages.step()``.
        names: What all ranks together have told, in one order everywhere.
        counted: The names that are whole where they are, and count here.

    Raises:
        RuntimeError: There is no process group.
        TypeError: ``group`` is not a process group.
        ValueError: This process is not in it.
    """

    def __init__(self, group: Any = None) -> None:
        """Look at the group; nothing is sent."""
        self._transport = Transport(group)
        self.messages = Messages(self._transport)
        self.names: Names = {}
        self.counted: Collection[str] = ()
        self._told: Names | None = None
        #: What each rank has told last.
        self._all_told: dict[int, Names] = {}

    def tell(self, names: Names) -> None:
        """Tell the others of the names of a step, if they have changed, and learn of theirs.

        Raises:
            ValueError: Ranks disagree about a name.
        """
        is_new = names is not self._told and names != self._told
        text = _written(names) if is_new else b""
        lengths = self.messages.send(len(text) if is_new else 0)[:, 0]
        if not lengths.any():
            self._told = names
            return
        # If they disagree, all tell again in their next step.
        self._told = None
        senders = {rank: int(lengths[rank]) for rank in np.flatnonzero(lengths).tolist()}
        for rank, told in self._transport.send_bytes(text, senders).items():
            self._all_told[rank] = _read(told)
        with self.messages.alike():
            self._merge()
        self._told = names

    def _merge(self) -> None:
        merged: dict[str, tuple[int, Told]] = {}
        for rank in range(self._transport.size):
            for name, told in self._all_told[rank].items():
                lowest, before = merged.setdefault(name, (rank, told))
                if told._replace(counts=None) != before._replace(counts=None) or (
                    (told.counts is None) != (before.counts is None)
                ):
                    raise ValueError(
                        f"parameter {name!r} is {_words(before)} on rank {lowest}, and "
                        f"{_words(told)} on rank {rank}; expected it alike on all ranks that have "
                        "it"
                    )
        self.names = {name: told for name, (_, told) in merged.items()}
        mine = self._transport.rank
        self.counted = {name for name, (rank, _) in merged.items() if rank == mine}

    def add(self, count: int, numbers: Callable[[], np.ndarray]) -> np.ndarray:
        """Add up int64 numbers of all ranks; see ``multiopt.step.across.Ranks``."""
        sent, problem = np.zeros(1 + count, np.int64), None
        try:
            sent[1:] = numbers()
        except Exception as error:
            sent[0], problem = 1, error
        tensor = torch.from_numpy(sent).to(self._transport.carrier("cpu"))
        self._transport.all_reduce(tensor)
        total: np.ndarray = tensor.cpu().numpy()
        if problem is not None:
            raise problem  # which the next message tells
        if total[0]:
            self.messages.send()
        return total[1:]

    @property
    def all_ranks(self) -> set[int]:
        """The ranks of the group, among all."""
        return self._transport.all_ranks

    def alike(self) -> AbstractContextManager[None]:
        """What all ranks do with the same data, so that all raise the same error by themselves."""
        return self.messages.alike()


def _written(names: Names) -> bytes:
    """What a rank tells, as bytes."""
    words = {
        name: [
            told.counts,
            told.dtype,
            told.is_bounded,
            told.clip and astuple(told.clip),
            told.asks,
        ]
        for name, told in names.items()
    }
    return json.dumps(words).encode()


def _read(text: bytes) -> Names:
    """What ``_written`` wrote."""
    words = json.loads(text)
    return {
        name: Told(counts, dtype, bounded, None if clip is None else Clip(*clip), asks)
        for name, (counts, dtype, bounded, clip, asks) in words.items()
    }


def _words(told: Told) -> str:
    """What was told of a name, for messages."""
    part = "whole" if told.counts is None else "in parts"
    clip = "without a global norm" if told.clip is None else repr(told.clip)
    bound = ", with a bound on its norm" if told.is_bounded else ""
    return f"{told.dtype}, {part}, {clip}{bound}"
