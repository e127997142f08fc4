"""Steps that most rules begin with: ascent turned into descent, and the two weight decays.

A decay that is off is not computed: ``0 * param`` is NaN where the parameter is infinite.
"""

from typing import Any

__all__ = ["descending", "descent", "penalized", "shrunk"]


def descent(h: Any, rate: Any, decoupled: bool) -> dict[str, Any]:
    """The coefficients of ``descending``, ``penalized`` and ``shrunk``.

    Args:
        h: What has the ``weight_decay`` and, unless the rule only descends, ``maximize``.
        rate: The learning rate of the step.
        decoupled: Whether the decay shrinks the parameter, or else joins the gradient.
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
    """The gradient of what is minimized: the negative one where the rule maximizes."""
    return -grad if c.maximizes else grad


def penalized(param: Any, grad: Any, c: Any) -> Any:
    """The gradient with that of the L2 penalty, ``weight_decay / 2 * param ** 2``, added."""
    return grad + c.weight_decay * param if c.penalizes else grad


def shrunk(param: Any, c: Any) -> Any:
    """The parameter after decoupled weight decay (Loshchilov & Hutter 2019, Algorithm 2)."""
    return c.shrinkage * param if c.shrinks else param
