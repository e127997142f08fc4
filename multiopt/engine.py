"""Groups: all parameters that one engine updates together, as a table with one row per parameter.

A group lives as long as its parameters do. It adds their slots to the columns of
``multiopt.columns``. A step is about some of its rows, in any order, and makes the same five calls
whichever they are:

    look      find the arrays of the rows, and report those that the engine cannot use as they are
    lend      accept what Python provides in place of such an array
    measure   check that gradients are finite, and sum their squares (``finite``, ``squares``)
    prepare   do everything else that can fail
    run       clip and update; this cannot fail

A new engine is a subclass; ``docs/backends.md`` shows one.

>>> import numpy as np
>>> from multiopt.backend import backend_named
>>> from multiopt.layout import Layout
>>> from multiopt.rules import SGD
>>> rule, layout = SGD(lr=0.5, momentum=0.9), Layout("numpy", (), "float32", "cpu")
>>> group = backend_named("numpy").group(rule, layout)
>>> rows = group.add([(3,), (2, 2)])
>>> group.set_rules(rows, rule)
>>> [group.rule_at(row).lr for row in rows]
[0.5, 0.5]
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, TypeAlias

import numpy as np

from multiopt.arrays import Array, Arrays, Member, Part
from multiopt.columns import Columns
from multiopt.layout import Layout
from multiopt.rules.arithmetic import Host, clip_coefficient
from multiopt.rules.rule import Rule
from multiopt.rules.sums import Sum

if TYPE_CHECKING:
    from multiopt.backend import Backend

__all__ = ["MASTER", "Group", "Slots"]

#: The slot of the master copy: the float32 values that a 16-bit parameter is rounded from. It
#: belongs to no rule.
MASTER = "master_param"

#: The slots of several parameters, each in the order of ``slot_names``; None for a slot of zeros.
Slots: TypeAlias = Sequence[Sequence[Array | None]]


class Group(Columns, ABC):
    """Parameters that one engine updates together, one per row.

    Args:
        backend: The backend of their library.
        layout: A layout of theirs; its shape does not matter.
        rule: A rule of their kind; the values of its numbers do not matter.
        has_masters: Whether they have master copies.
    """

    #: Whether ``look`` fills the spans of all arrays that the engine uses as they are.
    fills_spans: ClassVar = False

    def __init__(
        self, backend: "Backend", layout: Layout, rule: Rule, has_masters: bool = False
    ) -> None:
        """Create a group without rows."""
        self.backend, self.layout = backend, layout.with_shape(())
        self.has_masters = has_masters
        #: The number of the group in its ``Table``.
        self.number = 0
        super().__init__(rule, np.dtype(layout.compute_dtype))

    # Rows

    def add(self, shapes: Sequence[tuple[int, ...]], slots: Slots | None = None) -> np.ndarray:
        """Add rows for new parameters, with a clock of zero.

        Args:
            shapes: Their storage shapes.
            slots: Their first slots, which the group takes over: arrays of the library, or NumPy
                arrays, which are converted to the shape and dtype of the slot. None for zeros.

        Returns:
            The rows, as int64.

        Raises:
            ValueError: The rule does not support one of the shapes.
            MemoryError: There is not enough memory.
        """
        rows = self._begin(len(shapes))
        self._make_slots(rows, shapes, slots)
        # Nothing below can fail.
        self._keep(rows, shapes)
        return rows

    def remove(self, row: int) -> None:
        """Free a row; another parameter may take it."""
        self._drop_slots(row)
        self._let_go(row)

    def layout_at(self, row: int) -> Layout:
        """The layout of the parameter in a row."""
        return self.layout.with_shape(self.shapes[row])

    # Slots

    @abstractmethod
    def _make_slots(
        self,
        rows: np.ndarray,
        shapes: Sequence[tuple[int, ...]],
        slots: Slots | None,
    ) -> None:
        """Make the slots of new rows from what ``add`` was given."""

    @abstractmethod
    def _drop_slots(self, row: int) -> None:
        """Free the slots of a row. This cannot fail."""

    @abstractmethod
    def slots_at(self, row: int) -> dict[str, Array]:
        """The slots of a row by name, master copy included: the engine's own arrays, not copies."""

    @abstractmethod
    def slots_on_host(self, rows: np.ndarray, number: int) -> Iterator[np.ndarray]:
        """Read one slot of some rows on the host, without a copy where that is possible.

        Args:
            rows: Rows whose slots have equally many elements.
            number: The position of the slot in ``slot_names``.

        Yields:
            Arrays of shape (rows, elements) with the slots of one or more rows, in their order.
        """

    def slot_names(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        """The names of the slots of a parameter of this shape, in their order."""
        own = tuple(self.rule.slot_shapes(shape))
        return (*own, MASTER) if self.has_masters else own

    # A step

    @abstractmethod
    def look(self, part: Part, arrays: Arrays, last: bool) -> None:
        """Find the arrays of a part. Nothing is changed yet.

        Rows without a gradient are dropped from the part. The positions of rows whose arrays the
        engine cannot use as they are go into ``part.odd``; the spans of the other arrays go into
        ``arrays.spans``.

        Args:
            part: The part.
            arrays: The arrays of the step.
            last: Whether all other spans are filled, so that ``arrays.overlap`` may be set.
        """

    def locate(self, part: Part, arrays: Arrays) -> None:
        """Fill the spans of arrays used as they are, if ``look`` left that out (``part.owned``)."""

    def overlap(self, arrays: Arrays) -> int:
        """Return whether memory that the step writes overlaps any other.

        Args:
            arrays: The arrays of the step, after every group has filled in its spans.

        Returns:
            ``APART``, ``SHARED_GRADIENTS`` or ``OVERLAPPING`` of ``multiopt.arrays``.
        """
        return arrays.find_overlap()

    @abstractmethod
    def lend(self, part: Part, position: int, member: Member, copy: bool, arrays: Arrays) -> None:
        """Accept a parameter that Python has examined, for this step.

        Args:
            part: The part.
            position: Its position in ``part.rows``.
            member: The parameter.
            copy: Whether the gradient must be copied because its memory is written.
            arrays: The arrays of the step, to fill in the spans of arrays that are used as they
                are.
        """

    @abstractmethod
    def finite(self, part: Part, threads: int | None) -> np.ndarray:
        """Return for each row of a part whether its gradient is finite."""

    @abstractmethod
    def squares(self, part: Part, which: np.ndarray | slice, threads: int | None) -> Sum:
        """The exact sum of the squares of gradients that ``own`` has multiplied.

        Args:
            part: The part.
            which: Positions in ``part.rows``; a slice for all.
            threads: The largest number of threads, or None.
        """

    def norms(self, part: Part, which: np.ndarray, threads: int | None) -> list[float]:
        """The norms of gradients of which ``own`` is 1; the arguments are as for ``squares``."""
        places = range(len(which))
        return [self.squares(part, which[k : k + 1], threads).norm() for k in places]

    def clip_by_norm(self, part: Part, threads: int | None) -> None:
        """Fill the columns ``norm`` and ``own`` of the rows whose clip bounds their own norm."""
        is_bounded = self.is_bounded(part.rows)
        which = np.flatnonzero(is_bounded)
        self.own[part.rows[which]] = 1.0
        self.bound_norms(part, which, self.norms(part, which, threads))

    def is_bounded(self, rows: np.ndarray) -> np.ndarray:
        """Whether the clips of rows bound their own norm."""
        bounded: np.ndarray = ~np.isnan(self.norm_bound[rows])
        return bounded

    @np.errstate(all="ignore")
    def bound_norms(self, part: Part, which: np.ndarray, norms: Sequence[float]) -> None:
        """Fill ``norm`` and ``own`` of rows whose norms are known.

        Args:
            part: The part.
            which: The positions of the rows whose clip bounds their own norm.
            norms: Their norms.
        """
        rows = part.rows[which]
        self.norm[rows] = norms
        limits = zip(self.norm_bound[rows].tolist(), norms, self.eps[rows].tolist(), strict=True)
        self.own[rows] = np.array([clip_coefficient(Host, *x) for x in limits], self.dtype)
        part.norms = self.norm[part.rows]

    def missing_norm(self, part: Part, position: int) -> Sum | None:
        """The sum of squares that a rule asks for next, over what is here of a parameter.

        Args:
            part: The part. Its ``sums`` have the sums over the whole parameter that are known.
            position: A position in ``part.rows``.

        Returns:
            The sum; None if the rule asks for no more.
        """
        raise NotImplementedError(f"{type(self).__name__} does not update parts of parameters")

    @abstractmethod
    def prepare(
        self, part: Part, arrays: Arrays, leave_clipped: bool, threads: int | None
    ) -> dict[int, Array]:
        """Do everything that can fail, such as allocating memory, so that ``run`` cannot.

        Args:
            part: The part.
            arrays: The arrays of the step.
            leave_clipped: Whether to overwrite the gradients with the clipped ones.
            threads: The largest number of threads, or None.

        Returns:
            By place, the new arrays of parameters that cannot be updated in place.
        """

    @abstractmethod
    def run(self, part: Part) -> None:
        """Clip and update what was prepared, and count the step. This cannot fail."""

    def left_over(self, part: Part) -> Iterable[tuple[Member, Array]]:
        """The clipped gradients that could not be written over the gradients."""
        return ()

    @abstractmethod
    def forget(self, part: Part) -> None:
        """Release all arrays of a step, completed or not."""
