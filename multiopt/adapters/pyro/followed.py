"""What the caller holds and may change between calls: settings of his own, clocks that he reads."""

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
    """An object from which settings were read, what it held then, and whose settings they are."""

    given: Any
    held: Any
    users: "dict[TensorOptimizer, None]"


class Sources(dict[int, Source]):
    """The caller's own objects from which settings were read, by identity.

    Pyro reads them anew at each step.
    """

    def watch(self, tracked: "TensorOptimizer") -> None:
        """Watch the settings of a tensor as they are now, and no earlier ones of it."""
        self.unwatch(tracked)
        watched = list(tracked.given.values())
        # A dict that nobody else holds, such as most callables make, stays as it is.
        if sys.getrefcount(tracked.clip_args) > ALONE:
            watched.append(tracked.clip_args)
        for given in watched:
            # Others may not have followed its last change yet.
            if id(given) not in self:
                self[id(given)] = Source(given, _held(given), {})
            source = self[id(given)]
            source.users[tracked] = None
            tracked.sources.append(source)

    def unwatch(self, tracked: "TensorOptimizer") -> None:
        """Watch no settings of a tensor."""
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
        """Take the settings for known as they are now."""
        for source in self.values():
            source.held = _held(source.given)


def _held(given: Any) -> Any:
    """The numbers in a setting, or in a dict of settings."""
    if isinstance(given, Mapping):
        return {name: number(value) for name, value in given.items()}
    return number(given)


class Clocks(dict[Any, tuple["ref[torch.Tensor]", int]]):
    """Clocks as torch shows them: tensors, which the next call reads if they were written.

    By ``TensorOptimizer``, with what they say. One that nobody holds any more cannot be written.
    """

    def shown(self, tracked: "TensorOptimizer", step: int) -> torch.Tensor:
        """The clock of a tensor, one object for as long as anybody holds it."""
        clock = self._held(tracked)
        if clock is None:
            clock = scalar(step)
            self[tracked] = ref(clock), step
        return clock

    def _held(self, tracked: "TensorOptimizer") -> torch.Tensor | None:
        """The clock of a tensor, if anybody holds it."""
        return self[tracked][0]() if tracked in self else None

    def written(self) -> "dict[TensorOptimizer, int]":
        """The clocks that were written, and what they say now."""
        counts = {}
        for tracked, (_, step) in list(self.items()):
            clock = self._held(tracked)
            if clock is None or tracked.tensor is None:
                del self[tracked]
            elif clock.item() != step:
                counts[tracked] = whole_number(clock)
        return counts

    def refresh(self, tracked: "TensorOptimizer", step: int) -> None:
        """Let a clock that is shown say how many steps were taken."""
        if (clock := self._held(tracked)) is not None:
            clock.fill_(step)
            self[tracked] = ref(clock), step

    def refresh_all(self) -> None:
        """The same of all that are shown, after a call."""
        for tracked in list(self):
            if tracked.tensor is not None:
                self.refresh(tracked, tracked.clock)
