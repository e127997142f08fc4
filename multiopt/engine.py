"""What computes: a group is all parameters that one engine updates, a table with a row for each.

A group lives as long as its parameters do. Its columns are the one home of what is known of them:
clocks, the numbers of the rule, bounds of clips, slots. A step names some rows, in any order, and
makes five calls, whatever the rows are:

    look      where their arrays are now, and which are not what the engine takes as they are
    lend      for each of those: what it is to take instead
    measure   whether gradients are finite, and their sums of squares (``finite``, ``squares``)
    prepare   everything that may fail
    run       clip and update; nothing fails any more

>>> import numpy as np
>>> from multiopt.backend import named
>>> from multiopt.layout import Layout
>>> from multiopt.rules import SGD
>>> group = named("numpy").group(SGD(lr=0.5, momentum=0.9), Layout("numpy", (), "float32", "cpu"))
>>> rows = group.add([(3,), (2, 2)])
>>> group.set_rules(rows, SGD(lr=0.5, momentum=0.9))
>>> [group.rule_at(row).lr for row in rows]
[0.5, 0.5]
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import compress
from math import inf, nan
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeAlias, TypeVar

import numpy as np

from multiopt.averaging import Averaged
from multiopt.layout import Layout, Words, address
from multiopt.rules.arithmetic import GROW, SHRINK, clip_coefficient, rescaling
from multiopt.rules.rule import Rule, with_numbers

if TYPE_CHECKING:
    from multiopt.backend import Backend
    from multiopt.step.clip import Clip

__all__ = [
    "APART",
    "MASTER",
    "OVERLAPPING",
    "SHARED_GRADIENTS",
    "UNKNOWN",
    "Arrays",
    "Group",
    "Member",
    "Numbered",
    "Part",
    "Schedules",
    "formulas",
    "kind_of",
    "norms",
    "number_fields",
    "numbers_of",
    "other_fields",
    "schedules_of",
]

#: A thing that has a number.
Item = TypeVar("Item")

#: An array of any library.
Array: TypeAlias = Any

#: Whether memory overlaps that a step writes: with nothing; only gradients with each other; a
#: parameter with something; nobody has looked.
APART, SHARED_GRADIENTS, OVERLAPPING, UNKNOWN = range(4)

#: What is held where nothing is.
NO_ARRAYS = np.empty(0, object)

#: The name of the slot that is no rule's: what a 16-bit parameter is rounded from, in float32.
MASTER = "master_param"


class Arrays:
    """The arrays of a step, by place in its list of names. One object serves all steps.

    Attributes:
        params: The parameters, an array of objects.
        grads: The gradients, likewise; None for a name that is to be left alone.
        own: Whether the gradients are the parameters' own, as torch's ``.grad``.
        spans: Where memory that is written or read begins, and where it ends: of parameters first,
            then of gradients. Zero where there is none.
        order: The order of the beginnings at the last step, of as many; None before the first.
        overlap: Whether memory that is written overlaps with any other, as far as it is known.
        words: What compiled code is told: the identities of ``params`` and ``grads``, the addresses
            of the beginnings and of the ends, how many parameters there are, the address of
            ``order`` or 0.
    """

    __slots__ = ("_room", "grads", "order", "overlap", "own", "params", "spans", "words")

    def __init__(self) -> None:
        """Hold none."""
        self.release()
        self._room = self.spans = np.zeros((2, 0), np.int64)
        self.words = Words(6)
        self.own, self.overlap = False, UNKNOWN
        self.order: np.ndarray | None = None

    def take(self, params: np.ndarray, grads: np.ndarray, own: bool) -> None:
        """Hold those of a step, of which nothing is looked at yet."""
        self.params, self.grads, self.own = params, grads, own
        values, count = self.words.values, 2 * len(params)
        values[0], values[1] = id(params), id(grads)
        if count != self.spans.shape[1]:
            if count > self._room.shape[1]:
                self._room = np.zeros((2, 2 * count), np.int64)
                values[2] = start = address(self._room)
                values[3] = start + self._room.strides[0]
            self.spans = self._room[:, :count]
            values[4], values[5], self.order = len(params), 0, None
        self.spans.fill(0)
        self.overlap = UNKNOWN

    def release(self) -> None:
        """Hold none any more."""
        self.params = self.grads = NO_ARRAYS

    def set_order(self, order: np.ndarray) -> None:
        """Remember the order of the beginnings."""
        self.order, self.words.values[5] = order, address(order)


@dataclass(slots=True, eq=False)
class Part:
    """The rows of a group that a step is about.

    Attributes:
        group: The group.
        rows: The rows.
        places: The place of each in the list of names of the step.
        at: The addresses of the two.
        fresh: The positions in ``rows`` of those that are new; None if none is.
        odd: After ``look``, the positions in ``rows`` that need to be lent something.
        owned: After ``look``, whether all arrays are known to own their memory, so that two of them
            overlap only if they are one object.
        params: The parameters, for engines that keep a list.
        grads: The gradients, likewise.
        norms: After ``clip_by_norm``, by position the norm of the gradient; -1 for no bound.
        clipped: After ``run``, for each row whether its gradient was clipped, as far as the host
            knows; None for no clips.
        limited: By position, the same as a value on a device, of which only that knows; None for
            no such values.
    """

    group: "Group"
    rows: np.ndarray
    places: np.ndarray
    at: tuple[int, int]
    fresh: np.ndarray | None = None
    odd: Sequence[int] = ()
    owned: bool = False
    params: Any = ()
    grads: Any = ()
    norms: np.ndarray | None = None
    clipped: np.ndarray | None = None
    limited: Mapping[int, Any] | None = None

    def take(self, rows: np.ndarray, places: np.ndarray) -> None:
        """Be about these rows, at these places."""
        self.rows, self.places, self.at = rows, places, (address(rows), address(places))

    def keep(self, which: np.ndarray) -> None:
        """Leave out the rows that are not marked."""
        self.take(self.rows[which], self.places[which])
        if self.params:
            self.params = list(compress(self.params, which))
            self.grads = list(compress(self.grads, which))


@dataclass(slots=True)
class Member:
    """One parameter of a step, as Python has looked at it.

    Attributes:
        name: Its name.
        place: Its place in the list of names.
        row: Its row.
        backend: The backend of its library.
        param: Its array, or the parts of a complex one.
        grad: Its gradient, likewise, which nothing may change.
        layout: Its layout.
        slots: Its slots, where the engine is the rule as it stands.
        master: What a 16-bit parameter was rounded from, if that is kept.
        rule: The rule, with the numbers of this step.
        scalars: The coefficients of this step, rounded to the compute dtype.
        scales: Clip coefficients, rounded likewise, applied one after the other.
        bound: Bound of each element of the scaled gradient, rounded likewise, or None.
    """

    name: str
    place: int
    row: int
    backend: "Backend"
    param: Array
    grad: Array
    layout: Layout
    slots: tuple[Array, ...] = ()
    master: Array | None = None
    rule: Rule | None = None
    scalars: Any = None
    scales: list[float] = field(default_factory=list)
    bound: float | None = None


class Schedules(NamedTuple):
    """The hyperparameters of a row that are schedules.

    Attributes:
        columns: Of each, its column of numbers.
        names: The hyperparameter.
        schedules: The callable.
    """

    columns: tuple[int, ...]
    names: tuple[str, ...]
    schedules: tuple[Callable[[int], float], ...]


class Group(ABC):
    """Parameters that one engine updates, with the columns that all engines have.

    Args:
        backend: That of their library.
        layout: What their layouts have in common; the shape counts for nothing.
        rule: A rule of their kind: the numbers among the hyperparameters count for nothing.
        has_masters: Whether each has a master copy.

    Attributes:
        columns: The hyperparameters that are numbers, with the place in those that are tuples.
        kind: What rules have in common that may share it.
        steps: By row, how many steps were taken: the clock.
        numbers: By row, the hyperparameters that are numbers, in the order of ``columns``; those
            that are schedules have the number of the last step.
        shapes: By row, the shape, parts of complex ones included.
    """

    #: What a new row has in each column.
    FRESH: ClassVar = {
        "steps": (np.int64, 0),
        "schedule": (np.int32, 0),
        "clip": (np.int32, 0),
        "norm_bound": (np.float64, nan),
        "eps": (np.float64, 0.0),
        "own": (np.float64, 1.0),
        "shared": (np.float64, 1.0),
        "bound": (np.float64, inf),
        "norm": (np.float64, -1.0),
    }

    steps: np.ndarray
    schedule: np.ndarray
    clip: np.ndarray
    norm_bound: np.ndarray
    eps: np.ndarray
    own: np.ndarray
    shared: np.ndarray
    bound: np.ndarray
    norm: np.ndarray
    numbers: np.ndarray

    def __init__(
        self, backend: "Backend", layout: Layout, rule: Rule, has_masters: bool = False
    ) -> None:
        """Have no row yet."""
        self.backend, self.layout, self.rule = backend, layout.with_shape(()), rule
        self.has_masters = has_masters
        self.dtype = np.dtype(layout.compute_dtype)
        self.columns, self.kind = number_fields(rule), kind_of(rule)
        #: Whether there are averages; then the last column says since when.
        self.has_averages = isinstance(rule, Averaged)
        self.shapes: list[tuple[int, ...]] = []
        #: Different sets of schedules, by the number that rows have for them; 0 for none.
        self.schedules = Numbered(((),), Schedules((), (), ()))
        #: What the owner of the group knows it by.
        self.number = 0
        #: How many rows have schedules; how many have clips.
        self.scheduled = self.clipping = 0
        #: How many rows have no elements.
        self.empty = 0
        self._free: list[int] = []
        self._grow(16)

    # Rows

    def _grow(self, capacity: int) -> None:
        """Move the columns to longer ones. Nobody may hold their addresses from step to step."""
        for name, (dtype, value) in self.FRESH.items():
            column = np.full(capacity, value, dtype)
            if self.shapes:
                column[: len(self.shapes)] = getattr(self, name)[: len(self.shapes)]
            setattr(self, name, column)
        numbers = self._new_numbers(capacity)
        if self.shapes:
            numbers[: len(self.shapes)] = self.numbers[: len(self.shapes)]
        self.numbers = numbers

    def _new_numbers(self, capacity: int) -> np.ndarray:
        """A column of numbers."""
        return np.zeros((capacity, len(self.columns)))

    def rows(self) -> np.ndarray:
        """The rows that are taken."""
        rows = np.arange(len(self.shapes))
        return np.setdiff1d(rows, self._free) if self._free else rows

    def add(
        self, shapes: Sequence[tuple[int, ...]], slots: Sequence[Sequence[Array]] | None = None
    ) -> np.ndarray:
        """Rows for new parameters, with a clock of zero.

        Args:
            shapes: Their shapes, parts of complex ones included.
            slots: Of each all slots in their order, as ``from_host`` gives them, to take possession
                of; None for slots of zero.

        Raises:
            ValueError: The rule is not for parameters of a shape.
            MemoryError: There is no room.
        """
        count = len(shapes)
        taken = self._free[len(self._free) - min(count, len(self._free)) :]
        first, end = len(self.shapes), len(self.shapes) + count - len(taken)
        if end > len(self.steps):
            self._grow(max(end, 2 * len(self.steps)))
        rows = np.array([*taken, *range(first, end)], np.int64)
        for name, (_, value) in self.FRESH.items():
            getattr(self, name)[rows] = value
        self._make_slots(rows, shapes, slots)
        # From here on nothing fails.
        del self._free[len(self._free) - len(taken) :]
        self.empty += sum(0 in shape for shape in shapes)
        for row, shape in zip(taken, shapes, strict=False):
            self.shapes[row] = shape
        self.shapes.extend(shapes[len(taken) :])
        return rows

    def remove(self, row: int) -> None:
        """Let go of a row. Others may take its place."""
        self.scheduled -= self.schedule[row] != 0
        self.clipping -= self.clip[row] != 0
        self.empty -= 0 in self.shapes[row]
        self.schedule[row] = self.clip[row] = 0
        self._drop_slots(row)
        self._free.append(row)

    def __len__(self) -> int:
        """The number of rows in use."""
        return len(self.shapes) - len(self._free)

    def layout_at(self, row: int) -> Layout:
        """The layout of a parameter."""
        return self.layout.with_shape(self.shapes[row])

    # Slots

    @abstractmethod
    def _make_slots(
        self,
        rows: np.ndarray,
        shapes: Sequence[tuple[int, ...]],
        slots: Sequence[Sequence[Array]] | None,
    ) -> None:
        """Give new rows slots; see ``add``."""

    @abstractmethod
    def _drop_slots(self, row: int) -> None:
        """Let go of the slots of a row; nothing of it fails."""

    @abstractmethod
    def slots_at(self, row: int) -> dict[str, Array]:
        """The slots of a row by name, master copy included, as the engine has them."""

    def slot_names(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        """The names of the slots of a parameter of this shape, in their order."""
        own = tuple(self.rule.slot_shapes(shape))
        return (*own, MASTER) if self.has_masters else own

    # Numbers

    def set_rules(self, rows: np.ndarray, rule: Rule) -> None:
        """Give rows the numbers and the schedules of a rule of the kind of this group."""
        values = numbers_of(rule, self.columns)
        schedules = schedules_of(rule, self.columns)
        self.numbers[rows] = values
        self.set_schedules(rows, schedules)

    def takes(self, rule: Rule) -> bool:
        """Whether a rule is of the kind of this group."""
        if type(rule) is not type(self.rule):
            return False
        kind = kind_of(rule)
        return kind is not None and kind == self.kind

    def change_numbers(self, rows: np.ndarray, rule: Rule, names: Iterable[str]) -> None:
        """Give rows, which are alike, some hyperparameters of a rule of the kind of this group.

        Args:
            rows: The rows.
            rule: The rule.
            names: The hyperparameters, those of a chained rule as they are called there.
        """
        values, names = numbers_of(rule, self.columns), set(names)
        for column, (name, _) in enumerate(self.columns):
            if name.removeprefix("rule.") in names:
                self.numbers[rows, column] = values[column]
        schedules = schedules_of(rule, self.columns)
        if schedules.columns or self.scheduled:
            self.set_schedules(rows, schedules)

    def set_schedules(self, rows: np.ndarray, schedules: Schedules) -> None:
        """Give rows some schedules in the place of those that they have."""
        key = schedules.columns, *map(id, schedules.schedules)
        number = self.schedules.number(key, schedules, lambda: self.schedule)
        self.scheduled += (len(rows) if number else 0) - int(np.count_nonzero(self.schedule[rows]))
        self.schedule[rows] = number

    def rule_now(self, row: int) -> Rule:
        """The rule of a row with the numbers of this step in the places of schedules."""
        return with_numbers(self.rule, self.columns, self.numbers[row].tolist())

    def rule_at(self, row: int) -> Rule:
        """The rule of a row, its schedules in their places."""
        values: list[Any] = self.numbers[row].tolist()
        schedules = self.schedules[self.schedule[row]]
        for column, schedule in zip(schedules.columns, schedules.schedules, strict=True):
            values[column] = schedule
        return with_numbers(self.rule, self.columns, values)

    def counts(self, rows: np.ndarray) -> np.ndarray:
        """How many steps the averages of rows have seen; their clocks where there are none."""
        steps: np.ndarray = self.steps[rows]
        if self.has_averages:
            steps -= self.numbers[rows, -1].astype(np.int64)
        return steps

    def set_clock(self, row: int, step: int) -> None:
        """Say how many steps a row has taken. Its average has seen as many as before."""
        if self.has_averages:
            self.numbers[row, -1] += step - self.steps[row]
        self.steps[row] = step

    def set_clips(self, rows: np.ndarray, clip: "Clip | None", number: int) -> None:
        """Bound the gradients of rows.

        Args:
            rows: The rows.
            clip: The clip; None for none.
            number: What the owner of the group knows it by, 0 for none.
        """
        self.clipping += (len(rows) if number else 0) - int(np.count_nonzero(self.clip[rows]))
        self.clip[rows] = number
        self.own[rows] = self.shared[rows] = 1.0
        norm, value, eps = (None, None, 0.0) if clip is None else (clip.norm, clip.value, clip.eps)
        self.norm_bound[rows], self.norm[rows] = nan if norm is None else norm, -1.0
        self.eps[rows] = eps
        self.bound[rows] = self.dtype.type(inf if value is None else value)

    # A step

    @abstractmethod
    def look(self, part: Part, arrays: Arrays, last: bool) -> None:
        """Find the arrays of a part as they are now; nothing is changed yet.

        It leaves those without a gradient out of the part, and says in ``part.odd`` which are not
        what the engine takes as they are. For the others it fills ``arrays.spans``.

        Args:
            part: The part.
            arrays: The arrays of the step.
            last: Whether it is the last part of the step, so that ``arrays.overlap`` may be told.
        """

    def locate(self, part: Part, arrays: Arrays) -> None:  # noqa: B027 -- most have nothing to do
        """Fill the spans of what was not lent, where ``look`` has not; for ``part.owned``."""

    def overlap(self, arrays: Arrays) -> int:
        """Whether memory that a step writes overlaps with any other.

        Args:
            arrays: Those of the step, their spans filled by the groups of all its parts.
        """
        low, high = arrays.spans
        order = arrays.order
        if order is None or (np.diff(low[order]) < 0).any():
            order = np.argsort(low)
            arrays.set_order(order)
        writes = order < len(low) // 2
        low, high = low[order], high[order]
        taken = low < high
        low, high, writes = low[taken], high[taken], writes[taken]
        # How far the memory reaches that was met before, going up through the addresses.
        reached = np.maximum.accumulate(high)[:-1]
        reached_by_writes = np.maximum.accumulate(np.where(writes, high, 0))[:-1]
        if (low[1:] < np.where(writes[1:], reached, reached_by_writes)).any():
            return OVERLAPPING
        return SHARED_GRADIENTS if (low[1:] < reached).any() else APART

    @abstractmethod
    def lend(self, part: Part, position: int, member: Member, copy: bool, arrays: Arrays) -> None:
        """Take a parameter that Python has looked at, this step only.

        Args:
            part: The part.
            position: Its position in ``part.rows``.
            member: The parameter.
            copy: Whether the gradient's own memory may not be read, since something writes there.
            arrays: The arrays of the step, to fill in the spans of what is used as it is.
        """

    @abstractmethod
    def finite(self, part: Part, threads: int | None) -> np.ndarray:
        """For each row of a part whether its gradient has no infinity and no NaN."""

    @abstractmethod
    def squares(
        self, part: Part, which: np.ndarray, factor: float, threads: int | None
    ) -> np.ndarray:
        """Sums of squares of gradients.

        Args:
            part: The part.
            which: Positions in ``part.rows``.
            factor: What gradients are multiplied by, in float64; first they are by ``own``, in the
                compute dtype.
            threads: The largest number of threads, or None.
        """

    @np.errstate(all="ignore")
    def clip_by_norm(self, part: Part, threads: int | None) -> None:
        """Measure the gradients that have a bound of their norm: fill ``norm`` and ``own``."""
        which = np.flatnonzero(~np.isnan(self.norm_bound[part.rows]))
        rows = part.rows[which]
        self.own[rows] = 1.0

        def squares(some: np.ndarray, factor: float) -> np.ndarray:
            return self.squares(part, which[some], factor, threads)

        self.norm[rows] = norms(len(rows), squares)
        found = clip_coefficient(np, self.norm_bound[rows], self.norm[rows], self.eps[rows])
        self.own[rows] = found.astype(self.dtype)
        part.norms = self.norm[part.rows]

    @abstractmethod
    def prepare(
        self, part: Part, arrays: Arrays, leave_clipped: bool, threads: int | None
    ) -> dict[int, Array]:
        """Make all that may fail of a step, the memory that it needs included.

        Args:
            part: The part.
            arrays: The arrays of the step.
            leave_clipped: Whether to write clipped gradients over the gradients.
            threads: The largest number of threads, or None.

        Returns:
            By place, the arrays that take the place of parameters that cannot be written.
        """

    @abstractmethod
    def run(self, part: Part) -> None:
        """Clip and update what was prepared, and count the step. Nothing fails any more."""

    def left_over(self, part: Part) -> Iterable[tuple[Member, Array]]:
        """The clipped gradients of a step that could not be left in their own place."""
        return ()

    @abstractmethod
    def forget(self, part: Part) -> None:
        """Hold nothing of a step any more, whether it ended or not."""


class Numbered(Generic[Item]):
    """Things by small numbers, which columns hold; what no column holds any more is let go.

    Args:
        key: What tells the thing apart that has the number 0.
        item: That thing.
    """

    def __init__(self, key: Hashable, item: Item) -> None:
        """Have one thing."""
        self._items: dict[int, Item] = {0: item}
        self._keys: dict[int, Hashable] = {0: key}
        self._numbers: dict[Hashable, int] = {key: 0}
        self._next, self._most = 1, 16

    def number(self, key: Hashable, item: Item, column: Callable[[], np.ndarray]) -> int:
        """The number of a thing.

        Args:
            key: What tells it apart.
            item: The thing, which is held, so that an ``id`` in its key stays its own.
            column: The numbers that are in use.
        """
        if key not in self._numbers:
            if len(self._items) > self._most:
                used = {0, *np.unique(column()).tolist()}
                for number in self._items.keys() - used:
                    del self._items[number], self._numbers[self._keys.pop(number)]
                self._most = 16 + 2 * len(used)
            self._items[self._next], self._keys[self._next] = item, key
            self._numbers[key] = self._next
            self._next += 1
        return self._numbers[key]

    def having(self, test: Callable[[Item], bool]) -> list[tuple[int, Item]]:
        """The things that pass a test, with their numbers."""
        return [(number, item) for number, item in self._items.items() if test(item)]

    def __getitem__(self, number: int) -> Item:
        """The thing that has a number."""
        return self._items[number]


def number_fields(rule: Rule) -> list[tuple[str, int | None]]:
    """The numbers among the hyperparameters: field, and place in it where the field is a tuple.

    None in the place of a number is a choice.
    """
    found: list[tuple[str, int | None]] = [
        (f"{inner}.{name}", place)
        for inner in rule.nested
        for name, place in number_fields(getattr(rule, inner))
    ]
    for name in rule.ranges:
        value = getattr(rule, name)
        if isinstance(value, tuple):
            found += [(name, place) for place, part in enumerate(value) if part is not None]
        elif value is not None:
            found.append((name, None))
    return found


def other_fields(rule: Rule) -> dict[str, Any]:
    """The hyperparameters that are no numbers: switches, and choices of other kinds."""
    declared = {*rule.ranges, *rule.nested}
    found = {f.name: getattr(rule, f.name) for f in fields(rule) if f.name not in declared}
    for inner in rule.nested:
        found |= {f"{inner}.{name}": x for name, x in other_fields(getattr(rule, inner)).items()}
    return found


def formulas(rule: Rule) -> list[Rule]:
    """The rules whose formulas a rule computes: those in it, or itself."""
    return [getattr(rule, inner) for inner in rule.nested] or [rule]


def kind_of(rule: Rule) -> Hashable | None:
    """What rules have in common that may share a group: all but the values of their numbers.

    None if that cannot be looked up, for a choice is a list, say.
    """
    choices = tuple(other_fields(rule).items())
    computed = tuple((type(part), part.update, part.slots) for part in formulas(rule))
    kind = computed, tuple(number_fields(rule)), choices
    try:
        hash(kind)
    except TypeError:
        return None
    return kind


def numbers_of(rule: Rule, columns: Sequence[tuple[str, int | None]]) -> list[float]:
    """The numbers of a rule; NaN in the place of a schedule."""
    return [nan if callable(value) else value for value in _values_of(rule, columns)]


def schedules_of(rule: Rule, columns: Sequence[tuple[str, int | None]]) -> Schedules:
    """The schedules of a rule."""
    found = [
        (number, columns[number][0], value)
        for number, value in enumerate(_values_of(rule, columns))
        if callable(value)
    ]
    return Schedules(*zip(*found, strict=True)) if found else Schedules((), (), ())


def _values_of(rule: Rule, columns: Sequence[tuple[str, int | None]]) -> list[Any]:
    values = [(attrgetter(name)(rule), place) for name, place in columns]
    return [value if place is None else value[place] for value, place in values]


def norms(count: int, squares: Callable[[np.ndarray, float], np.ndarray]) -> np.ndarray:
    """Norms that neither overflow nor underflow.

    A sum of squares near the ends of float64's range is taken again of scaled gradients.

    Args:
        count: How many norms.
        squares: For some of them the sums of squares of the gradients times a factor.
    """
    if not count:
        return np.empty(0)
    totals = squares(np.arange(count), 1.0)
    found: np.ndarray = np.sqrt(totals)
    factors = rescaling(np, totals)
    for factor in (SHRINK, GROW):
        which = np.flatnonzero(factors == factor)
        if which.size:
            found[which] = np.sqrt(squares(which, factor)) / factor
    return found
