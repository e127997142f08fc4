"""Gradients that need a hand before a step: those of shards, and sparse ones."""

import numpy as np

from multiopt.adapters.torch.groups import Followed
from multiopt.adapters.torch.shards import local_gradient
from multiopt.distributed.boxes import here
from multiopt.rules import SGD, Adafactor, Adagrad, Adam, Muon

__all__ = ["held", "without_sparse"]

#: The rules whose classes in torch take sparse gradients; as there, every element is updated.
SPARSE = Adagrad, SGD

#: The rules whose classes in torch take no complex parameters.
REAL = Adafactor, Muon


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


def without_sparse(followed: Followed, params: np.ndarray) -> np.ndarray | None:
    """Make sparse gradients dense, if the rule's class in torch takes them.

    Args:
        followed: The parameters' names and rules.
        params: Some of the parameters, as an array of objects.

    Returns:
        All gradients; None if none of them is sparse.

    Raises:
        RuntimeError: torch does not take a gradient or its parameter, in torch's words.
    """
    grads = np.fromiter((param.grad for param in params), object, len(params))
    given = [place for place, grad in enumerate(grads) if grad is not None]
    sparse = [place for place in given if grads[place].is_sparse]
    for place in given:
        rule = followed.rule_for(followed.key_of(params[place]))
        name = "Adam" if isinstance(rule, Adam) else type(rule).__name__
        if isinstance(rule, REAL) and params[place].is_complex():
            raise RuntimeError(f"{name} does not support complex parameters")
        if not grads[place].is_sparse:
            continue
        if not isinstance(rule, SPARSE):
            consider = ", please consider SparseAdam instead" if name == "Adam" else ""
            raise RuntimeError(f"{name} does not support sparse gradients{consider}")
        if isinstance(rule, Adagrad) and rule.weight_decay != 0:
            raise RuntimeError("weight_decay option is not compatible with sparse gradients")
        grads[place] = grads[place].to_dense()
    return grads if sparse else None
