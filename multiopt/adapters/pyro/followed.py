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

    def watch(self, one: "TensorOptimizer") -> None:
        """Watch the settings of a tensor as they are now, and no earlier ones of it."""
        self.unwatch(one)
        watched = list(one.given.values())
        # A dict that nobody else holds, such as most callables make, stays as it is.
        if sys.getrefcount(one.clip_args) > ALONE:
            watched.append(one.clip_args)
        for given in watched:
            # Others may not have followed its last change yet.
            if id(given) not in self:
                self[id(given)] = Source(given, _held(given), {})
            source = self[id(given)]
            source.users[one] = None
            one.sources.append(source)

    def unwatch(self, one: "TensorOptimizer") -> None:
        """Watch no settings of a tensor."""
        for source in one.sources:
            source.users.pop(one, None)
            if not source.users:
                self.pop(id(source.given), None)
        one.sources = []

    def changed(self) -> "list[TensorOptimizer]":
        """The tensors whose settings have changed since ``renew``."""
        found: dict[TensorOptimizer, None] = {}
        for source in self.values():
            if source.held != _held(source.given):
                found |= source.users
        return list(found)

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

    def shown(self, one: "TensorOptimizer", step: int) -> torch.Tensor:
        """The clock of a tensor, one object for as long as anybody holds it."""
        clock = self._held(one)
        if clock is None:
            clock = scalar(step)
            self[one] = ref(clock), step
        return clock

    def _held(self, one: "TensorOptimizer") -> torch.Tensor | None:
        """The clock of a tensor, if anybody holds it."""
        return self[one][0]() if one in self else None

    def written(self) -> "dict[TensorOptimizer, int]":
        """The clocks that were written, and what they say now."""
        found = {}
        for one, (_, step) in list(self.items()):
            clock = self._held(one)
            if clock is None or one.tensor is None:
                del self[one]
            elif clock.item() != step:
                found[one] = whole_number(clock)
        return found

    def say(self, one: "TensorOptimizer", step: int) -> None:
        """Let a clock that is shown say how many steps were taken."""
        if (clock := self._held(one)) is not None:
            clock.fill_(step)
            self[one] = ref(clock), step

    def say_all(self) -> None:
        """The same of all that are shown, after a call."""
        for one in list(self):
            if one.tensor is not None:
                self.say(one, one.clock)
