"""Rules: the mathematics of an update with its hyperparameters, and without any state.

A rule is a frozen dataclass with three parts. Its fields declare the hyperparameters; ``scalars``
computes the coefficients of one step from them, on the host and in float64; ``update`` is a pure
function of arrays, and the only place where the formula is written down. All engines run that one
function, or code that is made from it. A rule of your own is written like the rules of multiopt:

>>> import multiopt as mo
>>> from multiopt.rules.rule import FRACTION, NONNEGATIVE, Hyperparameter, number
>>> def heavy_ball(xp, param, grad, slots, c):
...     velocity = c.momentum * slots[0] - c.lr * grad
...     return param + velocity, (velocity,)
>>> @dataclass(frozen=True)
... class HeavyBall(mo.Rule):
...     lr: Hyperparameter = number(0.1, NONNEGATIVE)
...     momentum: Hyperparameter = number(0.9, FRACTION)
...     slots = ("velocity",)
...     update = staticmethod(heavy_ball)
...     scalars = classmethod(lambda cls, h, step: {"lr": h.lr, "momentum": h.momentum})
>>> opt, w = mo.Optimizer(HeavyBall(lr=0.5, momentum=0.5)), np.zeros(1)
>>> for _ in range(2):
...     _ = opt.step({"w": w}, {"w": np.ones(1)})
>>> w.tolist(), opt.state("w").slots["velocity"].tolist()
([-1.25], [-0.75])
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, NoReturn, TypeAlias

import numpy as np

from multiopt.errors import brief
from multiopt.rules import declared
from multiopt.rules.declared import *  # noqa: F403  so that rules import from here only
from multiopt.rules.declared import Declared, Range

__all__ = [
    "Coefficients",
    "Hyperparameter",
    "Rule",
    "Update",
    "is_schedule",
    "is_shared",
    "named",
    "namespace",
    "plain_numbers",
    "rounded_numbers",
    "with_numbers",
]
__all__ += declared.__all__

#: A number, or a schedule: a callable that returns the number for each step (1, 2, ...).
Hyperparameter: TypeAlias = float | Callable[[int], float]
#: ``update(xp, param, grad, slots, c) -> (param, slots)``. It takes arrays and returns new ones.
Update: TypeAlias = Callable[[Any, Any, Any, tuple[Any, ...], Any], tuple[Any, tuple[Any, ...]]]


#: The types of a switch among the coefficients. Looking a type up takes a third of ``isinstance``.
SWITCHES = frozenset({bool, np.bool_})


class Coefficients:
    """The coefficients of one step: floats and bool switches, under the names from ``scalars``.

    They are read as attributes, or in order by iteration, and cannot be changed.

    >>> c = Coefficients(lr=0.5, maximizes=False)
    >>> c.lr, list(c)
    (0.5, [0.5, False])
    """

    def __init__(self, **numbers: Any) -> None:
        """Store the numbers under their names."""
        vars(self).update(numbers)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        """Refuse every change.

        Raises:
            AttributeError: Always.
        """
        raise AttributeError(f"coefficients cannot be changed; got {name}={value!r}")

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the numbers in order."""
        return iter(vars(self).values())

    def __len__(self) -> int:
        """The number of coefficients."""
        return len(vars(self))

    def __eq__(self, other: object) -> Any:
        """Whether two objects have the same names and numbers."""
        return vars(self) == vars(other) if isinstance(other, Coefficients) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """The call that creates an equal object."""
        return f"Coefficients({', '.join(f'{name}={x!r}' for name, x in vars(self).items())})"


