"""RMSprop, plain and centered: ``spec/rules/rmsprop.md``."""

from dataclasses import dataclass
from typing import Any

from multiopt.rules.adam import first_moment, moments, second_moment
from multiopt.rules.decay import descending, descent, penalized, shrunk
from multiopt.rules.rule import FRACTION, NONNEGATIVE, Hyperparameter, Rule, Update, number, switch

__all__ = ["RMSprop"]


def rmsprop(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """Descend along the gradient over the root of its mean square."""
    (square_avg,) = slots
    grad = penalized(param, descending(grad, c), c)
    square_avg = second_moment(square_avg, grad, c)
    return shrunk(param, c) - c.lr * scaled(xp, grad, square_avg, c), (square_avg,)


def rmsprop_with_momentum(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """Descend along a buffer of such directions."""
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
    """Descend along a buffer of such directions."""
    square_avg, buffer, grad_avg = slots
    grad = penalized(param, descending(grad, c), c)
    square_avg = second_moment(square_avg, grad, c)
    grad_avg = first_moment(grad_avg, grad, c)
    direction = scaled(xp, grad, variance(xp, square_avg, grad_avg), c)
    buffer = c.momentum * buffer + direction
    return shrunk(param, c) - c.lr * buffer, (square_avg, buffer, grad_avg)


def scaled(xp: Any, grad: Any, mean_square: Any, c: Any) -> Any:
    """The gradient over a root of a mean square."""
    return grad / (xp.sqrt(mean_square) + c.eps)


def variance(xp: Any, square_avg: Any, grad_avg: Any) -> Any:
    """The mean square less the square of the mean, which rounding must not bring below zero."""
    difference = square_avg - grad_avg * grad_avg
    return xp.where(difference < 0.0, 0.0, difference)


@dataclass(frozen=True)
class RMSprop(Rule):
    """RMSprop: the gradient over the root of a running average of its square.

    Source: Tieleman & Hinton, "Lecture 6.5 - rmsprop" (Coursera, Neural Networks for Machine
    Learning, 2012); centered: Graves, "Generating Sequences With Recurrent Neural Networks"
    (2013, arXiv:1308.0850), equations 38-41, in torch's form, with ``eps`` outside the root. Names
    and defaults are those of ``torch.optim.RMSprop``.

    Args:
        lr: Learning rate, >= 0.
        alpha: How much of the averages stays at a step, >= 0 and < 1.
        eps: Added to the root, >= 0.
        weight_decay: L2 penalty, >= 0: ``weight_decay * param`` is added to the gradient.
        momentum: Share of the buffer of directions that stays, >= 0; 0 keeps no buffer.
        centered: Divide by the root of the gradient's variance instead of its mean square.
        maximize: Ascend instead.
        decoupled_weight_decay: The decay shrinks the parameter as ``AdamW``'s, instead.

    Each of the first five may be a schedule ``step -> number``.

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
        """``square_avg``, ``momentum_buffer`` with a momentum, ``grad_avg`` where centered."""
        buffer = () if self.momentum == 0 else ("momentum_buffer",)
        return ("square_avg", *buffer, *(("grad_avg",) if self.centered else ()))

    @property
    def update(self) -> Update:
        """One step."""
        if self.centered:
            return centered if self.momentum == 0 else centered_with_momentum
        return rmsprop if self.momentum == 0 else rmsprop_with_momentum

    @classmethod
    def scalars(cls, h: Any, step: Any) -> dict[str, Any]:
        """The numbers of a step."""
        return dict(
            **moments(h.alpha, h.alpha),
            lr=h.lr,
            eps=h.eps,
            momentum=h.momentum,
            **descent(h, h.lr, h.decoupled_weight_decay),
        )
