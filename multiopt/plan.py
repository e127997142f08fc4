"""What a step of one list of names does, worked out once and kept for the next step."""

from collections.abc import Sequence
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from multiopt.backend import Backend, Batch, Member, Now, identities, named
from multiopt.clipping import Clipping, Norms
from multiopt.entry import Entry
from multiopt.rules import Rule
from multiopt.rules.rule import is_schedule

if TYPE_CHECKING:
    from collections.abc import Hashable

__all__ = ["ALL_UPDATED", "Outcome", "Part", "Plan"]


class Part(NamedTuple):
    """The parameters of a plan that one batch updates.

    Attributes:
        backend: Theirs.
        batch: The batch.
        where: Their positions in the plan.
        everything: All positions in the batch.
    """

    backend: Backend
    batch: Batch
    where: np.ndarray
    everything: np.ndarray


class Outcome(NamedTuple):
    """What a step did, in the positions of its plan.

    Attributes:
        active: Those that were updated; None for all.
        skipped: Those left alone because their gradient was not finite.
        norms: What was measured for clipping, if anything was.
        clipped: Those whose gradient a clip changed, as far as the host knows; None for no clips.
        on_devices: By position, the same as a value on its device.
    """

    active: np.ndarray | None
    skipped: tuple[int, ...]
    norms: Norms | None
    clipped: np.ndarray | None
    on_devices: dict[int, Any]


ALL_UPDATED = Outcome(None, (), None, None, {})


