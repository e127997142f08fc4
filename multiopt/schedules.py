"""Schedules: numbers that change from step to step, for any hyperparameter in a rule's ``ranges``.

A schedule is a callable ``step -> number``, and any callable will do. Those here can be pickled,
compared, printed as the call that makes them, and described in saved state.

**The step is the number of the step about to be taken, 1 for the first**: what a schedule gives for
``t`` is what step ``t`` uses. Counting from 0, as optax and torch do, ``t`` is their ``t - 1``. It
counts the steps of the parameter's own name, so that a late parameter begins at the beginning;
``Shared`` counts the steps of the optimizer instead.

Values are computed in float64 with the powers and cosines of the host: equal on all backends of one
machine, and in the last bit perhaps not on another.

>>> import multiopt as mo
>>> lr = mo.schedules.Join([mo.schedules.Linear(0.0, 0.5, 2), mo.schedules.Cosine(0.5, 4)], [2])
>>> [round(lr(step), 4) for step in range(1, 8)]
[0.0, 0.25, 0.5, 0.4268, 0.25, 0.0732, 0.0]
>>> mo.Adam(lr=lr).at(2).lr
0.25
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from itertools import pairwise
from math import cos, inf, isfinite, nan, pi
from numbers import Integral, Real
from sys import float_info
from typing import Any, ClassVar, Literal

import numpy as np

from multiopt.errors import brief
from multiopt.reached import reached
from multiopt.rules.rule import FINITE, FRACTION, NONNEGATIVE, Range, is_shared

__all__ = [
    "Constant",
    "Cosine",
    "CosineWarmRestarts",
    "Exponential",
    "InverseTime",
    "Join",
    "Linear",
    "MultiStep",
    "OneCycle",
    "Plateau",
    "Polynomial",
    "Schedule",
    "Shared",
    "StepDecay",
]

POSITIVE = Range("a finite number > 0", low=5e-324)


class Schedule(ABC):
    """What the schedules here have in common: frozen dataclasses that are called with a step."""

    #: The range of each field that is a number.
    ranges: ClassVar[Mapping[str, Range]] = {}
    #: The least value of each field that is an integer.
    counts: ClassVar[Mapping[str, int]] = {}

    def __post_init__(self) -> None:
        """Hold the fields to their ranges.

        Raises:
            ValueError: One is out of its range or of another kind.
        """
        for name, allowed in self.ranges.items():
            value = getattr(self, name)
            real = isinstance(value, Real) and not isinstance(value, bool)
            number = float(value) if real else nan
            self._require(allowed.holds(number), name, allowed.words)
            object.__setattr__(self, name, number)
        for name, least in self.counts.items():
            self._require(_is_count(getattr(self, name), least), name, f"an integer >= {least}")
            object.__setattr__(self, name, int(getattr(self, name)))

    def _require(self, holds: bool, name: str, words: str) -> None:
        if not holds:
            raise ValueError(
                f"{type(self).__name__}: {name} must be {words}; got {brief(getattr(self, name))}"
            )

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The number for a step, 1 for the first."""


@dataclass(frozen=True)
class Constant(Schedule):
    """The same number at every step, for a part of a ``Join``.

    Source: ``optax.constant_schedule``.

    Args:
        value: The number.

    >>> Constant(0.1)(7)
    0.1
    """

    value: float

    ranges: ClassVar = {"value": FINITE}

    def __call__(self, step: int) -> float:
        """The number for a step, 1 for the first."""
        return self.value


@dataclass(frozen=True)
class Exponential(Schedule):
    """``initial * gamma ** ((t - 1) / steps)``: the same factor at every step.

    Source: ``torch.optim.lr_scheduler.ExponentialLR``; with ``steps``,
    ``optax.exponential_decay``, whose ``transition_steps`` they are, and ``gamma`` its
    ``decay_rate``.

    Args:
        initial: The value of the first step.
        gamma: The factor, >= 0.
        steps: In how many steps the factor is applied once, > 0.

    >>> [Exponential(0.8, gamma=0.5)(step) for step in (1, 2, 3)]
    [0.8, 0.4, 0.2]
    """

    initial: float
    gamma: float
    steps: float = 1.0

    ranges: ClassVar = {"initial": FINITE, "gamma": NONNEGATIVE, "steps": POSITIVE}

    def __call__(self, step: int) -> float:
        """The number for a step, 1 for the first."""
        return float(self.initial * self.gamma ** ((step - 1) / self.steps))


