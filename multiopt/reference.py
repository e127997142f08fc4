"""The reference engine: the rule as it stands, on any Array API library, a parameter at a time.

It takes what no compiled engine does: rules that treat a parameter as a whole, devices, libraries
without a package of ours. All results are new arrays, made before anything is written.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from multiopt.arrays import Array, Arrays, Member, Part
from multiopt.engine import Group, Slots
from multiopt.errors import answer, brief
from multiopt.rules.arithmetic import clamp, sum_of_squares

if TYPE_CHECKING:
    from multiopt.backend import Backend
    from multiopt.layout import Layout
    from multiopt.rules import Rule

__all__ = ["ReferenceGroup", "fetched", "is_finite", "resumed", "updated"]


class Updated(NamedTuple):
    """What a rule made of a parameter, in the namespace of the computation.

    Attributes:
        arrays: The new parameter, the slots, and what the parameter is rounded from if it has a
            master copy.
        grad: The clipped gradient.
        limited: Whether the bound changed an element: anything with a truth value, such as a 0-d
            array that is still on its device.
    """

    arrays: list[Array]
    grad: Array
    limited: Any


class _Computed(NamedTuple):
    """A parameter of a step with what is to be written, and kept."""

    member: Member
    param: Array
    kept: tuple[Array, ...]
    grad: Array
    limited: Any


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
        self, rows: np.ndarray, shapes: Sequence[tuple[int, ...]], slots: Slots | None
    ) -> None:
        made = {}
        for k, (row, shape) in enumerate(zip(rows.tolist(), shapes, strict=True)):
            forms = list(self.rule.slot_shapes(shape).values()) + [shape] * self.has_masters
            given = [None] * len(forms) if slots is None else slots[k]
            arrays = [self._array(x, form) for x, form in zip(given, forms, strict=True)]
            made[row] = tuple(self.backend.to_slots(arrays, self.layout))
        self._slots.update(made)

    def _array(self, given: Array | None, shape: tuple[int, ...]) -> Array:
        """What is given for a slot of a shape; zeros for None."""
        if given is None:
            return np.zeros(shape, self.dtype)
        if not isinstance(given, np.ndarray):
            return given
        with np.errstate(over="ignore"):
            return given.astype(self.dtype, copy=False).reshape(shape)

    def _drop_slots(self, row: int) -> None:
        del self._slots[row]

    def slots_at(self, row: int) -> dict[str, Array]:
        """Return the slots of a row by name."""
        return dict(zip(self.slot_names(self.shapes[row]), self._slots[row], strict=True))

    def slots_on_host(self, rows: np.ndarray, number: int) -> Iterator[np.ndarray]:
        """Yield one slot of some rows, a copy for each row if the host cannot see it."""
        for row in rows.tolist():
            yield self._on_host(self._slots[row][number])

    def _on_host(self, slot: Array) -> np.ndarray:
        array = self.backend.memory(slot)
        # It may know addresses and nothing else.
        if array is None or array.dtype != self.dtype:
            array = self.backend.to_host(slot)
        return np.asarray(array, order="C").reshape(1, -1)

    # A step

    def look(self, part: Part, arrays: Arrays, last: bool) -> None:
        """Declare all arrays odd, so that Python looks at each."""
        part.look_at_all(arrays)
        self._members = {}

    def lend(self, part: Part, position: int, member: Member, copy: bool, arrays: Arrays) -> None:
        """Keep a parameter for this step."""
        member.slots = self._slots[member.row]
        if self.has_masters:
            *slots, member.master = member.slots
            member.slots = tuple(slots)
        self._members[member.row] = member

    def _members_of(self, part: Part) -> list[Member]:
        return [self._members[row] for row in part.rows.tolist()]

    def finite(self, part: Part, threads: int | None) -> np.ndarray:
        """Ask the library, with one transfer to the host for all rows."""
        return fetched(self.backend, self.layout, map(is_finite, self._members_of(part))).astype(
            bool, copy=False
        )

    @np.errstate(all="ignore")
    def squares(
        self, part: Part, which: np.ndarray | slice, factor: float, threads: int | None
    ) -> np.ndarray:
        """Let the library sum the squares, with one transfer to the host for all rows."""
        members = [self._members[row] for row in part.rows[which].tolist()]
        for member in members:
            member.scales = [float(self.own[member.row])]
        return fetched(self.backend, self.layout, (_squares(member, factor) for member in members))

    @np.errstate(all="ignore")
    def prepare(
        self, part: Part, arrays: Arrays, leave_clipped: bool, threads: int | None
    ) -> dict[int, Array]:
        """Run the rule for each parameter; the results are new arrays."""
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
        done = list(map(updated, members))
        closed = iter(self.backend.to_slots([x for one in done for x in one.arrays], self.layout))
        kept = [tuple(next(closed) for _ in one.arrays) for one in done]
        params = [param for param, *_ in kept]
        if not self.backend.in_place:
            params = self.backend.to_params(members, params)
        self._computed = [
            _Computed(member, param, tuple(slots), one.grad, one.limited)
            for member, param, (_, *slots), one in zip(members, params, kept, done, strict=True)
        ]
        if self.clipping:
            part.clipped = np.array([any(x != 1 for x in m.scales) for m in members], bool)
            part.limited = {
                k: one.limited
                for k, (member, one) in enumerate(zip(members, done, strict=True))
                if member.bound is not None
            }
        if self.backend.in_place:
            return {}
        whole = self.backend.as_complex if self.layout.is_complex else lambda array: array
        return {one.member.place: whole(one.param) for one in self._computed}

    @np.errstate(all="ignore")
    def run(self, part: Part) -> None:
        """Write the results, keep the new slots, and count the step."""
        for one in self._computed:
            if self.backend.in_place:
                self.backend.write(one.member.param, one.param)
            self._slots[one.member.row] = one.kept
        self.steps[part.rows] += 1

    def left_over(self, part: Part) -> Iterable[tuple[Member, Array]]:
        """Return the clipped gradients."""
        clipped = part.clipped
        if clipped is None:
            return []
        return [
            (one.member, one.grad)
            for one, scaled in zip(self._computed, clipped, strict=True)
            if scaled or bool(one.limited)
        ]

    def forget(self, part: Part) -> None:
        """Release everything of the step."""
        self._members, self._computed = {}, []


def fetched(backend: "Backend", layout: "Layout", values: Iterable[Array]) -> np.ndarray:
    """Arrays without dimensions as an array of the host, in one transfer."""
    arrays = list(values)
    stack = backend.namespace(layout).stack
    return backend.to_host(stack(arrays)) if arrays else np.empty(0)


def is_finite(member: Member) -> Array:
    """Whether a gradient, as it came in, has no infinity and no NaN."""
    xp = member.backend.namespace(member.layout)
    return xp.all(xp.isfinite(member.backend.to_compute(member.grad, member.layout)))


def _scaled(member: Member) -> Array:
    """A gradient times its clip coefficients."""
    grad = member.backend.to_compute(member.grad, member.layout)
    for scale in member.scales:
        if scale != 1:
            grad = scale * grad
    return grad


def _squares(member: Member, factor: float) -> Array:
    """The sum of squares of a gradient, scaled so far, times a factor.

    Raises:
        TypeError: The device has no float64.
    """
    xp, layout = member.backend.namespace(member.layout), member.layout

    def measured() -> Array:
        grad = xp.astype(_scaled(member), xp.float64, copy=False)
        return sum_of_squares(xp, grad if factor == 1 else factor * grad)

    what = f"the norm of the gradient of {member.name!r} is a float64, which {layout.library}"
    return answer(f"{what} does not compute on the device {layout.device}", measured)


def resumed(member: Member, param: Array, master: Array) -> Array:
    """What a parameter is computed from: its master copy, where that rounds to it.

    Where it does not, the parameter was changed by somebody else, or there was no step yet.

    Args:
        member: The parameter.
        param: Its array, opened.
        master: Its master copy, likewise.
    """
    backend, layout = member.backend, member.layout
    (rounded,) = backend.to_params([member], [master])
    same = backend.to_compute(rounded, layout) == param
    return backend.namespace(layout).where(same, master, param)


def updated(member: Member) -> Updated:
    """Clip the gradient of a parameter, then let its rule update it; nothing is written.

    Raises:
        TypeError: The rule broke its contract.
    """
    backend, layout, rule = member.backend, member.layout, member.rule
    assert rule is not None
    xp = backend.namespace(layout)
    grad, limited = _scaled(member), False
    if member.bound is not None:
        limited = xp.any(xp.abs(grad) > member.bound)
        grad = clamp(xp, grad, member.bound)
    param = backend.to_compute(member.param, layout)
    if member.master is not None:
        param = resumed(member, param, backend.to_compute(member.master, layout))
    if not rule.elementwise:
        # A matrix product depends on strides, which ``asarray`` keeps.
        param, grad = (_in_rows(xp, x) for x in (param, grad))
    slots = tuple(backend.to_compute(slot, layout) for slot in member.slots)
    try:
        new_param, new_slots = rule.update(xp, param, grad, slots, member.scalars)
    except Exception as error:
        error.add_note(f"while the rule updated parameter {member.name!r}")
        raise
    _check_update(member, param, new_param, new_slots)
    # A rule may hand on what it was given as a slot; what the caller lent is not ours to keep,
    # nor is what he gets: that is ``new_param``, where it is neither written nor rounded.
    is_given = not backend.in_place and member.master is None
    others = (param, grad, *slots, new_param) if is_given else (param, grad, *slots)
    kept = (*new_slots, *([] if member.master is None else [new_param]))
    arrays = [xp.asarray(x, copy=True) if _is_part(x, others) else x for x in kept]
    # What NumPy computes of arrays without dimensions is a scalar.
    arrays = [np.asarray(x) if isinstance(x, np.generic) else x for x in (new_param, *arrays)]
    return Updated(arrays, grad, limited)


def _check_update(member: Member, param: Array, new_param: Array, new_slots: Any) -> None:
    """Refuse what is not an update of a parameter.

    Raises:
        TypeError: The rule broke its contract.
    """
    if not isinstance(new_slots, tuple) or len(new_slots) != len(member.slots):
        raise TypeError(
            f"the rule of parameter {member.name!r} returned {brief(new_slots)} as slots; expected "
            f"a tuple of {len(member.slots)}, as many as it has"
        )
    for old, new in zip((param, *member.slots), (new_param, *new_slots), strict=True):
        if new.dtype != param.dtype or new.shape != old.shape:
            raise TypeError(
                f"the rule of parameter {member.name!r} returned an array of shape "
                f"{tuple(new.shape)} and dtype {new.dtype}; expected {tuple(old.shape)} and "
                f"{param.dtype}: an update has no literals and keeps shapes"
            )


def _in_rows(xp: Any, array: Array) -> Array:
    """A copy in row-major order."""
    return xp.reshape(xp.reshape(array, (-1,), copy=True), array.shape)


def _is_part(array: Array, lent: tuple[Array, ...]) -> bool:
    """Whether an array is one of others, or, in NumPy, may be a view of one."""
    if isinstance(array, np.ndarray):
        return any(np.may_share_memory(array, other) for other in lent)
    return any(array is other for other in lent)
