"""Pyro's AdagradRMSProp, the step sizes of automatic differentiation variational inference.

Step sizes decay over time as Adagrad's do, and adapt to an average of squared gradients as
RMSProp's do. ``spec/rules/adagrad_rmsprop.md`` gives the formula in the order in which it is
computed.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from multiopt.rules.adam import descend, second_moment
from multiopt.rules.rule import NONNEGATIVE, SHARE, Hyperparameter, Range, Rule, number

__all__ = ["AdagradRMSProp"]


def adagrad_rmsprop(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """AdagradRMSProp: Kucukelbir et al., equations 10 and 11."""
    (average,) = slots
    average = second_moment(average, grad, c)
    return descend(xp, param, grad, average, c), (average,)


@dataclass(frozen=True)
class AdagradRMSProp(Rule):
    """The step sizes of ADVI: Adagrad's decay over time, RMSProp's average of squared gradients.

    Source: Kucukelbir, Tran, Ranganath, Gelman & Blei, "Automatic Differentiation Variational
    Inference" (JMLR 18, 2017, arXiv:1603.00788), equations 10 and 11 with ``tau`` of 1, as
    ``pyro.optim.adagrad_rmsprop.AdagradRMSProp`` has them. Names and defaults are Pyro's.

    Args:
        eta: Scale of the step size, >= 0.
        delta: Added to the exponent of the decay, >= -1 and < 1: step ``i`` has the factor
            ``i ** (delta - 1/2)``. The C library of the host computes it, so it is the same for
            all array libraries, but not necessarily on all machines.
        t: Weight of the new squared gradient in the average, from 0 to 1.

    All three may be schedules ``step -> number``.

    Raises:
        ValueError: A value is out of range.

    >>> import numpy as np, multiopt as mo
    >>> opt = mo.Optimizer(mo.AdagradRMSProp(eta=0.5))
    >>> w = np.array([1.0, -1.0])
    >>> _ = opt.step({"w": w}, {"w": np.array([4.0, -0.25])})
    >>> w.round(4).tolist()
    [0.6, -0.9]
    """

    eta: Hyperparameter = number(1.0, NONNEGATIVE)
    delta: Hyperparameter = number(1e-16, Range("a number >= -1 and < 1", low=-1.0, below=1.0))
    t: Hyperparameter = number(0.1, SHARE)

    #: Pyro's name for the average.
    slots: ClassVar = ("sum",)
    update: ClassVar = staticmethod(adagrad_rmsprop)

    @classmethod
    def scalars(cls, h: Any, step: Any) -> dict[str, Any]:
        """Compute the coefficients of a step."""
        return dict(
            # The first average is the first squared gradient.
            beta2=np.where(step == 1, 0.0, 1.0 - h.t),
            one_minus_beta2=np.where(step == 1, 1.0, h.t),
            step_size=h.eta * _power(step, h.delta - 0.5),
            root_scale=1.0,
            eps=1.0,
        )


def _power(base: Any, exponent: Any) -> Any:
    """``base ** exponent`` with the host's ``pow`` for each number; NumPy's for arrays differs."""
    return np.vectorize(math.pow, [float])(base, exponent)