@dataclass(frozen=True)
class StepDecay(Schedule):
    """A factor after every ``step_size`` steps.

    Source: ``torch.optim.lr_scheduler.StepLR``; ``optax.exponential_decay(staircase=True)``.

    Args:
        initial: The value of the first ``step_size`` steps.
        step_size: How many steps have the same value, >= 1.
        gamma: The factor, >= 0.

    >>> [StepDecay(0.8, step_size=2, gamma=0.5)(step) for step in (1, 2, 3, 4, 5)]
    [0.8, 0.8, 0.4, 0.4, 0.2]
    """

    initial: float
    step_size: int
    gamma: float = 0.1

    ranges: ClassVar = {"initial": FINITE, "gamma": NONNEGATIVE}
    counts: ClassVar = {"step_size": 1}

    def __call__(self, step: int) -> float:
        """The number for a step, 1 for the first."""
        return float(self.initial * self.gamma ** ((step - 1) // self.step_size))


@dataclass(frozen=True)
class MultiStep(Schedule):
    """A factor after each of some numbers of steps.

    Source: ``torch.optim.lr_scheduler.MultiStepLR``; ``optax.piecewise_constant_schedule`` with one
    factor.

    Args:
        initial: The value up to the first milestone.
        milestones: Numbers of steps, >= 0, in ascending order, after which the factor is applied;
            a milestone given twice counts twice.
        gamma: The factor, >= 0.

    >>> [MultiStep(0.8, milestones=[1, 3], gamma=0.5)(step) for step in (1, 2, 3, 4)]
    [0.8, 0.4, 0.4, 0.2]
    """

    initial: float
    milestones: tuple[int, ...]
    gamma: float = 0.1

    ranges: ClassVar = {"initial": FINITE, "gamma": NONNEGATIVE}

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        given = _tuple(self.milestones)
        holds = all(_is_count(n, 0) for n in given) and list(given) == sorted(given)
        self._require(holds, "milestones", "integers >= 0 in ascending order")
        object.__setattr__(self, "milestones", tuple(map(int, given)))

    def __call__(self, step: int) -> float:
        """The number for a step, 1 for the first."""
        return float(self.initial * self.gamma ** bisect_right(self.milestones, step - 1))


@dataclass(frozen=True)
class Polynomial(Schedule):
    """From ``initial`` to ``final`` in some steps, along a power of the share that is left.

    ``final + (initial - final) * (1 - (t - 1) / steps) ** power``, then ``final``.

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

    initial: float
    final: float
    steps: int
    power: float = 1.0

    ranges: ClassVar = {"initial": FINITE, "final": FINITE, "power": POSITIVE}
    counts: ClassVar = {"steps": 1}

    def __call__(self, step: int) -> float:
        """The number for a step, 1 for the first."""
        left = max(1.0 - (step - 1) / self.steps, 0.0)
        return _between(self.final, self.initial, left**self.power)


@dataclass(frozen=True)
class Linear(Schedule):
    """From ``initial`` to ``final`` in equal steps, then ``final``; upwards it is a warm-up.

    A warm-up from 0 does nothing in its first step. ``Linear(lr / n, lr, n - 1)`` reaches ``lr`` at
    step ``n``.

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

    initial: float
    final: float
    steps: int

    ranges: ClassVar = {"initial": FINITE, "final": FINITE}
    counts: ClassVar = {"steps": 1}

    def __call__(self, step: int) -> float:
        """The number for a step, 1 for the first."""
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

    initial: float
    steps: int
    final: float = 0.0

    ranges: ClassVar = {"initial": FINITE, "final": FINITE}
    counts: ClassVar = {"steps": 1}

    def __call__(self, step: int) -> float:
        """The number for a step, 1 for the first."""
        return _between(self.initial, self.final, _wave(min((step - 1) / self.steps, 1.0)))


@dataclass(frozen=True)
class CosineWarmRestarts(Schedule):
    """``Cosine`` again and again, each time ``multiplier`` times as long.

    Source: Loshchilov & Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts" (ICLR 2017,
    arXiv:1608.03983), equation 5. ``torch.optim.lr_scheduler.CosineAnnealingWarmRestarts``, whose
    ``T_0``, ``T_mult`` and ``eta_min`` are ``period``, ``multiplier`` and ``final``.

    Args:
        initial: The value of the first step and of each restart.
        period: The length of the first cosine, >= 1.
        multiplier: The factor of the lengths, an integer >= 1.
        final: What each cosine goes towards.

    >>> restarts = CosineWarmRestarts(1.0, period=1, multiplier=2)
    >>> [round(restarts(step), 4) for step in range(1, 8)]
    [1.0, 1.0, 0.5, 1.0, 0.8536, 0.5, 0.1464]
    """

    initial: float
    period: int
    multiplier: int = 1
    final: float = 0.0

    ranges: ClassVar = {"initial": FINITE, "final": FINITE}
    counts: ClassVar = {"period": 1, "multiplier": 1}

    def __call__(self, step: int) -> float:
        """The number for a step, 1 for the first."""
        passed, length = step - 1, self.period
        if self.multiplier == 1:
            passed %= length
        while passed >= length:
            passed, length = passed - length, length * self.multiplier
        return _between(self.initial, self.final, _wave(passed / length))


@dataclass(frozen=True)
class OneCycle(Schedule):
    """Up to ``peak`` and down again, far below the beginning; held there afterwards.

    From ``peak / div_factor`` to ``peak``, then to ``peak / (div_factor * final_div_factor)``,
    which step ``steps`` has.

    Source: Smith & Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large
    Learning Rates" (2018, arXiv:1708.07120). Names, defaults and numbers are those of
    ``torch.optim.lr_scheduler.OneCycleLR`` (``max_lr`` and ``total_steps`` are ``peak`` and
    ``steps``), which raises an error after the last step, and where the way up has less than one
    step: there the first step has ``peak``.

    Args:
        peak: The highest value.
        steps: The length, >= 1.
        pct_start: The share of the steps on the way up, >= 0 and < 1.
        anneal: ``"cos"`` or ``"linear"``.
        div_factor: What ``peak`` is divided by at the beginning, > 0.
        final_div_factor: What the beginning is divided by at the end, > 0.
        three_phase: Whether the way down goes to the beginning first, in as many steps as the way
            up; ``pct_start`` is then at most 0.5.

    >>> cycle = OneCycle(1.0, steps=5, pct_start=0.6, anneal="linear", div_factor=4.0)
    >>> [round(cycle(step), 4) for step in (1, 2, 3, 4, 5, 6)]
    [0.25, 0.625, 1.0, 0.5, 0.0, 0.0]
    """

    peak: float
    steps: int
    pct_start: float = 0.3
    anneal: Literal["cos", "linear"] = "cos"
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    three_phase: bool = False

    ranges: ClassVar = {
        "peak": FINITE,
        "pct_start": FRACTION,
        "div_factor": POSITIVE,
        "final_div_factor": POSITIVE,
    }
    counts: ClassVar = {"steps": 1}

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        self._require(self.anneal in ("cos", "linear"), "anneal", "'cos' or 'linear'")
        self._require(isinstance(self.three_phase, bool), "three_phase", "True or False")
        if self.three_phase:
            self._require(self.pct_start <= 0.5, "pct_start", "at most 0.5 with three_phase")

    def __call__(self, step: int) -> float:
        """The number for a step, 1 for the first."""
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

    For 1/2 < ``power`` <= 1 the values have an infinite sum and a finite sum of squares, the
    conditions of Robbins and Monro, under which stochastic approximation converges. With 1/2 or
    less the noise of the gradients need not die down, with more than 1 the steps may end too early.

    Source: Robbins & Monro, "A Stochastic Approximation Method" (Annals of Mathematical Statistics,
    1951); in variational inference Hoffman, Blei, Wang & Paisley, "Stochastic Variational
    Inference" (JMLR 2013), whose ``(t + delay) ** -forgetting_rate`` is this with
    ``steps = 1 + delay``, but for a factor. With a ``power`` of 1 it is Keras's
    ``InverseTimeDecay``.

    Args:
        initial: The value of the first step.
        steps: After how many steps it is ``initial / 2 ** power``, > 0.
        power: The exponent, > 0.

    >>> [InverseTime(1.0, steps=2)(step) for step in (1, 3, 7)]
    [1.0, 0.5, 0.25]
    """

    initial: float
    steps: float = 1.0
    power: float = 1.0

    ranges: ClassVar = {"initial": FINITE, "steps": POSITIVE, "power": POSITIVE}

    def __call__(self, step: int) -> float:
        """The number for a step, 1 for the first."""
        return float(self.initial * (1.0 + (step - 1) / self.steps) ** -self.power)


@dataclass(frozen=True)
class Join(Schedule):
    """Schedules one after the other, each counting from its own beginning.

    Source: ``optax.join_schedules``; ``torch.optim.lr_scheduler.SequentialLR``.

    Args:
        schedules: The schedules, any callables.
        boundaries: Numbers of steps in ascending order, one less than schedules: after the first of
            them the second schedule begins, with its step 1.

    >>> join = Join([Constant(1.0), Exponential(0.8, gamma=0.5)], boundaries=[2])
    >>> [join(step) for step in (1, 2, 3, 4)]
    [1.0, 1.0, 0.8, 0.4]
    """

    schedules: tuple[Callable[[int], float], ...]
    boundaries: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the arguments."""
        parts, ends = _tuple(self.schedules), _tuple(self.boundaries)
        self._require(
            bool(parts) and all(map(callable, parts)) and not any(map(is_shared, parts)),
            "schedules",
            "one or more schedules (Shared goes around the Join)",
        )
        self._require(
            len(ends) == len(parts) - 1
            and all(_is_count(n, 1) for n in ends)
            and all(a < b for a, b in pairwise(ends)),
            "boundaries",
            f"{len(parts) - 1} integers >= 1 in ascending order, one less than schedules",
        )
        object.__setattr__(self, "schedules", parts)
        object.__setattr__(self, "boundaries", tuple(map(int, ends)))

    def __call__(self, step: int) -> float:
        """The number for a step, 1 for the first."""
        number = bisect_right(self.boundaries, step - 1)
        return self.schedules[number](step - (0, *self.boundaries)[number])


@dataclass(frozen=True)
class Shared(Schedule):
    """A schedule of the steps of the optimizer, for all parameters the same.

    The optimizer counts the steps in which it updated anything (``Optimizer.steps``). Without it a
    parameter's schedule begins when the parameter does.

    Args:
        schedule: The schedule, any callable.

    >>> import numpy as np, multiopt as mo
    >>> opt = mo.Optimizer(mo.SGD(lr=mo.schedules.Shared(mo.schedules.InverseTime(1.0))))
    >>> a, b = np.zeros(1), np.zeros(1)
    >>> for params in ({"a": a}, {"a": a, "b": b}):
    ...     _ = opt.step(params, {name: np.ones(1) for name in params})
    >>> a.tolist(), b.tolist()
    ([-1.5], [-0.5])
    """

    schedule: Callable[[int], float]

    #: By this ``Rule.at`` knows which number to call it with.
    shared: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the argument."""
        inner = self.schedule
        self._require(callable(inner) and not is_shared(inner), "schedule", "a schedule")

    def __call__(self, step: int) -> float:
        """The number for a step of the optimizer, 1 for the first."""
        return self.schedule(step)


@dataclass
class _Observed:
    """What a ``Plateau`` knows of the losses."""

    value: float
    best: float
    bad: int = 0
    waiting: int = 0
    average: float = 0.0
    finite: int = 0
    observed: int = 0


@dataclass(frozen=True, eq=False)
class Plateau(Schedule):
    """A number that is cut when a loss has stopped improving.

    Call ``observe`` with the loss, after each step or each epoch; ``patience`` and ``cooldown``
    count these calls. What it has seen is saved and loaded with the state of the optimizer. One
    object serves all names of a rule, whatever their clocks; a copy of the optimizer has a copy.

    The cuts are those of ``torch.optim.lr_scheduler.ReduceLROnPlateau``, with three exceptions:

    * a loss that is not finite counts as one without improvement, and enters neither the best nor
      the average; in torch a loss of minus infinity is the best for ever;
    * with ``"rel"`` the improvement is a share of the absolute value of the best, so that a loss
      below zero must improve as well; in torch it need not, and there is never a cut;
    * a cut is never too small to be made (torch's ``eps``).

    Args:
        initial: The value at first, >= 0.
        factor: What a cut multiplies the value by, >= 0 and < 1.
        patience: How many losses in a row without improvement are let pass.
        threshold: How much better than the best a loss must be to be an improvement, >= 0.
        threshold_mode: ``"rel"`` for a share of the best, ``"abs"`` for a difference.
        mode: ``"min"`` if a lower loss is better, ``"max"`` if a higher one is.
        cooldown: How many losses after a cut are not counted against it.
        smoothing: For noisy losses: how much of the exponential average of the losses stays at
            each one, >= 0 and < 1; the average, its bias corrected, is judged in place of the loss.
        minimum: What the value is never cut below, >= 0 and at most ``initial``.

    Raises:
        ValueError: A value is out of range.

    >>> lr = Plateau(0.8, factor=0.5, patience=1)
    >>> for loss in (3.0, 2.0, 2.0, 2.0):
    ...     lr.observe(loss)
    >>> lr(step=5)
    0.4
    """

    initial: float
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    threshold_mode: Literal["rel", "abs"] = "rel"
    mode: Literal["min", "max"] = "min"
    cooldown: int = 0
    smoothing: float = 0.0
    minimum: float = 0.0
    _seen: _Observed = field(init=False, repr=False)

    ranges: ClassVar = {
        "initial": NONNEGATIVE,
        "factor": FRACTION,
        "threshold": NONNEGATIVE,
        "smoothing": FRACTION,
        "minimum": NONNEGATIVE,
    }
    counts: ClassVar = {"patience": 0, "cooldown": 0}

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        self._require(self.threshold_mode in ("rel", "abs"), "threshold_mode", "'rel' or 'abs'")
        self._require(self.mode in ("min", "max"), "mode", "'min' or 'max'")
        self._require(self.minimum <= self.initial, "minimum", f"at most {self.initial!r}")
        best = inf if self.mode == "min" else -inf
        object.__setattr__(self, "_seen", _Observed(self.initial, best))

    def __call__(self, step: int) -> float:
        """The value now, for any step."""
        return self._seen.value

    def observe(self, loss: Any) -> None:
        """Take a loss, and cut the value if there has been no improvement for too long.

        Args:
            loss: A number, or what ``float`` makes one of, such as a tensor without dimensions.
        """
        seen, loss = self._seen, float(loss)
        seen.observed += 1
        improves = False
        if isfinite(loss):
            seen.finite += 1
            seen.average = self.smoothing * seen.average + (1.0 - self.smoothing) * loss
            smoothed = seen.average / (1.0 - self.smoothing**seen.finite)
            improves = self._is_better(smoothed)
            if improves:
                seen.best = smoothed
        seen.bad = 0 if improves else seen.bad + 1
        if seen.waiting > 0:
            seen.waiting -= 1
            seen.bad = 0
        if seen.bad > self.patience:
            seen.value = max(seen.value * self.factor, self.minimum)
            seen.waiting, seen.bad = self.cooldown, 0

    def _is_better(self, loss: float) -> bool:
        best = self._seen.best
        if not isfinite(best):
            return True
        if self.threshold_mode == "abs":
            least = self.threshold
            return loss < best - least if self.mode == "min" else loss > best + least
        # Towards minus infinity for "min", whatever the sign of the best.
        shrinks = (self.mode == "min") == (best >= 0)
        bound = best * (1.0 - self.threshold if shrinks else 1.0 + self.threshold)
        return loss < bound if self.mode == "min" else loss > bound

    @property
    def observed(self) -> int:
        """How many losses it has taken."""
        return self._seen.observed

    def state(self) -> dict[str, Any]:
        """What it has seen, as JSON has it, which knows no infinity."""
        return {k: v if isfinite(v) else repr(v) for k, v in asdict(self._seen).items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what another has seen, as ``state`` gives it."""
        for name in asdict(self._seen):
            value = state[name]
            setattr(self._seen, name, float(value) if isinstance(value, str) else value)


# Saved state


#: How deep a description of a schedule may be nested. One of a rule in a file has at most 64.
DEEPEST = 56


def described(value: Any, depth: int = 0) -> Any:
    """A schedule as plain data: its class, its fields, and what it has seen.

    One that is no dataclass is its class alone; values that are no schedules are as ``plain``.

    Args:
        value: The schedule.
        depth: How deep it is nested in another one. What is nested too deep is None.

    >>> described(Shared(Linear(0.0, 1.0, 10)))["schedule"]
    {'name': 'Linear', 'initial': 0.0, 'final': 1.0, 'steps': 10}
    """
    if depth < DEEPEST and isinstance(value, tuple | list):
        return [described(part, depth + 1) for part in value]
    if depth == DEEPEST or not isinstance(value, Schedule):
        return plain(value, depth)
    words = {name: described(part, depth + 1) for name, part in _arguments(value).items()}
    state = {"state": value.state()} if isinstance(value, Plateau) else {}
    return {"name": type(value).__name__, **words, **state}


def plain(value: Any, depth: int = 0) -> Any:
    """A value as JSON has it; what JSON has nothing like, or is nested too deep, is None.

    State must not be lost over the description of a rule or a schedule, whatever is in its fields.

    Args:
        value: The value.
        depth: How deep it is nested in another one.

    >>> plain((np.float32(0.5), inf, {"table": np.arange(3)}, {1, 2}, print))
    [0.5, 'inf', {'table': [0, 1, 2]}, None, None]
    """
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if depth == DEEPEST:
        return None
    if isinstance(value, tuple | list):
        return [plain(part, depth + 1) for part in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: plain(part, depth + 1) for key, part in value.items()}
    if isinstance(value, float) and not isfinite(value):
        return repr(float(value))
    return value if isinstance(value, bool | int | float | str) else None


def check_description(description: Any) -> None:
    """Refuse a description with a state that no ``Plateau`` could take.

    Raises:
        ValueError: It has one.
    """
    waiting = [description]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list | tuple):
            waiting += part
        elif isinstance(part, Mapping):
            waiting += part.values()
            state = part.get("state")
            # That of a subclass has another name, and perhaps more in its state.
            known = part.get("name") == "Plateau" or _has_observed(state)
            if known and not _is_observed(state):
                raise ValueError(f"expected the state of a Plateau; got {state!r}")


def plateaus(value: Any, description: Any) -> Iterator[tuple[Plateau, Mapping[str, Any]]]:
    """Each ``Plateau`` in a schedule, with the state that a description has in its place."""
    if isinstance(value, tuple | list) and isinstance(description, list | tuple):
        for part, words in zip(value, description, strict=False):
            yield from plateaus(part, words)
    elif (
        isinstance(value, Schedule)
        and isinstance(description, Mapping)
        and description.get("name") == type(value).__name__
    ):
        if isinstance(value, Plateau) and _has_observed(description.get("state")):
            yield value, description["state"]
        for name, part in _arguments(value).items():
            yield from plateaus(part, description.get(name))


def left_behind(value: Any) -> list[Plateau]:
    """Each ``Plateau`` that a hyperparameter reaches, and no description of it has the state of.

    A description has those that are schedules, or parts of some; not those inside of a callable of
    the user's.

    >>> plateau = Plateau(0.1)
    >>> left_behind(Shared(plateau))
    []
    >>> left_behind(lambda step: plateau(step) / step) == [plateau]
    True
    """
    saved, others = list[Plateau](), list[Any]()
    waiting = [(value, 0)]
    while waiting:
        part, depth = waiting.pop()
        is_opaque = depth == DEEPEST or not isinstance(part, Schedule | tuple | list)
        if not is_opaque and isinstance(part, Plateau):
            saved.append(part)
        inside = _arguments(part).values() if isinstance(part, Schedule) else part
        if is_opaque:
            others.append(part)
        else:
            waiting += [(inner, depth + 1) for inner in inside]
            # A class of the user's may hold more than its fields.
            if isinstance(part, Schedule) and type(part).__module__ != __name__:
                others.append(type(part).__call__.__get__(part))
    # One of somebody else may have a state that cannot be loaded: then there is no description.
    if not all(_is_observed(plateau.state()) for plateau in saved):
        return list(reached([*saved, *others], Plateau))
    known = {id(plateau) for plateau in saved}
    return [plateau for plateau in reached(others, Plateau) if id(plateau) not in known]


def _arguments(schedule: Any) -> dict[str, Any]:
    known = fields(schedule) if is_dataclass(schedule) else ()
    return {f.name: getattr(schedule, f.name) for f in known if f.init}


def _has_observed(state: Any) -> bool:
    return isinstance(state, Mapping) and all(f.name in state for f in fields(_Observed))


def _is_observed(state: Any) -> bool:
    """Whether a ``Plateau`` can take a state, and go on from it."""
    if not _has_observed(state):
        return False
    counts = [state[f.name] for f in fields(_Observed) if f.type is int]
    return (
        all(_is_count(count, 0) and count <= 2**53 for count in counts)
        and _is_finite(state["value"])
        and state["value"] >= 0
        and (_is_finite(state["best"]) or state["best"] in ("inf", "-inf"))
        and _is_finite(state["average"])
    )


def _between(start: float, stop: float, share: float) -> float:
    return start * (1.0 - share) + stop * share


def _wave(share: float) -> float:
    return (1.0 - cos(pi * share)) / 2.0


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def _is_finite(value: Any) -> bool:
    """Whether a value is a number of float64, as not every integer is."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= float_info.max


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)
