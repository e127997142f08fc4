"""RMSprop: the gradient divided by the root of an average of its square.

The centered form divides by the root of the variance instead. Each form exists with and without a
momentum buffer, and has only the slots that it needs. ``spec/rules/rmsprop.md`` gives the formulas
in the order in which they are computed.
"""

from dataclasses import dataclass
from typing import Any

from multiopt.rules.adam import first_moment, moments, second_moment
from multiopt.rules.decay import descending, descent, penalized, shrunk
from multiopt.rules.rule import FRACTION, NONNEGATIVE, Hyperparameter, Rule, Update, number, switch

__all__ = ["RMSprop"]


def rmsprop(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """Descend along the gradient, divided by the root of its mean square."""
    (square_avg,) = slots
    grad = penalized(param, descending(grad, c), c)
    square_avg = second_moment(square_avg, grad, c)
    return shrunk(param, c) - c.lr * scaled(xp, grad, square_avg, c), (square_avg,)


def rmsprop_with_momentum(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """Descend along a momentum buffer of the directions of ``rmsprop``."""
    square_avg, buffer = slots
    grad = penalized(param, descending(grad, c), c)
    square_avg = second_moment(square_avg, grad, c)
    buffer = c.momentum * buffer + scaled(xp, grad, square_avg, c)
    return shrunk(param, c) - c.lr * buffer, (square_avg, buffer)


def centered(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """Graves (2013), equations 38-41: divide by the root of the variance."""
    square_avg, grad_avg = slots
    grad = penalized(param, descending(grad, c), c)
    square_avg = second_moment(square_avg, grad, c)
    grad_avg = first_moment(grad_avg, grad, c)
    direction = scaled(xp, grad, variance(xp, square_avg, grad_avg), c)
    return shrunk(param, c) - c.lr * direction, (square_avg, grad_avg)


def centered_with_momentum(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """Descend along a momentum buffer of the directions of ``centered``."""
    square_avg, buffer, grad_avg = slots
    grad = penalized(param, descending(grad, c), c)
    square_avg = second_moment(square_avg, grad, c)
    grad_avg = first_moment(grad_avg, grad, c)
    direction = scaled(xp, grad, variance(xp, square_avg, grad_avg), c)
    buffer = c.momentum * buffer + direction
    return shrunk(param, c) - c.lr * buffer, (square_avg, buffer, grad_avg)


def scaled(xp: Any, grad: Any, mean_square: Any, c: Any) -> Any:
    """The gradient divided by the root of a mean square."""
    return grad / (xp.sqrt(mean_square) + c.eps)


def variance(xp: Any, square_avg: Any, grad_avg: Any) -> Any:
    """The mean square minus the square of the mean; if rounding makes it negative, zero."""
    difference = square_avg - grad_avg * grad_avg
    return xp.where(difference < 0.0, 0.0, difference)


@dataclass(frozen=True)
class RMSprop(Rule):
    """RMSprop: the gradient divided by the root of a running average of its square.

    Source: Tieleman & Hinton, "Lecture 6.5 - rmsprop" (Coursera, Neural Networks for Machine
    Learning, 2012); centered: Graves, "Generating Sequences With Recurrent Neural Networks"
    (2013, arXiv:1308.0850), equations 38-41, in torch's form, with ``eps`` outside the root. Names
    and defaults are those of ``torch.optim.RMSprop``.

    Args:
        lr: Learning rate, >= 0.
        alpha: Decay rate of the averages, >= 0 and < 1.
        eps: Added to the root, >= 0.
        weight_decay: L2 penalty, >= 0: ``weight_decay * param`` is added to the gradient.
        momentum: Decay rate of the buffer of directions, >= 0; with 0 there is no buffer.
        centered: Divide by the root of the variance of the gradient instead of its mean square.
        maximize: Ascend instead of descending.
        decoupled_weight_decay: Shrink the parameter as ``AdamW`` does instead of adding a penalty.

    ``lr``, ``alpha``, ``eps``, ``weight_decay`` and ``momentum`` may be schedules
    ``step -> number``.

    Raises:
        ValueError: A value is out of range.

    >>> import numpy as np, multiopt as mo
    >>> opt = mo.Optimizer(mo.RMSprop(lr=0.5, alpha=0.75))
    >>> w = np.array([2.0, -2.0])
    >>> _ = opt.step({"w": w}, {"w": np.array([4.0, -0.01])})
    >>> w.round(4).tolist()
    [1.0, -1.0]
    """

    lr: Hyperparameter = number(1e-2, NONNEGATIVE)
    alpha: Hyperparameter = number(0.99, FRACTION)
    eps: Hyperparameter = number(1e-8, NONNEGATIVE)
    weight_decay: Hyperparameter = number(0.0, NONNEGATIVE)
    momentum: Hyperparameter = number(0.0, NONNEGATIVE)
    centered: bool = switch()
    maximize: bool = switch()
    decoupled_weight_decay: bool = switch()

    @property
    def slots(self) -> tuple[str, ...]:
        """``square_avg``, with momentum ``momentum_buffer``, and if centered ``grad_avg``."""
        buffer = () if self.momentum == 0 else ("momentum_buffer",)
        return ("square_avg", *buffer, *(("grad_avg",) if self.centered else ()))

    @property
    def update(self) -> Update:
        """The formula for the options of this rule."""
        if self.centered:
            return centered if self.momentum == 0 else centered_with_momentum
        return rmsprop if self.momentum == 0 else rmsprop_with_momentum

    @classmethod
    def scalars(cls, h: Any, step: Any) -> dict[str, Any]:
        """Compute the coefficients of a step."""
        return dict(
            **moments(h.alpha, h.alpha),
            lr=h.lr,
            eps=h.eps,
            momentum=h.momentum,
            **descent(h, h.lr, h.decoupled_weight_decay),
        )
