"""The arrays of a step, and the rows that it is about."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from multiopt.layout import Layout, Words, address
from multiopt.rules.rule import Rule

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

#: Whether memory overlaps that a step writes: with nothing; only gradients with each other; a
#: parameter with something; nobody has looked.
APART, SHARED_GRADIENTS, OVERLAPPING, UNKNOWN = range(4)

#: What is held where nothing is.
NO_ARRAYS = np.empty(0, object)


class Arrays:
    """The arrays of a step, by place in its list of names. One object serves all steps.

    Attributes:
        params: The parameters, an array of objects.
        grads: The gradients, likewise; None for a name that is to be left alone.
        own: Whether the gradients are the parameters' own, as torch's ``.grad``.
        spans: Where memory that is written or read begins, and where it ends: of parameters first,
            then of gradients. Zero where there is none.
        order: The order of the beginnings at the last step, of as many; None before the first.
        overlap: Whether memory that is written overlaps with any other, as far as it is known.
        words: What compiled code is told: the identities of ``params`` and ``grads``, the addresses
            of the beginnings and of the ends, how many parameters there are, the address of
            ``order`` or 0.
    """

    __slots__ = ("_room", "grads", "order", "overlap", "own", "params", "spans", "words")

    def __init__(self) -> None:
        """Hold none."""
        self.release()
        self._room = self.spans = np.zeros((2, 0), np.int64)
        self.words = Words(6)
        self.own, self.overlap = False, UNKNOWN
        self.order: np.ndarray | None = None

    def take(self, params: np.ndarray, grads: np.ndarray, own: bool) -> None:
        """Hold those of a step, of which nothing is looked at yet."""
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
        """Hold none any more."""
        self.params = self.grads = NO_ARRAYS

    def set_order(self, order: np.ndarray) -> None:
        """Remember the order of the beginnings."""
        self.order, self.words.values[5] = order, address(order)

    def find_overlap(self) -> int:
        """Whether memory that is written overlaps with any other, once all spans are filled."""
        low, high = self.spans
        order = self.order
        if order is None or (np.diff(low[order]) < 0).any():
            order = np.argsort(low)
            self.set_order(order)
        writes = order < len(low) // 2
        low, high = low[order], high[order]
        taken = low < high
        low, high, writes = low[taken], high[taken], writes[taken]
        # How far the memory reaches that was met before, going up through the addresses.
        reached = np.maximum.accumulate(high)[:-1]
        reached_by_writes = np.maximum.accumulate(np.where(writes, high, 0))[:-1]
        if (low[1:] < np.where(writes[1:], reached, reached_by_writes)).any():
            return OVERLAPPING
        return SHARED_GRADIENTS if (low[1:] < reached).any() else APART


@dataclass(slots=True, eq=False)
class Part:
    """The rows of a group that a step is about.

    Attributes:
        group: The group.
        rows: The rows.
        places: The place of each in the list of names of the step.
        at: The addresses of the two.
        fresh: The places of names that are new, also of other parts; None if none is.
        odd: After ``look``, the positions in ``rows`` that need to be lent something.
        owned: After ``look``, whether all arrays are known to own their memory, so that two of them
            overlap only if they are one object.
        params: The parameters, for engines that keep a list.
        grads: The gradients, likewise.
        norms: After ``clip_by_norm``, by position the norm of the gradient; -1 for no bound.
        clipped: After ``run``, for each row whether its gradient was clipped, as far as the host
            knows; None for no clips.
        limited: By position, the same as a value on a device, of which only that knows; None for
            no such values.
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
    limited: Mapping[int, Any] | None = None

    def take(self, rows: np.ndarray, places: np.ndarray) -> None:
        """Be about these rows, at these places."""
        self.rows, self.places, self.at = rows, places, (address(rows), address(places))

    def keep(self, which: np.ndarray) -> None:
        """Leave out the rows that are not marked."""
        self.take(self.rows[which], self.places[which])
        if self.params:
            self.params = list(compress(self.params, which))
            self.grads = list(compress(self.grads, which))

    def look_at_all(self, arrays: Arrays) -> None:
        """Leave out the rows that have no gradient, and let Python look at all others."""
        has = np.array([grad is not None for grad in arrays.grads[self.places]], bool)
        if not has.all():
            self.keep(has)
        self.odd = range(len(self.rows))


@dataclass(slots=True)
class Member:
    """One parameter of a step, as Python has looked at it.

    Attributes:
        name: Its name.
        place: Its place in the list of names.
        row: Its row.
        backend: The backend of its library.
        param: Its array, or the parts of a complex one.
        grad: Its gradient, likewise, which nothing may change.
        layout: Its layout.
        slots: Its slots, where the engine is the rule as it stands.
        master: What a 16-bit parameter was rounded from, if that is kept.
        rule: The rule, with the numbers of this step.
        scalars: The coefficients of this step, rounded to the compute dtype.
        scales: Clip coefficients, rounded likewise, applied one after the other.
        bound: Bound of each element of the scaled gradient, rounded likewise, or None.
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
