"""Rprop: ``spec/rules/rprop.md``."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from multiopt.rules.decay import descending
from multiopt.rules.rule import BOUND, NONNEGATIVE, Hyperparameter, Rule, number, switch

__all__ = ["Rprop"]


def rprop(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """Riedmiller & Braun, without going back where the gradient turns."""
    prev, step_size = slots
    grad = descending(grad, c)
    # The gradient as seen from the previous direction. The product of the two could underflow.
    ahead = xp.where(prev > 0.0, grad, xp.where(prev < 0.0, -grad, prev))
    step_size = step_size + c.start
    shrunk = xp.where(ahead < 0.0, c.shrink * step_size, step_size)
    step_size = xp.where(ahead > 0.0, c.grow * step_size, shrunk)
    step_size = xp.where(step_size < c.smallest, c.smallest, step_size)
    step_size = xp.where(step_size > c.largest, c.largest, step_size)
    grad = xp.where(ahead < 0.0, 0.0, grad)
    # A gradient of zero or NaN is itself the change.
    change = xp.where(grad > 0.0, step_size, xp.where(grad < 0.0, -step_size, grad))
    return param - change, (grad, step_size)


@dataclass(frozen=True)
class Rprop(Rule):
    """Rprop: each element has its own step size; of the gradient only the sign counts.

    The step size grows while the gradient keeps its sign and shrinks where it changes; the element
    then rests for a step. It is for full-batch gradients: noise changes signs.

    Source: Riedmiller & Braun, "A Direct Adaptive Method for Faster Backpropagation Learning: The
    RPROP Algorithm" (ICNN 1993), in torch's form (iRprop- of Igel & Hüsken, 2000), which does not
    take back the step that went too far. Names and defaults are those of ``torch.optim.Rprop``.

    Args:
        lr: The step size to start with, >= 0; it has no part later.
        etas: Factors of the step size where the sign changes, >= 0 and < 1, and where it stays,
            > 1. A schedule's numbers are held to >= 0 only.
        step_sizes: The smallest and the largest step size, each >= 0, infinity allowed.
        maximize: Ascend instead.

    ``lr`` and either of ``etas`` and ``step_sizes`` may be a schedule ``step -> number``.

    Raises:
        ValueError: A value is out of range.

    >>> import numpy as np, multiopt as mo
    >>> opt = mo.Optimizer(mo.Rprop(lr=0.5))
    >>> w = np.array([1.0, 1.0])
    >>> for grad in ([3.0, -1e-9], [4.0, 1e-9]):
    ...     _ = opt.step({"w": w}, {"w": np.array(grad)})
    >>> w.round(4).tolist()
    [-0.1, 1.5]
    """

    lr: Hyperparameter = number(1e-2, NONNEGATIVE)
    etas: tuple[Hyperparameter, Hyperparameter] = number((0.5, 1.2), NONNEGATIVE)
    step_sizes: tuple[Hyperparameter, Hyperparameter] = number((1e-6, 50.0), BOUND)
    maximize: bool = switch()

    slots: ClassVar = ("prev", "step_size")
    update: ClassVar = staticmethod(rprop)

    def __post_init__(self) -> None:
        """Check the hyperparameters."""
        super().__post_init__()
        shrink, grow = self.etas
        around = (callable(shrink) or shrink < 1) and (callable(grow) or grow > 1)
        self._require(around, "etas", "below and above 1")

    @classmethod
    def scalars(cls, h: Any, step: Any) -> dict[str, Any]:
        """The numbers of a step."""
        shrink, grow = h.etas
        smallest, largest = h.step_sizes
        return dict(
            start=np.where(step == 1, h.lr, 0.0),
            shrink=shrink,
            grow=grow,
            smallest=smallest,
            largest=largest,
            maximizes=h.maximize,
        )
