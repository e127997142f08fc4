"""Groups whose slots are in the host's memory: what compiled kernels and blocks have in common.

``HostGroup`` does two things for them. It keeps slots in chunks, so that the slots of small
parameters lie side by side. And it replaces an array that an engine cannot use as it is, such as
one with gaps or one of a library without addressable memory, by a copy for one step: a loan. So the
engines only see contiguous memory in the dtype that they expect. Each engine is a subclass that
finds arrays (``look``) and updates them (``_prepare``, ``_run``).

Slots lie in C order, or in the memory order of their parameter (``orders``). If an engine
``follows`` orders, a parameter in another order than its slots is lent copies of them in its own
order, and keeps these when the step has been taken. If an engine ``walks``, a loan is the memory of
the user's arrays, whatever their strides, wherever it can be reached and written.

The slots of these two parameters lie in chunk 0, one after the other:

>>> from multiopt.backend import backend_named
>>> from multiopt.layout import Layout
>>> from multiopt.rules import SGD
>>> class Engine(HostGroup):
...     _prepare = _run = None  # this engine takes no steps
>>> layout = Layout("numpy", (), "float32", "cpu")
>>> group = Engine(backend_named("numpy"), layout, SGD(momentum=0.9))
>>> rows = group.add([(3,), (2, 2)])
>>> group.chunk[rows].tolist(), group.offset[rows].tolist()
([0, 0], [0, 3])
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from multiopt.arrays import Array, Arrays, Member, Part
from multiopt.reference import resumed
from multiopt.rules.sums import Sum
from multiopt_kernels.chunks import ChunkedGroup
from multiopt_kernels.orders import (
    is_apart,
    memory_order,
    order_of_strides,
    turned,
    turned_back,
)

if TYPE_CHECKING:
    from multiopt.backend import Backend
    from multiopt.layout import Layout
    from multiopt.rules import Rule

__all__ = ["CHUNK", "HostGroup", "Loan"]

#: How many elements are measured or clipped at a time.
CHUNK = 2**15

#: What ``prepare`` returns when all parameters are updated in place.
NONE_REPLACED: dict[int, Array] = {}


@dataclass(slots=True)
class Loan:
    """What an engine works on for one parameter, in place of the user's arrays.

    Attributes:
        member: The parameter.
        axes: The memory order of the arrays below, whose axes are in this order.
        param: The parameter's own memory, or a copy.
        grad: The gradient's own memory, or a copy.
        slots: Copies of the slots if the step may still fail after it has updated them, or if they
            are in another order; else None.
        in_place: Whether ``param`` is the parameter's own memory.
        grad_is_copy: Whether ``grad`` is a copy.
        strided: Whether ``param`` and ``grad`` are the user's own memory, in any order and with
            gaps. Otherwise they are contiguous.
        ready: The array from which the result is written to the parameter. It shares memory with
            ``param``.
    """

    member: Member
    axes: tuple[int, ...]
    param: np.ndarray
    grad: np.ndarray
    slots: tuple[np.ndarray, ...] | None
    in_place: bool
    grad_is_copy: bool
    strided: bool = False
    ready: Array = None


class HostGroup(ChunkedGroup):
    """A group whose slots are in the host's memory, and which lends copies of odd arrays."""

    #: Whether the engine takes arrays in any memory order, if it is that of the slots too.
    follows: bool = False

    #: Whether the engine takes parameters and gradients with any strides, in their own dtype.
    walks = False

    def __init__(
        self, backend: "Backend", layout: "Layout", rule: "Rule", has_masters: bool = False
    ) -> None:
        """Create a group without rows."""
        self._loans: dict[int, Loan] = {}
        self._clipped_grads: np.ndarray | None = None
        super().__init__(backend, layout, rule, has_masters)

    # A step

    def _slots_in_use(self, row: int) -> tuple[np.ndarray, ...]:
        """The slots of the rule that a step updates: those of the row, or lent copies of them."""
        loan = self._loans.get(row)
        slots = self._memory(row) if loan is None or loan.slots is None else loan.slots
        return slots[: len(self.rule.slots)]

    def look(self, part: Part, arrays: Arrays, last: bool) -> None:
        """Have Python examine all arrays."""
        part.params, part.grads = arrays.at(part.places)
        part.look_at_all(arrays)

    def lend(self, part: Part, position: int, member: Member, copy: bool, arrays: Arrays) -> None:
        """Use the memory of a parameter and its gradient, or copies of what cannot be used."""
        row = int(part.rows[position])
        views = self._views(row)
        member.slots = views[:-1] if self.has_masters else views
        loan = None if copy else self._strided(member, views)
        if loan is None:
            loan = self._copied(member, copy, views)
        self._loans[row] = loan
        bounds = (0, 0) if loan.grad_is_copy else _bounds(loan.grad)
        arrays.spans[:, len(arrays.params) + member.place] = bounds
        self._take(part, position, loan)

    def _strided(self, member: Member, views: Sequence[np.ndarray]) -> Loan | None:
        """A loan of the arrays as they lie in memory, if the engine walks through them."""
        if not (self.walks and self.backend.in_place):
            return None
        param, grad = (self._as_it_lies(member, x) for x in (member.param, member.grad))
        if param is None or grad is None or not param.flags.writeable:
            return None
        # The slots lie in the order of the parameter, which is written too.
        axes = order_of_strides(param)
        slots = None
        if axes != self.axes_at(member.row):
            slots = tuple(turned(slot, axes) for slot in views)
        arrays = param.transpose(axes), grad.transpose(axes)
        return Loan(member, axes, *arrays, slots, in_place=True, grad_is_copy=False, strided=True)

    def _as_it_lies(self, member: Member, array: Array) -> np.ndarray | None:
        """The array's own memory, with any strides; None if it does not hold its values."""
        memory, name = member.backend.memory(array), self.layout.storage_dtype
        # The conjugates of a complex tensor do not come as parts.
        if memory is None or memory.shape != self.shapes[member.row] or not memory.flags.aligned:
            return None
        dtype = memory.dtype
        if name == self.dtype.name:
            return memory if dtype == self.dtype else None
        if name == "bfloat16" and dtype == np.int16:
            return memory
        return memory if dtype.name == name and dtype.isnative else None

    def _copied(self, member: Member, copy: bool, views: Sequence[np.ndarray]) -> Loan:
        """A loan of contiguous arrays, which are copies where they must be."""
        axes = self._axes_for(member)
        param = None if self.has_masters else self._own(member, member.param, axes)
        in_place = self.backend.in_place and param is not None and param.flags.writeable
        if param is None or not in_place:
            param = member.backend.to_compute(member.param, member.layout)
            if self.has_masters:
                param = resumed(member, param, views[-1])
            param = turned(param, axes)
        grad = None if copy else self._own(member, member.grad, axes)
        grad_is_copy = grad is None
        if grad is None:
            grad = turned(member.backend.to_compute(member.grad, member.layout), axes)
        copies = None
        if not self.backend.in_place or axes != self.axes_at(member.row):
            copies = tuple(turned(slot, axes) for slot in member.slots)
        return Loan(member, axes, param, grad, copies, in_place, grad_is_copy)

    def _axes_for(self, member: Member) -> tuple[int, ...]:
        """The memory order for a loan: that of the parameter if it is dense, else of its slots."""
        memory = member.backend.memory(member.param) if self.follows else None
        # The conjugates of a complex tensor do not come as parts.
        if memory is None or memory.shape != self.shapes[member.row] or not self.backend.in_place:
            return self.axes_at(member.row)
        axes = memory_order(memory)
        return self.axes_at(member.row) if axes is None else axes

    def _own(self, member: Member, array: Array, axes: tuple[int, ...]) -> np.ndarray | None:
        """The array's own memory if an engine can use it as it is, else None."""
        memory = member.backend.memory(array)
        if memory is None or memory.dtype != self.dtype:
            return None
        memory = memory.transpose(axes)
        return memory if memory.flags.c_contiguous and memory.flags.aligned else None

    def _take(self, part: Part, position: int, loan: Loan) -> None:
        """Have the engine work on a loan."""
        part.params[position], part.grads[position] = loan.param, loan.grad

    def finite(self, part: Part, threads: int | None) -> np.ndarray:
        """Check each gradient, ``CHUNK`` elements at a time."""
        return np.array([all(np.isfinite(x).all() for x in _blocks(g)) for g in part.grads], bool)

    @np.errstate(all="ignore")
    def squares(self, part: Part, which: np.ndarray | slice, threads: int | None) -> Sum:
        """Sum the squares of small gradients together, of large ones ``CHUNK`` at a time."""
        total, rows = Sum(self.layout.compute_dtype), part.rows[which]
        grads = part.grads if isinstance(which, slice) else [part.grads[k] for k in which.tolist()]
        if grads and not self.large:
            flat = np.concatenate(grads, axis=None)
            if self.bounded:  # otherwise all factors are 1
                flat *= np.repeat(self.own[rows].astype(self.dtype), self.size[rows])
            total.add_values(np, flat)
            return total
        for grad, scale in zip(grads, self.own[rows].tolist(), strict=True):
            for x in _blocks(grad):
                total.add_values(np, x if scale == 1 else scale * x)
        return total

    @abstractmethod
    def _prepare(self, part: Part, leave_clipped: bool, threads: int | None) -> None:
        """Do everything that can fail, so that ``_run`` cannot."""

    @abstractmethod
    def _run(self, part: Part) -> None:
        """Clip and update, and count the step if parameters are updated in place. Cannot fail."""

    def prepare(
        self, part: Part, arrays: Arrays, leave_clipped: bool, threads: int | None
    ) -> dict[int, Array]:
        """Do everything that can fail.

        If the library cannot write to its arrays, the update itself is computed here, on copies.
        """
        if self._loans:
            kept = set(part.rows.tolist())
            self._loans = {row: loan for row, loan in self._loans.items() if row in kept}
            if leave_clipped and self.clipping:
                self._lend_overlapping(part, arrays)
        self._prepare(part, leave_clipped, threads)
        if leave_clipped and self.clipping:
            self._clipped_grads = arrays.grads
        if not self.backend.in_place:
            return self._replaced(part)
        copied = self._made_ready() if self._loans else ()
        self._touch(arrays.params, part.places, copied)
        return NONE_REPLACED

    def _lend_overlapping(self, part: Part, arrays: Arrays) -> None:
        """Lend copies of gradients that cannot be written, since elements may share a place."""
        for position, row in enumerate(part.rows.tolist()):
            loan = self._loans.get(row)
            if loan is not None and loan.strided and not is_apart(loan.grad):
                self.lend(part, position, loan.member, copy=True, arrays=arrays)

    def _made_ready(self) -> list[int]:
        """Set ``ready`` in the loans whose result is written back; return their places."""
        copied = [loan for loan in self._loans.values() if not loan.in_place]
        params = [turned_back(loan.param, loan.axes) for loan in copied]
        ready = self.backend.to_slots(params, self.layout)
        for loan, array in zip(copied, ready, strict=True):
            loan.ready = array
        return [loan.member.place for loan in copied]

    @np.errstate(all="ignore")
    def _replaced(self, part: Part) -> dict[int, Array]:
        """Compute the new arrays of parameters that cannot be written, by place."""
        # This updates only copies, so the step may still fail when the new arrays are made.
        self._run(part)
        members = [loan.member for loan in self._loans.values()]
        new = self.backend.to_params(members, [loan.param for loan in self._loans.values()])
        whole = self.backend.as_complex if self.layout.is_complex else lambda array: array
        return {member.place: whole(array) for member, array in zip(members, new, strict=True)}

    def _touch(self, arrays: np.ndarray, places: np.ndarray, copied: Sequence[int]) -> None:
        """Tell the library that the arrays at some places are written, except at ``copied``."""
        if copied:
            # ``np.setdiff1d`` would take 40 us for ten places.
            left = set(copied)
            places = np.array([k for k in places.tolist() if k not in left], np.intp)
        self.backend.touch(arrays if len(places) == len(arrays) else arrays[places])

    def run(self, part: Part) -> None:
        """Run the engine, write the results of loans back, and count the step."""
        if self.backend.in_place:
            self._run(part)
            if self._clipped_grads is not None and part.clipped is not None and part.clipped.any():
                copied = [one.member.place for one in self._loans.values() if one.grad_is_copy]
                self._touch(self._clipped_grads, part.places[part.clipped], copied)
        else:
            self.steps[part.rows] += 1
        if self._loans:
            self._return_loans()

    @np.errstate(all="ignore")
    def _return_loans(self) -> None:
        """Write the results that were computed in copies to the slots and parameters."""
        for row, loan in self._loans.items():
            new = list(loan.slots or ())
            if self.has_masters and not loan.strided:
                new.append(loan.param)
            if loan.in_place and loan.slots is None and not new:
                continue  # all of it is the row's own memory
            if loan.axes != self.axes_at(row):
                self._turn(row, loan.axes, new)
            else:
                own = self._memory(row)
                for slot, values in zip(own[len(own) - len(new) :], new, strict=True):
                    slot[...] = values
            if self.backend.in_place and not loan.in_place:
                self.backend.write(loan.member.param, loan.ready)

    def left_over(self, part: Part) -> Iterable[tuple[Member, Array]]:
        """Return the clipped gradients that are in lent copies."""
        if part.clipped is None or not self._loans:
            return []
        clipped = set(part.rows[part.clipped].tolist())
        return [
            (loan.member, turned_back(loan.grad, loan.axes))
            for row, loan in self._loans.items()
            if loan.grad_is_copy and row in clipped
        ]

    def forget(self, part: Part) -> None:
        """Release the loans of the step."""
        self._clipped_grads, part.params, part.grads = None, (), ()
        self._take_back()
        self._loans = {}

    def _take_back(self) -> None:
        """Have the engine work on the group's own memory again, not on loans."""


def _blocks(array: np.ndarray) -> Iterable[np.ndarray]:
    """An array of any shape, as one-dimensional pieces of ``CHUNK`` elements."""
    flat = array.reshape(-1)
    return (flat[low : low + CHUNK] for low in range(0, len(flat), CHUNK))


def _bounds(array: np.ndarray) -> tuple[int, int]:
    low, high = np.lib.array_utils.byte_bounds(array)
    return (low, high) if array.size else (0, 0)
