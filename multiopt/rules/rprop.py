"""Rprop: each element has a step size of its own, and only signs of gradients matter.

A slot keeps the previous gradient, to see whether the sign has changed. ``spec/rules/rprop.md``
gives the formula in the order in which it is computed.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from multiopt.rules.decay import descending
from multiopt.rules.rule import BOUND, NONNEGATIVE, Hyperparameter, Rule, number, switch

__all__ = ["Rprop"]


def rprop(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """Rprop: Riedmiller & Braun, without taking back a step that made the sign change."""
    prev, step_size = slots
    grad = descending(grad, c)
    # The gradient relative to the previous direction. A product of the two could underflow.
    ahead = xp.where(prev > 0.0, grad, xp.where(prev < 0.0, -grad, prev))
    step_size = step_size + c.start
    shrunk = xp.where(ahead < 0.0, c.shrink * step_size, step_size)
    step_size = xp.where(ahead > 0.0, c.grow * step_size, shrunk)
    step_size = xp.where(step_size < c.smallest, c.smallest, step_size)
    step_size = xp.where(step_size > c.largest, c.largest, step_size)
    grad = xp.where(ahead < 0.0, 0.0, grad)
    # If the gradient is zero or NaN, so is the change.
    change = xp.where(grad > 0.0, step_size, xp.where(grad < 0.0, -step_size, grad))
    return param - change, (grad, step_size)


@dataclass(frozen=True)
class Rprop(Rule):
    """Rprop: each element has its own step size; only the sign of the gradient matters.

    The step size grows while the gradient keeps its sign, and shrinks when the sign changes; the
    element then does not move for one step. The rule is meant for full-batch gradients, because
    noise changes signs.

    Source: Riedmiller & Braun, "A Direct Adaptive Method for Faster Backpropagation Learning: The
    RPROP Algorithm" (ICNN 1993), in torch's form (iRprop- of Igel & Hüsken, 2000), which does not
    take back the step that went too far. Names and defaults are those of ``torch.optim.Rprop``.

    Args:
        lr: The first step size of each element, >= 0. It does not matter later.
        etas: Two factors of the step size: >= 0 and < 1 if the sign changes, > 1 if it stays. The
            numbers of a schedule only have to be >= 0.
        step_sizes: The smallest and the largest step size, each >= 0; infinity is allowed.
        maximize: Ascend instead of descending.

    ``lr`` and either of ``etas`` and ``step_sizes`` may be schedules ``step -> number``.

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
        """Compute the coefficients of a step."""
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
