"""Entries: all that is kept for one name as a record, and what users choose for it.

The registry keeps its state in columns. Where one name is handled by itself (it gets another rule,
it moves to another library, it is pickled), its row is read as an ``Entry`` and written back as a
new row.

>>> import numpy as np
>>> from multiopt.entry import Entry, with_rule
>>> from multiopt.layout import Layout
>>> from multiopt.rules import SGD, Adam
>>> layout = Layout("numpy", (2,), "float64", "cpu")
>>> slots = {"exp_avg": np.ones(2), "exp_avg_sq": np.ones(2)}
>>> entry = Entry(Adam(), None, 7, slots, layout)
>>> with_amsgrad = with_rule("w", entry, Adam(amsgrad=True))   # keeps what both rules have
>>> [*with_amsgrad.slots], with_amsgrad.step
(['exp_avg', 'exp_avg_sq', 'max_exp_avg_sq'], 7)
>>> with_rule("w", entry, SGD(momentum=0.5)).step              # keeps nothing, so it starts over
0
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple, cast

from multiopt.backend import Array, zeros
from multiopt.engine import MASTER
from multiopt.errors import brief
from multiopt.layout import Layout
from multiopt.rules import Rule
from multiopt.rules.average import AVERAGE, Average, Averaged
from multiopt.rules.rule import plain_numbers, with_numbers
from multiopt.step.clip import Clip

__all__ = [
    "Changed",
    "Entry",
    "all_slots",
    "chained",
    "changed",
    "changed_for_all",
    "check_average",
    "check_clip",
    "check_rule",
    "chosen",
    "chosen_average",
    "chosen_clip",
    "slot_shapes",
    "unchained",
    "with_rule",
]


class Entry(NamedTuple):
    """What is held of one name, as a record.

    Attributes:
        rule: The rule.
        clip: The clip, or None.
        step: The clock.
        slots: The slots by name, including the master copy of a 16-bit parameter; empty if all of
            them are zero.
        layout: The layout of the parameter.
        average: If an average is kept, an entry for it, whose step counts the steps it has seen.
    """

    rule: Rule
    clip: Clip | None
    step: int
    slots: dict[str, Array]
    layout: Layout
    average: "Entry | None" = None

    def converted(self, convert: Callable[[Array], Array]) -> dict[str, Array]:
        """Return the slots, each converted."""
        return {name: convert(slot) for name, slot in self.slots.items()}

    def with_converted(self, convert: Callable[[Array], Array]) -> "Entry":
        """Return a copy with all slots converted, including the average's."""
        average = None if self.average is None else self.average.with_converted(convert)
        return self._replace(slots=self.converted(convert), average=average)


def chained(entry: Entry) -> Rule:
    """The rule that an engine runs for an entry: its rule, with its average if one is kept."""
    if entry.average is None:
        return entry.rule
    average = cast("Average", entry.average.rule)
    return Averaged(entry.rule, average, since=entry.step - entry.average.step)


def unchained(entry: Entry) -> Entry:
    """Take an entry with a chained rule apart into rule and average; the inverse of ``chained``."""
    chain = entry.rule
    if not isinstance(chain, Averaged):
        return entry
    slots, count = dict(entry.slots), entry.step - int(chain.since)
    mean = {"average": slots.pop(AVERAGE)}
    average = Entry(chain.average, None, count, mean if count else {}, entry.layout)
    return entry._replace(rule=chain.rule, slots=slots, average=average)


def all_slots(entry: Entry, names: Iterable[str]) -> list[Array]:
    """List the slots of an entry for an engine; an empty list stands for slots that are all zero.

    Args:
        entry: The entry.
        names: The names of the slots, in the engine's order.
    """
    have = dict(entry.slots)
    if entry.average is not None and entry.average.slots:
        have[AVERAGE] = entry.average.slots["average"]
    if not have:
        return []
    shapes, layout = chained(entry).slot_shapes(entry.layout.storage_shape), entry.layout
    return [
        have[name]
        if name in have
        else zeros(layout.with_shape(shapes.get(name, layout.storage_shape)))
        for name in names
    ]