@dataclass(frozen=True)
class Rule(Declared, ABC):
    """An update rule: a frozen dataclass of hyperparameters with three parts.

    * The fields are the hyperparameters. They are declared with ``number``, ``switch`` and
      ``choice``, and their values are checked when a rule is created.
    * ``scalars`` computes the coefficients of one step from them, on the host, in float64.
    * ``update`` is the mathematics, a plain function of arrays; ``slots`` names the arrays that it
      carries from step to step.

    A rule holds no state and knows no names. ``CONTRIBUTING.md`` explains how to write one.

    >>> import numpy as np, multiopt as mo
    >>> rule = mo.SGD(lr=lambda step: 1.0 / step)
    >>> param, slots = rule.update(np, np.ones(2), np.ones(2), (), rule.coefficients(step=2))
    >>> param.tolist()
    [0.5, 0.5]
    """

    beside: ClassVar[str] = ", or a schedule step -> number"
    #: Fields that are rules, whose hyperparameters are this one's too; only ``Averaged`` has any.
    nested: ClassVar[tuple[str, ...]] = ()
    #: Whether ``update`` treats each element by itself. If not, it runs as written, a parameter at
    #: a time, in row-major order; some of this package are compiled in passes.
    elementwise: ClassVar[bool] = True
    #: Whether it needs no more of other elements than ``norm``s: parts are then updated with these.
    norms_only: ClassVar[bool] = False

    @property
    @abstractmethod
    def slots(self) -> tuple[str, ...]:
        """The names of the arrays that the rule keeps for a parameter. All are zero at first."""

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The slots of a parameter with their shapes: by default, all have the parameter's shape.

        Args:
            shape: The shape of the parameter.

        Returns:
            The shape of each slot by its name. The names are some or all of ``slots``, in the order
            in which ``update`` receives them.

        Raises:
            ValueError: The rule does not support parameters of this shape.
        """
        return dict.fromkeys(self.slots, shape)

    @property
    @abstractmethod
    def update(self) -> Update:
        """The formula: ``update(xp, param, grad, slots, c) -> (param, slots)``.

        ``xp`` is the Array API namespace of the arrays, ``slots`` a tuple in the order of the
        rule's ``slots``, and ``c`` the result of ``coefficients``. The function is pure and uses
        only the operations of ``spec/arithmetic.md``, so it may be traced, compiled or
        differentiated.
        """

    @classmethod
    @abstractmethod
    def scalars(cls, h: Any, step: Any) -> Any:
        """Compute the coefficients of a step in float64.

        Args:
            h: An object with the hyperparameters as attributes, each a number or an array of
                numbers.
            step: The number of the step, 1 for the first, or an integer array of such numbers.

        Returns:
            A dict of floats and bool switches. ``update`` reads them as attributes of ``c``.
        """

    def coefficients(self, step: Any, dtype: str = "float64") -> Coefficients:
        """The coefficients that ``update`` needs at a step, with all schedules evaluated.

        They are computed in float64. Rounded to the compute dtype, they equal the coefficients of
        ``Optimizer.step`` to the last bit.

        Args:
            step: The number of the step, 1 for the first, or an integer array of such numbers.
            dtype: The compute dtype, ``"float32"`` or ``"float64"``; 16-bit parameters are computed
                in float32. With an array of steps the coefficients are not rounded.

        Raises:
            ValueError: A schedule returned something that is not a number, or a number out of
                range.
        """
        numbers = named(self.scalars(self.at(step), step))
        if type(step) is not int and np.ndim(step):
            return Coefficients(**numbers)
        values = rounded_numbers(numbers.values(), dtype)
        return Coefficients(**dict(zip(numbers, values, strict=True)))

    def at(self, step: Any, count: int | None = None) -> Any:
        """This rule with every schedule replaced by its number for a step.

        Args:
            step: The number of the step, 1 for the first, or an integer array of such numbers.
            count: The optimizer's count of steps, which ``schedules.Shared`` is called with; by
                default it is called with ``step``.

        Raises:
            ValueError: A schedule returned something that is not a number, or a number out of
                range.

        >>> import multiopt as mo
        >>> mo.SGD(lr=lambda step: 1.0 / step).at(4).lr
        0.25
        """
        if not any(is_schedule(getattr(self, name)) for name in self.ranges):
            return self
        now = _copied(self)
        for name in self.ranges:
            value = getattr(self, name)
            if is_schedule(value):
                object.__setattr__(now, name, self._scheduled(name, value, step, count))
        return now

    def _scheduled(self, name: str, value: Any, step: Any, count: int | None) -> Any:
        if isinstance(value, tuple):
            return tuple(self._scheduled(name, part, step, count) for part in value)
        if not callable(value):
            return value
        if count is not None and is_shared(value):
            step = count
        if np.ndim(step):
            return np.vectorize(lambda s: self._scheduled(name, value, int(s), None), [float])(step)
        return self.in_range(name, self.asked(name, value, step), step)

    def asked(self, name: str, schedule: Callable[[int], float], step: int) -> Any:
        """Call a schedule.

        Args:
            name: The name of the hyperparameter.
            schedule: The schedule.
            step: The number of the step.

        Returns:
            Its number, not yet checked against the range of the hyperparameter.

        Raises:
            ValueError: The schedule raised an error, or returned something that is not a number.
        """

        def refusal(why: object) -> ValueError:
            what = f"{type(self).__name__}: the schedule of {name}"
            return ValueError(f"{what} gave no number at step {step}: {why}")

        try:
            given = schedule(step)
        except Exception as error:
            raise refusal(error) from error
        try:
            return given if type(given) is float else _number(given)
        except Exception as error:  # any class of error: the value may be an array of any library
            raise refusal(f"got {brief(given)}") from error

    def in_range(self, name: str, number: Any, step: int) -> float:
        """Check a number from a schedule against the range of its hyperparameter.

        Raises:
            ValueError: It is out of range.
        """
        allowed = self.ranges[name]
        if type(number) is float and allowed.holds(number):
            return number + 0.0  # turns -0.0 into 0.0, as ``Range.read`` does
        checked: float = self._checked(name, allowed, number, f" at step {step}")
        return checked

    def _checked(self, name: str, allowed: Range, value: Any, when: str = "") -> Any:
        if callable(value) and not allowed.whole:
            return value
        return super()._checked(name, allowed, value, when)


def _number(given: Any) -> Any:
    """Convert what a schedule returned, perhaps an array with one element, to a float.

    ``float`` would also accept booleans and text. They are returned unchanged, to be refused by the
    check of the range with a message that shows them.

    Raises:
        Exception: The value cannot be converted. The class depends on its library.
    """
    value = given.item() if hasattr(given, "item") else given
    return value if isinstance(value, bool | str | bytes | bytearray) else float(value)


def _copied(rule: Rule) -> Rule:
    """Copy a rule without checking its fields; ``copy.copy`` takes three times as long."""
    if type(rule).__basicsize__ != Rule.__basicsize__:
        return copy.copy(rule)  # its class keeps fields in ``__slots__``
    made = object.__new__(type(rule))
    vars(made).update(vars(rule))
    return made


def with_numbers(
    rule: Rule, fields: Sequence[tuple[str, int | None]], values: Sequence[Any]
) -> Rule:
    """Copy a rule with other numbers or schedules, which are known to be in range.

    Args:
        rule: The rule.
        fields: For each value the name of its hyperparameter, and the index in it if the
            hyperparameter is a tuple, otherwise None. The name of a hyperparameter of a nested rule
            is preceded by the nested rule's field and a dot.
        values: The values.
    """
    made = _copied(rule)
    owners = {"": made}
    for (label, place), value in zip(fields, values, strict=True):
        inner, _, name = label.rpartition(".")
        if inner not in owners:
            owners[inner] = _copied(getattr(made, inner))
            object.__setattr__(made, inner, owners[inner])
        owner = owners[inner]
        if place is not None:
            parts = getattr(owner, name)
            value = (*parts[:place], value, *parts[place + 1 :])
        object.__setattr__(owner, name, value)
    return made


def plain_numbers(rule: Rule, values: Mapping[str, Any]) -> dict[str, float] | None:
    """Convert new hyperparameters to what a rule would store, without creating the rule.

    This is possible if each value is a number in its range that replaces a number or a schedule,
    and the class of the rule has no further checks.

    Args:
        rule: The rule whose hyperparameters are to change.
        values: The new values by name.

    Returns:
        The numbers by name; None if a rule must be created to check the values.
    """
    if type(rule).__post_init__ is not Rule.__post_init__:
        return None
    numbers = {}
    for name, value in values.items():
        allowed, now = rule.ranges.get(name), getattr(rule, name, None)
        is_number = isinstance(value, float) and (isinstance(now, float) or callable(now))
        if allowed is None or not (is_number and allowed.holds(value)):
            return None
        numbers[name] = float(value) + 0.0
    return numbers


def namespace(
    fields: Sequence[tuple[str, int | None]], values: Sequence[Any], others: Mapping[str, Any]
) -> SimpleNamespace:
    """An object that ``scalars`` accepts in place of a rule, with hyperparameters as attributes.

    Args:
        fields: The hyperparameters that are numbers, as in ``with_numbers``.
        values: A value for each of them, such as a column of numbers or a stand-in of a trace.
        others: The other hyperparameters by name.
    """
    flat = dict(others)
    for (label, place), value in zip(fields, values, strict=True):
        flat[label] = value if place is None else (*flat.get(label, ()), value)
    h = SimpleNamespace()
    for label, value in flat.items():
        inner, _, name = label.rpartition(".")
        setattr(vars(h).setdefault(inner, SimpleNamespace()) if inner else h, name, value)
    return h


def rounded_numbers(numbers: Collection[Any], dtype: str) -> list[float | bool]:
    """Round the result of ``scalars`` to a dtype: ``rounded`` of all at once, in half the time.

    Python floats come back, since an np.float64 would promote a float32 array.
    """
    values = np.fromiter(numbers, dtype, len(numbers)).tolist()
    return [
        bool(x) if type(x) in SWITCHES else value for x, value in zip(numbers, values, strict=True)
    ]


def named(c: Any) -> dict[str, Any]:
    """The result of ``scalars`` as a dict; a rule may also return a named tuple."""
    return c._asdict() if isinstance(c, tuple) else dict(c)  # type: ignore[attr-defined]


def is_schedule(value: Any) -> bool:
    """Whether a hyperparameter, or one element of a tuple, is a schedule."""
    return any(map(callable, value)) if isinstance(value, tuple) else callable(value)


def is_shared(schedule: Any) -> bool:
    """Whether a schedule counts the steps of the optimizer, as ``schedules.Shared`` does."""
    return getattr(schedule, "shared", False) is True
