"""The exact norm of gradients on any number of ranks."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import starmap
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch.distributed as dist

from multiopt.arrays import Array, Arrays, Part
from multiopt.backend import backend_for
from multiopt.distributed.boxes import counts_here, here, is_distributed
from multiopt.distributed.ranks import Ranks
from multiopt.exact import Accumulator
from multiopt.registry import Registry
from multiopt.rules import SGD
from multiopt.rules.sums import length
from multiopt.step.across import Told

__all__ = ["global_norm"]

#: How many names of earlier calls are remembered, beside as many as a call has.
MANY = 1000


class _Measuring:
    """Sums of squares by the engines that steps have, on arrays as they lie."""

    def __init__(self) -> None:
        # It has a row for each name, and never takes a step.
        self._registry, self._arrays = Registry(SGD()), Arrays()

    def sum(self, grads: Mapping[str, Array]) -> Accumulator:
        """The sum over arrays that lie here."""
        total, known = Accumulator("float64"), self._registry
        names = list(grads)
        if len(known) > 2 * len(names) + MANY:
            # Most of its names were those of earlier calls.
            known = self._registry = Registry(SGD())
        rows, arrays = known.find(names), np.fromiter(grads.values(), object, len(grads))
        if rows.missing:
            new = np.array(rows.missing)
            known.enter([names[place] for place in rows.missing], arrays[new])
            rows = known.find(names)
        self._arrays.take(arrays, arrays, own=False)
        try:
            for part in starmap(Part, rows.parts):
                total = total + self._of_part(names, part)
        finally:
            self._arrays.release()
        return total

    def _of_part(self, names: Sequence[str], part: Part) -> Accumulator:
        group, total = part.group, Accumulator("float64")
        try:
            group.look(part, self._arrays, last=False)
            # Those that compiled code cannot read as they are, or that have another shape now.
            for position in part.odd:
                array = self._arrays.grads[part.places[position]]
                label = f"gradient of {names[part.places[position]]!r}"
                one = Accumulator(backend_for(array, label).layout(array, label).compute_dtype)
                one.add(array)
                total = total + one
            others = np.delete(np.arange(len(part.rows)), part.odd)
            return total + group.squares(part, others, None) if others.size else total
        finally:
            group.forget(part)


_measuring = _Measuring()

#: By process group.
_ranks: WeakKeyDictionary[Any, Ranks] = WeakKeyDictionary()


def global_norm(
    grads: Mapping[str, Array | None] | Iterable[Array | None], group: Any = None
) -> float:
    """The Euclidean norm over all gradients on all ranks: exact until it is rounded at the end.

    It is the same on all ranks, to the last bit, and the same as that of the whole gradients in one
    process. Every rank of the group calls this. While names, shapes and placements repeat, a
    message of a few numbers and one ``all_reduce`` of 111 integers do it.

    Each element of a ``DTensor`` counts once, however it is sharded and replicated. Any other array
    counts once a name, on the lowest rank that has the name: replicas (DDP) and partitions
    (``ZeroRedundancyOptimizer``) look alike otherwise.

    Args:
        grads: Gradients by name; or in an order, and then their positions are their names, so all
            ranks must have the same ones. Arrays of any library, shape and dtype that parameters
            may have. None is left out.
        group: The process group; None for the default one, or for one process if there is none.

    Returns:
        The norm; NaN if an element is NaN, else infinity if one is infinite.

    Raises:
        TypeError: Something is not a usable array, here or on another rank.
        ValueError: A ``DTensor`` is a sum that was not made; or a name is of other dtypes, or in
            parts only on some ranks.

    >>> import numpy as np, torch
    >>> from multiopt.distributed import global_norm
    >>> global_norm({"w": torch.tensor([3.0, 0.0]), "b": np.array([4.0])})
    5.0
    """
    named = grads.items() if isinstance(grads, Mapping) else enumerate(grads)
    arrays = {str(name): grad for name, grad in named if grad is not None}
    if not (dist.is_available() and dist.is_initialized()):
        return _measuring.sum({name: here(grad) for name, grad in arrays.items()}).norm()
    key = dist.group.WORLD if group is None else group
    if key not in _ranks:
        _ranks[key] = Ranks(group)
    ranks = _ranks[key]
    with ranks.messages.step():
        told = {name: _told(name, grad) for name, grad in arrays.items()}
        ranks.tell(told)
        counted = {
            name: here(grad)
            for name, grad in arrays.items()
            if (name in ranks.counted if told[name].counts is None else told[name].counts)
        }
        integers = ranks.add(length("float64"), lambda: _measuring.sum(counted).to_integers())
    return Accumulator.from_integers(integers, "float64").norm()


def _told(name: str, grad: Array) -> Told:
    """What other ranks need to know of a gradient."""
    label, part = f"gradient of {name!r}", here(grad)
    dtype = backend_for(part, label).layout(part, label).compute_dtype
    counts = counts_here(grad, label) if is_distributed(grad) else None
    return Told(counts, dtype, is_bounded=False, clip=None, asks=False)
