"""What computes: a group is all parameters that one engine updates, a table with a row for each.

A group lives as long as its parameters do: their slots beside the columns of ``multiopt.columns``.
A step names some rows, in any order, and makes five calls, whatever the rows are:

    look      where their arrays are now, and which are not what the engine takes as they are
    lend      for each of those: what it is to take instead
    measure   whether gradients are finite, and their sums of squares (``finite``, ``squares``)
    prepare   everything that may fail
    run       clip and update; nothing fails any more

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
from multiopt.rules.arithmetic import clip_coefficient, norms
from multiopt.rules.rule import Rule

if TYPE_CHECKING:
    from multiopt.backend import Backend

__all__ = ["MASTER", "Group", "Slots"]

#: The slot that does not belong to a rule: what a 16-bit parameter is rounded from, in float32.
MASTER = "master_param"

#: For each of several parameters its slots, in their order; None for one of zeros.
Slots: TypeAlias = Sequence[Sequence[Array | None]]


class Group(Columns, ABC):
    """Parameters that one engine updates, a row of columns for each.

    Args:
        backend: That of their library.
        layout: What their layouts have in common; the shape counts for nothing.
        rule: A rule of their kind: the numbers among the hyperparameters count for nothing.
        has_masters: Whether each has a master copy.
    """

    #: Whether ``look`` itself fills the spans of all arrays that it takes as they are.
    fills_spans: ClassVar = False

    def __init__(
        self, backend: "Backend", layout: Layout, rule: Rule, has_masters: bool = False
    ) -> None:
        """Create a group without rows."""
        self.backend, self.layout = backend, layout.with_shape(())
        self.has_masters = has_masters
        #: What the owner of the group knows it by.
        self.number = 0
        super().__init__(rule, np.dtype(layout.compute_dtype))

    # Rows

    def add(self, shapes: Sequence[tuple[int, ...]], slots: Slots | None = None) -> np.ndarray:
        """Add rows for new parameters, with a clock of zero.

        Args:
            shapes: Their shapes, parts of complex ones included.
            slots: What to begin with, to take possession of: arrays of the library; or of NumPy,
                whose shape and dtype are changed. None for zeros.

        Raises:
            ValueError: The rule is not for parameters of a shape.
            MemoryError: There is not enough memory.
        """
        rows = self._begin(len(shapes))
        self._make_slots(rows, shapes, slots)
        # From here on nothing fails.
        self._keep(rows, shapes)
        return rows

    def remove(self, row: int) -> None:
        """Free a row; another parameter may take it."""
        self._drop_slots(row)
        self._let_go(row)

    def layout_at(self, row: int) -> Layout:
        """The layout of a parameter."""
        return self.layout.with_shape(self.shapes[row])

    # Slots

    @abstractmethod
    def _make_slots(
        self,
        rows: np.ndarray,
        shapes: Sequence[tuple[int, ...]],
        slots: Slots | None,
    ) -> None:
        """Make room for the slots of new rows, and fill it with what ``add`` was given."""

    @abstractmethod
    def _drop_slots(self, row: int) -> None:
        """Free the slots of a row. This cannot fail."""

    @abstractmethod
    def slots_at(self, row: int) -> dict[str, Array]:
        """The slots of a row by name, master copy included, as the engine has them."""

    @abstractmethod
    def slots_on_host(self, rows: np.ndarray, number: int) -> Iterator[np.ndarray]:
        """A slot of some rows of one size, by its number, over their memory where that is possible.

        Yields:
            Arrays of two axes, with the slots of one or more rows, in their order.
        """

    def slot_names(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        """The names of the slots of a parameter of this shape, in their order."""
        own = tuple(self.rule.slot_shapes(shape))
        return (*own, MASTER) if self.has_masters else own

    # A step

    @abstractmethod
    def look(self, part: Part, arrays: Arrays, last: bool) -> None:
        """Find the arrays of a part as they are now; nothing is changed yet.

        It leaves those without a gradient out of the part, and says in ``part.odd`` which are not
        what the engine takes as they are. For the others it fills ``arrays.spans``.

        Args:
            part: The part.
            arrays: The arrays of the step.
            last: Whether all other spans are filled, so that ``arrays.overlap`` may be told.
        """

    def locate(self, part: Part, arrays: Arrays) -> None:
        """Fill the spans of arrays used as they are, if ``look`` left that out (``part.owned``)."""

    def overlap(self, arrays: Arrays) -> int:
        """Return whether memory that the step writes overlaps any other.

        Args:
            arrays: Those of the step, their spans filled by the groups of all its parts.
        """
        return arrays.find_overlap()

    @abstractmethod
    def lend(self, part: Part, position: int, member: Member, copy: bool, arrays: Arrays) -> None:
        """Take a parameter that Python has looked at, this step only.

        Args:
            part: The part.
            position: Its position in ``part.rows``.
            member: The parameter.
            copy: Whether the gradient's own memory may not be read, since something writes there.
            arrays: The arrays of the step, to fill in the spans of what is used as it is.
        """

    @abstractmethod
    def finite(self, part: Part, threads: int | None) -> np.ndarray:
        """Return for each row of a part whether its gradient is finite."""

    @abstractmethod
    def squares(
        self, part: Part, which: np.ndarray | slice, factor: float, threads: int | None
    ) -> np.ndarray:
        """Sums of squares of gradients, in memory that the next call may write.

        Args:
            part: The part.
            which: Positions in ``part.rows``; a slice for all.
            factor: What gradients are multiplied by, in float64; first they are by ``own``, in the
                compute dtype.
            threads: The largest number of threads, or None.
        """

    @np.errstate(all="ignore")
    def clip_by_norm(self, part: Part, threads: int | None) -> None:
        """Measure the gradients that have a bound of their norm: fill ``norm`` and ``own``."""
        which = np.flatnonzero(~np.isnan(self.norm_bound[part.rows]))
        rows = part.rows[which]
        self.own[rows] = 1.0

        def squares(some: np.ndarray, factor: float) -> np.ndarray:
            return self.squares(part, which[some], factor, threads)

        self.norm[rows] = norms(len(rows), squares)
        found = clip_coefficient(np, self.norm_bound[rows], self.norm[rows], self.eps[rows])
        self.own[rows] = found.astype(self.dtype)
        part.norms = self.norm[part.rows]

    @abstractmethod
    def prepare(
        self, part: Part, arrays: Arrays, leave_clipped: bool, threads: int | None
    ) -> dict[int, Array]:
        """Make all that may fail of a step, the memory that it needs included.

        Args:
            part: The part.
            arrays: The arrays of the step.
            leave_clipped: Whether to write clipped gradients over the gradients.
            threads: The largest number of threads, or None.

        Returns:
            By place, the arrays that take the place of parameters that cannot be written.
        """

    @abstractmethod
    def run(self, part: Part) -> None:
        """Clip and update what was prepared, and count the step. This cannot fail."""

    def left_over(self, part: Part) -> Iterable[tuple[Member, Array]]:
        """The clipped gradients of a step that could not be left in their own place."""
        return ()

    @abstractmethod
    def forget(self, part: Part) -> None:
        """Hold nothing of a step any more, whether it ended or not."""
