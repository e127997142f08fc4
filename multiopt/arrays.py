"""The objects of a step: its arrays, its rows by group, and the parameters that Python examines.

The names of a step are a list. Parameters and gradients are arrays of objects in the same order,
and an index into that list is a *place*. A ``Part`` is the rows of one group; an index into its
rows is a *position*. Engines read arrays and rows through addresses, so a regular step creates no
Python object for each name; only for arrays that an engine cannot use as they are does it make a
``Member``.

Whether arrays overlap in memory is found for all of a step at once, from the spans of addresses
that they take up:

>>> import numpy as np
>>> from multiopt.arrays import APART, OVERLAPPING, Arrays
>>> arrays, memory = Arrays(), np.zeros(4)
>>> def overlap(*params):
...     objects = np.fromiter(params, object, len(params))
...     arrays.take(objects, objects, own=False)
...     for place, param in enumerate(params):
...         arrays.spans[:, place] = np.lib.array_utils.byte_bounds(param)
...     return arrays.find_overlap()
>>> overlap(memory[:2], memory[2:]) == APART, overlap(memory[:3], memory[2:]) == OVERLAPPING
(True, True)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from multiopt.layout import Layout, Words, address
from multiopt.rules.rule import Rule
from multiopt.rules.sums import Sum

if TYPE_CHECKING:
    from multiopt.backend import Backend
    from multiopt.engine import Group

__all__ = [
    "APART",
    "OVERLAPPING",
    "SHARED_GRADIENTS",
    "UNKNOWN",
    "Array",
    "Arrays",
    "Member",
    "Part",
]

#: An array of any library.
Array: TypeAlias = Any

#: Whether the arrays of a step overlap in memory: none do; only gradients with each other; a
#: parameter with another array; not checked yet.
APART, SHARED_GRADIENTS, OVERLAPPING, UNKNOWN = range(4)

#: From how many names on the order of the last step is worth more than a look at it.
MANY = 500

#: The parameters and gradients between steps.
NO_ARRAYS = np.empty(0, object)


class Arrays:
    """The arrays of a step, by place in its list of names. One object serves all steps.

    Attributes:
        params: The parameters, as an array of objects.
        grads: The gradients, as an array of objects; None for a name that is left alone.
        own: Whether the gradients were read from the parameters, as torch's ``.grad``.
        spans: Where the memory of each array begins and where it ends, of shape (2, 2 * names):
            parameters first, then gradients. Zero where there is none.
        order: The order in which the spans began in the last step, if it had as many names; None
            otherwise.
        overlap: Whether arrays overlap in memory, as far as it is known.
        words: What compiled code reads: the identities of ``params`` and ``grads``, the addresses
            of the two rows of ``spans``, the number of parameters, and the address of ``order`` or
            0.
    """

    __slots__ = ("_last", "_room", "grads", "order", "overlap", "own", "params", "spans", "words")

    def __init__(self) -> None:
        """Create an empty object."""
        self.release()
        self._room = self.spans = np.zeros((2, 0), np.int64)
        self.words = Words(6)
        self.own, self.overlap = False, UNKNOWN
        self.order: np.ndarray | None = None
        #: The last order that was found, of however many spans.
        self._last = np.arange(0)

    def take(self, params: np.ndarray, grads: np.ndarray, own: bool) -> None:
        """Begin a step with these arrays; nothing about them is known yet."""
        self.params, self.grads, self.own = params, grads, own
        values, count = self.words.values, 2 * len(params)
        values[0], values[1] = id(params), id(grads)
        if count != self.spans.shape[1]:
            if count > self._room.shape[1]:
                self._room = np.zeros((2, 2 * count), np.int64)
                values[2] = start = address(self._room)
                values[3] = start + self._room.strides[0]
            self.spans = self._room[:, :count]
            values[4], values[5], self.order = len(params), 0, None
        self.spans.fill(0)
        self.overlap = UNKNOWN

    def release(self) -> None:
        """Release the arrays at the end of a step."""
        self.params = self.grads = NO_ARRAYS

    def at(self, places: np.ndarray) -> tuple[list[Array], list[Array]]:
        """The parameters and the gradients at some places, which go up."""
        both = self.params, self.grads
        if len(places) < len(self.params):
            both = self.params[places], self.grads[places]
        return both[0].tolist(), both[1].tolist()

    def sort(self) -> np.ndarray:
        """Find the order in which the spans begin, once all are filled."""
        low, order = self.spans[0], self._expected()
        begins = low if order is None else low[order]
        # Where little has changed, sorting what was expected takes a fifth of the time.
        if order is not None and np.count_nonzero(begins[1:] < begins[:-1]) <= len(low) // 16:
            order = order[np.argsort(begins, kind="stable")]
        else:
            order = np.argsort(low)
        self.order = self._last = order
        self.words.values[5] = address(order)
        return order

    def _expected(self) -> np.ndarray | None:
        """The last order, with names that are new at its end; None if there are too few to gain."""
        before, now = len(self._last) // 2, len(self.params)
        if now < MANY or before > now:
            return None
        if before == now:
            return self._last
        # Parameters come first, then gradients.
        moved = self._last + (self._last >= before) * (now - before)
        return np.concatenate([moved, np.arange(before, now), np.arange(now + before, 2 * now)])

    def find_overlap(self) -> int:
        """Find out from the spans, once all are filled, whether arrays overlap in memory."""
        low, high = self.spans
        order = self.sort()
        writes = order < len(low) // 2
        low, high = low[order], high[order]
        taken = low < high
        low, high, writes = low[taken], high[taken], writes[taken]
        # Going up through the addresses: how far the spans seen so far reach.
        reached = np.maximum.accumulate(high)[:-1]
        reached_by_writes = np.maximum.accumulate(np.where(writes, high, 0))[:-1]
        if (low[1:] < np.where(writes[1:], reached, reached_by_writes)).any():
            return OVERLAPPING
        return SHARED_GRADIENTS if (low[1:] < reached).any() else APART


@dataclass(slots=True, eq=False)
class Part:
    """The rows of one group that a step is about.

    Attributes:
        group: The group.
        rows: The rows.
        places: The place of each row in the list of names of the step.
        at: The addresses of ``rows`` and ``places``.
        fresh: The places of new names, those of other parts included; None if there are none.
        odd: After ``look``, the positions whose arrays the engine cannot use as they are.
        owned: After ``look``, whether all arrays are known to own their memory, so that two of them
            overlap only if they are the same object.
        params: The parameters, for engines that keep them in a list.
        grads: The gradients, for engines that keep them in a list.
        norms: After ``clip_by_norm``, the norm of each gradient; -1 where it has no bound.
        clipped: After ``run``, whether each gradient was clipped, as far as the host knows; None if
            no row has a clip.
        sums: By position, the sums of squares that a rule asks for, in order, over a parameter of
            which only a part is here; None if there are none.
        limited: By position, whether the bound on elements clipped a gradient, as a value that may
            still be on its device; None if there are no such values.
    """

    group: "Group"
    rows: np.ndarray
    places: np.ndarray
    at: tuple[int, int]
    fresh: np.ndarray | None = None
    odd: Sequence[int] = ()
    owned: bool = False
    params: Any = ()
    grads: Any = ()
    norms: np.ndarray | None = None
    clipped: np.ndarray | None = None
    sums: dict[int, list[Sum]] | None = None
    limited: Mapping[int, Any] | None = None

    def take(self, rows: np.ndarray, places: np.ndarray) -> None:
        """Set the rows and their places."""
        self.rows, self.places, self.at = rows, places, (address(rows), address(places))

    def keep(self, which: np.ndarray) -> None:
        """Drop the rows that are False in ``which``."""
        self.take(self.rows[which], self.places[which])
        if self.params:
            self.params = list(compress(self.params, which))
            self.grads = list(compress(self.grads, which))

    def look_at_all(self, arrays: Arrays) -> None:
        """Drop the rows without a gradient, and have Python examine all others."""
        _, grads = arrays.at(self.places)
        has = [grad is not None for grad in grads]
        if not all(has):
            self.keep(np.array(has))
        self.odd = range(len(self.rows))


@dataclass(slots=True)
class Member:
    """One parameter of a step that Python has examined.

    The fields after ``layout`` are for engines that run the update from Python.

    Attributes:
        name: Its name.
        place: Its place in the list of names.
        row: Its row.
        backend: The backend of its library.
        param: Its array; for a complex one the array of real and imaginary parts.
        grad: Its gradient, in the same form. It must not be changed.
        layout: Its layout.
        slots: Its slots.
        master: The master copy of a 16-bit parameter, if there is one.
        rule: The rule that updates it.
        scalars: The coefficients of this step, rounded to the compute dtype.
        scales: Factors of the gradient from clipping by norms, rounded to the compute dtype and
            applied one after the other.
        bound: The bound of each element of the scaled gradient, rounded to the compute dtype, or
            None.
    """

    name: str
    place: int
    row: int
    backend: "Backend"
    param: Array
    grad: Array
    layout: Layout
    slots: tuple[Array, ...] = ()
    master: Array | None = None
    rule: Rule | None = None
    scalars: Any = None
    scales: list[float] = field(default_factory=list)
    bound: float | None = None
