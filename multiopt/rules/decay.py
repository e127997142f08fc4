"""What most rules begin with: turning ascent into descent, and the two kinds of weight decay.

``descent`` computes the coefficients that the other three functions read. An L2 penalty is added to
the gradient; a decoupled decay shrinks the parameter instead. A decay that is off is not computed,
since ``0 * param`` is NaN where the parameter is infinite.
"""

from typing import Any

__all__ = ["descending", "descent", "penalized", "shrunk"]


def descent(h: Any, rate: Any, decoupled: bool) -> dict[str, Any]:
    """The coefficients of ``descending``, ``penalized`` and ``shrunk``.

    Args:
        h: The hyperparameters: ``weight_decay`` and, unless the rule can only descend,
            ``maximize``.
        rate: The learning rate of the step.
        decoupled: Whether the decay shrinks the parameter instead of being added to the gradient.
    """
    is_on = h.weight_decay != 0
    return {
        "maximizes": getattr(h, "maximize", False),
        "weight_decay": h.weight_decay,
        "penalizes": not decoupled and is_on,
        "shrinkage": 1.0 - rate * h.weight_decay,
        "shrinks": decoupled and is_on,
    }


def descending(grad: Any, c: Any) -> Any:
    """The gradient of what is minimized: negated if the rule maximizes."""
    return -grad if c.maximizes else grad


def penalized(param: Any, grad: Any, c: Any) -> Any:
    """The gradient plus the gradient of the L2 penalty ``weight_decay / 2 * param ** 2``."""
    return grad + c.weight_decay * param if c.penalizes else grad


def shrunk(param: Any, c: Any) -> Any:
    """The parameter after decoupled weight decay (Loshchilov & Hutter 2019, Algorithm 2)."""
    return c.shrinkage * param if c.shrinks else param
