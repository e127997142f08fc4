"""Which part of a whole parameter lies on this rank."""

import sys
from typing import Any, TypeGuard

import torch

from multiopt.backend import backend_for
from multiopt.state.index import Box

__all__ = ["box_of", "counts_here", "here", "is_distributed", "is_part", "ranks_of"]


def is_distributed(array: Any) -> "TypeGuard[torch.distributed.tensor.DTensor]":
    """Whether an array is a ``DTensor``."""
    # Importing it takes half a second; where it was not imported, there are none.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(array, module.DTensor)


def here(array: Any) -> Any:
    """The part of an array that lies on this rank, not a copy."""
    with torch.no_grad():
        return array.to_local() if is_distributed(array) else array


def box_of(array: Any, name: str) -> tuple[tuple[int, ...], Box]:
    """The shape of a whole parameter, and the box of it that lies here.

    Raises:
        TypeError: It is not a usable array.
        ValueError: What lies here is no box.
    """
    if not is_distributed(array):
        label = f"parameter {name!r}"
        shape = backend_for(array, label).layout(array, label).shape
        return shape, ((0,) * len(shape), shape)
    shape = tuple(array.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    held = tuple(here(array).shape)
    extent, offset = compute_local_shape_and_global_offset(
        array.shape, array.device_mesh, array.placements
    )
    if tuple(extent) != held:
        raise ValueError(
            f"parameter {name!r} is placed as {array.placements}, and this rank holds {held} of "
            f"{shape}, which is no box; expected Shard and Replicate: redistribute it"
        )
    return shape, (tuple(offset), held)


def is_part(array: Any) -> bool:
    """Whether only a part of an array lies on this rank."""
    return is_distributed(array) and any(
        size > 1 and not placement.is_replicate()
        for size, placement in zip(array.device_mesh.shape, array.placements, strict=True)
    )


def ranks_of(array: "torch.distributed.tensor.DTensor") -> set[int]:
    """The ranks, among all, that an array lies on."""
    return set(array.device_mesh.mesh.reshape(-1).tolist())


def counts_here(array: "torch.distributed.tensor.DTensor", label: str) -> bool:
    """Whether what lies here counts in a sum over all ranks: of replicas the first ones do.

    Raises:
        ValueError: The ranks hold parts of a sum that was not made.
    """
    if any(placement.is_partial() for placement in array.placements):
        raise ValueError(
            f"{label} is placed as {array.placements}, a sum that was not made; expected Shard and "
            "Replicate: redistribute it"
        )
    coordinate = array.device_mesh.get_coordinate()
    return coordinate is not None and all(
        at == 0 or not placement.is_replicate()
        for at, placement in zip(coordinate, array.placements, strict=True)
    )
