"""Objects that the user holds and may change between calls: settings, and clocks that were read.

Pyro reads settings again at every step, and torch shows a clock as a tensor that can be written. So
at each call the drop-in compares them with what they held before, and follows what has changed.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch

from multiopt.adapters.pyro.tracking import ALONE
from multiopt.adapters.torch.settings import number
from multiopt.adapters.torch.state import scalar, whole_number

if TYPE_CHECKING:
    from multiopt.adapters.pyro.tensor import TensorOptimizer

__all__ = ["Clocks", "Source", "Sources"]


@dataclass(slots=True)
class Source:
    """A user's object that settings were read from.

    Attributes:
        given: The object.
        held: The numbers that it held when it was last read.
        users: The tensors whose settings were read from it.
    """

    given: Any
    held: Any
    users: "dict[TensorOptimizer, None]"


class Sources(dict[int, Source]):
    """The user's own objects that settings were read from, by identity."""

    def watch(self, tracked: "TensorOptimizer") -> None:
        """Watch the current settings of a tensor, in place of those watched before."""
        self.unwatch(tracked)
        watched = list(tracked.given.values())
        # Nobody can change a dict that nobody else holds; most callables return such a dict.
        if sys.getrefcount(tracked.clip_args) > ALONE:
            watched.append(tracked.clip_args)
        for given in watched:
            # Keep the old value: other tensors may not have followed its last change yet.
            if id(given) not in self:
                self[id(given)] = Source(given, _held(given), {})
            source = self[id(given)]
            source.users[tracked] = None
            tracked.sources.append(source)

    def unwatch(self, tracked: "TensorOptimizer") -> None:
        """Stop watching the settings of a tensor."""
        for source in tracked.sources:
            source.users.pop(tracked, None)
            if not source.users:
                self.pop(id(source.given), None)
        tracked.sources = []

    def changed(self) -> "list[TensorOptimizer]":
        """The tensors whose settings have changed since ``renew``."""
        affected: dict[TensorOptimizer, None] = {}
        for source in self.values():
            if source.held != _held(source.given):
                affected |= source.users
        return list(affected)

    def renew(self) -> None:
        """Note the current values of all settings, so that they no longer count as changed."""
        for source in self.values():
            source.held = _held(source.given)


def _held(given: Any) -> Any:
    """The numbers in a setting, or in a dict of settings."""
    if isinstance(given, Mapping):
        return {name: number(value) for name, value in given.items()}
    return number(given)


class Clocks(dict[Any, tuple["ref[torch.Tensor]", int]]):
    """The clocks that were shown to the user as tensors, each with the step it was given.

    The user may write to such a tensor, as in torch; the next call follows. A clock that nobody
    holds any longer cannot be written, so it is only referred to weakly.
    """

    def shown(self, tracked: "TensorOptimizer", step: int) -> torch.Tensor:
        """The clock of a tensor: the same object for as long as somebody holds it."""
        clock = self._held(tracked)
        if clock is None:
            clock = scalar(step)
            self[tracked] = ref(clock), step
        return clock

    def _held(self, tracked: "TensorOptimizer") -> torch.Tensor | None:
        """The clock of a tensor, if somebody still holds it."""
        return self[tracked][0]() if tracked in self else None

    def written(self) -> "dict[TensorOptimizer, int]":
        """The tensors whose clocks the user has written, with their new steps."""
        counts = {}
        for tracked, (_, step) in list(self.items()):
            clock = self._held(tracked)
            if clock is None or tracked.tensor is None:
                del self[tracked]
            elif clock.item() != step:
                counts[tracked] = whole_number(clock)
        return counts

    def refresh(self, tracked: "TensorOptimizer", step: int) -> None:
        """Write the number of steps to the clock of a tensor, if somebody holds it."""
        if (clock := self._held(tracked)) is not None:
            clock.fill_(step)
            self[tracked] = ref(clock), step

    def refresh_all(self) -> None:
        """Write the number of steps to every clock that somebody holds, after a call."""
        for tracked in list(self):
            if tracked.tensor is not None:
                self.refresh(tracked, tracked.clock)
