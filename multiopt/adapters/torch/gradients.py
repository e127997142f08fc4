"""Gradients that need a hand before a step: those of shards, and sparse ones."""

import numpy as np
import torch

from multiopt.adapters.torch.shards import local_gradient
from multiopt.distributed.boxes import here

__all__ = ["held", "without_sparse"]

#: The classes of torch that take sparse gradients; as there, every element is updated.
SPARSE = {"Adagrad", "SGD"}


def held(params: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What this rank holds of some parameters and of their gradients.

    Args:
        params: The parameters, as an array of objects.

    Returns:
        The tensors that lie here, and their gradients.
    """
    count = len(params)
    grads = map(local_gradient, params)
    return np.fromiter(map(here, params), object, count), np.fromiter(grads, object, count)


def without_sparse(optimizer: str, params: np.ndarray) -> np.ndarray | None:
    """Make sparse gradients dense, if the optimizer takes them.

    Returns:
        All gradients; None if none of them is sparse.

    Raises:
        RuntimeError: The optimizer takes none, as in torch.
    """
    grads = [param.grad for param in params]
    if not any(grad is not None and grad.layout != torch.strided for grad in grads):
        return None
    if optimizer not in SPARSE:
        raise RuntimeError(f"{optimizer} does not support sparse gradients")
    dense = [grad if grad is None or not grad.is_sparse else grad.to_dense() for grad in grads]
    return np.fromiter(dense, object, len(dense))
