"""The table of names: which row of which group each name has.

Everything about a parameter is stored in the columns of its group, so all that is kept under a name
is a code: the number of the group and the row in it, packed into one integer. Finding the rows of a
step is then one dict look-up per name and a few operations on an array of codes.

>>> import numpy as np
>>> from multiopt.entry import Entry
>>> from multiopt.layout import Layout
>>> from multiopt.rules import SGD
>>> from multiopt.table import Table
>>> table = Table()
>>> layout = Layout("numpy", (3,), "float64", "cpu")
>>> table.put({"w": Entry(SGD(lr=0.5), None, 0, {}, layout)})
>>> table.names, table.rule_of("w").lr, table.clock("w")
(('w',), 0.5, 0)
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from multiopt.backend import Backend, backend_named
from multiopt.engine import Group
from multiopt.entry import Entry, all_slots, chained, unchained
from multiopt.guard import Guard
from multiopt.kinds import Numbered, formulas, kind_of
from multiopt.layout import Layout, address
from multiopt.rules import Rule
from multiopt.step.checks import check_name
from multiopt.step.clip import Clip
from multiopt.step.run import Rows, RowsOfGroup

if TYPE_CHECKING:
    from multiopt.state.record import Saved
    from multiopt.step.across import Across

__all__ = ["GROUP", "NOTHING", "Table"]

#: A code is the number of a group times this, plus a row.
GROUP = 1 << 40

#: The code of a name without a row.
MISSING = -1


class _Codes(dict[str, int]):
    """Codes by name. Looking up an unknown name gives ``MISSING`` and does not add the name.

    Attributes:
        missed: Whether an unknown name was looked up.
    """

    missed = False

    def __missing__(self, name: object) -> int:
        self.missed = True
        return MISSING


#: The rows of an empty list of names.
NOTHING = Rows([], np.empty(0, np.int64), [], False, False, {}, [])


class Table:
    """Names with their rows.

    Args:
        masters: Whether 16-bit parameters have master copies.
        guard: The optimizer's guard; by default a new one.

    Attributes:
        across: What steps know of other ranks; None if every parameter is whole here.
        last: The names of the last step with their rows, in case the same list comes again.
        pending: Loaded state of names not seen yet.
    """

    __slots__ = (
        *("_clips", "_codes", "_everything", "_everything_at", "_garbage", "_groups", "_kinds"),
        *("across", "guard", "last", "masters", "pending"),
    )

    def __init__(self, masters: bool = False, guard: Guard | None = None) -> None:
        """Create an empty table."""
        self.masters = masters
        self.guard = Guard() if guard is None else guard
        self.across: Across | None = None
        self.pending: dict[str, Saved] = {}
        self._codes = _Codes()
        self._groups: dict[int, Group] = {}
        self._kinds: dict[Hashable, int] = {}
        self._clips: Numbered[Clip | None] = Numbered(None, None)
        self.last = NOTHING
        # Codes of rows that no name uses any more.
        self._garbage: list[int] = []
        self._everything, self._everything_at = np.arange(0), 0

    def __contains__(self, name: object) -> bool:
        """Whether a name has been seen."""
        return name in self._codes

    def __len__(self) -> int:
        """The number of names seen."""
        return len(self._codes)

    @property
    def names(self) -> tuple[str, ...]:
        """The names seen so far, oldest first."""
        return tuple(self._codes)

    def row_of(self, name: str) -> tuple[Group, int]:
        """The group of a name, and its row in it.

        Raises:
            KeyError: The name has not been seen.
        """
        if name not in self._codes:
            why = "its loaded state is pending" if name in self.pending else "it was never stepped"
            raise KeyError(f"no state for parameter {name!r}: {why}")
        return self.at(self._codes[name])

    def at(self, code: int) -> tuple[Group, int]:
        """The group and the row that a code stands for."""
        number, row = divmod(code, GROUP)
        return self._groups[number], row

    def rule_of(self, name: str) -> Rule:
        """The rule of a name, schedules included."""
        group, row = self.row_of(name)
        return formulas(group.rule_at(row))[0]

    def scheduled_rules(self) -> dict[str, Rule]:
        """The rules of the names that have schedules."""
        if not any(group.scheduled for group in self._groups.values()):
            return {}
        rules = {}
        for name in self.names:
            group, row = self.row_of(name)
            if group.schedule[row]:
                rules[name] = group.rule_at(row)
        return rules

    def alike(self, names: Sequence[str]) -> list[Hashable]:
        """A key for each name; names with the same rule, schedules and clock have the same key."""
        codes = np.fromiter(map(self._codes.__getitem__, names), np.int64, len(names))
        keys: list[Hashable] = [None] * len(names)
        for group, rows, places in self._by_group(codes):
            columns = [group.numbers[rows], group.schedule[rows], group.steps[rows]]
            table = np.column_stack([*columns, np.full(len(rows), group.number)])
            row_keys = table.view(np.dtype((np.void, table.strides[0]))).ravel().tolist()
            for place, key in zip(places.tolist(), row_keys, strict=True):
                keys[place] = key
        return keys

    def clock(self, name: str) -> int:
        """The number of steps that a name has taken."""
        group, row = self.row_of(name)
        return int(group.steps[row])

    def entry(self, name: str, chain: Rule | None = None) -> Entry:
        """A record of what is kept for a name; its slots are the engine's own arrays, not copies.

        Args:
            name: The name.
            chain: The rule of its row, if the caller has it already.
        """
        group, row = self.row_of(name)
        rule = group.rule_at(row) if chain is None else chain
        slots = group.slots_at(row)
        clip = self._clips[int(group.clip[row])]
        layout = group.layout_at(row)
        return unchained(Entry(rule, clip, int(group.steps[row]), slots, layout))

    def find(self, names: list[str]) -> Rows:
        """Look up the rows of a list of names; unknown names have none.

        Raises:
            TypeError: A name is not a string.
        """
        lookup, known = self._codes, self.last.leading(names)
        lookup.missed, rest = False, names[len(known) :] if len(known) else names
        codes = np.fromiter(map(lookup.__getitem__, rest), np.int64, len(rest))
        if len(known):
            codes = np.concatenate([known, codes])
        missing = np.flatnonzero(codes < 0).tolist() if lookup.missed else []
        for place in missing:
            check_name("params", names[place])
        return self.parted(names, codes, missing)

    def parted(self, names: list[str], codes: np.ndarray, missing: list[int]) -> Rows:
        """Sort the rows of a list of names by group.

        Args:
            names: The names.
            codes: Their codes.
            missing: The places of the names without a row.
        """
        count = len(names)
        if len(self._everything) < count:
            self._everything = np.arange(2 * count)
            self._everything_at = address(self._everything)
        if len(self._groups) == 1 and not missing and count:
            ((number, group),) = self._groups.items()
            rows = codes - number * GROUP if number else codes
            places = self._everything[:count]
            parts = [(group, rows, places, (address(rows), self._everything_at))]
        else:
            parts = [
                (*part, (address(part[1]), address(part[2]))) for part in self._by_group(codes)
            ]
        scheduled = clipping = 0
        for group, *_ in parts:
            # ``any`` takes 1 us longer, a twentieth of a step of one name.
            scheduled += group.scheduled
            clipping += group.clipping
        clips = self._global_clips(parts) if clipping else {}
        return Rows(names, codes, parts, scheduled > 0, clipping > 0, clips, missing)

    def _global_clips(self, parts: Iterable[RowsOfGroup]) -> dict[int, Clip]:
        """The clips of some rows that bound a global norm, by their numbers."""
        clips = self._clips.having(lambda clip: clip is not None and clip.global_norm is not None)
        if not clips:
            return {}
        used = {int(n) for group, rows, *_ in parts for n in np.unique(group.clip[rows])}
        return {number: clip for number, clip in clips if number in used and clip is not None}

    def group_for(self, rule: Rule, layout: Layout) -> Group:
        """The group for parameters of a layout under a rule; made if there is none yet."""
        backend = backend_named(layout.library)
        has_masters = self.masters and layout.storage_dtype != layout.compute_dtype
        kind = kind_of(rule) or tuple(map(id, formulas(rule)))
        key = kind, layout.with_shape(()), has_masters
        if key not in self._kinds:
            # Only the reference engine can be told the norms of what lies on several ranks.
            by_parts = self.across is not None and not rule.elementwise
            make = partial(Backend.group, backend) if by_parts else backend.group
            group = make(rule, layout, has_masters)
            group.number = max(self._groups, default=-1) + 1
            # In this order, so that a signal handler that raises in between leaves only a group
            # without names behind.
            self._groups[group.number] = group
            self._kinds[key] = group.number
        return self._groups[self._kinds[key]]

    def _drop_empty(self) -> None:
        """Drop the groups without rows."""
        self._groups = {number: group for number, group in self._groups.items() if len(group)}
        self._kinds = {key: n for key, n in self._kinds.items() if n in self._groups}

    def give_clips(self, group: Group, rows: np.ndarray, clips: Sequence[Clip | None]) -> None:
        """Set the clips of some rows."""
        if all(clip is clips[0] for clip in clips):
            group.set_clips(rows, clips[0], self._number_of_clip(clips[0]))
            return
        for row, clip in zip(rows.tolist(), clips, strict=True):
            group.set_clips(np.array([row]), clip, self._number_of_clip(clip))

    def _number_of_clip(self, clip: Clip | None) -> int:
        def used() -> np.ndarray:
            return np.concatenate([group.clip for group in self._groups.values()])

        return self._clips.number(clip, clip, used)

    def placed(self, entries: Mapping[str, Entry]) -> dict[str, int]:
        """Make new rows from entries, without registering them.

        Returns:
            The codes of the rows, by name.

        Raises:
            ValueError: A rule does not support the shape of a parameter.
        """
        codes: dict[str, int] = {}
        # All names that are alike get their rows at once.
        alike: dict[Hashable, list[str]] = {}
        for name, entry in entries.items():
            average = entry.average
            means = (None, False) if average is None else (id(average.rule), bool(average.slots))
            kind = entry.layout.with_shape(()), id(entry.rule), bool(entry.slots), means
            alike.setdefault(kind, []).append(name)
        try:
            for names in alike.values():
                batch = [entries[name] for name in names]
                chain, averages = chained(batch[0]), [entry.average for entry in batch]
                group = self.group_for(chain, batch[0].layout)
                shapes = [entry.layout.storage_shape for entry in batch]
                slot_names = {shape: group.slot_names(shape) for shape in set(shapes)}
                slots = [all_slots(e, slot_names[e.layout.storage_shape]) for e in batch]
                rows = group.add(shapes, slots if slots[0] else None)
                codes.update(zip(names, (rows + group.number * GROUP).tolist(), strict=True))
                group.set_rules(rows, chain)
                self.give_clips(group, rows, [entry.clip for entry in batch])
                counts = [0 if average is None else average.step for average in averages]
                group.set_clocks(rows, [entry.step for entry in batch], counts)
        except BaseException:
            self.free(codes.values())
            raise
        return {name: codes[name] for name in entries}

    def put(self, entries: Mapping[str, Entry]) -> None:
        """Register entries, replacing what was kept for these names.

        Raises:
            ValueError: A rule does not support the shape of a parameter; nothing has changed.
        """
        placed = self.placed(entries)
        with self.guard:
            self.replace_rows(placed)
        self.sweep()

    def names_by_group(
        self, names: Iterable[str] | None = None
    ) -> Iterator[tuple[Group, list[str], np.ndarray, np.ndarray]]:
        """Yield each group with its names, of some or all; their places among these; their rows."""
        names = list(self._codes if names is None else names)
        codes = np.fromiter(map(self._codes.__getitem__, names), np.int64, len(names))
        for group, rows, places in self._by_group(codes):
            has_all = len(places) == len(names)
            yield group, names if has_all else [names[k] for k in places.tolist()], places, rows

    def rows_of(self, names: Iterable[str] | None) -> list[tuple[Group, np.ndarray]]:
        """The rows of some names, or of all names for None, by group."""
        if names is None:
            if self._garbage:
                self.sweep()
            return [(group, group.rows()) for group in self._groups.values()]
        unique = dict.fromkeys(names)
        codes = np.fromiter(map(self._codes.__getitem__, unique), np.int64, len(unique))
        return [part[:2] for part in self._by_group(codes)]

    def names_by_rule(
        self, names: Iterable[str], key: Callable[[str], Hashable]
    ) -> Iterator[tuple[list[str], Rule]]:
        """Sort names that have been seen by the rule of their row, and by a key.

        Args:
            names: The names.
            key: Returns what names must also have in common.

        Yields:
            Names that are alike, and their rule, chained with their average if they have one.
        """
        alike: dict[Hashable, tuple[Group, list[str], list[int]]] = {}
        for name in names:
            group, row = self.row_of(name)
            _, mine, rows = alike.setdefault((group.number, key(name)), (group, [], []))
            mine.append(name)
            rows.append(row)
        for group, mine, rows in alike.values():
            for positions in group.by_rule(np.array(rows)):
                places = positions.tolist()
                yield [mine[k] for k in places], group.rule_at(rows[places[0]])

    def _by_group(self, codes: np.ndarray) -> Iterator[tuple[Group, np.ndarray, np.ndarray]]:
        """Sort codes by group, leaving out ``MISSING``.

        Yields:
            A group, the rows, and the places of their codes.
        """
        numbers = codes // GROUP
        for number, group in self._groups.items():
            places = np.flatnonzero(numbers == number)
            if places.size:
                yield group, codes[places] - number * GROUP, places

    def names_at(self, group: Group, rows: np.ndarray) -> list[str]:
        """The names of some rows, oldest first. This searches all names."""
        codes = set((rows + group.number * GROUP).tolist())
        return [name for name, code in self._codes.items() if code in codes]

    def rename_rows(self, names: Mapping[str, str]) -> None:
        """Rename some names; their order stays."""
        self._codes = _Codes({names.get(n, n): code for n, code in self._codes.items()})
        self.last = NOTHING

    def replace_rows(self, placed: Mapping[str, int]) -> None:
        """Give names other rows, and bring ``last`` up to date."""
        self._garbage += [self._codes[name] for name in placed if name in self._codes]
        self._codes.update(placed)
        scheduled = any(part[0].scheduled for part in self.last.parts)
        if placed:
            self.last = NOTHING
        elif scheduled != self.last.scheduled:
            self.last = self.last._replace(scheduled=scheduled)

    def free(self, codes: Iterable[int]) -> None:
        """Free some rows."""
        self._garbage += codes
        self.sweep()

    def sweep(self) -> None:
        """Free the rows that no name uses any more."""
        with self.guard:
            while self._garbage:
                number, row = divmod(self._garbage.pop(), GROUP)
                self._groups[number].remove(row)
            self._drop_empty()