def check_rule(rule: Any) -> None:
    """Check that an argument is a rule or a callable.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(rule, type) or not (isinstance(rule, Rule) or callable(rule)):
        raise TypeError(f"rule must be a rule or a callable name -> rule; got {brief(rule)}")


def check_clip(clip: Any) -> None:
    """Check that an argument is a clip, a callable or None.

    Raises:
        TypeError: It is none of them.
    """
    if isinstance(clip, type) or not (clip is None or isinstance(clip, Clip) or callable(clip)):
        raise TypeError(f"clip must be a Clip, a callable name -> Clip or None; got {brief(clip)}")


def check_average(average: Any) -> None:
    """Check that an argument is an average, a callable or None.

    Raises:
        TypeError: It is none of them.
    """
    known = average is None or isinstance(average, Average) or callable(average)
    if isinstance(average, type) or not known:
        raise TypeError(
            f"average must be an Average, a callable name -> Average or None; got {brief(average)}"
        )


def chosen_clip(clip: Any, name: str) -> Clip | None:
    """Return the clip for a name; None for no clipping."""
    return None if clip is None else chosen(clip, name, Clip, "clip")


def chosen_average(average: Any, name: str) -> Average | None:
    """Return the average to keep for a name; None for none."""
    return None if average is None else chosen(average, name, Average, "average")


def chosen(given: Any, name: str, kind: type, what: str) -> Any:
    """Return the rule, clip or average for a name: the one for all names, or the callable's choice.

    Args:
        given: A rule, clip or average, or a callable ``name -> ...``.
        name: The name.
        kind: The class that is expected.
        what: The word for it, for messages.

    Raises:
        TypeError: The callable returned something else.
    """
    if isinstance(given, kind):
        return given
    choice = given(name)
    if not isinstance(choice, kind) and not (kind is not Rule and choice is None):
        raise TypeError(
            f"the {what} callable gave {brief(choice)} for parameter {name!r}; expected a "
            f"{kind.__name__}"
        )
    return choice


def slot_shapes(name: str, rule: Rule, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the slots of a parameter, by name.

    Raises:
        ValueError: The rule does not support the parameter.
    """
    if layout.is_complex and not rule.elementwise:
        raise ValueError(
            f"parameter {name!r} is complex; expected a real one, for {type(rule).__name__} treats "
            "it as a whole: give it another rule"
        )
    try:
        return rule.slot_shapes(layout.storage_shape)
    except ValueError as error:
        raise ValueError(f"parameter {name!r}: {error}") from error


def with_rule(name: str, entry: Entry, rule: Rule) -> Entry:
    """Give an entry another rule. Slots that both rules have are kept; others start at zero.

    If the new rule has slots and none of them is kept, the clock starts again with them, because
    Adam's bias corrections belong to the steps that its averages have seen.

    Raises:
        ValueError: The rule does not support parameters of this shape.
    """
    layout = entry.layout
    old = entry.rule.slot_shapes(layout.storage_shape)
    new = slot_shapes(name, rule, layout)
    if list(new.items()) == list(old.items()):
        return entry._replace(rule=rule)
    kept = {slot: entry.slots[slot] for slot, shape in old.items() if new.get(slot) == shape}
    slots = {slot: zeros(layout.with_shape(shape)) for slot, shape in new.items()} | kept
    if MASTER in entry.slots:
        slots[MASTER] = entry.slots[MASTER]
    return entry._replace(rule=rule, slots=slots, step=0 if new and not kept else entry.step)


def changed(
    whose: Callable[[], Sequence[str]] | None, rule: Rule, values: Mapping[str, Any]
) -> Rule:
    """Return a rule with some hyperparameters changed.

    Args:
        whose: Returns the names that have the rule, for messages; None if no name has it yet.
        rule: The rule.
        values: The new values by hyperparameter.

    Raises:
        TypeError: The rule does not have such a hyperparameter.
        ValueError: A value is out of range.
    """
    numbers = plain_numbers(rule, values)
    if numbers is not None:
        # Ten times as fast as calling the constructor.
        return with_numbers(rule, [(name, None) for name in numbers], [*numbers.values()])
    known = [f.name for f in fields(rule)]
    unknown = ", ".join(key for key in values if key not in known)
    try:
        if unknown:
            raise TypeError(
                f"{type(rule).__name__} has no hyperparameter {unknown}; it has {', '.join(known)}"
            )
        return replace(rule, **values)
    except (TypeError, ValueError) as error:
        if whose is None:
            raise
        raise type(error)(f"parameter {whose()[0]!r}: {error}") from error


class Changed:
    """A callable ``name -> rule`` that changes hyperparameters of the rules another one chooses.

    Args:
        given: The other callable.
        values: The new values by hyperparameter.
    """

    def __init__(self, given: Callable[[str], Rule], values: dict[str, Any]) -> None:
        """Wrap a callable; it is not called yet."""
        self.given, self.values = given, values
        # The last few rules, so that names which shared a rule still share one.
        self._last: list[tuple[Rule, Rule]] = []

    def __call__(self, name: str) -> Rule:
        """Return the changed rule for a name."""
        rule = chosen(self.given, name, Rule, "rule")
        for old, new in self._last:
            if old is rule:
                return new
        self._last = [(rule, changed(lambda: [name], rule, self.values)), *self._last[:7]]
        return self._last[0][1]

    def __repr__(self) -> str:
        """Show the callable and the changes."""
        return f"{self.given!r} with {self.values!r}"


def changed_for_all(
    rule: Rule | Callable[[str], Rule], values: Mapping[str, Any]
) -> Rule | Changed:
    """Change some hyperparameters of the rule for all names, or of what a callable chooses.

    Raises:
        TypeError: The rule does not have such a hyperparameter.
        ValueError: A value is out of range.
    """
    if isinstance(rule, Rule):
        return changed(None, rule, values)
    if isinstance(rule, Changed):
        return Changed(rule.given, {**rule.values, **values})
    return Changed(rule, dict(values))
