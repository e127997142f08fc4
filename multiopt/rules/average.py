"""Averages of parameters over their steps, kept as one more slot of each parameter.

``Average`` is a rule that moves only its slot, never the parameter. ``Averaged`` chains a rule and
an average into one rule, so that one pass over the memory updates both. ``spec/registry.md`` states
what users can rely on.

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

from multiopt.rules.arithmetic import one_minus_power, where
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

#: The slot of a chained rule that holds the average.
AVERAGE = "param_average"


def average(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """Move the average towards the parameter, which does not change."""
    (mean,) = slots
    mean = param if c.follows else mean + c.share * (param - mean)
    return param, (mean,)


@dataclass(frozen=True)
class Average(Rule):
    """The average of a parameter over its steps, kept in addition to the parameter.

    With noisy gradients the parameter wanders around the optimum, and the mean of its values is
    closer to the optimum than the last value. Source: Polyak & Juditsky, "Acceleration of
    Stochastic Approximation by Averaging" (SIAM J. Control Optim. 30, 1992), equation 2; Ruppert
    (1988). It takes the form of a rule: each step moves the average towards the new parameter.

    Args:
        decay: > 0 and <= 1. 1 gives the plain mean of all values since ``start``
            (Polyak-Ruppert). A smaller number gives an exponential average, bias-corrected as in
            Adam, in which each value has ``decay`` times the weight of the next one.
        start: The first step of the parameter that counts, an integer >= 1. Until then the average
            is the parameter.

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
        """Compute the weight of the newest value in an average of ``count`` values."""
        count = where(step < h.start, 1.0, step - h.start + 1.0)
        plain = h.decay == 1.0
        total = where(plain, count, one_minus_power(h.decay, count))
        return dict(
            share=where(plain, 1.0, 1.0 - h.decay) / total,
            follows=count == 1.0,
        )


@dataclass(frozen=True)
class Averaged(Rule):
    """A rule chained with the average of the parameter that it updates.

    Engines receive it in place of the rule. Users never see it.

    Args:
        rule: The rule.
        average: The average.
        since: The clock of the parameter before the first step that the average has seen. It is
            negative if the clock has been reset since, because an average counts its own steps.
    """

    rule: Rule
    average: Average
    since: float = number(0, FINITE)

    nested: ClassVar = ("rule", "average")

    @property
    def elementwise(self) -> bool:  # type: ignore[override]
        """Whether the rule updates each element by itself; the average always does."""
        return self.rule.elementwise

    @property
    def slots(self) -> tuple[str, ...]:
        """The slots of the rule, then the slot of the average."""
        return (*self.rule.slots, AVERAGE)

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The slots of the rule with their shapes, and the average with the parameter's shape."""
        return {**self.rule.slot_shapes(shape), AVERAGE: shape}

    @property
    def update(self) -> Update:
        """The formula of the rule, followed by the formula of the average."""
        step, follow = self.rule.update, self.average.update

        def both(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
            param, kept = step(xp, param, grad, slots[:-1], _of("rule", c))
            _, mean = follow(xp, param, grad, slots[-1:], _of("average", c))
            return param, kept + mean

        return both

    def scalars(self, h: Any, step: Any) -> dict[str, Any]:  # type: ignore[override]
        """Compute both sets of coefficients, under dotted names."""
        # A rule without hyperparameters is not in ``h``. The average counts its own steps.
        found = {
            "rule": self.rule.scalars(getattr(h, "rule", None), step),
            "average": self.average.scalars(h.average, step - h.since),
        }
        return {f"{of}.{name}": x for of, c in found.items() for name, x in named(c).items()}


def _of(which: str, c: Any) -> Coefficients:
    """The coefficients of one of the two chained rules."""
    start = f"{which}."
    return Coefficients(
        **{name.removeprefix(start): x for name, x in vars(c).items() if name.startswith(start)}
    )
