"""Averages of the parameters over the steps: ``spec/registry.md``, "Averages".

An average is one more slot of a parameter. A rule and an average are chained into one rule, so that
one pass over the memory updates both:

>>> import numpy as np
>>> from multiopt.rules.average import Average, Averaged
>>> from multiopt.rules import SGD
>>> rule = Averaged(SGD(lr=1.0, momentum=0.5), Average())
>>> rule.slots
('momentum_buffer', 'param_average')
>>> param, slots = np.zeros(1), (np.zeros(1), np.zeros(1))
>>> for step in (1, 2):
...     param, slots = rule.update(np, param, np.ones(1), slots, rule.coefficients(step))
>>> param.tolist(), slots[1].tolist()
([-2.5], [-1.75])
"""

from dataclasses import dataclass
from math import ulp
from typing import Any, ClassVar

import numpy as np

from multiopt.rules.arithmetic import one_minus_power
from multiopt.rules.rule import (
    FINITE,
    SHARE,
    Coefficients,
    Hyperparameter,
    Range,
    Rule,
    Update,
    named,
    number,
)

__all__ = ["AVERAGE", "Average", "Averaged"]

#: The name of the slot of a chained rule that has the average.
AVERAGE = "param_average"


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
        start: The first of its steps that counts, an integer >= 1. Before it the average is the
            parameter.

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

    decay: Hyperparameter = number(1.0, SHARE._replace(words="a number > 0 and <= 1", low=ulp(0.0)))
    start: float = number(1, Range("an integer >= 1", low=1.0))

    slots: ClassVar = ("average",)
    update: ClassVar = staticmethod(average)

    def __post_init__(self) -> None:
        """Check the hyperparameters."""
        super().__post_init__()
        whole = not callable(self.start) and self.start == int(self.start)
        self._require(whole, "start", "an integer >= 1")

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


@dataclass(frozen=True)
class Averaged(Rule):
    """A rule, and then the average of the parameter that it makes.

    Engines get it in the place of the rule; users never do.

    Args:
        rule: The rule.
        average: The average.
        since: The clock of the parameter before the first step that the average has seen. Less than
            0 if the clock was reset meanwhile: an average counts its own steps.
    """

    rule: Rule
    average: Average
    since: float = number(0, FINITE)

    nested: ClassVar = ("rule", "average")

    @property
    def elementwise(self) -> bool:  # type: ignore[override]
        """As the rule."""
        return self.rule.elementwise

    @property
    def slots(self) -> tuple[str, ...]:
        """Those of the rule, and the average."""
        return (*self.rule.slots, AVERAGE)

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Those of the rule, and the average like the parameter."""
        return {**self.rule.slot_shapes(shape), AVERAGE: shape}

    @property
    def update(self) -> Update:
        """Both formulas, one after the other."""
        step, follow = self.rule.update, self.average.update

        def both(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
            param, kept = step(xp, param, grad, slots[:-1], _of("rule", c))
            _, mean = follow(xp, param, grad, slots[-1:], _of("average", c))
            return param, kept + mean

        return both

    def scalars(self, h: Any, step: Any) -> dict[str, Any]:  # type: ignore[override]
        """Those of the rule, and those of the average at its own step, under dotted names."""
        # A rule without hyperparameters has no namespace.
        found = {
            "rule": self.rule.scalars(getattr(h, "rule", None), step),
            "average": self.average.scalars(h.average, step - h.since),
        }
        return {f"{of}.{name}": x for of, c in found.items() for name, x in named(c).items()}


def _of(which: str, c: Any) -> Coefficients:
    """The coefficients of one of two chained rules."""
    start = f"{which}."
    return Coefficients(
        **{name.removeprefix(start): x for name, x in vars(c).items() if name.startswith(start)}
    )
