"""The registry: what the optimizer keeps for each name, and how a step over some names runs.

Names are rows. The registry maps each name to a row of a group, and everything else about the
parameter is stored in the columns of that group. So a step can be over any names, in any order:

    names -> rows     one look-up per name; all new names of a group get their rows at once
    rows  -> groups   the parts of the step, one for each group
    Step              looks, checks, clips, prepares and runs all parts (``multiopt.step``)

``spec/registry.md`` states what users can rely on.

>>> import numpy as np
>>> from multiopt.registry import Registry
>>> from multiopt.rules import SGD
>>> registry = Registry(SGD(lr=1.0))
>>> w, b = np.zeros(2), np.zeros(1)
>>> for names, params in ((["w"], [w]), (["b", "w"], [b, w])):
...     grads = [np.ones_like(param) for param in params]
...     _ = registry.step(names, *(np.fromiter(x, object, len(x)) for x in (params, grads)))
>>> w.tolist(), b.tolist(), registry.clock("w")
([-2.0, -2.0], [-1.0], 2)
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from multiopt.arrays import Array, Arrays
from multiopt.backend import backend_for, backend_named, slot_of
from multiopt.entry import changed, chosen, chosen_average
from multiopt.first_sight import Undo, begin, move
from multiopt.guard import Guard
from multiopt.rules import Rule
from multiopt.rules.average import Average, Averaged
from multiopt.step.clip import Clip
from multiopt.step.numbers import ask_schedules
from multiopt.step.report import Outcome
from multiopt.step.run import Rows, Step, duplicates
from multiopt.step.skips import Skips, counted
from multiopt.table import NOTHING, Table

__all__ = ["Registry"]


class Registry(Table):
    """Names with their rows, pending state, and the steps over them.

    Args:
        rule: A rule for all names, or a callable ``name -> rule``.
        clip: A clip for all names, a callable ``name -> Clip or None``, or None.
        on_nonfinite: ``"propagate"``, ``"raise"`` or ``"skip"``.
        max_skips: How many steps in a row may skip a name; None for no limit.
        threads: The largest number of threads, or None.
        masters: Whether 16-bit parameters have master copies.
        guard: The optimizer's guard; by default a new one.
        average: An average for all names, a callable ``name -> Average or None``, or None.

    Attributes:
        rule: The rule for new names.
        clip: The clip for new names.
        average: The average for new names.
        settings: The hyperparameters that were set while the run went on: by name, and under None
            those for all names. A checkpoint has them.
        skips: How often each name was skipped; names that never were are left out.
        steps: How many steps updated anything.
        outcome: The outcome of the last step. Each completed step stores a new object.
    """

    __slots__ = (
        *("__weakref__", "_arrays", "_max_skips", "average", "clip", "in_place", "leave_clipped"),
        *("needs_gradients", "on_nonfinite", "outcome", "rule", "skips", "steps", "threads"),
        *("before_writing", "endings", "settings"),
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
        self.settings: dict[str | None, dict[str, Any]] = {}
        self.skips: dict[str, Skips] = {}
        self.steps = 0
        self.outcome: Outcome | None = None
        #: Whether a step overwrites the gradients with the clipped ones.
        self.leave_clipped = False
        #: Whether a step writes into the arrays it is given, where the library can.
        self.in_place = True
        #: Called by a step that is checked and prepared. If it raises, nothing has changed.
        self.before_writing: Callable[[], object] | None = None
        #: Whether reading ``.grad`` is an error if no parameter has a gradient or can get one.
        self.needs_gradients = False
        #: Pending names by their last part, to find renamed parameters. None until a step needs
        #: it; empty once it has warned.
        self.endings: dict[str, str] | None = None
        self.on_nonfinite, self._max_skips, self.threads = on_nonfinite, max_skips, threads
        self._arrays = Arrays()

    def __getstate__(self) -> dict[str, Any]:
        """Return everything that is kept, with one entry per name."""
        transient = "__weakref__", "_arrays"
        state = {name: getattr(self, name) for name in self.__slots__ if name not in transient}
        if self.outcome is not None:
            state["outcome"] = self.outcome.detached()
        entries = {}
        for name in self._codes:
            entry = self.entry(name)
            to_host = backend_named(entry.layout.library).to_host
            entries[name] = entry.with_converted(to_host)
        return {**state, "masters": self.masters, "pending": self.pending, "entries": entries}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what ``__getstate__`` returned, in new rows."""
        entries = state.pop("entries")
        super().__init__(state.pop("masters"))
        for name, value in state.items():
            setattr(self, name, value)
        self._arrays = Arrays()
        for name, entry in entries.items():
            entries[name] = entry.with_converted(partial(slot_of, layout=entry.layout))
        self.put(entries)

    # Queries

    def known(self) -> dict[str, None]:
        """All names that have a row, pending state or a count of skips."""
        return dict.fromkeys([*self._codes, *self.pending, *self.skips])

    def rule_for(self, name: str) -> Rule:
        """The rule that a name gets at first sight, settings that were made for it included.

        Raises:
            TypeError: The callable returned something that is not a rule, or the rule does not have
                a hyperparameter that was set.
            ValueError: A value that was set is out of range.
        """
        rule: Rule = chosen(self.rule, name, Rule, "rule")
        own = self.settings.get(name)
        return changed(lambda: [name], rule, own) if own else rule

    def average_of(self, name: str) -> Average | None:
        """The average that is kept of a name, or will be once it is seen; None for none."""
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
        """Take one step over some names.

        Args:
            names: The names of the parameters.
            params: The parameters, as an array of objects.
            grads: Their gradients, as an array of objects; None to read them from the parameters.
            after: Called once parameters, slots and clocks have been updated. It must not fail.

        Returns:
            By place, the new arrays of parameters that were not updated in place.
        """
        rows = self.last if names == self.last.names else self.find(names)
        own = grads is None
        if self._garbage:
            self.sweep()
        if grads is None:
            grads = self._own_gradients(rows, params)
        if not self.in_place:
            params = duplicates(rows.names, params, grads)
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
            if self.across is not None:
                self.across.measure(step, self.on_nonfinite, rows.global_clips)
                self.across.clip(step, rows.global_clips)
                self.across.settle(step)
            else:
                if self.on_nonfinite != "propagate":
                    step.check_finite(self.on_nonfinite)
                if rows.clipping:
                    step.clip(rows.global_clips)
            step.prepare()
            skips = self._counted(step) if step.skipped or self.skips else self.skips
            if self.before_writing is not None:
                self.before_writing()
            with self.guard:
                # Nothing below can fail.
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

    def enter(self, names: list[str], params: np.ndarray) -> None:
        """Begin the state of names before their first step: slots of zero, and a clock of zero.

        Pending state is taken over.

        Args:
            names: Names not seen yet.
            params: Their parameters, as an array of objects.
        """
        fresh: dict[int, int] = {}
        undo: Undo = []
        committed = False
        try:
            # Only whether there is a gradient matters here.
            rows = begin(self, self.find(names), params, params, fresh, undo)
            with self.guard:
                self._register(rows, fresh, ())
                committed = True
        finally:
            if not committed:
                self._take_back(fresh, undo)

    def _look(self, step: Step, rows: Rows, fresh: dict[int, int]) -> Rows:
        """Look at the arrays of a step; return its rows, new ones where parameters have moved."""
        while moved := step.look():
            rows = move(self, rows, moved, fresh)
            step.take(rows, fresh)
        return rows

    def _ask(self, rows: Rows, arrays: Arrays, fresh: dict[int, int]) -> Rows:
        """Call the schedules of some rows; return the rows, new ones where parameters have moved.

        A schedule is the caller's code and may change anything, so the step looks at its arrays
        afterwards. A schedule is not called for a name that is left alone.
        """
        count = self.steps + 1
        if self.on_nonfinite == "propagate":
            ask_schedules(rows.names, [part[:3] for part in rows.parts], arrays.grads, count)
            return rows
        step = Step(rows, arrays, fresh, self.threads, self.leave_clipped)
        try:
            rows = self._look(step, rows, fresh)
            if self.across is not None:
                self.across.measure(step, self.on_nonfinite, rows.global_clips)
            else:
                step.check_finite(self.on_nonfinite)
            parts = [(part.group, part.rows, part.places) for part in step.parts]
            ask_schedules(rows.names, parts, arrays.grads, count)
        finally:
            step.forget()
        return rows

    def _own_gradients(self, rows: Rows, params: np.ndarray) -> np.ndarray:
        """The gradients that the parameters carry, as torch's ``.grad``."""
        if not rows.names:
            return params
        backend = backend_for(params[0], f"parameter {rows.names[0]!r}")
        return backend.gradients(params, rows.names, rows.missing, self.needs_gradients)

    # The end of a step

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
        """Register the new rows of a step, and count the step."""
        new: tuple[str, ...] = ()
        if fresh:
            new = self._register(rows, fresh, step.skipped)
        else:
            self.last = rows
        self.outcome = Outcome(rows.names, new, step.parts, step.skipped, step.global_norms)
        self.skips = skips
        for part in step.parts:
            if len(part.places):
                self.steps += 1
                break

    def _register(
        self, rows: Rows, fresh: Mapping[int, int], skipped: Sequence[int]
    ) -> tuple[str, ...]:
        """Register the new rows, except those of skipped names; return the names never seen before.

        A name that is skipped at first sight counts as not seen.
        """
        dropped = fresh.keys() & skipped
        codes, names = self._codes, rows.names
        added = {names[place]: fresh[place] for place in sorted(fresh) if place not in dropped}
        new = tuple(name for name in added if name not in codes)
        self._garbage += [fresh[place] for place in dropped]
        self._garbage += [codes[name] for name in added if name in codes]
        codes.update(added)
        for name in added if self.pending else ():
            self.pending.pop(name, None)
        self.last = NOTHING if dropped else rows
        return new

    def _take_back(self, fresh: Mapping[int, int], undo: Undo) -> None:
        """Undo the preparations of a step that was not committed."""
        for take_back in undo:
            take_back()
        if self.guard.torn is not None:
            # Some of the new rows may be registered; those and only those stay.
            garbage = dict.fromkeys([*self._garbage, *fresh.values()])
            self._garbage = [*garbage.keys() - set(self._codes.values())]
            return
        self.free(fresh.values())

    # Changes between steps

    def forget(self, names: Iterable[str]) -> None:
        """Drop the rows, the pending state and the skips of some names."""
        gone = dict.fromkeys(names)
        with self.guard:
            self._garbage += [self._codes.pop(name) for name in gone if name in self._codes]
            self.pending = {n: saved for n, saved in self.pending.items() if n not in gone}
            self.skips = {n: count for n, count in self.skips.items() if n not in gone}
            self.settings = {n: made for n, made in self.settings.items() if n not in gone}
            self.last = NOTHING
        self.sweep()

    def rename(self, names: Mapping[str, str]) -> None:
        """Rename some names; their order stays."""
        with self.guard:
            self.rename_rows(names)
            self.pending = {names.get(n, n): saved for n, saved in self.pending.items()}
            self.skips = {names.get(n, n): count for n, count in self.skips.items()}
            self.settings = {
                n if n is None else names.get(n, n): made for n, made in self.settings.items()
            }
