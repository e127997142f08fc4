"""What every rule is: hyperparameters, the numbers of a step, slots and one pure update."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, NoReturn, TypeAlias

import numpy as np

from multiopt.errors import brief
from multiopt.rules import declared
from multiopt.rules.declared import *  # noqa: F403  what fields of rules are declared with
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
    "with_numbers",
]
__all__ += declared.__all__

#: A number, or a schedule: a callable that gives the number for each step (1, 2, ...).
Hyperparameter: TypeAlias = float | Callable[[int], float]
#: ``update(xp, param, grad, slots, c) -> (param, slots)``: arrays in, new arrays out.
Update: TypeAlias = Callable[[Any, Any, Any, tuple[Any, ...], Any], tuple[Any, tuple[Any, ...]]]


#: What a switch among the coefficients is.
SWITCH = bool | np.bool_


class Coefficients:
    """The numbers of one step, by the names that ``scalars`` gave them: floats and bool switches.

    They can be read as attributes and, in their order, by iteration, and not be changed.

    >>> c = Coefficients(lr=0.5, maximizes=False)
    >>> c.lr, list(c)
    (0.5, [0.5, False])
    """

    def __init__(self, **numbers: Any) -> None:
        """Take the numbers."""
        vars(self).update(numbers)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        """Refuse to change.

        Raises:
            AttributeError: Always.
        """
        raise AttributeError(f"coefficients cannot be changed; got {name}={value!r}")

    def __iter__(self) -> Iterator[Any]:
        """The numbers in their order."""
        return iter(vars(self).values())

    def __len__(self) -> int:
        """How many there are."""
        return len(vars(self))

    def __eq__(self, other: object) -> Any:
        """Whether others have the same names and numbers."""
        return vars(self) == vars(other) if isinstance(other, Coefficients) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """The call that makes them."""
        return f"Coefficients({', '.join(f'{name}={x!r}' for name, x in vars(self).items())})"


@dataclass(frozen=True)
class Rule(Declared, ABC):
    """An update rule: a frozen dataclass of hyperparameters with three parts.

    * its fields, the hyperparameters, declared with ``number``, ``switch`` and ``choice`` and held
      to that when it is made;
    * ``scalars``: from them the numbers of one step, on the host, in float64;
    * ``update``: the mathematics, a plain function of arrays, and the names of its ``slots``.

    A rule holds no state and does not know the names it is used for. ``CONTRIBUTING.md`` says how
    to write one.

    >>> import numpy as np, multiopt as mo
    >>> rule = mo.SGD(lr=lambda step: 1.0 / step)
    >>> param, slots = rule.update(np, np.ones(2), np.ones(2), (), rule.coefficients(step=2))
    >>> param.tolist()
    [0.5, 0.5]
    """

    beside: ClassVar[str] = ", or a schedule step -> number"
    #: Fields that are rules themselves, whose hyperparameters count as those of this one: see
    #: ``multiopt.rules.average``.
    nested: ClassVar[tuple[str, ...]] = ()
    #: Whether ``update`` treats each element by itself. One that does not runs as it stands, for
    #: each parameter by itself, on arrays in row-major order.
    elementwise: ClassVar[bool] = True

    @property
    @abstractmethod
    def slots(self) -> tuple[str, ...]:
        """The names of the arrays that the rule keeps for a parameter, all zero at first."""

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The slots of a parameter, with their shapes: its own, unless the rule says otherwise.

        Args:
            shape: That of the parameter.

        Returns:
            Shapes by the names of slots, which are all or some of ``slots``, in the order in which
            ``update`` gets them.

        Raises:
            ValueError: The rule is not for parameters of this shape.
        """
        return dict.fromkeys(self.slots, shape)

    @property
    @abstractmethod
    def update(self) -> Update:
        """The formula: ``update(xp, param, grad, slots, c) -> (param, slots)``.

        ``xp`` is the Array API namespace of the arrays, ``slots`` a tuple in the order of the
        rule's ``slots``, ``c`` what ``coefficients`` gave. The function is pure and uses only the
        operations of ``spec/arithmetic.md``, so it may be traced, compiled or differentiated.
        """

    @classmethod
    @abstractmethod
    def scalars(cls, h: Any, step: Any) -> Any:
        """The numbers of a step, in float64: a dict of floats and bool switches.

        Args:
            h: What has the hyperparameters as attributes, each a number, or an array of numbers.
            step: The number of the step, 1 for the first, or an integer array of such numbers.

        Returns:
            What ``update`` gets as attributes of ``c``, by name.
        """

    def coefficients(self, step: Any, dtype: str = "float64") -> Coefficients:
        """The numbers that ``update`` needs at a step, schedules evaluated.

        They are computed in float64. Rounded to the dtype of the computation they are those of
        ``Optimizer.step``, to the last bit.

        Args:
            step: The number of the step, 1 for the first, or an integer array of such numbers.
            dtype: ``"float32"`` or ``"float64"``; 16-bit parameters are computed in float32.

        Raises:
            ValueError: A schedule gave a value out of range.
        """
        numbers = named(self.scalars(self.at(step), step))
        if np.ndim(step):
            return Coefficients(**numbers)
        # Python's own numbers, since an np.float64 would promote a float32 array. This is
        # ``rounded``, but for the dtype, which takes longer to find than a number to round.
        kind = np.dtype(dtype).type
        return Coefficients(
            **{
                name: bool(x) if isinstance(x, SWITCH) else float(kind(x))
                for name, x in numbers.items()
            }
        )

    def at(self, step: Any, count: int | None = None) -> Any:
        """This rule with every schedule replaced by the number it gives at a step.

        Args:
            step: The number of the step, from 1.
            count: The number of the step of the optimizer, which ``schedules.Shared`` gets; by
                default it gets the other.

        Raises:
            ValueError: A schedule gave no number, or one out of range.

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
        """What a schedule gives.

        Args:
            name: The hyperparameter.
            schedule: The schedule.
            step: The number of the step.

        Raises:
            ValueError: It is not a number.
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
        except Exception as error:  # of any kind: it may be an array of any library
            raise refusal(f"got {brief(given)}") from error

    def in_range(self, name: str, number: Any, step: int) -> float:
        """What a schedule gave, if it is in the range of its hyperparameter.

        Raises:
            ValueError: It is not.
        """
        allowed = self.ranges[name]
        if type(number) is float and allowed.holds(number):
            return number + 0.0  # not -0.0, as below
        checked: float = self._checked(name, allowed, number, f" at step {step}")
        return checked

    def _checked(self, name: str, allowed: Range, value: Any, when: str = "") -> Any:
        if callable(value) and not allowed.whole:
            return value
        return super()._checked(name, allowed, value, when)


