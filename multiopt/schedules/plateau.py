"""A schedule that follows a loss, and so has a state."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import inf, isfinite
from sys import float_info
from typing import Any, Literal

from multiopt.rules.declared import (
    FRACTION,
    NONNEGATIVE,
    NONNEGATIVE_INTEGER,
    choice,
    number,
    within,
)
from multiopt.schedules.base import Schedule

__all__ = ["Observed", "Plateau", "has_observed", "is_observed"]


@dataclass
class Observed:
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

    initial: float = field(metadata=within(NONNEGATIVE))
    factor: float = number(0.1, FRACTION)
    patience: int = number(10, NONNEGATIVE_INTEGER)
    threshold: float = number(1e-4, NONNEGATIVE)
    threshold_mode: Literal["rel", "abs"] = choice("rel", "abs", default="rel")
    mode: Literal["min", "max"] = choice("min", "max", default="min")
    cooldown: int = number(0, NONNEGATIVE_INTEGER)
    smoothing: float = number(0.0, FRACTION)
    minimum: float = number(0.0, NONNEGATIVE)
    _seen: Observed = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        self._require(self.minimum <= self.initial, "minimum", f"at most {self.initial!r}")
        best = inf if self.mode == "min" else -inf
        object.__setattr__(self, "_seen", Observed(self.initial, best))

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


def has_observed(state: Any) -> bool:
    """Whether a state has all that a ``Plateau`` has."""
    return isinstance(state, Mapping) and all(f.name in state for f in fields(Observed))


def is_observed(state: Any) -> bool:
    """Whether a ``Plateau`` can take a state, and go on from it."""
    if not has_observed(state):
        return False
    counts = [state[f.name] for f in fields(Observed) if f.type is int]
    return (
        all(NONNEGATIVE_INTEGER.has(count) and count <= 2**53 for count in counts)
        and _is_finite(state["value"])
        and state["value"] >= 0
        and (_is_finite(state["best"]) or state["best"] in ("inf", "-inf"))
        and _is_finite(state["average"])
    )


def _is_finite(value: Any) -> bool:
    """Whether a value is a number of float64, as not every integer is."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= float_info.max
