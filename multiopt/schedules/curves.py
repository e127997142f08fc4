"""Schedules that are a formula of the step, with no state of their own.

In the formulas ``t`` is the step. It is 1 for the first step, so that ``t - 1`` steps have passed.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import cos, pi
from typing import Literal

from multiopt.rules.declared import (
    FINITE,
    FRACTION,
    NONNEGATIVE,
    NONNEGATIVE_INTEGER,
    POSITIVE,
    POSITIVE_INTEGER,
    choice,
    number,
    switch,
    within,
)
from multiopt.schedules.base import Schedule, as_tuple

__all__ = [
    "Constant",
    "Cosine",
    "CosineWarmRestarts",
    "Exponential",
    "InverseTime",
    "Linear",
    "MultiStep",
    "OneCycle",
    "Polynomial",
    "StepDecay",
]


@dataclass(frozen=True)
class Constant(Schedule):
    """The same number at every step, for use as a part of a ``Join``.

    Source: ``optax.constant_schedule``.

    Args:
        value: The number.

    >>> Constant(0.1)(7)
    0.1
    """

    value: float = field(metadata=within(FINITE))

    def __call__(self, step: int) -> float:
        """The number for a step; the first step is 1."""
        return self.value


@dataclass(frozen=True)
class Exponential(Schedule):
    """``initial * gamma ** ((t - 1) / steps)``: every step multiplies by the same factor.

    Source: ``torch.optim.lr_scheduler.ExponentialLR``; with ``steps``,
    ``optax.exponential_decay``, which calls ``steps`` ``transition_steps`` and ``gamma``
    ``decay_rate``.

    Args:
        initial: The value of the first step.
        gamma: The factor, >= 0.
        steps: The number of steps in which the factor is applied once, > 0.

    >>> [Exponential(0.8, gamma=0.5)(step) for step in (1, 2, 3)]
    [0.8, 0.4, 0.2]
    """

    initial: float = field(metadata=within(FINITE))
    gamma: float = field(metadata=within(NONNEGATIVE))
    steps: float = number(1.0, POSITIVE)

    def __call__(self, step: int) -> float:
        """The number for a step; the first step is 1."""
        return float(self.initial * self.gamma ** ((step - 1) / self.steps))


@dataclass(frozen=True)
class StepDecay(Schedule):
    """Multiply by a factor after every ``step_size`` steps.

    Source: ``torch.optim.lr_scheduler.StepLR``; ``optax.exponential_decay(staircase=True)``.

    Args:
        initial: The value of the first ``step_size`` steps.
        step_size: The number of steps that have the same value, >= 1.
        gamma: The factor, >= 0.

    >>> [StepDecay(0.8, step_size=2, gamma=0.5)(step) for step in (1, 2, 3, 4, 5)]
    [0.8, 0.8, 0.4, 0.4, 0.2]
    """

    initial: float = field(metadata=within(FINITE))
    step_size: int = field(metadata=within(POSITIVE_INTEGER))
    gamma: float = number(0.1, NONNEGATIVE)

    def __call__(self, step: int) -> float:
        """The number for a step; the first step is 1."""
        return float(self.initial * self.gamma ** ((step - 1) // self.step_size))


@dataclass(frozen=True)
class MultiStep(Schedule):
    """Multiply by a factor after each of several numbers of steps.

    Source: ``torch.optim.lr_scheduler.MultiStepLR``; ``optax.piecewise_constant_schedule`` with one
    factor.

    Args:
        initial: The value up to the first milestone.
        milestones: The numbers of steps, >= 0 and in ascending order, after which the factor is
            applied. A milestone given twice counts twice.
        gamma: The factor, >= 0.

    >>> [MultiStep(0.8, milestones=[1, 3], gamma=0.5)(step) for step in (1, 2, 3, 4)]
    [0.8, 0.4, 0.4, 0.2]
    """

    initial: float = field(metadata=within(FINITE))
    milestones: Sequence[int]
    gamma: float = number(0.1, NONNEGATIVE)

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        given = as_tuple(self.milestones)
        holds = all(map(NONNEGATIVE_INTEGER.has, given)) and list(given) == sorted(given)
        self._require(holds, "milestones", "integers >= 0 in ascending order")
        object.__setattr__(self, "milestones", tuple(map(int, given)))

    def __call__(self, step: int) -> float:
        """The number for a step; the first step is 1."""
        return float(self.initial * self.gamma ** bisect_right(self.milestones, step - 1))


@dataclass(frozen=True)
class Polynomial(Schedule):
    """From ``initial`` to ``final`` in ``steps`` steps, along a power of the remaining share.

    The value is ``final + (initial - final) * (1 - (t - 1) / steps) ** power``, then ``final``.

    Source: ``optax.polynomial_schedule``; ``torch.optim.lr_scheduler.PolynomialLR`` for a ``final``
    of 0.

    Args:
        initial: The value of the first step.
        final: The value after ``steps`` steps.
        steps: The length, >= 1.
        power: The exponent, > 0.

    >>> [Polynomial(1.0, 0.0, steps=2, power=2.0)(step) for step in (1, 2, 3, 4)]
    [1.0, 0.25, 0.0, 0.0]
    """

    initial: float = field(metadata=within(FINITE))
    final: float = field(metadata=within(FINITE))
    steps: int = field(metadata=within(POSITIVE_INTEGER))
    power: float = number(1.0, POSITIVE)

    def __call__(self, step: int) -> float:
        """The number for a step; the first step is 1."""
        left = max(1.0 - (step - 1) / self.steps, 0.0)
        return _between(self.final, self.initial, left**self.power)


@dataclass(frozen=True)
class Linear(Schedule):
    """From ``initial`` to ``final`` in equal steps, then ``final``. Upwards, it is a warm-up.

    A warm-up from 0 does not move the parameter in its first step. ``Linear(lr / n, lr, n - 1)``
    does, and reaches ``lr`` at step ``n``.

    Source: ``optax.linear_schedule``; ``torch.optim.lr_scheduler.LinearLR``, whose factors are
    ``initial / lr`` and ``final / lr``. Warm-up: Goyal et al., "Accurate, Large Minibatch SGD"
    (2017, arXiv:1706.02677), section 2.2.

    Args:
        initial: The value of the first step.
        final: The value after ``steps`` steps.
        steps: The length, >= 1.

    >>> [Linear(0.0, 1.0, steps=4)(step) for step in (1, 2, 5, 6)]
    [0.0, 0.25, 1.0, 1.0]
    """

    initial: float = field(metadata=within(FINITE))
    final: float = field(metadata=within(FINITE))
    steps: int = field(metadata=within(POSITIVE_INTEGER))

    def __call__(self, step: int) -> float:
        """The number for a step; the first step is 1."""
        return _between(self.initial, self.final, min((step - 1) / self.steps, 1.0))


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from ``initial`` to ``final``, then ``final``.

    Source: Loshchilov & Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts" (ICLR 2017,
    arXiv:1608.03983), equation 5, one period. ``optax.cosine_decay_schedule``;
    ``torch.optim.lr_scheduler.CosineAnnealingLR``, which rises again after ``T_max`` steps.

    Args:
        initial: The value of the first step.
        steps: The length, >= 1.
        final: The value after ``steps`` steps.

    >>> [round(Cosine(1.0, steps=4)(step), 4) for step in (1, 2, 3, 4, 5, 6)]
    [1.0, 0.8536, 0.5, 0.1464, 0.0, 0.0]
    """

    initial: float = field(metadata=within(FINITE))
    steps: int = field(metadata=within(POSITIVE_INTEGER))
    final: float = number(0.0, FINITE)

    def __call__(self, step: int) -> float:
        """The number for a step; the first step is 1."""
        return _between(self.initial, self.final, _wave(min((step - 1) / self.steps, 1.0)))


