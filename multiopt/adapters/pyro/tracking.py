"""The tensors that an optimizer of the drop-in knows, by identity as in Pyro.

Pyro keeps a torch optimizer for every tensor it has ever seen. Here a tensor is forgotten once
nobody else holds it. Weak references would tell at once, but ``torch.utils.swap_tensors``, and with
it the conversion of modules, refuses tensors that have any. So each tensor is held, and every call
checks for a few of them whether anybody else still holds them.
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

#: Python's reference count of an object that only an attribute holds.
ALONE = sys.getrefcount(_EXAMPLE.tensor)


class KnownTensors:
    """Tensors by identity, in the order in which they were first seen.

    Attributes:
        keys: The keys of the tensors by their identities.
    """

    def __init__(self) -> None:
        """Start with no tensors."""
        self._by_id: dict[int, TensorOptimizer] = {}
        self.keys: dict[int, str] = {}
        self._unasked: list[TensorOptimizer] = []

    def get(self, tensor: torch.Tensor) -> "TensorOptimizer | None":
        """The ``TensorOptimizer`` of a tensor; None if the tensor is not known."""
        return self._by_id.get(id(tensor))

    def add(self, tracked: "TensorOptimizer") -> None:
        """Add a tensor, which is held from now on."""
        self._by_id[id(tracked.tensor)] = tracked
        self.keys[id(tracked.tensor)] = tracked.key

    def remove(self, tracked: "TensorOptimizer") -> None:
        """Let go of a tensor."""
        del self._by_id[id(tracked.tensor)], self.keys[id(tracked.tensor)]
        tracked.tensor = tracked.scheduler = None

    def move(self, tracked: "TensorOptimizer", tensor: torch.Tensor) -> None:
        """Have another tensor in the place of one."""
        self._by_id.pop(id(tracked.tensor), None)
        self.keys.pop(id(tracked.tensor), None)
        tracked.tensor = tensor
        self.add(tracked)

    def __iter__(self) -> Iterator["TensorOptimizer"]:
        """The ``TensorOptimizer`` of each tensor."""
        return iter(list(self._by_id.values()))

    def __len__(self) -> int:
        """The number of tensors."""
        return len(self._by_id)

    def abandoned(self, asked: int | None = None) -> list["TensorOptimizer"]:
        """Find tensors that nobody else holds.

        Args:
            asked: How many to check, in turn; by default all. If a caller checks twice as many as
                it adds, abandoned tensors never outnumber the others.
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
            # Python does not count the references that autograd holds in C++.
            if tracked.tensor._use_count() <= 1:  # type: ignore[attr-defined]
                found.append(tracked)
        return found
