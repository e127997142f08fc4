"""The tensors that an optimizer of the drop-in knows, by identity as in Pyro.

Pyro keeps a torch optimizer for every tensor it ever met. Here a tensor is forgotten when nobody
else holds it any more. Weak references would tell at once, but ``torch.utils.swap_tensors``, and
with it the conversion of modules, refuses tensors that have any. So each tensor is held, and every
call looks whether anybody else still holds a few of them.
"""

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from multiopt.adapters.pyro.tensor import TensorOptimizer

__all__ = ["ALONE", "KnownTensors"]


_EXAMPLE = SimpleNamespace(tensor=torch.empty(0))

#: What Python counts for an object that only an attribute holds.
ALONE = sys.getrefcount(_EXAMPLE.tensor)


class KnownTensors:
    """Tensors by identity, in the order of their first sight.

    Attributes:
        keys: Their keys by their identities.
    """

    def __init__(self) -> None:
        """Know no tensor."""
        self._by_id: dict[int, TensorOptimizer] = {}
        self.keys: dict[int, str] = {}
        self._unasked: list[TensorOptimizer] = []

    def get(self, tensor: torch.Tensor) -> "TensorOptimizer | None":
        """What is held of a tensor; None for nothing."""
        return self._by_id.get(id(tensor))

    def add(self, tracked: "TensorOptimizer") -> None:
        """Hold a tensor."""
        self._by_id[id(tracked.tensor)] = tracked
        self.keys[id(tracked.tensor)] = tracked.key

    def remove(self, tracked: "TensorOptimizer") -> None:
        """Let go of a tensor."""
        del self._by_id[id(tracked.tensor)], self.keys[id(tracked.tensor)]
        tracked.tensor = tracked.scheduler = None

    def __iter__(self) -> Iterator["TensorOptimizer"]:
        """What is held of each."""
        return iter(list(self._by_id.values()))

    def __len__(self) -> int:
        """The number of tensors."""
        return len(self._by_id)

    def abandoned(self, asked: int | None = None) -> list["TensorOptimizer"]:
        """Those that nobody else holds.

        Args:
            asked: How many to ask, in turn; all by default. A caller that asks about twice as many
                as it adds never has more that are abandoned than others.
        """
        if asked is None:
            some = list(self)
        else:
            if not self._unasked:
                self._unasked = list(self._by_id.values())
            some = self._unasked[-asked:]
            del self._unasked[-asked:]
        found = []
        for tracked in some:
            if tracked.tensor is None or sys.getrefcount(tracked.tensor) > ALONE:
                continue
            # What autograd holds of a tensor in C++, Python does not count.
            if tracked.tensor._use_count() <= 1:  # type: ignore[attr-defined]
                found.append(tracked)
        return found