def _number(given: Any) -> Any:
    """The number that a schedule gave, perhaps as an array of one; what is no number to its reader.

    ``float`` would take truth values and text, which are left for the message as they are.

    Raises:
        Exception: It is of another kind.
    """
    value = given.item() if hasattr(given, "item") else given
    return value if isinstance(value, bool | str | bytes | bytearray) else float(value)


def _copied(rule: Rule) -> Rule:
    """Another rule with the same fields; ``copy.copy`` takes three times as long."""
    if type(rule).__basicsize__ != Rule.__basicsize__:
        return copy.copy(rule)  # it keeps fields in ``__slots__``
    made = object.__new__(type(rule))
    vars(made).update(vars(rule))
    return made


def with_numbers(
    rule: Rule, fields: Sequence[tuple[str, int | None]], values: Sequence[Any]
) -> Rule:
    """A rule with other numbers, or schedules, which are known to be in range.

    Args:
        rule: The rule.
        fields: The hyperparameters, with the place in those that are tuples, in their order. Those
            of a nested rule have its field and a dot before their names.
        values: The value of each.
    """
    made = _copied(rule)
    for inner in rule.nested:
        object.__setattr__(made, inner, _copied(getattr(made, inner)))
    for (label, place), value in zip(fields, values, strict=True):
        inner, _, name = label.rpartition(".")
        owner = getattr(made, inner) if inner else made
        if place is not None:
            parts = getattr(owner, name)
            value = (*parts[:place], value, *parts[place + 1 :])
        object.__setattr__(owner, name, value)
    return made


def plain_numbers(rule: Rule, values: Mapping[str, Any]) -> dict[str, float] | None:
    """Hyperparameters as a rule would hold them; None if a rule must be made to know.

    That is so unless each is a number in the place of a number, and nothing but its own range says
    whether it may be.
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
    """What ``scalars`` may get in the place of a rule: its hyperparameters as attributes.

    Args:
        fields: Those that are numbers, as for ``with_numbers``.
        values: What stands for each.
        others: The others.
    """
    flat = dict(others)
    for (label, place), value in zip(fields, values, strict=True):
        flat[label] = value if place is None else (*flat.get(label, ()), value)
    h = SimpleNamespace()
    for label, value in flat.items():
        inner, _, name = label.rpartition(".")
        setattr(vars(h).setdefault(inner, SimpleNamespace()) if inner else h, name, value)
    return h


def named(c: Any) -> dict[str, Any]:
    """What ``scalars`` gave, by name; a named tuple has names as well."""
    return c._asdict() if isinstance(c, tuple) else dict(c)  # type: ignore[attr-defined]


def is_schedule(value: Any) -> bool:
    """Whether a hyperparameter, or one of a pair, is a schedule."""
    return any(map(callable, value)) if isinstance(value, tuple) else callable(value)


def is_shared(schedule: Any) -> bool:
    """Whether a schedule counts the steps of the optimizer: ``schedules.Shared``."""
    return getattr(schedule, "shared", False) is True
