"""The reference engine: calls ``rule.update`` for one parameter at a time, on any library.

It runs whatever no faster engine can: most rules that treat a parameter as a whole, arrays on other
devices, array libraries that multiopt has no package for. Faster engines are tested against it.
Every result is a new array, and all of them are computed before the first is written, so an error
changes nothing.

>>> import numpy as np
>>> from multiopt.arrays import Member
>>> from multiopt.backend import backend_named
>>> from multiopt.reference import updated
>>> from multiopt.rules import SGD
>>> numpy, rule, w = backend_named("numpy"), SGD(lr=0.5), np.ones(2)
>>> member = Member("w", 0, 0, numpy, w, np.ones(2), numpy.layout(w, "parameter 'w'"))
>>> member.rule, member.scalars, member.bound = rule, rule.coefficients(step=1), 0.5
>>> updated(member).arrays, w
([array([0.75, 0.75])], array([1., 1.]))
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from multiopt.arrays import Array, Arrays, Member, Part
from multiopt.engine import Group, Slots
from multiopt.errors import answer, brief
from multiopt.rules.arithmetic import clamp
from multiopt.rules.sums import MissingSumError, Sum, known_sums

if TYPE_CHECKING:
    from multiopt.backend import Backend
    from multiopt.layout import Layout
    from multiopt.rules import Rule

__all__ = ["ReferenceGroup", "fetched", "is_finite", "resumed", "updated", "updated_part"]


class Updated(NamedTuple):
    """The result of updating one parameter, in the namespace that computed it.

    Attributes:
        arrays: The new parameter, the new slots, and the new master copy if there is one; all in
            the compute dtype.
        grad: The clipped gradient.
        limited: Whether the bound on elements changed any: a bool, or a 0-d array that may still be
            on its device.
    """

    arrays: list[Array]
    grad: Array
    limited: Any


class _Computed(NamedTuple):
    """A parameter of a step with its results, ready to be written."""

    member: Member
    param: Array
    slots: tuple[Array, ...]
    grad: Array
    limited: Any


class ReferenceGroup(Group):
    """Parameters that are updated by calling their rule."""

    def __init__(
        self, backend: "Backend", layout: "Layout", rule: "Rule", has_masters: bool = False
    ) -> None:
        """Create a group without rows."""
        self._slots: dict[int, tuple[Array, ...]] = {}
        self._members: dict[int, Member] = {}
        self._computed: list[_Computed] = []
        super().__init__(backend, layout, rule, has_masters)

    # Slots

    def _make_slots(
        self, rows: np.ndarray, shapes: Sequence[tuple[int, ...]], slots: Slots | None
    ) -> None:
        new = {}
        for k, (row, shape) in enumerate(zip(rows.tolist(), shapes, strict=True)):
            slot_shapes = list(self.rule.slot_shapes(shape).values()) + [shape] * self.has_masters
            given = [None] * len(slot_shapes) if slots is None else slots[k]
            arrays = [self._array(x, form) for x, form in zip(given, slot_shapes, strict=True)]
            new[row] = tuple(self.backend.to_slots(arrays, self.layout))
        self._slots.update(new)

    def _array(self, given: Array | None, shape: tuple[int, ...]) -> Array:
        """A slot of a shape with the values that ``add`` was given; zeros for None."""
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
        # A backend may know the addresses of an array but not its dtype.
        if array is None or array.dtype != self.dtype:
            array = self.backend.to_host(slot)
        return np.asarray(array, order="C").reshape(1, -1)

    # A step

    def look(self, part: Part, arrays: Arrays, last: bool) -> None:
        """Report all arrays as odd, so that Python examines each."""
        part.look_at_all(arrays)
        self._members = {}

    def lend(self, part: Part, position: int, member: Member, copy: bool, arrays: Arrays) -> None:
        """Take a parameter with its slots."""
        member.slots = self._slots[member.row]
        if self.has_masters:
            *slots, member.master = member.slots
            member.slots = tuple(slots)
        self._members[member.row] = member

    def _members_of(self, part: Part) -> list[Member]:
        return [self._members[row] for row in part.rows.tolist()]

    def finite(self, part: Part, threads: int | None) -> np.ndarray:
        """Check the gradients on their device, with one transfer to the host for all rows."""
        return fetched(self.backend, self.layout, map(is_finite, self._members_of(part))).astype(
            bool, copy=False
        )

    @np.errstate(all="ignore")
    def squares(self, part: Part, which: np.ndarray | slice, threads: int | None) -> Sum:
        """Sum the squares on their device.

        Raises:
            TypeError: The device does not support float64.
        """
        total, layout = Sum(self.layout.compute_dtype), self.layout
        xp = self.backend.namespace(layout)
        for row in part.rows[which].tolist():
            member = self._members[row]
            member.scales = [float(self.own[row])]
            grad = _scaled(member)
            self.backend.to_host(xp.reshape(grad, (-1,))[:0])  # refuses what has no values
            what = f"the norm of the gradient of {member.name!r} is a float64, which "
            what += f"{layout.library} does not compute on the device {layout.device}"
            answer(what, total.add_values, xp, grad)
        return total

    @np.errstate(all="ignore")
    def prepare(
        self, part: Part, arrays: Arrays, leave_clipped: bool, threads: int | None
    ) -> dict[int, Array]:
        """Run the rule for each parameter; the results are new arrays."""
        members = self._members_of(part)
        self._set_numbers(members)
        sums = part.sums or {}
        updates = [
            updated(member) if k not in sums else updated_part(member, sums[k])
            for k, member in enumerate(members)
        ]
        # All arrays in one call, for libraries that compute them together.
        flat = [array for update in updates for array in update.arrays]
        converted = iter(self.backend.to_slots(flat, self.layout))
        results = [tuple(next(converted) for _ in update.arrays) for update in updates]
        params = [param for param, *_ in results]
        if not self.backend.in_place:
            params = self.backend.to_params(members, params)
        self._computed = [
            _Computed(member, param, tuple(slots), update.grad, update.limited)
            for member, param, (_, *slots), update in zip(
                members, params, results, updates, strict=True
            )
        ]
        if self.clipping:
            part.clipped = np.array([any(x != 1 for x in m.scales) for m in members], bool)
            part.limited = {
                position: update.limited
                for position, (member, update) in enumerate(zip(members, updates, strict=True))
                if member.bound is not None
            }
        if self.backend.in_place:
            return {}
        to_user = self.backend.as_complex if self.layout.is_complex else lambda array: array
        return {computed.member.place: to_user(computed.param) for computed in self._computed}

    def missing_norm(self, part: Part, position: int) -> Sum | None:
        """Run the rule until it asks for a sum that is not known."""
        member = self._members[int(part.rows[position])]
        self._set_numbers([member])
        try:
            updated_part(member, (part.sums or {}).get(position, []))
        except MissingSumError as missing:
            return missing.part
        return None

    def _set_numbers(self, members: Iterable[Member]) -> None:
        """Set what members need for an update."""
        for member in members:
            row = member.row
            # The formula is that of the group's rule: a rule with the numbers of this step might
            # select another, say if a schedule gives a momentum of zero.
            member.rule = self.rule
            numbers = self.rule_now(row)
            member.scalars = numbers.coefficients(int(self.steps[row]) + 1, self.dtype.name)
            member.scales = [float(self.own[row]), float(self.shared[row])]
            bound = float(self.bound[row])
            member.bound = None if bound == np.inf else bound

    @np.errstate(all="ignore")
    def run(self, part: Part) -> None:
        """Write the results, keep the new slots, and count the step."""
        for computed in self._computed:
            if self.backend.in_place:
                self.backend.write(computed.member.param, computed.param)
            self._slots[computed.member.row] = computed.slots
        self.steps[part.rows] += 1

    def left_over(self, part: Part) -> Iterable[tuple[Member, Array]]:
        """Return all clipped gradients; this engine writes none of them."""
        clipped = part.clipped
        if clipped is None:
            return []
        return [
            (computed.member, computed.grad)
            for computed, scaled in zip(self._computed, clipped, strict=True)
            if scaled or bool(computed.limited)
        ]

    def forget(self, part: Part) -> None:
        """Release all arrays of the step."""
        self._members, self._computed = {}, []


def fetched(backend: "Backend", layout: "Layout", values: Iterable[Array]) -> np.ndarray:
    """Bring 0-d arrays to the host as one array, in one transfer."""
    arrays = list(values)
    stack = backend.namespace(layout).stack
    return backend.to_host(stack(arrays)) if arrays else np.empty(0)


def is_finite(member: Member) -> Array:
    """Whether all elements of a gradient are finite, before clipping; a 0-d array."""
    xp = member.backend.namespace(member.layout)
    return xp.all(xp.isfinite(member.backend.to_compute(member.grad, member.layout)))


def _scaled(member: Member) -> Array:
    """The gradient, times its clip coefficients."""
    grad = member.backend.to_compute(member.grad, member.layout)
    for scale in member.scales:
        if scale != 1:
            grad = scale * grad
    return grad


def resumed(member: Member, param: Array, master: Array) -> Array:
    """The values to update: those of the master copy wherever they round to the parameter.

    Where they do not, somebody else has changed the parameter, or this is its first step, and the
    parameter itself counts.

    Args:
        member: The parameter.
        param: Its array, in the compute dtype.
        master: Its master copy, in the compute dtype.
    """
    backend, layout = member.backend, member.layout
    (rounded,) = backend.to_params([member], [master])
    same = backend.to_compute(rounded, layout) == param
    return backend.namespace(layout).where(same, master, param)


def updated(member: Member) -> Updated:
    """Clip the gradient of a parameter, and call its rule. Nothing is written.

    Raises:
        TypeError: The rule returned something that is not an update.
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
        # The bits of a matrix product depend on strides, which ``asarray`` keeps.
        param, grad = (_in_rows(xp, x) for x in (param, grad))
    slots = tuple(backend.to_compute(slot, layout) for slot in member.slots)
    try:
        new_param, new_slots = rule.update(xp, param, grad, slots, member.scalars)
    except MissingSumError:
        raise
    except Exception as error:
        error.add_note(f"while the rule updated parameter {member.name!r}")
        raise
    _check_update(member, param, new_param, new_slots)
    # A rule may return an argument as a slot, but a slot must not share memory with an array of the
    # caller's: not with what came in, nor with ``new_param`` where the caller gets that itself.
    is_returned = not backend.in_place and member.master is None
    others = (param, grad, *slots, new_param) if is_returned else (param, grad, *slots)
    kept = (*new_slots, *([] if member.master is None else [new_param]))
    arrays = [xp.asarray(x, copy=True) if _is_part(x, others) else x for x in kept]
    # NumPy computes scalars, not arrays, from 0-d arrays.
    arrays = [np.asarray(x) if isinstance(x, np.generic) else x for x in (new_param, *arrays)]
    return Updated(arrays, grad, limited)


@np.errstate(all="ignore")
def updated_part(member: Member, sums: Iterable[Sum]) -> Updated:
    """Update what is here of a parameter that lies on several ranks.

    Args:
        member: The parameter.
        sums: The sums of squares over all of it that its rule asks for.

    Raises:
        MissingSumError: The rule asks for one more.
    """
    with known_sums(sums):
        return updated(member)


def _check_update(member: Member, param: Array, new_param: Array, new_slots: Any) -> None:
    """Check the types, shapes and dtypes of what a rule returned.

    Raises:
        TypeError: It is not an update of the parameter.
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
    """Copy an array into row-major order."""
    return xp.reshape(xp.reshape(array, (-1,), copy=True), array.shape)


def _is_part(array: Array, others: tuple[Array, ...]) -> bool:
    """Whether an array is one of the others, or, in NumPy, may be a view of one."""
    if isinstance(array, np.ndarray):
        return any(np.may_share_memory(array, other) for other in others)
    return any(array is other for other in others)
