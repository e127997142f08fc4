"""Declared fields: each field of a frozen dataclass states once what values it may have.

``Declared`` checks the values when an object is created, and its messages name the class, the
field, what was expected and what came instead. Rules, clips and schedules declare their fields in
this way.

>>> from dataclasses import dataclass, field
>>> @dataclass(frozen=True)
... class Decay(Declared):
...     factor: float = field(metadata=within(FRACTION))
...     every: int = number(1, POSITIVE_INTEGER)
...     kind: str = choice("step", "smooth", default="step")
>>> Decay(0.5)
Decay(factor=0.5, every=1, kind='step')
>>> Decay(2.0)
Traceback (most recent call last):
ValueError: Decay: factor must be a number >= 0 and < 1; got 2.0
"""

from collections.abc import Mapping
from dataclasses import Field, field, fields
from math import inf, nan, nextafter, ulp
from numbers import Integral, Real
from sys import float_info
from typing import Any, ClassVar, NamedTuple, NoReturn

from multiopt.errors import brief

__all__ = [
    "BOUND",
    "FINITE",
    "FRACTION",
    "NONNEGATIVE",
    "NONNEGATIVE_INTEGER",
    "POSITIVE",
    "POSITIVE_INTEGER",
    "SHARE",
    "Declared",
    "Range",
    "choice",
    "number",
    "switch",
    "within",
]


class Range(NamedTuple):
    """The numbers that a field may have as its value.

    Attributes:
        words: The description of the range in messages.
        low: The smallest number in the range.
        below: The upper bound; all numbers but infinity are below it.
        infinite: Whether infinity is in the range.
        whole: Whether the numbers must be integers.
        optional: Whether the field may also be None.
    """

    words: str
    low: float = 0.0
    below: float = inf
    infinite: bool = False
    whole: bool = False
    optional: bool = False

    def holds(self, value: float | None) -> bool:
        """Whether a number or None is in the range; NaN never is."""
        if value is None:
            return self.optional
        return self.low <= value < self.below or (self.infinite and value == inf)

    def read(self, value: Any) -> Any:
        """Convert a value to a float, or to an int if ``whole``; NaN if it is not such a number."""
        if value is None and self.optional:
            return None
        kind: Any = Integral if self.whole else Real
        if not isinstance(value, kind) or isinstance(value, bool):
            return nan
        try:
            # Adding 0.0 turns -0.0 into 0.0, so that equal rules give equal results.
            return int(value) if self.whole else float(value) + 0.0
        except OverflowError:
            return nan

    def has(self, value: Any) -> bool:
        """Whether a value of any type is a number in the range."""
        return self.holds(self.read(value))


FINITE = Range("a finite number", low=-float_info.max)
NONNEGATIVE = Range("a finite number >= 0")
POSITIVE = Range("a finite number > 0", low=ulp(0.0))
FRACTION = Range("a number >= 0 and < 1", below=1.0)
BOUND = Range("a number >= 0", infinite=True)
SHARE = Range("a number >= 0 and <= 1", below=nextafter(1.0, inf))
NONNEGATIVE_INTEGER = Range("an integer >= 0", whole=True)
POSITIVE_INTEGER = Range("an integer >= 1", low=1, whole=True)


def number(default: Any, allowed: Range) -> Any:
    """Declare a field that is a number, or a tuple of as many numbers as the default has.

    In a rule the number may be a schedule, unless its range is one of integers.

    Args:
        default: The default, a number or a tuple of numbers.
        allowed: The range of each number.
    """
    return field(default=default, metadata=within(allowed))


def within(allowed: Range) -> Mapping[str, Any]:
    """The metadata of a number without a default: ``field(metadata=within(FINITE))``."""
    return {"integers" if allowed.whole else "ranges": allowed}


def choice(*choices: Any, default: Any) -> Any:
    """Declare a field whose value is one of several choices.

    Args:
        choices: The choices.
        default: The choice that is the default.
    """
    return field(default=default, metadata={"choices": choices})


