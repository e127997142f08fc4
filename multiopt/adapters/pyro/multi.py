"""``pyro.optim.multi``: optimizers that differentiate the loss themselves."""

from typing import Any

from pyro.optim import multi
from pyro.optim.multi import MixedMultiOptimizer, MultiOptimizer, Newton, PyroMultiOptimizer

from multiopt.adapters.pyro.optim import PyroOptim

__all__ = [
    "MixedMultiOptimizer",
    "MultiOptimizer",
    "Newton",
    "PyroMultiOptimizer",
    "TorchMultiOptimizer",
]


class TorchMultiOptimizer(multi.TorchMultiOptimizer):
    """``pyro.optim.multi.TorchMultiOptimizer``, whose torch optimizer follows multiopt's rule."""

    def __init__(self, optim_constructor: Any, optim_args: dict[str, Any]) -> None:
        """Take the same arguments as Pyro's."""
        PyroMultiOptimizer.__init__(self, PyroOptim(optim_constructor, optim_args))
