"""``Plateau``: the one schedule that depends on losses, and therefore the only one with a state.

The state is saved and loaded with the optimizer. It is kept apart from the settings (``Observed``),
so that a schedule stays a frozen dataclass.
"""

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
    """The state of a ``Plateau``.

    Attributes:
        value: The value now.
        best: The best loss so far, or average of losses if they are smoothed; at first an infinity.
        bad: The number of losses in a row without improvement.
        waiting: The number of losses that the cooldown still lasts.
        average: The exponential average of the finite losses, before its bias correction.
        finite: The number of finite losses observed.
        observed: The number of all losses observed.
    """

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

    Call ``observe`` with the loss after each step or each epoch; ``patience`` and ``cooldown``
    count these calls. Its state is saved and loaded with the state of the optimizer. One object
    serves all names of a rule, whatever their clocks; a copy of the optimizer has a copy of it.

    The cuts are those of ``torch.optim.lr_scheduler.ReduceLROnPlateau``, with three exceptions:

    * A loss that is not finite counts as no improvement, and changes neither the best loss nor the
      average. In torch a loss of minus infinity remains the best forever.
    * With ``"rel"`` the improvement is a share of the absolute value of the best loss, so a loss
      below zero must improve as well. In torch it need not, and there is never a cut.
    * No cut is too small to be made; there is no counterpart of torch's ``eps``.

    Args:
        initial: The first value, >= 0.
        factor: The factor by which a cut multiplies the value, >= 0 and < 1.
        patience: How many losses in a row without improvement are tolerated.
        threshold: How much better than the best loss a loss must be to be an improvement, >= 0.
        threshold_mode: ``"rel"`` for a share of the best loss, ``"abs"`` for a difference.
        mode: ``"min"`` if a lower loss is better, ``"max"`` if a higher loss is.
        cooldown: How many losses after a cut are not counted as losses without improvement.
        smoothing: For noisy losses, the decay rate of an exponential average of the losses, >= 0
            and < 1. The average, corrected for its bias, is judged in place of the loss.
        minimum: The value is never cut below this number, >= 0 and at most ``initial``.

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
        """The value now, whatever the step."""
        return self._seen.value

    def observe(self, loss: Any) -> None:
        """Observe a loss, and cut the value if there has been no improvement for too long.

        Args:
            loss: A number, or an object that ``float`` accepts, such as a 0-d tensor.
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
        # The bound is below the best loss for "min" and above it for "max", whatever its sign.
        shrinks = (self.mode == "min") == (best >= 0)
        bound = best * (1.0 - self.threshold if shrinks else 1.0 + self.threshold)
        return loss < bound if self.mode == "min" else loss > bound

    @property
    def observed(self) -> int:
        """The number of losses observed."""
        return self._seen.observed

    def state(self) -> dict[str, Any]:
        """The state as plain data, with infinities as text because JSON does not have them."""
        return {k: v if isfinite(v) else repr(v) for k, v in asdict(self._seen).items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Load a state that ``state`` has returned."""
        for name in asdict(self._seen):
            value = state[name]
            setattr(self._seen, name, float(value) if isinstance(value, str) else value)


def has_observed(state: Any) -> bool:
    """Whether a state has all entries of the state of a ``Plateau``."""
    return isinstance(state, Mapping) and all(f.name in state for f in fields(Observed))


def is_observed(state: Any) -> bool:
    """Whether a ``Plateau`` can load a state and continue from it."""
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
    """Whether a value is a finite number in the range of float64, as not all integers are."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= float_info.max
