"""Averages of the parameters over the steps: ``spec/registry.md``, "Averages"."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from multiopt.rules.arithmetic import one_minus_power
from multiopt.rules.rule import Hyperparameter, Range, Rule, number

__all__ = ["Average", "Choices"]


def average(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """Move the average towards the parameter, which stays as it is."""
    (mean,) = slots
    mean = param if c.follows else mean + c.share * (param - mean)
    return param, (mean,)


@dataclass(frozen=True)
class Average(Rule):
    """The average of a parameter over its steps, kept beside it.

    Where gradients are noisy, iterates wander about the optimum, and their mean is closer to it
    than the last one. Source: Polyak & Juditsky, "Acceleration of Stochastic Approximation by
    Averaging" (SIAM J. Control Optim. 30, 1992), equation 2; Ruppert (1988). In the form of a
    rule: each step moves the average towards the new parameter.

    Args:
        decay: 1 for the plain mean of all parameters since ``start`` (Polyak-Ruppert); less for
            an exponential average, corrected for its bias as Adam's are, in which a parameter
            weighs ``decay`` times as much as the next one. > 0 and <= 1.
        start: The first step of the name that counts, an integer >= 1. Before it the average is
            the parameter.

    ``decay`` may be a schedule ``step -> number``.

    Raises:
        ValueError: A value is out of range.

    >>> import numpy as np, multiopt as mo
    >>> opt = mo.Optimizer(mo.SGD(lr=1.0), average=mo.Average())
    >>> w = np.array([0.0])
    >>> for grad in (-1.0, -1.0, 3.0):
    ...     _ = opt.step({"w": w}, {"w": np.array([grad])})
    >>> w.tolist(), opt.average("w").round(12).tolist()
    ([-1.0], [0.666666666667])
    """

    decay: Hyperparameter = number(
        1.0, Range("a number > 0 and <= 1", low=5e-324, below=1.0 + 2.0**-52)
    )
    start: float = number(1, Range("an integer >= 1", low=1.0))

    slots: ClassVar = ("average",)
    update: ClassVar = staticmethod(average)

    def __post_init__(self) -> None:
        """Check the hyperparameters."""
        super().__post_init__()
        if callable(self.start) or self.start != int(self.start):
            raise ValueError(f"Average: start must be an integer >= 1; got {self.start!r}")

    @classmethod
    def scalars(cls, h: Any, step: Any) -> dict[str, Any]:
        """The numbers of a step: the weight of the newest of ``count`` parameters."""
        count = np.where(step < h.start, 1.0, step - h.start + 1.0)
        plain = h.decay == 1.0
        total = np.where(plain, count, one_minus_power(h.decay, count))
        return dict(
            share=np.where(plain, 1.0, 1.0 - h.decay) / total,
            follows=count == 1.0,
        )


class Choices(dict[str, Any]):
    """A callable ``name -> average`` that knows the answers."""

    __call__ = dict.__getitem__
