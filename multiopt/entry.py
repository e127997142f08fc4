"""What the registry holds for one name, and what users choose for it: rule, clip, average."""

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
        rule: Its rule.
        clip: Its clip.
        step: Its clock.
        slots: Its slots by name, the master copy of a 16-bit parameter among them; empty for slots
            that are all zero.
        layout: The layout of its parameter.
        average: What is held of its average, if one is kept, as of a name of its own; of step 0
            before the first step that it has seen.
    """

    rule: Rule
    clip: Clip | None
    step: int
    slots: dict[str, Array]
    layout: Layout
    average: "Entry | None" = None

    def converted(self, convert: Callable[[Array], Array]) -> dict[str, Array]:
        """The slots, each converted."""
        return {name: convert(slot) for name, slot in self.slots.items()}

    def with_converted(self, convert: Callable[[Array], Array]) -> "Entry":
        """The same with slots converted, the average's too."""
        average = None if self.average is None else self.average.with_converted(convert)
        return self._replace(slots=self.converted(convert), average=average)


def chained(entry: Entry) -> Rule:
    """What an engine computes for an entry: its rule, with its average if it has one."""
    if entry.average is None:
        return entry.rule
    average = cast("Average", entry.average.rule)
    return Averaged(entry.rule, average, since=entry.step - entry.average.step)


def unchained(entry: Entry) -> Entry:
    """An entry of what an engine computes, with rule, slots and average apart."""
    chain = entry.rule
    if not isinstance(chain, Averaged):
        return entry
    slots, count = dict(entry.slots), entry.step - int(chain.since)
    mean = {"average": slots.pop(AVERAGE)}
    average = Entry(chain.average, None, count, mean if count else {}, entry.layout)
    return entry._replace(rule=chain.rule, slots=slots, average=average)


def all_slots(entry: Entry, names: Iterable[str]) -> list[Array]:
    """The slots of an entry as an engine has them: none if all are zero.

    Args:
        entry: The entry.
        names: Their names, in their order.
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
    """Refuse what is neither a rule nor a callable.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(rule, type) or not (isinstance(rule, Rule) or callable(rule)):
        raise TypeError(f"rule must be a rule or a callable name -> rule; got {brief(rule)}")


def check_clip(clip: Any) -> None:
    """Refuse what is neither a clip, nor a callable, nor None.

    Raises:
        TypeError: It is none of them.
    """
    if isinstance(clip, type) or not (clip is None or isinstance(clip, Clip) or callable(clip)):
        raise TypeError(f"clip must be a Clip, a callable name -> Clip or None; got {brief(clip)}")


def check_average(average: Any) -> None:
    """Refuse what is neither an average, nor a callable, nor None.

    Raises:
        TypeError: It is none of them.
    """
    known = average is None or isinstance(average, Average) or callable(average)
    if isinstance(average, type) or not known:
        raise TypeError(
            f"average must be an Average, a callable name -> Average or None; got {brief(average)}"
        )


def chosen_clip(clip: Any, name: str) -> Clip | None:
    """The clip of a name, as ``chosen``."""
    return None if clip is None else chosen(clip, name, Clip, "clip")


def chosen_average(average: Any, name: str) -> Average | None:
    """The average of a name, as ``chosen``."""
    return None if average is None else chosen(average, name, Average, "average")


def chosen(given: Any, name: str, kind: type, what: str) -> Any:
    """The rule or the clip of a name: the one given for all, or what the callable says.

    Raises:
        TypeError: The callable gave something else.
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
    """The slots of a parameter, with their shapes.

    Raises:
        ValueError: The rule is not for it.
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
    """An entry under another rule: slots that both have are kept, others start at zero.

    Where the new rule has slots and none is kept, the clock starts with them: Adam's corrections of
    a bias towards zero belong to the steps that its averages have seen.

    Raises:
        ValueError: The rule is not for parameters of this shape.
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
    """A rule with some hyperparameters changed.

    Args:
        whose: Gives the names whose it is, for messages; None if it is nobody's yet.
        rule: The rule.
        values: The hyperparameters.

    Raises:
        TypeError: The rule has no hyperparameter of that name.
        ValueError: A value is out of range.
    """
    numbers = plain_numbers(rule, values)
    if numbers is not None:
        # To make a rule takes ten times as long.
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
    """A callable ``name -> rule`` that changes hyperparameters of what another one gives.

    Args:
        given: The other.
        values: The hyperparameters.
    """

    def __init__(self, given: Callable[[str], Rule], values: dict[str, Any]) -> None:
        """Nothing is changed yet."""
        self.given, self.values = given, values
        # The last rules, so that names that share one go on sharing one.
        self._last: list[tuple[Rule, Rule]] = []

    def __call__(self, name: str) -> Rule:
        """The changed rule of a name."""
        rule = chosen(self.given, name, Rule, "rule")
        for old, new in self._last:
            if old is rule:
                return new
        self._last = [(rule, changed(lambda: [name], rule, self.values)), *self._last[:7]]
        return self._last[0][1]

    def __repr__(self) -> str:
        """The callable and the changes."""
        return f"{self.given!r} with {self.values!r}"


def changed_for_all(
    rule: Rule | Callable[[str], Rule], values: Mapping[str, Any]
) -> Rule | Changed:
    """The rule for all names, or the callable, with some hyperparameters changed.

    Raises:
        TypeError: The rule has no such hyperparameter.
        ValueError: A value is out of range.
    """
    if isinstance(rule, Rule):
        return changed(None, rule, values)
    if isinstance(rule, Changed):
        return Changed(rule.given, {**rule.values, **values})
    return Changed(rule, dict(values))
