"""The exact norm of gradients on any number of ranks."""

from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

from multiopt.arrays import Array
from multiopt.backend import backend_for
from multiopt.distributed.boxes import counts_here, here, is_distributed
from multiopt.distributed.ranks import Ranks
from multiopt.exact import Accumulator
from multiopt.step.across import Told

__all__ = ["global_norm"]

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
        return _sum(arrays).norm()
    key = dist.group.WORLD if group is None else group
    if key not in _ranks:
        _ranks[key] = Ranks(group)
    ranks = _ranks[key]
    with ranks.messages.step():
        ranks.tell({name: _told(name, grad) for name, grad in arrays.items()})
        counted = {
            name: grad
            for name, grad in arrays.items()
            if (ranks.names[name].counts is None and name in ranks.counted)
            or (is_distributed(grad) and counts_here(grad, name))
        }
        integers = ranks.add(len(_sum({}).to_integers()), lambda: _sum(counted).to_integers())
    return Accumulator.from_integers(integers, "float64").norm()


def _told(name: str, grad: Array) -> Told:
    """What other ranks need to know of a gradient."""
    label, part = f"gradient of {name!r}", here(grad)
    dtype = backend_for(part, label).layout(part, label).compute_dtype
    counts = counts_here(grad, label) if is_distributed(grad) else None
    return Told(counts, dtype, is_bounded=False, clip=None, asks=False)


def _sum(arrays: Mapping[str, Array]) -> Accumulator:
    """The sum of squares over arrays, as far as they lie here."""
    total = {dtype: Accumulator(dtype) for dtype in ("float64", "float32")}
    for name, array in arrays.items():
        part = here(array)
        total[backend_for(part, name).layout(part, name).compute_dtype].add(part)
    return total["float64"] + total["float32"]