@dataclass(frozen=True)
class CosineWarmRestarts(Schedule):
    """``Cosine`` over and over, each time ``multiplier`` times as long.

    Source: Loshchilov & Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts" (ICLR 2017,
    arXiv:1608.03983), equation 5. ``torch.optim.lr_scheduler.CosineAnnealingWarmRestarts`` calls
    ``period``, ``multiplier`` and ``final`` ``T_0``, ``T_mult`` and ``eta_min``.

    Args:
        initial: The value of the first step and of each restart.
        period: The length of the first cosine, >= 1.
        multiplier: How many times as long each cosine is as the one before, an integer >= 1.
        final: The value that each cosine approaches.

    >>> restarts = CosineWarmRestarts(1.0, period=1, multiplier=2)
    >>> [round(restarts(step), 4) for step in range(1, 8)]
    [1.0, 1.0, 0.5, 1.0, 0.8536, 0.5, 0.1464]
    """

    initial: float = field(metadata=within(FINITE))
    period: int = field(metadata=within(POSITIVE_INTEGER))
    multiplier: int = number(1, POSITIVE_INTEGER)
    final: float = number(0.0, FINITE)

    def __call__(self, step: int) -> float:
        """The number for a step; the first step is 1."""
        passed, length = step - 1, self.period
        if self.multiplier == 1:
            passed %= length
        while passed >= length:
            passed, length = passed - length, length * self.multiplier
        return _between(self.initial, self.final, _wave(passed / length))


