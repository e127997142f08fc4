"""Along what the values of an update vary, where a rule treats a parameter as a whole.

A parameter is a stack of matrices. A value may differ from element to element, from row to row or
from column to column of each matrix, from matrix to matrix, or it is one number for the parameter.
``Rule.slot_shapes`` says which slots have a number for each row or for each column:

>>> from multiopt.rules import LAMB, Adafactor
>>> for form in forms_of(Adafactor(), "float32"):
...     print(form.axes, *(extent.name for extent in form.slots))
('columns',) ELEMENTS
('rows', 'columns') ROWS COLUMNS

A rule whose slots all have the shape of the parameter has one form for all parameters, and does not
ask for their dimensions:

>>> [form.axes for form in forms_of(LAMB(), "float32")]
[('elements',)]
"""

from collections.abc import Sequence
from enum import Flag
from functools import reduce
from operator import or_
from typing import NamedTuple

from multiopt.rules import Rule
from multiopt_kernels.operations import SUMS, NotTraceable, Trace

__all__ = ["Extent", "Form", "extents_of", "forms_of", "plain_form"]


class Extent(Flag):
    """Along what a value varies."""

    SINGLE = 0
    MATRICES = 1
    DOWN = 2
    ACROSS = 4
    ROWS = MATRICES | DOWN
    COLUMNS = MATRICES | ACROSS
    ELEMENTS = MATRICES | DOWN | ACROSS


class Form(NamedTuple):
    """What parameters have in common that can run the same text.

    Attributes:
        axes: The names of their last axes: ``("elements",)`` for parameters of any dimensions,
            ``("columns",)`` for those of fewer than two, ``("rows", "columns")`` for all others.
        slots: The extent of each slot.
        dtype: The compute dtype.
    """

    axes: tuple[str, ...]
    slots: tuple[Extent, ...]
    dtype: str

    @property
    def extents(self) -> tuple[Extent, ...]:
        """The extents of the parameter, of the gradient and of each slot."""
        return (Extent.ELEMENTS, Extent.ELEMENTS, *self.slots)

    def axes_of(self, extent: Extent) -> tuple[str | None, ...]:
        """The names of the last axes of a slot; None for one of length 1."""
        if extent is Extent.ELEMENTS:
            return self.axes
        return ("rows", None) if extent is Extent.ROWS else (None, "columns")


#: What is left of the extent of a value that is summed.
KEPT = {
    "norm": Extent.SINGLE,
    "root_mean_square": Extent.SINGLE,
    "row_means": Extent.ROWS,
    "column_means": Extent.COLUMNS,
}

#: A shape of each sort, and which of its slots have which extent.
VECTOR, MATRIX = (7,), (2, 3, 5)
EXTENTS: dict[tuple[int, ...], Extent] = {
    (2, 3, 1): Extent.ROWS,
    (2, 1, 5): Extent.COLUMNS,
    MATRIX: Extent.ELEMENTS,
}


def plain_form(slots: int, dtype: str) -> Form:
    """The form of a rule whose slots all have the shape of the parameter."""
    return Form(("elements",), (Extent.ELEMENTS,) * slots, dtype)


def forms_of(rule: Rule, dtype: str) -> list[Form]:
    """The forms of the parameters of a rule: one, or one for vectors and one for matrices.

    Args:
        rule: The rule.
        dtype: The compute dtype.

    Raises:
        NotTraceable: It takes only some shapes, or has slots of shapes of its own.
    """
    try:
        vector, matrix = (list(rule.slot_shapes(x).items()) for x in (VECTOR, MATRIX))
    except ValueError as error:
        raise NotTraceable(f"does not take all shapes: {error}") from None
    names = [name for name, _ in vector]
    if any(shape != VECTOR for _, shape in vector) or any(x not in EXTENTS for _, x in matrix):
        raise NotTraceable("has slots of shapes of its own")
    extents = tuple(EXTENTS[shape] for _, shape in matrix)
    form = plain_form(len(names), dtype)
    if extents == form.slots and names == [name for name, _ in matrix]:
        return [form]
    return [form._replace(axes=("columns",)), Form(("rows", "columns"), extents, dtype)]


def extents_of(trace: Trace, arrays: Sequence[Extent]) -> dict[int, Extent]:
    """The extent of each value of a trace.

    Args:
        trace: The trace.
        arrays: Those of the first inputs; the others are single numbers.

    Raises:
        NotTraceable: It sums something else than elements, or than what has a number for each row.
    """
    count = len(trace.inputs) + len(trace.literals)
    extents = dict.fromkeys(range(count), Extent.SINGLE) | dict(enumerate(arrays))
    for operation in trace.operations:
        extent = reduce(or_, (extents[value] for value in operation.inputs))
        if operation.function in SUMS:
            # What has a number for each row is summed for each matrix.
            taken = (Extent.ELEMENTS, Extent.ROWS)[: 1 + (operation.function == "column_means")]
            if extent not in taken:
                raise NotTraceable("sums something that is not an array")
            extent &= KEPT[operation.function]
        extents[operation.output] = extent
    return extents