def switch(default: bool = False) -> Any:
    """Declare a field that is True or False."""
    return choice(True, False, default=default)


class Declared:
    """The base class of frozen dataclasses with declared fields."""

    #: The range of each field that is a number or a tuple of numbers, integers excepted.
    ranges: ClassVar[Mapping[str, Range]] = {}
    #: The range of each field that is an integer.
    integers: ClassVar[Mapping[str, Range]] = {}
    #: The choices of each field declared with ``choice`` or ``switch``.
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    #: The fields declared with ``switch``.
    switches: ClassVar[tuple[str, ...]] = ()
    #: What a message adds to the words of a range, if a number may be replaced by something else.
    beside: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        """Collect the declarations of the fields; the parent class's come first."""
        super().__init_subclass__()
        declared = {name: x.metadata for name, x in vars(cls).items() if isinstance(x, Field)}
        for kind in ("ranges", "integers", "choices"):
            own = {name: what[kind] for name, what in declared.items() if kind in what}
            setattr(cls, kind, {**getattr(cls, kind), **own})
        cls.switches = tuple(name for name, x in cls.choices.items() if x == (True, False))

    def __post_init__(self) -> None:
        """Check the fields against their declarations, and convert numbers to floats and ints.

        Raises:
            ValueError: A value is out of its range, of the wrong type, or not one of the choices.
        """
        kind: Any = type(self)
        for f, allowed in _numbers(kind):
            value = getattr(self, f.name)
            if not isinstance(f.default, tuple):
                # This is the usual case, and takes a tenth of the time of a full check.
                usual = type(value) is float and not allowed.whole and allowed.holds(value)
                found = value + 0.0 if usual else self._checked(f.name, allowed, value)
            else:
                length = len(f.default) if f.metadata else None
                found = self._checked_parts(f.name, allowed, value, length)
            object.__setattr__(self, f.name, found)
        for name, choices in self.choices.items():
            value = getattr(self, name)
            # The types must agree as well: 1 is equal to True, but is not a switch.
            if not any(isinstance(value, type(x)) and value == x for x in choices):
                *others, last = map(repr, choices)
                self._refuse(name, f"{', '.join(others)} or {last}", value)

    def _checked_parts(self, name: str, allowed: Range, value: Any, length: int | None) -> Any:
        """Check a tuple or a list of numbers; a length of None allows any."""
        if not isinstance(value, tuple | list) or length not in (None, len(value)):
            words = {None: "a tuple", 2: "a pair", 3: "a triple"}.get(
                length, f"a tuple of {length}"
            )
            self._refuse(name, f"{words} of numbers", value)
        return tuple(self._checked(name, allowed, part) for part in value)

    def _checked(self, name: str, allowed: Range, value: Any, when: str = "") -> Any:
        """Convert a number, and check that it is in its range."""
        found = allowed.read(value)
        if not allowed.holds(found):
            self._refuse(
                name, f"{allowed.words}{'' if allowed.whole else self.beside}", value, when
            )
        return found

    def _require(self, holds: bool, name: str, words: str) -> None:
        """Refuse the value of a field unless a condition holds."""
        if not holds:
            self._refuse(name, words, getattr(self, name))

    def _refuse(self, name: str, words: str, value: Any, when: str = "") -> NoReturn:
        raise ValueError(f"{type(self).__name__}: {name} must be {words}; got {brief(value)}{when}")


# This is a dict because torch's compiler warns about functools.cache.
_NUMBERS: dict[type, list[tuple[Field[Any], Range]]] = {}


def _numbers(kind: Any) -> list[tuple[Field[Any], Range]]:
    """The fields that are numbers; to find them takes a quarter of the time to create a rule."""
    if kind not in _NUMBERS:
        ranges = {**kind.ranges, **kind.integers}
        _NUMBERS[kind] = [(f, ranges[f.name]) for f in fields(kind) if f.name in ranges]
    return _NUMBERS[kind]
