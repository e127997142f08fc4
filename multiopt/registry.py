"""Names are rows: what is known by name, and the steps of it (``spec/registry.md``).

The registry knows for every name which row of which group it has; all else stands in the columns of
the group. A step looks its names up, in any order and any selection, and hands the rows over:

    names -> rows     a look-up a name; names never seen get rows, all at once
    rows  -> groups   the parts of a step, one for each engine
    Step              looks, checks, clips, prepares and runs all parts (``multiopt.step``)

>>> import numpy as np
>>> from multiopt.registry import Registry
>>> from multiopt.rules import SGD
>>> known = Registry(SGD(lr=1.0))
>>> w, b = np.zeros(2), np.zeros(1)
>>> for names, params in ((["w"], [w]), (["b", "w"], [b, w])):
...     grads = [np.ones_like(param) for param in params]
...     _ = known.step(names, *(np.fromiter(x, object, len(x)) for x in (params, grads)))
>>> w.tolist(), b.tolist(), known.clock("w")
([-2.0, -2.0], [-1.0], 2)
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from numbers import Real
from typing import Any, ClassVar, TypeAlias

import numpy as np

from multiopt.averaging import Average, Averaged
from multiopt.backend import backend_of, identities, named
from multiopt.engine import Array, Arrays, Group, Numbered, Part, formulas, kind_of
from multiopt.entry import (
    Entry,
    all_slots,
    chained,
    changed,
    chosen,
    chosen_average,
    chosen_clip,
    restored,
    restored_average,
    restored_plateaus,
    slot_shapes,
    unchained,
    with_rule,
)
from multiopt.guard import Guard
from multiopt.layout import Layout, address
from multiopt.rules import Rule
from multiopt.rules.rule import is_shared
from multiopt.skipping import Skips, counted
from multiopt.step.checks import check_gradients, check_name, own_gradient
from multiopt.step.clip import Clip, Together
from multiopt.step.report import Outcome
from multiopt.step.run import Rows, RowsOfGroup, Step

__all__ = ["Registry"]

#: A code is the number of a group times this, plus a row.
GROUP = 1 << 40

#: A name that is not known, in the place of its code.
MISSING = -1

Undo: TypeAlias = list[Callable[[], object]]


class _Codes(dict[str, int]):
    """Names with their codes; a name that is not known has one too, and is not added.

    Attributes:
        missed: Whether one was asked for that is not known.
    """

    missed = False

    def __missing__(self, name: object) -> int:
        self.missed = True
        return MISSING


#: No names.
NOTHING = Rows([], np.empty(0, np.int64), [], False, False, None, [])


class Registry:
    """Names with their rows, the state that waits for names, and their steps.

    Args:
        rule: A rule for all names, or a callable ``name -> rule``.
        clip: A clip for all names, a callable ``name -> Clip or None``, or None.
        on_nonfinite: ``"propagate"``, ``"raise"`` or ``"skip"``.
        max_skips: In how many steps in a row a name may be skipped; None for no limit.
        threads: The largest number of threads, or None.
        masters: Whether 16-bit parameters have master copies.
        guard: That of the optimizer.
        average: An average of all names, a callable ``name -> Average or None``, or None.

    Attributes:
        rule: The rule for names to come.
        clip: The clip for names to come.
        average: The average of names to come.
        pending: Loaded state of names not seen yet, as a state dict has it, slots NumPy arrays.
            Where it came with an average, that is under ``"average"``, and under ``"keeps"`` what
            average this optimizer keeps of the name.
        skips: How often names were skipped, for those that ever were.
        steps: How many steps updated anything.
        outcome: What became of the last step; every step that ended has an object of its own here.
    """

    __slots__ = (
        "__weakref__",
        "_arrays",
        "_clips",
        "_codes",
        "_everything",
        "_everything_at",
        "_garbage",
        "_groups",
        "_kinds",
        "_last",
        "_max_skips",
        "average",
        "clip",
        "guard",
        "leave_clipped",
        "masters",
        "needs_gradients",
        "on_nonfinite",
        "outcome",
        "pending",
        "rule",
        "skips",
        "steps",
        "threads",
    )

    #: What a copy makes anew.
    ANEW: ClassVar = {
        *("__weakref__", "_arrays", "_clips", "_codes", "_everything", "_everything_at"),
        *("_garbage", "_groups", "_kinds", "_last", "guard"),
    }

    def __init__(
        self,
        rule: Rule | Callable[[str], Rule],
        clip: Clip | Callable[[str], Clip | None] | None = None,
        on_nonfinite: str = "propagate",
        max_skips: int | None = None,
        threads: int | None = None,
        masters: bool = False,
        guard: Guard | None = None,
        average: Average | Callable[[str], Average | None] | None = None,
    ) -> None:
        """Know no name yet."""
        self.rule, self.clip, self.average = rule, clip, average
        self.pending: dict[str, Mapping[str, Any]] = {}
        self.skips: dict[str, Skips] = {}
        self.steps = 0
        self.outcome: Outcome | None = None
        #: Whether a step writes clipped gradients over the gradients.
        self.leave_clipped = False
        #: Whether it is an error if no parameter has a gradient of its own, nor will have one.
        self.needs_gradients = False
        self.on_nonfinite, self._max_skips = on_nonfinite, max_skips
        self.threads, self.masters = threads, masters
        self.guard = Guard() if guard is None else guard
        self._begin_empty()

    def _begin_empty(self) -> None:
        self._codes = _Codes()
        self._groups: dict[int, Group] = {}
        self._kinds: dict[Hashable, int] = {}
        self._clips: Numbered[Clip | None] = Numbered(None, None)
        self._last = NOTHING
        # Codes of rows that no name has any more.
        self._garbage: list[int] = []
        self._arrays = Arrays()
        self._everything, self._everything_at = np.arange(0), 0

    def __getstate__(self) -> dict[str, Any]:
        """All that is held, by name."""
        state = {name: getattr(self, name) for name in self.__slots__ if name not in self.ANEW}
        if self.outcome is not None:
            state["outcome"] = self.outcome.detached()
        entries = {}
        for name in self._codes:
            entry = self.entry(name)
            to_host = named(entry.layout.library).to_host
            entries[name] = entry.with_converted(to_host)
        return {**state, "entries": entries}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give all names rows."""
        entries = state.pop("entries")
        for name, value in state.items():
            setattr(self, name, value)
        self.guard = Guard()
        self._begin_empty()
        for name, entry in entries.items():
            from_host = partial(named(entry.layout.library).from_host, layout=entry.layout)
            entries[name] = entry.with_converted(from_host)
        self.put(entries)

    # What is known

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

    def known(self) -> dict[str, None]:
        """The names of which anything is held."""
        return dict.fromkeys([*self._codes, *self.pending, *self.skips])

    def row_of(self, name: str) -> tuple[Group, int]:
        """The group of a name, and its row.

        Raises:
            KeyError: The name has not been seen.
        """
        if name not in self._codes:
            why = "its loaded state is pending" if name in self.pending else "it was never stepped"
            raise KeyError(f"no state for parameter {name!r}: {why}")
        number, row = divmod(self._codes[name], GROUP)
        return self._groups[number], row

    def rule_of(self, name: str) -> Rule:
        """The rule of a name, its schedules in their places."""
        group, row = self.row_of(name)
        return formulas(group.rule_at(row))[0]

    def scheduled_rules(self) -> dict[str, Rule]:
        """The rules of all names that have schedules."""
        if not any(group.scheduled for group in self._groups.values()):
            return {}
        found = {}
        for name in self.names:
            group, row = self.row_of(name)
            if group.schedule[row]:
                found[name] = group.rule_at(row)
        return found

    def clock(self, name: str) -> int:
        """How many steps a name has taken."""
        group, row = self.row_of(name)
        return int(group.steps[row])

    def alike(self, names: Sequence[str]) -> list[Hashable]:
        """For each name what is equal for those of the same rule, schedules included, and clock."""
        codes = np.fromiter(map(self._codes.__getitem__, names), np.int64, len(names))
        numbers = codes // GROUP
        found: list[Hashable] = [None] * len(names)
        for number, group in self._groups.items():
            places = np.flatnonzero(numbers == number)
            rows = codes[places] - number * GROUP
            columns = [group.numbers[rows], group.schedule[rows], group.steps[rows]]
            table = np.column_stack([*columns, np.full(len(rows), number)])
            keys = table.view(np.dtype((np.void, table.strides[0]))).ravel().tolist()
            for place, key in zip(places.tolist(), keys, strict=True):
                found[place] = key
        return found

    def entry(self, name: str, chain: Rule | None = None) -> Entry:
        """What is held of a name, its slots as they are in memory.

        Args:
            name: The name.
            chain: The rule of its row, if it is known.
        """
        group, row = self.row_of(name)
        rule = group.rule_at(row) if chain is None else chain
        slots = group.slots_at(row)
        clip = self._clips[int(group.clip[row])]
        layout = group.layout_at(row)
        return unchained(Entry(rule, clip, int(group.steps[row]), slots, layout))

    def average_of(self, name: str) -> Average | None:
        """What average is kept of a name, seen or not."""
        if name in self._codes:
            group, row = self.row_of(name)
            rule = group.rule_at(row)
            return rule.average if isinstance(rule, Averaged) else None
        if name in self.pending and "keeps" in self.pending[name]:
            kept: Average | None = self.pending[name]["keeps"]
            return kept
        return chosen_average(self.average, name)

    # The step

    def step(
        self,
        names: list[str],
        params: np.ndarray,
        grads: np.ndarray | None,
        after: Callable[[Step], object] | None = None,
    ) -> dict[int, Array]:
        """Step; return, by place, the arrays that take the place of parameters not written.

        Args:
            names: The names of the parameters.
            params: The parameters, an array of objects.
            grads: Their gradients; None for their own.
            after: Called when parameters, slots and clocks have been updated. It may not fail.
        """
        rows = self._last if names == self._last.names else self._find(names)
        own = grads is None
        if self._garbage:
            self._sweep()
        if grads is None:
            grads = self._own_gradients(rows, params)
        arrays = self._arrays
        fresh: dict[int, int] = {}
        undo: Undo = []
        step: Step | None = None
        how = self.threads, self.leave_clipped
        committed = False
        try:
            if rows.missing and any(grads[place] is not None for place in rows.missing):
                rows = self._begin(rows, params, grads, fresh, undo)
            arrays.take(params, grads, own)
            if rows.scheduled:
                rows = self._ask(rows, arrays, fresh)
            step = Step(rows, arrays, fresh, *how)
            while moved := step.look():
                rows = self._move(rows, moved, fresh)
                step = Step(rows, arrays, fresh, *how)
            if self.on_nonfinite != "propagate":
                step.check_finite(self.on_nonfinite)
            if rows.clipping:
                step.clip(rows.together)
            step.prepare()
            skips = self._counted(step) if step.skipped or self.skips else self.skips
            with self.guard:
                # From here on nothing fails.
                step.run()
                if after is not None:
                    after(step)
                self._commit(rows, fresh, step, skips)
                committed = True
            return step.replaced
        finally:
            if step is not None:
                step.forget()
            arrays.release()
            if not committed:
                self._take_back(fresh, undo)

    def _ask(self, rows: Rows, arrays: Arrays, fresh: dict[int, int]) -> Rows:
        """Ask the schedules of some rows; return those of a step.

        A schedule is the caller's code: arrays are looked at when it has run. It is not asked for
        a name that takes no part.
        """
        if self.on_nonfinite == "propagate":
            self._ask_schedules(rows.names, [Part(*part) for part in rows.parts], arrays.grads)
            return rows
        step = Step(rows, arrays, fresh, self.threads, self.leave_clipped)
        try:
            while moved := step.look():
                rows = self._move(rows, moved, fresh)
                step = Step(rows, arrays, fresh, self.threads, self.leave_clipped)
            step.check_finite(self.on_nonfinite)
            self._ask_schedules(rows.names, step.parts, arrays.grads)
        finally:
            step.forget()
        return rows

    def _find(self, names: list[str]) -> Rows:
        """The rows of a list of names; those that are not known have none."""
        known = self._codes
        known.missed = False
        codes = np.fromiter(map(known.__getitem__, names), np.int64, len(names))
        missing = np.flatnonzero(codes < 0).tolist() if known.missed else []
        for place in missing:
            check_name("params", names[place])
        return self._parted(names, codes, missing)

    def _parted(self, names: list[str], codes: np.ndarray, missing: list[int]) -> Rows:
        """A list of names with their rows by group.

        Args:
            names: The names.
            codes: Their codes.
            missing: The places of those that have none.
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
            numbers, parts = codes // GROUP, []
            for number, group in self._groups.items():
                places = np.flatnonzero(numbers == number)
                if places.size:
                    rows = codes[places] - number * GROUP
                    parts.append((group, rows, places, (address(rows), address(places))))
        groups = [part[0] for part in parts]
        scheduled = any(group.scheduled for group in groups)
        clipping = any(group.clipping for group in groups)
        together = self._together(names, parts) if clipping else None
        return Rows(names, codes, parts, scheduled, clipping, together, missing)

    def _together(self, names: Sequence[str], parts: Iterable[RowsOfGroup]) -> Together | None:
        """The clips of some rows that measure several gradients together."""
        shared = self._clips.having(lambda clip: clip is not None and clip.global_norm is not None)
        if not shared:
            return None
        used = {int(n) for group, rows, *_ in parts for n in np.unique(group.clip[rows])}
        clips = {number: clip for number, clip in shared if number in used and clip is not None}
        return Together.of(names, clips) if clips else None

    def _own_gradients(self, rows: Rows, params: np.ndarray) -> np.ndarray:
        """The gradients that parameters carry themselves."""
        names, grads = rows.names, None
        # At first sight each is asked by itself whether it can have one.
        missing = rows.missing
        asked = {k: own_gradient(names[k], params[k]) for k in missing}
        backends = {part[0].backend for part in rows.parts}
        if len(backends) == 1 and len(missing) < len(names):
            grads = backends.pop().gradients(params)
        if grads is None:
            found = [
                asked[k] if k in asked else own_gradient(name, params[k])
                for k, name in enumerate(names)
            ]
            grads = np.fromiter(found, object, len(found))
        if self.needs_gradients:
            check_gradients(names, params, grads)
        return grads

    @np.errstate(all="ignore")
    def _ask_schedules(
        self, names: Sequence[str], parts: Sequence[Part], grads: np.ndarray
    ) -> None:
        """Write the numbers of this step into the columns of schedules.

        Each schedule is asked once for each number of a step.

        Raises:
            ValueError: A schedule gave no number, or one out of range.
        """
        has = np.frombuffer(identities(grads), np.uintp) != id(None)
        known: dict[tuple[int, int], float] = {}
        for part in parts:
            group, places, rows = part.group, part.places, part.rows
            if not (group.scheduled and len(rows)):
                continue
            numbers, steps, counts = group.schedule[rows], group.steps[rows], group.counts(rows)
            columns = (numbers, steps, counts) if group.has_averages else (numbers, steps)
            if numbers[0] and all((x == x[0]).all() for x in columns) and has[places].all():
                # The usual case: it takes a third of the time.
                name, number = names[places[0]], int(numbers[0])
                clocks = int(steps[0]) + 1, int(counts[0]) + 1
                for column, value in self._numbers_of(group, name, number, clocks, known):
                    group.numbers[rows, column] = value
                continue
            which = np.flatnonzero(has[places] & (group.schedule[part.rows] != 0))
            rows = part.rows[which]
            numbers, steps, counts = group.schedule[rows], group.steps[rows], group.counts(rows)
            while which.size:
                alike = (numbers == numbers[0]) & (steps == steps[0]) & (counts == counts[0])
                name, number = names[places[which[0]]], int(numbers[0])
                clocks = int(steps[0]) + 1, int(counts[0]) + 1
                rows = part.rows[which[alike]]
                for column, value in self._numbers_of(group, name, number, clocks, known):
                    group.numbers[rows, column] = value
                rest = (x[~alike] for x in (which, numbers, steps, counts))
                which, numbers, steps, counts = rest

    def _numbers_of(
        self,
        group: Group,
        name: str,
        number: int,
        clocks: tuple[int, int],
        known: dict[tuple[int, int], float],
    ) -> list[tuple[int, float]]:
        """What schedules give at a step, with the columns that are theirs.

        Args:
            group: Whose.
            name: A name that has them.
            number: That of the schedules.
            clocks: The number of the step of the name, and of its average.
            known: What schedules gave at this step already; takes more.

        Raises:
            ValueError: A schedule gave no number, or one out of range.
        """
        try:
            return [
                (column, self._asked(group.rule, hyperparameter, schedule, clocks, known))
                for column, hyperparameter, schedule in zip(*group.schedules[number], strict=True)
            ]
        except ValueError as error:
            raise ValueError(f"parameter {name!r}: {error}") from error

    def _asked(
        self,
        rule: Rule,
        name: str,
        schedule: Any,
        clocks: tuple[int, int],
        known: dict[tuple[int, int], float],
    ) -> float:
        """The number of a schedule at a step of a name; ``clocks`` has that of its average too."""
        step, count = clocks
        inner, _, name = name.rpartition(".")
        if inner:
            rule = getattr(rule, inner)
            step = count if inner == "average" else step
        if is_shared(schedule):
            step = self.steps + 1
        key = id(schedule), step
        if key not in known:
            known[key] = rule.asked(name, schedule, step)
        return rule.in_range(name, known[key], step)

    # Names that are new, or have moved

    def _begin(
        self,
        rows: Rows,
        params: np.ndarray,
        grads: np.ndarray,
        fresh: dict[int, int],
        undo: Undo,
    ) -> Rows:
        """Rows for names that are seen for the first time, with a gradient; nothing is registered.

        Args:
            rows: The names, some of them without a row.
            params: The parameters.
            grads: Their gradients.
            fresh: By place, the new codes; filled as they are made.
            undo: Takes what takes back what else has been done.
        """
        names, codes = rows.names, rows.codes.copy()
        kinds: dict[Hashable, tuple[Group, Rule, list[int]]] = {}
        shapes: dict[int, tuple[int, ...]] = {}
        clips: dict[int, Clip | None] = {}
        resumed: dict[int, Entry] = {}
        for place in rows.missing:
            if grads[place] is None:
                continue
            name, param = names[place], params[place]
            label = f"parameter {name!r}"
            backend = backend_of(param, label)
            alike = backend.alike(param)
            rule = (
                self.rule if isinstance(self.rule, Rule) else chosen(self.rule, name, Rule, "rule")
            )
            average = None if self.average is None else self.average_of(name)
            key: Hashable = id(rule), id(average), type(param), alike
            if alike is None or key not in kinds:
                layout = backend.layout(param, label)
                if alike is None:
                    key = id(rule), id(average), layout.with_shape(())
                if key not in kinds:
                    chain = rule if average is None else Averaged(rule, average)
                    kinds[key] = self._group_for(chain, layout), chain, []
                shapes[place] = layout.shape
            else:
                group = kinds[key][0]
                shape = tuple(param.shape)
                shapes[place] = (*shape, 2) if group.layout.is_complex else shape
            layout = kinds[key][0].layout.with_shape(shapes[place])
            clip = chosen_clip(self.clip, name)
            if name not in self.pending:
                clips[place] = clip
                kinds[key][2].append(place)
                continue
            stored = self.pending[name]
            mean = stored.get("average")
            entry = restored(name, stored, rule, clip, layout, self.masters)
            resumed[place] = entry._replace(average=restored_average(name, mean, average, layout))
            # The first step asks the schedules.
            seen = restored_plateaus(rule, stored["rule"], ahead=True)
            if average is not None and mean is not None:
                seen += restored_plateaus(average, mean["rule"], ahead=True)
            undo += [partial(plateau.load_state, before) for plateau, before in seen]
        placed = self._placed({names[place]: entry for place, entry in resumed.items()})
        fresh.update({place: placed[names[place]] for place in resumed})
        for group, rule, places in kinds.values():
            if not places:
                continue
            self._check_shapes(group, rule, [(names[k], shapes[k]) for k in places])
            made = group.add([shapes[k] for k in places])
            fresh.update(zip(places, (made + group.number * GROUP).tolist(), strict=True))
            group.set_rules(made, rule)
            self._set_clips(group, made, [clips[k] for k in places])
        for place, code in fresh.items():
            codes[place] = code
        return self._parted(names, codes, [place for place in rows.missing if place not in fresh])

    def _set_clips(self, group: Group, rows: np.ndarray, clips: Sequence[Clip | None]) -> None:
        """Give rows their clips."""
        if all(clip is clips[0] for clip in clips):
            group.set_clips(rows, clips[0], self._number_of_clip(clips[0]))
            return
        for row, clip in zip(rows.tolist(), clips, strict=True):
            group.set_clips(np.array([row]), clip, self._number_of_clip(clip))

    def _number_of_clip(self, clip: Clip | None) -> int:
        def used() -> np.ndarray:
            return np.concatenate([group.clip for group in self._groups.values()])

        return self._clips.number(clip, clip, used)

    def _check_shapes(
        self, group: Group, rule: Rule, shapes: Iterable[tuple[str, tuple[int, ...]]]
    ) -> None:
        """Refuse shapes that a rule is not for.

        Raises:
            ValueError: There is one.
        """
        known: set[tuple[int, ...]] = set()
        for name, shape in shapes:
            if shape not in known:
                own = rule.rule if isinstance(rule, Averaged) else rule
                slot_shapes(name, own, group.layout.with_shape(shape))
                known.add(shape)

    def _group_for(self, rule: Rule, layout: Layout) -> Group:
        """The group of a kind of rule and of parameters."""
        backend = named(layout.library)
        has_masters = self.masters and layout.dtype != layout.compute_dtype
        kind = kind_of(rule) or tuple(map(id, formulas(rule)))
        key = kind, layout.with_shape(()), has_masters, backend.wanted(layout)
        if key not in self._kinds:
            group = backend.group(rule, layout, has_masters)
            group.number = max(self._groups, default=-1) + 1
            self._kinds[key], self._groups[group.number] = group.number, group
        return self._groups[self._kinds[key]]

    def _drop_empty(self) -> None:
        """Let go of groups without rows."""
        for key, number in list(self._kinds.items()):
            if not len(self._groups[number]):
                del self._kinds[key], self._groups[number]

    def _move(self, rows: Rows, moved: Mapping[int, Layout], fresh: dict[int, int]) -> Rows:
        """Rows in other groups for parameters whose library or device is another one now."""
        codes = rows.codes.copy()
        for place, layout in moved.items():
            name = rows.names[place]
            (group, row), old = self.row_of(name), self.entry(name)
            carried = partial(_carried, old=old.layout, new=layout)
            entry = old.with_converted(carried)._replace(layout=layout)
            fresh[place] = codes[place] = code = self._placed({name: entry})[name]
            # Schedules have been asked for this step.
            self._groups[code // GROUP].numbers[code % GROUP] = group.numbers[row]
        return self._parted(rows.names, codes, rows.missing)

    # What a step leaves behind

    def _counted(self, step: Step) -> dict[str, Skips]:
        """The counts of skips after a step.

        Raises:
            ValueError: A name would be skipped too often in a row.
        """
        skipped = [step.names[place] for place in step.skipped]
        updated = [step.names[place] for place in step.places()]
        return counted(self.skips, skipped, updated, self._max_skips)

    def _commit(
        self, rows: Rows, fresh: Mapping[int, int], step: Step, skips: dict[str, Skips]
    ) -> None:
        """Register what a step has begun, and count it."""
        born: tuple[str, ...] = ()
        if fresh:
            born = self._register(rows, fresh, step.skipped)
        else:
            self._last = rows
        self.outcome = Outcome(rows.names, born, step.parts, step.skipped, step.global_norms)
        self.skips = skips
        for part in step.parts:
            if len(part.places):
                self.steps += 1
                break

    def _register(
        self, rows: Rows, fresh: Mapping[int, int], skipped: Sequence[int]
    ) -> tuple[str, ...]:
        """Give names the rows that a step has begun; return those that were never seen before."""
        left = fresh.keys() & skipped
        born = []
        for place in sorted(fresh):
            name = rows.names[place]
            if place in left:
                # Who is skipped at first sight has not been seen.
                self._garbage.append(fresh[place])
                continue
            if name in self._codes:
                self._garbage.append(self._codes[name])
            else:
                born.append(name)
            self._codes[name] = fresh[place]
            self.pending.pop(name, None)
        self._last = NOTHING if left else rows
        return tuple(born)

    def _take_back(self, fresh: Mapping[int, int], undo: Undo) -> None:
        """Let go of what a step has begun that did not end."""
        for take_back in undo:
            take_back()
        if self.guard.torn is not None:
            # Some of it may be registered, and the rows that it was in are to be let go.
            held = set(self._codes.values())
            garbage = dict.fromkeys([*self._garbage, *fresh.values()])
            self._garbage = [code for code in garbage if code not in held]
            return
        self._free(fresh.values())

    def _free(self, codes: Iterable[int]) -> None:
        """Let go of rows."""
        self._garbage += codes
        self._sweep()

    def _sweep(self) -> None:
        """Let others take the rows that no name has any more."""
        with self.guard:
            while self._garbage:
                number, row = divmod(self._garbage.pop(), GROUP)
                self._groups[number].remove(row)
            self._drop_empty()

    # What changes between steps

    def _placed(self, entries: Mapping[str, Entry]) -> dict[str, int]:
        """New rows with what is held of some names, by name; nothing is registered.

        Raises:
            ValueError: A rule is not for parameters of a shape.
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
                mine = [entries[name] for name in names]
                chain, averages = chained(mine[0]), [entry.average for entry in mine]
                group = self._group_for(chain, mine[0].layout)
                shapes = [entry.layout.shape for entry in mine]
                known = {shape: group.slot_names(shape) for shape in set(shapes)}
                slots = [all_slots(entry, known[entry.layout.shape]) for entry in mine]
                rows = group.add(shapes, slots if slots[0] else None)
                made = (rows + group.number * GROUP).tolist()
                codes.update(zip(names, made, strict=True))
                group.set_rules(rows, chain)
                self._set_clips(group, rows, [entry.clip for entry in mine])
                group.steps[rows] = [entry.step for entry in mine]
                if group.has_averages:
                    seen = [0 if average is None else average.step for average in averages]
                    group.numbers[rows, -1] = group.steps[rows] - np.array(seen)
        except BaseException:
            self._free(codes.values())
            raise
        return {name: codes[name] for name in entries}

    def put(self, entries: Mapping[str, Entry]) -> None:
        """Hold this of some names from now on, in the place of what is held of them.

        Raises:
            ValueError: A rule is not for parameters of a shape; nothing has changed.
        """
        placed = self._placed(entries)
        with self.guard:
            self._replace(placed)
        self._sweep()

    def forget(self, names: Iterable[str]) -> None:
        """Drop all that is held of some names."""
        gone = dict.fromkeys(names)
        with self.guard:
            self._garbage += [self._codes.pop(name) for name in gone if name in self._codes]
            self.pending = {n: stored for n, stored in self.pending.items() if n not in gone}
            self.skips = {n: count for n, count in self.skips.items() if n not in gone}
            self._last = NOTHING
        self._sweep()

    def rename(self, names: Mapping[str, str]) -> None:
        """Give names new names, in their places."""
        with self.guard:
            self._codes = _Codes({names.get(n, n): code for n, code in self._codes.items()})
            self.pending = {names.get(n, n): stored for n, stored in self.pending.items()}
            self.skips = {names.get(n, n): count for n, count in self.skips.items()}
            self._last = NOTHING

    def set_rules(self, rule: Rule | Callable[[str], Rule]) -> None:
        """Change the rules of all names, and of those to come.

        Raises:
            TypeError: The callable gives something else.
            ValueError: A rule is not for parameters of a shape; nothing has changed.
        """
        entries = {}
        for name in self._codes:
            entries[name] = with_rule(name, self.entry(name), chosen(rule, name, Rule, "rule"))
        placed = self._placed(entries)
        with self.guard:
            self._garbage += self._codes.values()
            self._codes.update(placed)
            self._last, self.rule = NOTHING, rule
        self._sweep()

    def set_clips(self, clip: Clip | Callable[[str], Clip | None] | None) -> None:
        """Change the clips of all names, and of those to come.

        Raises:
            TypeError: The callable gives something else; nothing has changed.
        """
        clips = {name: chosen_clip(clip, name) for name in self._codes}
        with self.guard:
            for name, one in clips.items():
                group, row = self.row_of(name)
                group.set_clips(np.array([row]), one, self._number_of_clip(one))
            self._last, self.clip = NOTHING, clip

    def set_numbers(
        self, names: Iterable[str] | None, values: Mapping[str, Any], rule: Any = None
    ) -> None:
        """Change some hyperparameters of some names.

        Args:
            names: The names; None for all.
            values: The hyperparameters.
            rule: If all names are meant, the rule for names to come.

        Raises:
            TypeError: The rule of a name has no such hyperparameter.
            ValueError: A value is out of range; nothing has changed.
        """
        if self._garbage:
            self._sweep()
        writes: list[tuple[Group, np.ndarray, Rule]] = []
        others: dict[str, Entry] = {}
        for group, rows in self._rows_of(names):
            for which in _alike(group, rows, values):
                mine, old = rows[which], group.rule_at(int(rows[which[0]]))
                labels = partial(self._names_at, group, mine)
                usual = isinstance(rule, Rule) and formulas(old)[0] == self.rule
                new = rule if usual else changed(labels, formulas(old)[0], values)
                chain = replace(old, rule=new) if isinstance(old, Averaged) else new
                if group.takes(chain):
                    writes.append((group, mine, chain))
                else:
                    others |= {name: with_rule(name, self.entry(name), new) for name in labels()}
        placed = self._placed(others)
        with self.guard:
            for group, rows, new in writes:
                group.change_numbers(rows, new, values)
            self._replace(placed)
            if rule is not None:
                self.rule = rule
        self._sweep()

    def change(self, rules: Mapping[str, Rule], clips: Mapping[str, Clip | None]) -> None:
        """Change the rules of some names, and the clips of some of them; their state stays.

        Raises:
            ValueError: A rule is not for parameters of a shape; nothing has changed.
        """
        writes: dict[tuple[int, int, int], tuple[Group, Rule | None, list[int]]] = {}
        others: dict[str, Entry] = {}
        for name, rule in rules.items():
            number, row = divmod(self._codes[name], GROUP)
            group = self._groups[number]
            key = number, id(rule), int(group.schedule[row])
            if key not in writes:
                old = group.rule_at(row)
                chain = replace(old, rule=rule) if isinstance(old, Averaged) else rule
                writes[key] = group, chain if group.takes(chain) else None, []
            _, fits, rows = writes[key]
            if fits is not None:
                rows.append(row)
            else:
                others[name] = with_rule(name, self.entry(name), rule)
        for name in others.keys() & clips.keys():
            others[name] = others[name]._replace(clip=clips[name])
        placed = self._placed(others)
        with self.guard:
            for group, fits, rows in writes.values():
                if fits is not None:
                    group.change_numbers(np.array(rows), fits, formulas(fits)[0].ranges)
            for name in clips.keys() - others.keys():
                group, row = self.row_of(name)
                self._set_clips(group, np.array([row]), [clips[name]])
            self._replace(placed)
        self._sweep()

    def _rows_of(self, names: Iterable[str] | None) -> list[tuple[Group, np.ndarray]]:
        """The rows of some names, by group; those of all for None."""
        if names is None:
            return [(group, group.rows()) for group in self._groups.values()]
        labels = dict.fromkeys(names)
        codes = np.fromiter(map(self._codes.__getitem__, labels), np.int64, len(labels))
        numbers = codes // GROUP
        return [
            (group, codes[numbers == number] - number * GROUP)
            for number, group in self._groups.items()
        ]

    def _names_at(self, group: Group, rows: np.ndarray) -> list[str]:
        """The names that have some rows, oldest first. It looks through all names."""
        codes = set((rows + group.number * GROUP).tolist())
        return [name for name, code in self._codes.items() if code in codes]

    def _replace(self, placed: Mapping[str, int]) -> None:
        """Let names have other rows from now on, and look at the last list of names anew."""
        self._garbage += [self._codes[name] for name in placed if name in self._codes]
        self._codes.update(placed)
        last = self._last
        self._last = NOTHING if placed else self._parted(last.names, last.codes, last.missing)


