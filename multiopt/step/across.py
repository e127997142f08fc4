"""Steps across ranks: what must be known of a whole parameter before a rank updates its part of it.

Each rank holds parts of parameters, whole ones, or both, and what a step decides must be decided
alike on all of them: which names are skipped, and the norms that gradients are clipped by. Ranks
add up integers, exact sums among them (``multiopt.rules.sums``), so that the results have the bits
of one process. Everything is added up before anything is written.

``Ranks`` is what is asked of whoever carries the numbers; ``multiopt.distributed.ranks`` answers.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

import numpy as np

from multiopt.arrays import Part
from multiopt.rules.sums import Sum, length
from multiopt.step.checks import refuse_nonfinite
from multiopt.step.clip import Clip, carriers, share_norm

if TYPE_CHECKING:
    from multiopt.step.run import Step

__all__ = ["Across", "Names", "Ranks", "Told"]


class Told(NamedTuple):
    """What a rank tells the others of a name that has a gradient on it.

    Attributes:
        counts: Whether its elements count here, of a parameter that lies on several ranks; None for
            one that is whole here: it counts on the lowest rank that has it.
        dtype: The compute dtype.
        is_bounded: Whether its own norm is bounded.
        clip: The clip by which it is clipped together with others; None if there is none.
        asks: Whether its rule asks for norms of a parameter of which this rank has a part.
    """

    counts: bool | None
    dtype: str
    is_bounded: bool
    clip: Clip | None
    asks: bool


#: What is told of each name.
Names: TypeAlias = Mapping[str, Told]


class Ranks(Protocol):
    """The ranks of a step."""

    #: What all ranks together have told, in one order everywhere.
    names: Names
    #: The names that are whole where they are, and count here.
    counted: Collection[str]

    def tell(self, names: Names) -> None:
        """Tell the others of the names of a step, and learn of theirs, if anything is new."""

    def add(self, count: int, numbers: Callable[[], np.ndarray]) -> np.ndarray:
        """Add up int64 numbers of all ranks, as many on each; waiting can be interrupted.

        Args:
            count: How many numbers.
            numbers: Returns them. What it raises on one rank is raised on all.
        """

    def alike(self) -> AbstractContextManager[None]:
        """What all ranks do with the same data, so that all raise the same error by themselves."""


class _Place(NamedTuple):
    """Where the rows of a part are among the names of all ranks.

    Attributes:
        where: The positions of their names.
        counts: Whether their elements count here.
        asks: Whether their rules ask for norms of the whole.
    """

    where: np.ndarray
    counts: np.ndarray
    asks: np.ndarray

    def keep(self, which: np.ndarray) -> "_Place":
        """Drop the rows that are False in ``which``."""
        return _Place(*(column[which] for column in self))


class Across:
    """Steps across ranks. Its methods are called in order, by each rank.

    Args:
        ranks: The ranks.

    Attributes:
        counts: Of parameters that lie on several ranks, whether their elements count here.
        parts: The names of those of which only a part is here.
    """

    def __init__(self, ranks: Ranks) -> None:
        """Start without names."""
        self._ranks = ranks
        self.counts: Mapping[str, bool] = {}
        self.parts: Collection[str] = ()
        self._key: object = None
        self._told: Names = {}
        #: For each part of the last step, with the rows that it began with.
        self._all_places: list[_Place] = []
        self._places: list[_Place] = []
        #: The names of all ranks, and which of them are skipped in this step.
        self._names: Names = {}
        self._skipped = np.zeros(0, bool)

    # Names

    def _meet(self, step: "Step", clips: Mapping[int, Clip]) -> None:
        """Agree with the other ranks on the names of a step, and find the places of ours."""
        columns = [(part, part.group.clip[part.rows]) for part in step.parts]
        key = [(p.group.number, *map(bytes, (p.rows, p.places, clip))) for p, clip in columns]
        is_new = (step.names, key) != self._key
        if is_new:
            self._key, self._told = (step.names, key), self._all_told(step, clips)
        self._ranks.tell(self._told)
        if is_new or self._names is not self._ranks.names:
            self._names = self._ranks.names
            index_of = {name: index for index, name in enumerate(self._names)}
            self._all_places = [self._place(step, part, index_of) for part in step.parts]
        self._places = self._all_places
        self._skipped = np.zeros(len(self._names), bool)

    def _all_told(self, step: "Step", clips: Mapping[int, Clip]) -> Names:
        told = {}
        for part in step.parts:
            group, rows = part.group, part.rows
            bounded, codes = group.is_bounded(rows).tolist(), group.clip[rows].tolist()
            for place, is_bounded, code in zip(part.places.tolist(), bounded, codes, strict=True):
                name = step.names[place]
                told[name] = Told(
                    self.counts.get(name),
                    group.dtype.name,
                    is_bounded,
                    clips.get(code),
                    not group.rule.elementwise and name in self.parts,
                )
        return told

    def _place(self, step: "Step", part: Part, index_of: Mapping[str, int]) -> _Place:
        names = [step.names[place] for place in part.places.tolist()]
        told, counted = [self._told[name] for name in names], self._ranks.counted
        counts = [
            name in counted if x.counts is None else x.counts
            for name, x in zip(names, told, strict=True)
        ]
        where = np.array([index_of[name] for name in names], np.int64)
        return _Place(where, np.array(counts, bool), np.array([x.asks for x in told], bool))

    # Stages

    def measure(self, step: "Step", policy: str, clips: Mapping[int, Clip]) -> None:
        """Find gradients that are not finite on any rank, and bound the norms of single ones.

        Args:
            step: The step, whose arrays were looked at.
            policy: ``"propagate"``, ``"raise"`` or ``"skip"``.
            clips: The clips with a global norm, by their numbers.

        Raises:
            ValueError: A gradient is not finite, and the policy is ``"raise"``.
        """
        self._meet(step, clips)
        checks = policy != "propagate"
        widths = [checks + length(told.dtype) * told.is_bounded for told in self._names.values()]
        starts = np.cumsum([0, *widths])
        if not starts[-1]:
            return
        parts = step.parts

        def measured() -> np.ndarray:
            numbers = np.zeros(starts[-1], np.int64)
            for part, place in zip(parts, self._places, strict=True):
                group = part.group
                if checks and len(part.rows):
                    numbers[starts[place.where[~group.finite(part, step.threads)]]] += 1
                group.own[part.rows] = 1.0
                bounded = group.is_bounded(part.rows)
                for position in np.flatnonzero(bounded & place.counts).tolist():
                    one = np.array([position])
                    integers = group.squares(part, one, step.threads).to_integers()
                    first = starts[place.where[position]] + checks
                    numbers[first : first + len(integers)] += integers
            return numbers

        totals = self._ranks.add(int(starts[-1]), measured)
        if checks:
            self._skip(step, policy, totals[starts[:-1]] > 0)
        for part, place in zip(parts, self._places, strict=True):
            if part.group.bounded:
                which = np.flatnonzero(part.group.is_bounded(part.rows))
                first = starts[place.where[which]] + checks
                found = [_sum(totals[k:], part.group.dtype.name) for k in first]
                part.group.bound_norms(part, which, [one.norm() for one in found])

    def _skip(self, step: "Step", policy: str, skipped: np.ndarray) -> None:
        self._skipped = skipped
        if policy == "raise" and skipped.any():
            gone = [name for name, bad in zip(self._names, skipped, strict=True) if bad]
            with self._ranks.alike():
                refuse_nonfinite(gone)
        places: list[int] = []
        kept = [~skipped[place.where] for place in self._places]
        for part, which in zip(step.parts, kept, strict=True):
            places += part.places[~which].tolist()
            part.keep(which)
        self._places = [p.keep(which) for p, which in zip(self._places, kept, strict=True)]
        step.skipped = sorted(places)

    def clip(self, step: "Step", clips: Mapping[int, Clip]) -> None:
        """Measure the norms over several gradients, and compute what they scale them by."""
        dtypes: dict[Clip, str] = {}
        for told, is_skipped in zip(self._names.values(), self._skipped.tolist(), strict=True):
            if told.clip is not None and not is_skipped:
                dtypes[told.clip] = max(told.dtype, dtypes.get(told.clip, ""))
        if not dtypes:
            return
        codes = {clip: code for code, clip in clips.items()}
        held = {clip: carriers(step.parts, codes[clip]) for clip in dtypes if clip in codes}

        def measured() -> np.ndarray:
            totals = {clip: Sum(dtype) for clip, dtype in dtypes.items()}
            for clip, pairs in held.items():
                for part, which in pairs:
                    counts = self._places[step.parts.index(part)].counts
                    counted = np.arange(len(part.rows))[which]
                    counted = counted[counts[counted]]
                    if counted.size:
                        totals[clip] += part.group.squares(part, counted, step.threads)
            return np.concatenate([total.to_integers() for total in totals.values()])

        numbers = self._ranks.add(sum(map(length, dtypes.values())), measured)
        for clip, dtype in dtypes.items():
            step.global_norms[clip] = norm = _sum(numbers, dtype).norm()
            numbers = numbers[length(dtype) :]
            share_norm(held.get(clip, ()), clip, norm)

    def settle(self, step: "Step") -> None:
        """Find the norms that rules ask for, of parameters that lie on several ranks.

        A rule that asks for one norm after the other is asked again each time.
        """
        asking = [told.asks for told in self._names.values()] & ~self._skipped
        if not asking.any():
            return
        widths = [
            length(told.dtype) * asks
            for told, asks in zip(self._names.values(), asking.tolist(), strict=True)
        ]
        starts = 1 + np.cumsum([0, *widths])
        missing: list[tuple[Part, int, int]] = []

        def measured() -> np.ndarray:
            numbers = np.zeros(starts[-1], np.int64)
            missing.clear()
            for part, place in zip(step.parts, self._places, strict=True):
                for position in np.flatnonzero(place.asks).tolist():
                    found = part.group.missing_norm(part, position)
                    if found is not None:
                        first = int(starts[place.where[position]])
                        missing.append((part, position, first))
                        integers = found.to_integers() * place.counts[position]
                        numbers[first : first + len(integers)] += integers
            numbers[0] = len(missing)
            return numbers

        while True:
            totals = self._ranks.add(int(starts[-1]), measured)
            if not totals[0]:
                return
            for part, position, first in missing:
                part.sums = {} if part.sums is None else part.sums
                found = _sum(totals[first:], part.group.dtype.name)
                part.sums.setdefault(position, []).append(found)


def _sum(numbers: np.ndarray, dtype: str) -> Sum:
    """The sum that the first of some integers are."""
    return Sum.from_integers(numbers[: length(dtype)], dtype)