@dataclass(frozen=True)
class OneCycle(Schedule):
    """Up to ``peak``, then down to far below the first value, which is held afterwards.

    The value goes from ``peak / div_factor`` to ``peak``, and then down to
    ``peak / (div_factor * final_div_factor)``, which is the value of step ``steps``.

    Source: Smith & Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large
    Learning Rates" (2018, arXiv:1708.07120). Names, defaults and numbers are those of
    ``torch.optim.lr_scheduler.OneCycleLR`` (``max_lr`` and ``total_steps`` are ``peak`` and
    ``steps``). torch raises an error after the last step. It also does so if the way up is shorter
    than one step, where here the first step has ``peak``.

    Args:
        peak: The highest value.
        steps: The length, >= 1.
        pct_start: The share of the steps that go up, >= 0 and < 1.
        anneal: ``"cos"`` or ``"linear"``.
        div_factor: ``peak`` divided by the first value, > 0.
        final_div_factor: The first value divided by the last value, > 0.
        three_phase: Whether the way down first returns to the first value, in as many steps as the
            way up; ``pct_start`` is then at most 0.5.

    >>> cycle = OneCycle(1.0, steps=5, pct_start=0.6, anneal="linear", div_factor=4.0)
    >>> [round(cycle(step), 4) for step in (1, 2, 3, 4, 5, 6)]
    [0.25, 0.625, 1.0, 0.5, 0.0, 0.0]
    """

    peak: float = field(metadata=within(FINITE))
    steps: int = field(metadata=within(POSITIVE_INTEGER))
    pct_start: float = number(0.3, FRACTION)
    anneal: Literal["cos", "linear"] = choice("cos", "linear", default="cos")
    div_factor: float = number(25.0, POSITIVE)
    final_div_factor: float = number(1e4, POSITIVE)
    three_phase: bool = switch()

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        fits = not self.three_phase or self.pct_start <= 0.5
        self._require(fits, "pct_start", "at most 0.5 with three_phase")

    def __call__(self, step: int) -> float:
        """The number for a step; the first step is 1."""
        low = self.peak / self.div_factor
        lowest = low / self.final_div_factor
        top, last = self.pct_start * self.steps - 1, self.steps - 1
        ways = [(low, self.peak, top), (self.peak, lowest, last)]
        if self.three_phase:
            ways[1:] = [(self.peak, low, 2 * top), (low, lowest, last)]
        passed, begun = step - 1, 0.0
        for start, stop, end in ways:
            if passed <= end and begun < end:
                share = (passed - begun) / (end - begun)
                return _between(start, stop, _wave(share) if self.anneal == "cos" else share)
            begun = max(begun, end)
        return lowest


@dataclass(frozen=True)
class InverseTime(Schedule):
    """``initial / (1 + (t - 1) / steps) ** power``: slow enough to arrive, fast enough to settle.

    For 1/2 < ``power`` <= 1 the values have an infinite sum and a finite sum of squares. These are
    the conditions of Robbins and Monro, under which stochastic approximation converges. With a
    ``power`` of 1/2 or less the noise of the gradients need not die down; with more than 1 the
    steps may become small too early.

    Source: Robbins & Monro, "A Stochastic Approximation Method" (Annals of Mathematical Statistics,
    1951); in variational inference Hoffman, Blei, Wang & Paisley, "Stochastic Variational
    Inference" (JMLR 2013), whose ``(t + delay) ** -forgetting_rate`` is this with
    ``steps = 1 + delay``, except for a factor. With a ``power`` of 1 it is Keras's
    ``InverseTimeDecay``.

    Args:
        initial: The value of the first step.
        steps: The number of steps after which the value is ``initial / 2 ** power``, > 0.
        power: The exponent, > 0.

    >>> [InverseTime(1.0, steps=2)(step) for step in (1, 3, 7)]
    [1.0, 0.5, 0.25]
    """

    initial: float = field(metadata=within(FINITE))
    steps: float = number(1.0, POSITIVE)
    power: float = number(1.0, POSITIVE)

    def __call__(self, step: int) -> float:
        """The number for a step; the first step is 1."""
        return float(self.initial * (1.0 + (step - 1) / self.steps) ** -self.power)


def _between(start: float, stop: float, share: float) -> float:
    return start * (1.0 - share) + stop * share


def _wave(share: float) -> float:
    return (1.0 - cos(pi * share)) / 2.0
