"""Adafactor: the second moment of a matrix is kept as the means of its rows and of its columns.

Sums are exact. The rule is not elementwise. ``spec/rules/adafactor.md`` gives the formulas in the
order in which they are computed.
"""

from dataclasses import dataclass
from math import ulp
from typing import Any, ClassVar

import numpy as np

from multiopt.rules.adam import second_moment
from multiopt.rules.arithmetic import maximum
from multiopt.rules.decay import descending, descent, shrunk
from multiopt.rules.means import means
from multiopt.rules.rule import FINITE, NONNEGATIVE, Hyperparameter, Range, Rule, number, switch
from multiopt.rules.sums import root_mean_square

__all__ = ["Adafactor"]


def adafactor(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """Adafactor: Shazeer & Stern, Algorithms 4 and 5, in torch's form."""
    grad = descending(grad, c)
    eps1 = float(xp.finfo(param.dtype).eps) if c.takes_machine_eps else c.eps1
    if param.ndim < 2:
        (variance,) = slots = (second_moment(slots[0], grad, c),)
    else:
        row_var, col_var = slots = factored_second_moment(xp, slots, grad, c)
        variance = product(xp, row_var, col_var, eps1)
    direction = grad / maximum(xp, xp.sqrt(variance), eps1)
    size = maximum(xp, root_mean_square(xp, param), c.eps2)
    excess = maximum(xp, c.inverse_d * root_mean_square(xp, direction), 1.0)
    step_size = xp.asarray(c.relative_step * size / excess, dtype=param.dtype)
    return shrunk(param, c) - step_size * direction, slots


def factored_second_moment(xp: Any, slots: Any, grad: Any, c: Any) -> Any:
    """Update the exponential averages of the mean squares of the rows and of the columns."""
    squares = wide(xp, grad)
    squares = squares * squares
    rows = xp.expand_dims(means(xp, squares), axis=-1)
    columns = xp.expand_dims(means(xp, xp.matrix_transpose(squares)), axis=-2)
    return tuple(
        c.beta2 * average + c.one_minus_beta2 * xp.asarray(mean, dtype=grad.dtype)
        for average, mean in zip(slots, (rows, columns), strict=True)
    )


def product(xp: Any, row_var: Any, col_var: Any, eps1: Any) -> Any:
    """The second moment of rank one with these means of rows and columns."""
    total = means(xp, xp.matrix_transpose(wide(xp, row_var)))
    total = xp.asarray(xp.expand_dims(total, axis=-1), dtype=row_var.dtype)
    return row_var / maximum(xp, total, eps1) * col_var


def wide(xp: Any, x: Any) -> Any:
    """Convert an array to float64."""
    return xp.asarray(x, dtype=xp.float64)


@dataclass(frozen=True)
class Adafactor(Rule):
    """Adafactor: second moments kept as row and column means, and steps relative to the parameter.

    Source: Shazeer & Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost" (ICML
    2018, arXiv:1804.04235), Algorithms 4 and 5, in torch's form: ``lr`` bounds the relative step
    and scales a decoupled decay, ``eps[0]`` bounds denominators. Names and defaults are those of
    ``torch.optim.Adafactor``.

    Args:
        lr: Largest relative step, >= 0: step ``t`` uses ``min(lr, 1 / sqrt(t))``.
        beta2_decay: Sets the decay rate of the averages of squares, which is
            ``1 - t ** beta2_decay`` at step ``t``; <= 0.
        eps: Two lower bounds, each >= 0. The first is for the root of the second moment; None
            stands for the machine epsilon of the compute dtype. The second is for the root mean
            square of the parameter.
        d: Upper bound of the root mean square of a direction, >= 1; infinity for none.
        weight_decay: Decay, >= 0: a step multiplies the parameter by ``1 - lr * weight_decay``.
        maximize: Ascend instead of descending; the decay still shrinks the parameter.

    ``lr``, ``beta2_decay``, ``d``, ``weight_decay`` and either of ``eps`` may be schedules
    ``step -> number``.

    For arrays of two or more dimensions the second moment is factored along the last two; for
    others it is kept whole.

    Raises:
        ValueError: A value is out of range.

    >>> import numpy as np, multiopt as mo
    >>> opt = mo.Optimizer(mo.Adafactor(lr=0.5))
    >>> w = np.array([[1.0, -1.0], [1.0, 1.0]])
    >>> _ = opt.step({"w": w}, {"w": np.array([[4.0, -4.0], [2.0, 2.0]])})
    >>> w.round(4).tolist()
    [[0.5, -0.5], [0.5, 0.5]]
    >>> {name: slot.tolist() for name, slot in opt.state("w").slots.items()}
    {'row_var': [[16.0], [4.0]], 'col_var': [[10.0, 10.0]]}
    """

    lr: Hyperparameter = number(1e-2, NONNEGATIVE)
    beta2_decay: Hyperparameter = number(
        -0.8, Range("a finite number <= 0", low=FINITE.low, below=ulp(0.0))
    )
    eps: tuple[Hyperparameter | None, Hyperparameter] = number(
        (None, 1e-3), NONNEGATIVE._replace(optional=True)
    )
    d: Hyperparameter = number(1.0, Range("a number >= 1", low=1.0, infinite=True))
    weight_decay: Hyperparameter = number(0.0, NONNEGATIVE)
    maximize: bool = switch()

    elementwise: ClassVar[bool] = False
    #: Parameters of two or more dimensions have the first two, all others have the third.
    slots: ClassVar = ("row_var", "col_var", "variance")
    update: ClassVar = staticmethod(adafactor)

    def __post_init__(self) -> None:
        """Check the hyperparameters."""
        super().__post_init__()
        if self.eps[1] is None:
            self._refuse("eps[1]", "a number >= 0", None)

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Torch's shapes: a mean over the last axis, and a mean over the second to last."""
        if len(shape) < 2:
            return {"variance": shape}
        *stack, rows, columns = shape
        return {"row_var": (*stack, rows, 1), "col_var": (*stack, 1, columns)}

    @classmethod
    def scalars(cls, h: Any, step: Any) -> dict[str, Any]:
        """Compute the coefficients of a step."""
        eps1, eps2 = h.eps
        slow = 1.0 / np.sqrt(step)
        one_minus_beta2 = step**h.beta2_decay
        return dict(
            relative_step=np.where(h.lr < slow, h.lr, slow),
            beta2=1.0 - one_minus_beta2,
            one_minus_beta2=one_minus_beta2,
            eps1=0.0 if eps1 is None else eps1,
            takes_machine_eps=eps1 is None,
            eps2=eps2,
            inverse_d=1.0 / h.d,
            **descent(h, h.lr, decoupled=True),
        )
