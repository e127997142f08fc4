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

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from multiopt.arrays import Array, Arrays
from multiopt.backend import backend_for, backend_named, slot_of
from multiopt.entry import chosen, chosen_average, chosen_clip, with_rule
from multiopt.errors import answer
from multiopt.first_sight import Undo, begin, move
from multiopt.guard import Guard
from multiopt.hyperparameters import changed_for_all, changed_numbers
from multiopt.rules import Rule
from multiopt.rules.average import Average, Averaged
from multiopt.step.clip import Clip
from multiopt.step.numbers import ask_schedules
from multiopt.step.report import Outcome
from multiopt.step.run import Rows, Step
from multiopt.step.skips import Skips, counted
from multiopt.table import NOTHING, Table

__all__ = ["Registry"]


class Registry(Table):
    """Names with their rows, the state that waits for names, and their steps.

    Args:
        rule: A rule for all names, or a callable ``name -> rule``.
        clip: A clip for all names, a callable ``name -> Clip or None``, or None.
        on_nonfinite: ``"propagate"``, ``"raise"`` or ``"skip"``.
        max_skips: In how many steps in a row a name may be skipped; None for no limit.
        threads: The largest number of threads, or None.
        masters: Whether 16-bit parameters have master copies.
        guard: The guard of the optimizer.
        average: An average of all names, a callable ``name -> Average or None``, or None.

    Attributes:
        rule: The rule for names to come.
        clip: The clip for names to come.
        average: The average of names to come.
        skips: How often names were skipped, for those that ever were.
        steps: The number of steps in which anything was updated.
        outcome: The outcome of the last step that ended; a new object for each.
    """

    __slots__ = (
        *("__weakref__", "_arrays", "_max_skips", "average", "clip", "in_place", "leave_clipped"),
        *("needs_gradients", "on_nonfinite", "outcome", "rule", "skips", "steps", "threads"),
        "endings",
    )

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
        """Create an empty registry."""
        super().__init__(masters, guard)
        self.rule, self.clip, self.average = rule, clip, average
        self.skips: dict[str, Skips] = {}
        self.steps = 0
        self.outcome: Outcome | None = None
        #: Whether a step writes clipped gradients over the gradients.
        self.leave_clipped = False
        #: Whether a step writes the arrays that it was given, where the library can.
        self.in_place = True
        #: Whether it is an error if no parameter has a gradient of its own, nor will have one.
        self.needs_gradients = False
        #: The names whose state waits, by what they end in: None until a step asks, empty when it
        #: has warned of names like new ones.
        self.endings: dict[str, str] | None = None
        self.on_nonfinite, self._max_skips = on_nonfinite, max_skips
        self.threads = threads
        self._arrays = Arrays()

    def __getstate__(self) -> dict[str, Any]:
        """Return everything that is held, by name."""
        made_again = "__weakref__", "_arrays"
        state = {name: getattr(self, name) for name in self.__slots__ if name not in made_again}
        if self.outcome is not None:
            state["outcome"] = self.outcome.detached()
        entries = {}
        for name in self._codes:
            entry = self.entry(name)
            to_host = backend_named(entry.layout.library).to_host
            entries[name] = entry.with_converted(to_host)
        beside = {"masters": self.masters, "pending": self.pending}
        return {**state, **beside, "entries": entries}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give all names rows again."""
        entries = state.pop("entries")
        super().__init__(state.pop("masters"))
        for name, value in state.items():
            setattr(self, name, value)
        self._arrays = Arrays()
        for name, entry in entries.items():
            entries[name] = entry.with_converted(partial(slot_of, layout=entry.layout))
        self.put(entries)

    # What is known

    def known(self) -> dict[str, None]:
        """Return the names of which anything is held."""
        return dict.fromkeys([*self._codes, *self.pending, *self.skips])

    def average_of(self, name: str) -> Average | None:
        """Return the average that is kept of a name, seen or not."""
        if name in self._codes:
            group, row = self.row_of(name)
            rule = group.rule_at(row)
            return rule.average if isinstance(rule, Averaged) else None
        if name in self.pending and self.pending[name].keeps is not None:
            return self.pending[name].keeps
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
        rows = self.last if names == self.last.names else self.find(names)
        own = grads is None
        if self._garbage:
            self.sweep()
        if grads is None:
            grads = self._own_gradients(rows, params)
        if not self.in_place:
            params = _duplicates(rows.names, params, grads)
        arrays = self._arrays
        fresh: dict[int, int] = {}
        undo: Undo = []
        step: Step | None = None
        committed = False
        try:
            if rows.missing and any(grads[place] is not None for place in rows.missing):
                rows = begin(self, rows, params, grads, fresh, undo)
            arrays.take(params, grads, own)
            if rows.scheduled:
                rows = self._ask(rows, arrays, fresh)
            step = Step(rows, arrays, fresh, self.threads, self.leave_clipped)
            rows = self._look(step, rows, fresh)
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
            if self.in_place:
                return step.replaced
            return {place: params[place] for place in step.places()} | step.replaced
        finally:
            if step is not None:
                step.forget()
            arrays.release()
            if not committed:
                self._take_back(fresh, undo)

    def _look(self, step: Step, rows: Rows, fresh: dict[int, int]) -> Rows:
        """Look at the arrays of a step; return its rows, new ones where parameters have moved."""
        while moved := step.look():
            rows = move(self, rows, moved, fresh)
            step.take(rows, fresh)
        return rows

    def _ask(self, rows: Rows, arrays: Arrays, fresh: dict[int, int]) -> Rows:
        """Ask the schedules of some rows; return those of a step.

        A schedule is the caller's code: arrays are looked at when it has run. It is not asked for
        a name that takes no part.
        """
        count = self.steps + 1
        if self.on_nonfinite == "propagate":
            ask_schedules(rows.names, [part[:3] for part in rows.parts], arrays.grads, count)
            return rows
        step = Step(rows, arrays, fresh, self.threads, self.leave_clipped)
        try:
            rows = self._look(step, rows, fresh)
            step.check_finite(self.on_nonfinite)
            found = [(part.group, part.rows, part.places) for part in step.parts]
            ask_schedules(rows.names, found, arrays.grads, count)
        finally:
            step.forget()
        return rows

    def _own_gradients(self, rows: Rows, params: np.ndarray) -> np.ndarray:
        """Return the gradients that parameters carry themselves."""
        names = rows.names
        if not names:
            return params
        backend = backend_for(params[0], f"parameter {names[0]!r}")
        return backend.gradients(params, names, rows.missing, self.needs_gradients)

    # What a step leaves behind

    def _counted(self, step: Step) -> dict[str, Skips]:
        """Return the counts of skips after a step.

        Raises:
            ValueError: A name would be skipped too often in a row.
        """
        skipped = [step.names[place] for place in step.skipped]
        updated = [step.names[place] for place in step.places()]
        return counted(self.skips, skipped, updated, self._max_skips)

    def _commit(
        self, rows: Rows, fresh: Mapping[int, int], step: Step, skips: dict[str, Skips]
    ) -> None:
        """Register the rows that a step has begun, and count the step."""
        born: tuple[str, ...] = ()
        if fresh:
            born = self._register(rows, fresh, step.skipped)
        else:
            self.last = rows
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
        # A name that is skipped at first sight does not count as seen.
        left = fresh.keys() & skipped
        known, names = self._codes, rows.names
        kept = {names[place]: fresh[place] for place in sorted(fresh) if place not in left}
        born = tuple(name for name in kept if name not in known)
        self._garbage += [fresh[place] for place in left]
        self._garbage += [known[name] for name in kept if name in known]
        known.update(kept)
        for name in kept if self.pending else ():
            self.pending.pop(name, None)
        self.last = NOTHING if left else rows
        return born

    def _take_back(self, fresh: Mapping[int, int], undo: Undo) -> None:
        """Roll back what a step that did not end has begun."""
        for take_back in undo:
            take_back()
        if self.guard.torn is not None:
            # Some of it may be registered, and the rows that it was in are to be let go.
            held = set(self._codes.values())
            garbage = dict.fromkeys([*self._garbage, *fresh.values()])
            self._garbage = [code for code in garbage if code not in held]
            return
        self.free(fresh.values())

    # What changes between steps

    def forget(self, names: Iterable[str]) -> None:
        """Drop all that is held of some names."""
        gone = dict.fromkeys(names)
        with self.guard:
            self._garbage += [self._codes.pop(name) for name in gone if name in self._codes]
            self.pending = {n: stored for n, stored in self.pending.items() if n not in gone}
            self.skips = {n: count for n, count in self.skips.items() if n not in gone}
            self.last = NOTHING
        self.sweep()

    def rename(self, names: Mapping[str, str]) -> None:
        """Give names new names, in their places."""
        with self.guard:
            self.rename_rows(names)
            self.pending = {names.get(n, n): stored for n, stored in self.pending.items()}
            self.skips = {names.get(n, n): count for n, count in self.skips.items()}

    def set_rules(self, rule: Rule | Callable[[str], Rule]) -> None:
        """Change the rules of all names, and of those to come.

        Raises:
            TypeError: The callable gives something else.
            ValueError: A rule is not for parameters of a shape; nothing has changed.
        """
        entries = {}
        for name in self._codes:
            entries[name] = with_rule(name, self.entry(name), chosen(rule, name, Rule, "rule"))
        placed = self.placed(entries)
        with self.guard:
            self.replace_rows(placed)
            self.rule = rule
        self.sweep()

    def set_clips(self, clip: Clip | Callable[[str], Clip | None] | None) -> None:
        """Change the clips of all names, and of those to come.

        Raises:
            TypeError: The callable gives something else; nothing has changed.
        """
        clips = {name: chosen_clip(clip, name) for name in self._codes}
        with self.guard:
            for name, one in clips.items():
                group, row = self.row_of(name)
                self.give_clips(group, np.array([row]), [one])
            self.last, self.clip = NOTHING, clip

    def set_numbers(self, names: Iterable[str] | None, values: Mapping[str, Any]) -> None:
        """Change some hyperparameters of some names.

        Args:
            names: The names; None for all, and those to come.
            values: The hyperparameters.

        Raises:
            TypeError: The rule of a name has no such hyperparameter.
            ValueError: A value is out of range; nothing has changed.
        """
        rule = None if names is not None else changed_for_all(self.rule, values)
        usual = (self.rule, rule) if isinstance(rule, Rule) else None
        writes, placed = changed_numbers(self, names, values, usual)
        with self.guard:
            for write in writes:
                write()
            self.replace_rows(placed)
            if rule is not None:
                self.rule = rule
        if self._garbage:
            self.sweep()


def _duplicates(names: Sequence[str], params: np.ndarray, grads: np.ndarray) -> np.ndarray:
    """The parameters, those with a gradient as copies.

    Raises:
        TypeError: A parameter is not an array.
    """
    copies = params.copy()
    for place, grad in enumerate(grads):
        if grad is not None:
            label = f"parameter {names[place]!r}"
            backend = backend_for(params[place], label)
            copies[place] = answer(label, backend.duplicate, params[place])
    return copies
