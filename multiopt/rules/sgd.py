"""Stochastic gradient descent, with or without a momentum buffer.

Without momentum the rule has no slots at all. ``spec/rules/sgd.md`` gives the formulas in the order
in which they are computed.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from multiopt.rules.decay import descending, descent, penalized, shrunk
from multiopt.rules.rule import FINITE, NONNEGATIVE, Hyperparameter, Rule, Update, number, switch

__all__ = ["SGD"]


def descend(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """Descend along the gradient."""
    return shrunk(param, c) - c.lr * penalized(param, descending(grad, c), c), slots


def descend_with_momentum(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """Descend along the momentum buffer; with Nesterov, look ahead of it."""
    (buffer,) = slots
    grad = penalized(param, descending(grad, c), c)
    buffer = c.momentum * buffer + c.gradient_share * grad
    direction = grad + c.momentum * buffer if c.nesterov else buffer
    return shrunk(param, c) - c.lr * direction, (buffer,)


@dataclass(frozen=True)
class SGD(Rule):
    """Stochastic gradient descent, with momentum, Nesterov's look-ahead and an L2 penalty.

    Source: Sutskever, Martens, Dahl & Hinton, "On the importance of initialization and momentum
    in deep learning" (ICML 2013), equations 1-4, in torch's form, where the learning rate
    multiplies the buffer: ``buffer = momentum * buffer + (1 - dampening) * grad``,
    ``param -= lr * buffer``. As in torch, the first gradient is not dampened. Names
    and defaults are those of ``torch.optim.SGD``.

    Args:
        lr: Learning rate, >= 0.
        momentum: Decay rate of the buffer, >= 0; with 0 there is no buffer.
        dampening: Share of each gradient that is left out of the buffer, from the second step on.
        weight_decay: L2 penalty, >= 0: ``weight_decay * param`` is added to the gradient.
        nesterov: Descend along ``grad + momentum * buffer``. It requires momentum and no dampening.
        maximize: Ascend instead of descending.
        decoupled_weight_decay: Shrink the parameter as ``AdamW`` does instead of adding a penalty.

    ``lr``, ``momentum``, ``dampening`` and ``weight_decay`` may be schedules ``step -> number``.

    Raises:
        ValueError: A value is out of range.

    >>> import numpy as np, multiopt as mo
    >>> opt = mo.Optimizer(mo.SGD(lr=0.5, momentum=0.5))
    >>> w = np.array([1.0, 2.0])
    >>> for _ in range(2):
    ...     _ = opt.step({"w": w}, {"w": np.array([1.0, -1.0])})
    >>> w.tolist()
    [-0.25, 3.25]
    """

    lr: Hyperparameter = number(1e-3, NONNEGATIVE)
    momentum: Hyperparameter = number(0.0, NONNEGATIVE)
    dampening: Hyperparameter = number(0.0, FINITE)
    weight_decay: Hyperparameter = number(0.0, NONNEGATIVE)
    nesterov: bool = switch()
    maximize: bool = switch()
    decoupled_weight_decay: bool = switch()

    def __post_init__(self) -> None:
        """Check the hyperparameters."""
        super().__post_init__()
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                "SGD: nesterov needs a momentum and no dampening; "
                f"got momentum={self.momentum!r}, dampening={self.dampening!r}"
            )

    @property
    def slots(self) -> tuple[str, ...]:
        """``momentum_buffer`` if there is momentum, otherwise nothing."""
        return () if self.momentum == 0 else ("momentum_buffer",)

    @property
    def update(self) -> Update:
        """The formula for the options of this rule."""
        return descend if self.momentum == 0 else descend_with_momentum

    @classmethod
    def scalars(cls, h: Any, step: Any) -> dict[str, Any]:
        """Compute the coefficients of a step."""
        return dict(
            lr=h.lr,
            momentum=h.momentum,
            gradient_share=np.where(step == 1, 1.0, 1.0 - h.dampening),
            nesterov=h.nesterov,
            **descent(h, h.lr, h.decoupled_weight_decay),
        )