class Plan:
    """A list of names, their entries, and the batches in which they step.

    While a plan is in use it keeps the clocks of its entries; ``settle`` brings them back. About
    the arrays of a step it knows nothing: those are looked at each time.

    Args:
        names: The names, which all have a gradient, or had one when the plan was made.
        entries: The entry of each.
    """

    def __init__(self, names: list[str], entries: list[Entry]) -> None:
        """Sort the names into batches."""
        self.names = names
        self.entries = entries
        self.steps = np.empty(0, np.int64)
        # Whether the entries have clocks of earlier steps, and whether a step may be on its way.
        self._ahead = self._advancing = False
        #: What the last step does, or did, that ``advance_all`` takes.
        self.outcome = ALL_UPDATED
        self.resume()
        self.everything = np.arange(len(names))
        self.parts: list[Part] = []
        groups: dict[Hashable, list[int]] = {}
        kinds: dict[Hashable, Hashable] = {}
        for i, entry in enumerate(entries):
            alike = id(entry.rule), entry.layout[0], *entry.layout[2:]
            if alike not in kinds:
                kind = named(entry.layout.library).kind(entry.rule, entry.layout)
                kinds[alike] = None if kind is None else (entry.layout.library, kind)
            groups.setdefault(kinds[alike], []).append(i)
        #: Positions that are in no batch.
        self.loose = np.array(groups.pop(None, []), np.int64)
        #: By position, the number of its part, or -1, and its position there.
        self.part_of = np.full(len(names), -1)
        self.local = np.full(len(names), -1)
        for key, positions in groups.items():
            assert isinstance(key, tuple)
            backend = named(key[0])
            batch = backend.batch(key[1], [_member(backend, entries[i]) for i in positions])
            for i, slots in zip(positions, batch.homes(), strict=False):
                entries[i].slots = slots
            where, everything = np.array(positions), np.arange(len(positions))
            self.part_of[where], self.local[where] = len(self.parts), everything
            self.parts.append(Part(backend, batch, where, everything))
        #: The one part that has everything, if there is one.
        self.whole = self.parts[0] if len(self.parts) == 1 and not self.loose.size else None
        self._slots = [entry.slots for entry in entries]
        rules: dict[Hashable, tuple[Rule, list[int]]] = {}
        keys: dict[int, Hashable] = {}
        for i, entry in enumerate(entries):
            number = id(entry.rule)
            if number not in keys:
                keys[number] = _key(entry.rule) if _has_schedule(entry.rule) else None
            if keys[number] is not None:
                rules.setdefault(keys[number], (entry.rule, []))[1].append(i)
        #: The rules that have schedules, equal ones once, and the positions that have them.
        self.scheduled = [(rule, np.array(where)) for rule, where in rules.values()]
        sizes = [prod(entry.layout.shape) for entry in entries]
        # Those without elements, which have no address by which they could be told apart.
        self._empty = np.array([i for i, size in enumerate(sizes) if size == 0], np.int64)
        # Whether one batch has everything and can take a step by itself.
        shares = self.clipping is not None and self.clipping.limits is None
        self._takes_all = self.whole is not None and not shares

    @cached_property
    def clipping(self) -> Clipping | None:
        """The clips, if there are any."""
        clips = [entry.clip for entry in self.entries]
        if not any(clips):
            return None
        return Clipping(self.names, clips, [e.layout.compute_dtype for e in self.entries])

    # Clocks

    def is_current(self) -> bool:
        """Whether the slots of all entries are still where they were when it was made."""
        pairs = zip(self.entries, self._slots, strict=True)
        return all(entry.slots is slots for entry, slots in pairs)

    def resume(self) -> None:
        """Take the clocks of the entries over."""
        self._ahead = self._advancing = False
        self.steps = np.array([entry.step for entry in self.entries], np.int64)

    def advance(self, steps: np.ndarray) -> None:
        """Take the clocks after a step."""
        self._ahead = True
        np.copyto(self.steps, steps)

    def settle(self) -> None:
        """Bring the clocks back to the entries."""
        if self._ahead:
            for entry, step in zip(self.entries, self.steps.tolist(), strict=True):
                entry.step = step
            # A signal handler that looks may come before the clocks move.
            self._ahead = self._advancing

    # Schedules

    def rules_now(self, active: np.ndarray | None, count: int) -> list[Now]:
        """The rules with schedules at this step, each once for each number of a step.

        Args:
            active: The positions that take part; None for all.
            count: The number of the step of the optimizer.

        Raises:
            ValueError: A schedule gave no number, or one out of range.
        """
        now = []
        for rule, everywhere in self.scheduled:
            where = everywhere if active is None else everywhere[active[everywhere]]
            steps = self.steps[where]
            # The usual case is one number for all: it takes a tenth of the time.
            alike = len(steps) > 0 and (steps == steps[0]).all()
            for step in steps[:1].tolist() if alike else dict.fromkeys(steps.tolist()):
                mine = where if alike else where[steps == step]
                try:
                    now.append(Now(rule.at(step + 1, count), mine))
                except ValueError as error:
                    raise ValueError(f"parameter {self.names[mine[0]]!r}: {error}") from error
        return now

    # Arrays

    def takes_all(self, params: np.ndarray, grads: np.ndarray) -> bool:
        """Whether ``advance_all`` may be asked."""
        if not (self._takes_all and self.empty_differ(params)):
            return False
        # A schedule is not asked for what takes no part.
        return not self.scheduled or id(None) not in np.frombuffer(identities(grads), np.uintp)

    def empty_differ(self, params: np.ndarray) -> bool:
        """Whether arrays without elements are all different objects."""
        empty = self._empty
        return len(empty) < 2 or len(set(map(id, params[empty]))) == len(empty)

    def advance_all(
        self,
        params: np.ndarray,
        grads: np.ndarray,
        leaves: bool,
        now: Sequence[Now],
        leave_clipped: bool,
        threads: int | None,
    ) -> Outcome | None:
        """Take a step in which nothing is out of the ordinary; None if this is no such step.

        Parameters, slots and clocks change in one, whatever a signal raises. ``told`` says what
        was done, if that was before this could.
        """
        assert self.whole is not None
        clipping, batch, steps = self.clipping, self.whole.batch, self.steps
        limits = None if clipping is None else clipping.limits
        writes_grads = leave_clipped and clipping is not None
        if not batch.ready(params, grads, leaves, steps, now, limits, writes_grads):
            return None
        self.outcome = ALL_UPDATED
        if clipping is not None and limits is not None:
            room = np.empty(len(self.names), bool)
            self.outcome = Outcome(None, (), clipping.norms(), room, {})
        self._advancing = self._ahead = True
        try:
            clipped = batch.advance(steps, limits, leave_clipped, threads)
        finally:
            self._advancing = False
        if limits is None:
            return ALL_UPDATED
        # Counting takes 50 us less than ``any`` when other work has filled the caches.
        if leave_clipped and (count := np.count_nonzero(clipped)):
            self.whole.backend.touch(grads if count == len(clipped) else grads[clipped])
        return self.told()

    def told(self) -> Outcome:
        """What the last step did that ``advance_all`` took."""
        if self.outcome.clipped is not None:
            assert self.whole is not None
            np.copyto(self.outcome.clipped, self.whole.batch.clipped())
        return self.outcome

    def look(self, params: np.ndarray, grads: np.ndarray, leaves: bool) -> np.ndarray:
        """The positions that Python must look at, of the arrays of a step as they are now."""
        if self.whole is not None:
            return self.whole.batch.look(params, grads, leaves)
        odd = [
            part.where[part.batch.look(params[part.where], grads[part.where], leaves)]
            for part in self.parts
        ]
        return np.sort(np.concatenate([self.loose, *odd]))


def _member(backend: Backend, entry: Entry) -> Member:
    memory = [backend.memory_of(slot) for slot in entry.slots]
    own = tuple(array for array in memory if array is not None and array.flags.writeable)
    return Member(entry.rule, entry.layout, own if len(own) == len(memory) else None)


def _key(rule: Rule) -> "Hashable":
    try:
        hash(rule)
    except TypeError:
        return id(rule)  # a schedule that changes, or a choice of another kind
    return rule


def _has_schedule(rule: Rule) -> bool:
    return any(is_schedule(getattr(rule, name)) for name in rule.ranges)
