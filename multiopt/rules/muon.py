"""Muon: the momentum of a matrix, orthogonalized, is the direction of a step.

An iteration of matrix products brings all singular values near 1. Matrix products are rounded
differently by each library, so results agree within a tolerance instead of to the last bit.
``spec/rules/muon.md`` gives the formulas and the tolerance.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar, Literal

from multiopt.rules.arithmetic import maximum
from multiopt.rules.decay import descent, shrunk
from multiopt.rules.rule import (
    FINITE,
    NONNEGATIVE,
    Hyperparameter,
    Range,
    Rule,
    choice,
    number,
    switch,
)
from multiopt.rules.sums import norm

__all__ = ["Muon"]


def muon(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """Jordan's Muon in torch's form."""
    (buffer,) = slots
    buffer = c.momentum * buffer + c.one_minus_momentum * grad
    ahead = c.momentum * buffer + c.one_minus_momentum * grad if c.nesterov else buffer
    direction = orthogonalized(xp, ahead, c)
    return shrunk(param, c) - step_size(param.shape, c) * direction, (buffer,)


def orthogonalized(xp: Any, x: Any, c: Any) -> Any:
    """A matrix with about the same singular vectors, and with all singular values near 1.

    Each step of the Newton-Schulz iteration maps a singular value ``s`` to
    ``a * s + b * s ** 3 + c * s ** 5``.
    """
    is_tall = x.shape[0] > x.shape[1]
    if is_tall:
        # The product with the transpose is then the smaller one of the two.
        x = xp.matrix_transpose(x)
    x = x / maximum(xp, xp.asarray(norm(xp, x), dtype=x.dtype), c.eps)
    for _ in range(int(c.ns_steps)):
        gram = x @ xp.matrix_transpose(x)
        x = c.a * x + (c.b * gram + c.c * (gram @ gram)) @ x
    return xp.matrix_transpose(x) if is_tall else x


def step_size(shape: tuple[int, int], c: Any) -> float:
    """The learning rate for a matrix of this shape."""
    rows, columns = shape
    if c.matches_adamw:
        return float(c.lr * c.rms * sqrt(max(rows, columns)))
    return float(c.lr * sqrt(rows / columns)) if rows > columns > 0 else float(c.lr)


@dataclass(frozen=True)
class Muon(Rule):
    """Muon: steps along the momentum of a matrix, with all singular values made roughly equal.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024,
    https://kellerjordan.github.io/posts/muon/), in torch's form. Names and defaults are those of
    ``torch.optim.Muon``.

    It is meant for the matrices inside a network. Other parameters need another rule, which a
    callable can choose by name: ``Optimizer(lambda name: Muon() if name in hidden else AdamW())``.

    Args:
        lr: Learning rate, >= 0.
        weight_decay: Decay, >= 0: a step multiplies the parameter by ``1 - lr * weight_decay``.
        momentum: Decay rate of the average of the gradients, >= 0.
        nesterov: Average the gradient into the direction once more.
        ns_coefficients: ``a``, ``b`` and ``c`` of the Newton-Schulz iteration.
        eps: Lower bound of the norm by which the direction is divided before the iteration, >= 0.
        ns_steps: Number of steps of the iteration, from 0 to 99.
        adjust_lr_fn: The factor of ``lr`` for a matrix of m rows and n columns. It is
            ``sqrt(max(1, m / n))`` for None or ``"original"``, and ``0.2 * sqrt(max(m, n))`` for
            ``"match_rms_adamw"``, so that values of ``lr`` and ``weight_decay`` for AdamW fit.

    ``lr``, ``weight_decay``, ``momentum``, ``eps`` and each of ``ns_coefficients`` may be
    schedules ``step -> number``.

    Raises:
        ValueError: A value is out of range.

    >>> import numpy as np, multiopt as mo
    >>> opt = mo.Optimizer(mo.Muon(lr=0.5, weight_decay=0.0))
    >>> w = np.zeros((2, 2))
    >>> _ = opt.step({"w": w}, {"w": np.array([[0.0, 3.0], [-3.0, 0.0]])})
    >>> w.round(1).tolist()
    [[0.0, -0.6], [0.6, 0.0]]
    """

    lr: Hyperparameter = number(1e-3, NONNEGATIVE)
    weight_decay: Hyperparameter = number(0.1, NONNEGATIVE)
    momentum: Hyperparameter = number(0.95, NONNEGATIVE)
    nesterov: bool = switch(True)
    ns_coefficients: tuple[Hyperparameter, Hyperparameter, Hyperparameter] = number(
        (3.4445, -4.775, 2.0315), FINITE
    )
    eps: Hyperparameter = number(1e-7, NONNEGATIVE)
    ns_steps: int = number(5, Range("an integer from 0 to 99", below=100, whole=True))
    adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = choice(
        None, "original", "match_rms_adamw", default=None
    )

    elementwise: ClassVar[bool] = False
    slots: ClassVar = ("momentum_buffer",)
    update: ClassVar = staticmethod(muon)

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The slot of a matrix; it has the shape of the parameter.

        Raises:
            ValueError: The parameter is not a matrix.
        """
        if len(shape) != 2:
            raise ValueError(
                f"Muon is for matrices; got shape {shape}: give such names another rule by a "
                "callable, as in Optimizer(lambda name: AdamW() if name == ... else Muon())"
            )
        return super().slot_shapes(shape)

    @classmethod
    def scalars(cls, h: Any, step: Any) -> dict[str, Any]:
        """Compute the coefficients of a step."""
        a, b, c = h.ns_coefficients
        return dict(
            momentum=h.momentum,
            one_minus_momentum=1.0 - h.momentum,
            nesterov=h.nesterov,
            a=a,
            b=b,
            c=c,
            eps=h.eps,
            ns_steps=h.ns_steps,
            lr=h.lr,
            rms=0.2,
            matches_adamw=h.adjust_lr_fn == "match_rms_adamw",
            **descent(h, h.lr, decoupled=True),
        )
