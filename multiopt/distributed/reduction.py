"""The mean of gradients over the ranks, and values that one rank sends to the others.

``"ordered"`` makes the mean a function of the ranks' gradients alone: they are added in the order
of the ranks, in the compute dtype, divided by their number, and rounded once. A rank adds up a
part of each bucket, which it has received from all others, and sends the mean of it to all. So the
traffic is that of an ``all_reduce``, and beside the gradients there is never more than a bucket.
"""

from collections.abc import Iterable, Mapping

import torch

from multiopt.arrays import Array
from multiopt.distributed.packing import Vector, vectors_of
from multiopt.distributed.transport import Transport
from multiopt.layout import COMPUTE_DTYPE, Layout

__all__ = ["REDUCTIONS", "broadcast", "mean"]

REDUCTIONS = "ordered", "fast"


def mean(
    transport: Transport,
    vectors: Iterable[Vector],
    grads: Mapping[str, Array | None],
    reduction: str,
) -> dict[str, Array]:
    """Average gradients over the ranks; a gradient that a rank does not have counts as zero.

    Args:
        transport: The ranks.
        vectors: Where the gradients are, of lengths that are multiples of the number of ranks.
        grads: The gradients of this rank; they are not changed.
        reduction: ``"ordered"`` or ``"fast"``.

    Returns:
        New arrays by name.
    """
    means: dict[str, Array] = {}
    for vector in vectors:
        compute = getattr(torch, COMPUTE_DTYPE[str(vector.dtype).removeprefix("torch.")])
        flat = vector.packed(grads, transport.carrier(vector.kind))
        # On a GPU, torch multiplies by the reciprocal of a number, but divides by a tensor.
        count = torch.full((1,), transport.size, dtype=compute, device=flat.device)
        room = torch.empty_like(next(vector.buckets(flat), flat))
        for bucket in vector.buckets(flat) if transport.size > 1 else ():
            if reduction == "ordered":
                received = room[: len(bucket)]
                transport.all_to_all(_bytes(received), _bytes(bucket))
                first, *others = received.view(transport.size, -1)
                total = first.to(compute)
                for other in others:
                    total += other
                part = total.div_(count).to(vector.dtype)
                transport.all_gather(_bytes(bucket), _bytes(part))
            else:
                total = bucket.to(compute)
                transport.all_reduce(total)
                bucket.copy_(total.div_(count))
        means |= vector.unpacked(flat)
    return means


def broadcast(
    transport: Transport, layouts: Mapping[str, Layout], arrays: Mapping[str, Array], source: int
) -> dict[str, Array]:
    """Send arrays from one rank to all.

    Args:
        transport: The ranks.
        layouts: The layouts of the arrays, in the same order on every rank.
        arrays: The arrays, on the rank that sends them.
        source: That rank.

    Returns:
        New arrays by name; nothing on the rank that sends.
    """
    found: dict[str, Array] = {}
    for vector in vectors_of(layouts, multiple=1):
        device = transport.carrier(vector.kind)
        sends = transport.rank == source
        flat = vector.packed(arrays if sends else {}, device)
        for bucket in vector.buckets(flat):
            transport.broadcast(_bytes(bucket), source)
        if not sends:
            found |= vector.unpacked(flat)
    return found


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor; gloo does not have every dtype in every collective."""
    return tensor.view(torch.uint8)
