"""``Step``: one step over some rows, in the order in which nothing can be left half done.

Everything is looked at, checked, measured and allocated before anything is changed. Only the last
call, ``run``, writes, and it cannot fail. All calls work on whole parts; Python examines single
parameters only where an engine cannot use their arrays as they are, or where memory may overlap.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import starmap
from typing import NamedTuple, TypeAlias

import numpy as np

from multiopt.arrays import APART, SHARED_GRADIENTS, UNKNOWN, Array, Arrays, Member, Part
from multiopt.backend import backend_for
from multiopt.engine import Group
from multiopt.errors import answer
from multiopt.layout import Layout
from multiopt.step.checks import (
    check_layout,
    check_no_shared_memory,
    checked_gradient,
    refuse_nonfinite,
    refuse_shared,
)
from multiopt.step.clip import Clip, clip_by_global_norm

__all__ = ["Rows", "RowsOfGroup", "Step", "duplicates"]


#: A group, some of its rows, their places in a list of names, and the addresses of both arrays.
RowsOfGroup: TypeAlias = tuple[Group, np.ndarray, np.ndarray, tuple[int, int]]


class Rows(NamedTuple):
    """A list of names with their rows. It is kept in case the next step has the same names.

    Attributes:
        names: The names.
        codes: Their codes.
        parts: For each group, the rows and their places in the list.
        scheduled: Whether any of the rows may have schedules.
        clipping: Whether any of the rows may have a clip.
        global_clips: The clips with a global norm, by their numbers in the column ``clip``.
        missing: The places of names without a row.
    """

    names: list[str]
    codes: np.ndarray
    parts: list[RowsOfGroup]
    scheduled: bool
    clipping: bool
    global_clips: dict[int, Clip]
    missing: list[int]

    def leading(self, names: list[str]) -> np.ndarray:
        """The codes of the names with which a list begins as this one does.

        New names are mostly the last ones, and to compare a name takes a tenth of looking it up.
        """
        if names[:1] != self.names[:1]:
            return self.codes[:0]
        same, end = 0, min(len(names), len(self.names), *self.missing[:1])
        while same < end:
            middle = (same + end + 1) // 2
            if names[same:middle] == self.names[same:middle]:
                same = middle
            else:
                end = middle - 1
        return self.codes[:same]


class Step:
    """One step over some parts. Its methods are called in order, and only ``run`` changes anything.

    Args:
        rows: The names with their rows.
        arrays: The parameters and gradients.
        fresh: The places of new names.
        threads: The largest number of threads, or None.
        leave_clipped: Whether to overwrite the gradients with the clipped ones.

    Attributes:
        parts: The parts, without the rows that are left alone.
        skipped: After ``check_finite``, the places of the rows that are skipped.
        global_norms: After ``clip``, the global norm for each clip.
        replaced: After ``prepare``, by place, the new arrays of parameters that cannot be updated
            in place.
    """

    __slots__ = (
        "_arrays",
        "_leave_clipped",
        "_members",
        "_writes_grads",
        "global_norms",
        "names",
        "parts",
        "replaced",
        "skipped",
        "threads",
    )

    def __init__(
        self,
        rows: Rows,
        arrays: Arrays,
        fresh: Collection[int],
        threads: int | None,
        leave_clipped: bool,
    ) -> None:
        """Begin a step; no array is looked at yet."""
        self._arrays = arrays
        self.threads, self._leave_clipped = threads, leave_clipped
        # Clipped gradients then overwrite gradients, so gradients that share memory are copied.
        self._writes_grads = leave_clipped and rows.clipping
        self.skipped: list[int] = []
        self.global_norms: dict[Clip, float] = {}
        self.replaced: dict[int, Array] = {}
        self.take(rows, fresh)

    def take(self, rows: Rows, fresh: Collection[int]) -> None:
        """Take names and rows, at the beginning or after parameters have moved."""
        self.names, self.parts = rows.names, list(starmap(Part, rows.parts))
        self._members: dict[int, tuple[Part, Member]] = {}
        if fresh:
            new = np.fromiter(fresh, np.int64, len(fresh))
            for part in self.parts:
                part.fresh = new

    def places(self) -> set[int]:
        """The places of the rows that are updated."""
        return {place for part in self.parts for place in part.places.tolist()}

    # Looking

    def look(self) -> dict[int, Layout]:
        """Look at the arrays, and make sure that what one row writes, no other reads or writes.

        Gradients whose memory the step also writes are copied.

        Returns:
            By place, the layouts of parameters that have moved to another library or device. If
            there are any, the step must be started again with their new rows.

        Raises:
            TypeError: Something is not a usable array, or its dtype, library or device does not
                fit.
            ValueError: A shape does not fit, a parameter cannot be written, or two parameters share
                memory.
        """
        arrays, parts = self._arrays, self.parts
        odd: list[tuple[Part, int]] = []
        empty, last, filled = 0, len(parts) - 1, True
        for k, part in enumerate(parts):
            group = part.group
            filled = filled and group.fills_spans
            group.look(part, arrays, filled and k == last)
            empty += group.empty
            if part.odd:
                odd += [(part, position) for position in part.odd]
        moved: dict[int, Layout] = {}
        if odd:
            arrays.overlap = UNKNOWN
            self._lend(self._examined(odd, moved), copy=False)
            if moved:
                return moved
        if arrays.overlap or empty:
            self._check_apart()
        return moved

    def _examined(
        self, odd: Iterable[tuple[Part, int]], moved: dict[int, Layout]
    ) -> list[tuple[Part, int, Member]]:
        """Examine some parameters in Python. All are checked before any is lent to its group.

        Args:
            odd: For each parameter its part and its position in it.
            moved: Filled with the layouts of parameters that have moved, by place.

        Returns:
            The part, the position and the member for each parameter that has not moved.
        """
        found = []
        for part, position in odd:
            place, row = int(part.places[position]), int(part.rows[position])
            name = self.names[place]
            param, grad = self._arrays.params[place], self._arrays.grads[place]
            label = f"parameter {name!r}"
            backend = backend_for(param, label)
            layout = backend.layout(param, label)
            grad = checked_gradient(name, grad, layout)
            expected = part.group.layout_at(row)
            if layout != expected:
                check_layout(name, layout, expected)
                moved[place] = layout
                continue
            param, grad = backend.as_real(param, layout), backend.as_real(grad, layout)
            member = Member(name, place, row, backend, param, grad, layout)
            self._members[place] = part, member
            found.append((part, position, member))
        for _, _, member in found:
            label = f"parameter {member.name!r}"
            member.backend.check_writable(self._arrays.params[member.place], label)
        return found

    def _lend(self, found: Iterable[tuple[Part, int, Member]], copy: bool) -> None:
        """Lend parameters that Python has examined to their groups.

        Args:
            found: For each parameter its part, its position in it, and its member.
            copy: Whether gradients must be copied because their memory is written.
        """
        for part, position, member in found:
            part.group.lend(part, position, member, copy, self._arrays)
            if not member.backend.in_place or member.layout.device != "cpu":
                continue
            memory = member.backend.memory(member.param)
            if memory is not None and memory.size:
                bounds = np.lib.array_utils.byte_bounds(memory)
                self._arrays.spans[:, member.place] = bounds

    # Checking

    def _check_apart(self) -> None:
        """Make sure that what one row writes, no other row reads or writes.

        Raises:
            ValueError: Two parameters share memory.
        """
        arrays = self._arrays
        if self._members:
            elsewhere = [
                member
                for _, member in self._members.values()
                if member.layout.device != "cpu" or not arrays.spans[1, member.place]
            ]
            check_no_shared_memory(elsewhere)
        elif all(part.owned for part in self.parts):
            objects = [array for part in self.parts for array in (*part.params, *part.grads)]
            if len(set(map(id, objects))) == len(objects):
                return
        if not self.parts:
            return
        for part in self.parts:
            part.group.locate(part, arrays)
        if any(part.group.empty for part in self.parts):
            self._check_empty()
        found = self.parts[0].group.overlap(arrays)
        if found == APART or (found == SHARED_GRADIENTS and not self._writes_grads):
            return
        everything = [
            (part, position, place)
            for part in self.parts
            for position, place in enumerate(part.places.tolist())
        ]
        self._examined([(a, b) for a, b, place in everything if place not in self._members], {})
        check_no_shared_memory([member for _, member in self._members.values()])
        self._lend([(a, b, self._members[place][1]) for a, b, place in everything], copy=True)

    def _check_empty(self) -> None:
        """Refuse one empty array under two names. Spans cannot show it: it has no memory."""
        count = len(self.names)
        starts, ends = self._arrays.spans[:, :count]
        if np.count_nonzero(ends > starts) == count:
            return
        seen: dict[int, str] = {}
        for part in self.parts:
            if not part.group.backend.in_place:
                continue
            for place in part.places[ends[part.places] == starts[part.places]].tolist():
                first = seen.setdefault(id(self._arrays.params[place]), self.names[place])
                if first != self.names[place]:
                    refuse_shared(first, self.names[place])

    def check_finite(self, policy: str) -> None:
        """Skip the rows whose gradients are not finite, or raise an error.

        Args:
            policy: ``"raise"`` or ``"skip"``.

        Raises:
            ValueError: A gradient is not finite, and the policy is ``"raise"``.
        """
        skipped: list[int] = []
        for part in self.parts:
            finite = part.group.finite(part, self.threads)
            if not finite.all():
                skipped += part.places[~finite].tolist()
                part.keep(finite)
        if skipped and policy == "raise":
            refuse_nonfinite(self.names[place] for place in sorted(skipped))
        self.skipped = sorted(skipped)

    # Clipping and updating

    def clip(self, clips: Mapping[int, Clip]) -> None:
        """Measure norms, and compute the factors by which they scale the gradients.

        Args:
            clips: The clips with a global norm.
        """
        clipping = [part for part in self.parts if part.group.clipping and len(part.rows)]
        for part in clipping:
            if part.group.bounded:
                part.group.clip_by_norm(part, self.threads)
        if clips:
            self.global_norms = clip_by_global_norm(clipping, clips, self.threads)

    def prepare(self) -> None:
        """Do everything that is left that can fail."""
        for part in self.parts:
            new = part.group.prepare(part, self._arrays, self._leave_clipped, self.threads)
            if new:
                self.replaced |= new

    def run(self) -> None:
        """Update parameters, slots and clocks. This cannot fail."""
        for part in self.parts:
            part.group.run(part)

    def left_over(self) -> list[tuple[Array, Member, Array]]:
        """The clipped gradients that the engines could not write over the gradients.

        Returns:
            The parameter as it was passed, its member, and the clipped gradient as an array of the
            engine's namespace.
        """
        return [
            (self._arrays.params[member.place], member, grad)
            for part in self.parts
            for member, grad in part.group.left_over(part)
        ]

    def forget(self) -> None:
        """Release all arrays of the step."""
        for part in self.parts:
            part.group.forget(part)


def duplicates(names: Sequence[str], params: np.ndarray, grads: np.ndarray) -> np.ndarray:
    """Copy the parameters that have a gradient; the others stay as they are.

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
