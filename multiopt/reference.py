"""The reference engine: the rule as it stands, on any Array API library, a parameter at a time.

It takes what no compiled engine does: rules that treat a parameter as a whole, devices, libraries
without a package of ours. All results are new arrays, made before anything is written.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from multiopt.arrays import Array, Arrays, Member, Part
from multiopt.engine import Group

if TYPE_CHECKING:
    from multiopt.backend import Backend, Result
    from multiopt.layout import Layout
    from multiopt.rules import Rule

__all__ = ["ReferenceGroup"]


class _Computed(NamedTuple):
    """A parameter of a step with what was computed for it."""

    position: int
    member: Member
    result: "Result"


class ReferenceGroup(Group):
    """Parameters that are updated by their rule as it stands."""

    def __init__(
        self, backend: "Backend", layout: "Layout", rule: "Rule", has_masters: bool = False
    ) -> None:
        """Have no row yet."""
        self._slots: dict[int, tuple[Array, ...]] = {}
        self._members: dict[int, Member] = {}
        self._computed: list[_Computed] = []
        super().__init__(backend, layout, rule, has_masters)

    # Slots

    def _make_slots(
        self,
        rows: np.ndarray,
        shapes: Sequence[tuple[int, ...]],
        slots: Sequence[Sequence[Array]] | None,
    ) -> None:
        if slots is not None:
            self._slots.update(zip(rows.tolist(), map(tuple, slots), strict=True))
            return
        zeros, layout = self.backend.zeros, self.layout
        made = {}
        for row, shape in zip(rows.tolist(), shapes, strict=True):
            forms = list(self.rule.slot_shapes(shape).values()) + [shape] * self.has_masters
            made[row] = tuple(zeros(layout.with_shape(form)) for form in forms)
        self._slots.update(made)

    def _drop_slots(self, row: int) -> None:
        del self._slots[row]

    def slots_at(self, row: int) -> dict[str, Array]:
        """See ``Group``."""
        return dict(zip(self.slot_names(self.shapes[row]), self._slots[row], strict=True))

    # A step

    def look(self, part: Part, arrays: Arrays, last: bool) -> None:
        """See ``Group``: Python looks at every array."""
        part.look_at_all(arrays)
        self._members = {}

    def lend(self, part: Part, position: int, member: Member, copy: bool, arrays: Arrays) -> None:
        """See ``Group``."""
        member.slots = self._slots[member.row]
        if self.has_masters:
            *slots, member.master = member.slots
            member.slots = tuple(slots)
        self._members[member.row] = member

    def _members_of(self, part: Part) -> list[Member]:
        return [self._members[row] for row in part.rows.tolist()]

    def finite(self, part: Part, threads: int | None) -> np.ndarray:
        """See ``Group``."""
        return np.array(self.backend.finite(self._members_of(part)), bool)

    def squares(
        self, part: Part, which: np.ndarray, factor: float, threads: int | None
    ) -> np.ndarray:
        """See ``Group``."""
        members = [self._members[row] for row in part.rows[which].tolist()]
        for member in members:
            member.scales = [float(self.own[member.row])]
        return np.array(self.backend.sums_of_squares(members, factor))

    @np.errstate(all="ignore")
    def prepare(
        self, part: Part, arrays: Arrays, leave_clipped: bool, threads: int | None
    ) -> dict[int, Array]:
        """See ``Group``."""
        members = self._members_of(part)
        for member in members:
            row = member.row
            # Which slots there are, and so the formula, the kind says: a schedule may give a zero.
            member.rule = self.rule
            numbers = self.rule_now(row)
            member.scalars = numbers.coefficients(int(self.steps[row]) + 1, self.dtype.name)
            member.scales = [float(self.own[row]), float(self.shared[row])]
            bound = float(self.bound[row])
            member.bound = None if bound == np.inf else bound
        results = self.backend.run(members)
        self._computed = [
            _Computed(k, member, result)
            for k, (member, result) in enumerate(zip(members, results, strict=True))
        ]
        if self.clipping:
            part.clipped = np.array([any(x != 1 for x in m.scales) for m in members], bool)
            part.limited = {
                k: result.limited
                for k, member, result in self._computed
                if member.bound is not None
            }
        if self.backend.in_place:
            return {}
        whole = self.backend.whole if self.layout.is_complex else lambda array: array
        return {member.place: whole(result.param) for _, member, result in self._computed}

    @np.errstate(all="ignore")
    def run(self, part: Part) -> None:
        """See ``Group``."""
        for _, member, result in self._computed:
            if self.backend.in_place:
                self.backend.write(member, result.param)
            masters = () if result.master is None else (result.master,)
            self._slots[member.row] = (*result.slots, *masters)
        self.steps[part.rows] += 1

    def left_over(self, part: Part) -> Iterable[tuple[Member, Array]]:
        """See ``Group``."""
        clipped = part.clipped
        if clipped is None:
            return []
        return [
            (member, result.grad)
            for k, member, result in self._computed
            if clipped[k] or bool(result.limited)
        ]

    def forget(self, part: Part) -> None:
        """See ``Group``."""
        self._members, self._computed = {}, []