def _carried(array: Array, old: Layout, new: Layout) -> Array:
    """A slot taken to another library or device."""
    return named(new.library).from_host(named(old.library).to_host(array), new)


def _alike(group: Group, rows: np.ndarray, values: Mapping[str, Any]) -> list[np.ndarray]:
    """Positions of rows of which one may be asked whether hyperparameters fit all.

    They have the same rule, schedules included. Where a number takes the place of a number, and
    none but its range counts, that is all rows.
    """
    if not rows.size:
        return []
    known = {name.removeprefix("rule.") for name, place in group.columns if place is None}
    numbers_alone = known >= values.keys() and all(isinstance(x, Real) for x in values.values())
    by_itself = type(formulas(group.rule)[0]).__post_init__ is Rule.__post_init__
    if numbers_alone and by_itself and not group.scheduled:
        return [np.arange(len(rows))]
    numbers, schedule = group.numbers[rows], group.schedule[rows]
    if group.scheduled:
        # Those of schedules are of the last step.
        for number in np.unique(schedule).tolist():
            columns = list(group.schedules[number].columns)
            numbers[np.ix_(schedule == number, columns)] = 0.0
    if (numbers == numbers[0]).all() and (schedule == schedule[0]).all():
        return [np.arange(len(rows))]
    table = np.column_stack([numbers, schedule])
    which = np.unique(table, axis=0, return_inverse=True)[1].reshape(-1)
    return [np.flatnonzero(which == number) for number in range(which.max() + 1)]
