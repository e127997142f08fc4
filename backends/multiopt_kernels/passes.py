"""How the update of a rule that treats a parameter as a whole is cut into passes over its elements.

A norm is known only when all elements have been seen. So what depends on a norm is computed in a
later pass than the norm. A pass reads the parameter, the gradient and the slots, computes elements,
writes new slots as soon as they are known, and sums what norms are taken of. Nothing of the size of
the parameter is kept between passes: a later pass computes again what it needs, from the slots that
an earlier one has written.

>>> from multiopt.rules.sums import norm
>>> from multiopt_kernels.extents import plain_form
>>> from multiopt_kernels.operations import Kind
>>> from multiopt_kernels.trace import trace_update
>>> def update(xp, param, grad, slots, c):
...     (average,) = slots
...     average = c.beta * average + grad
...     unit = xp.asarray(average, dtype=xp.float64) / norm(xp, average)
...     return param - xp.asarray(unit, dtype=param.dtype), (average,)
>>> form = plain_form(1, "float32")
>>> trace = trace_update(update, 1, {"beta": Kind.NUMBER}, form)
>>> first, last = cut(trace, form.extents)
>>> [operation.function for operation in first.operations], [x.function for x in first.sums]
(['multiply', 'add'], ['norm'])
>>> [operation.function for operation in last.operations]
['wide', 'divide', 'narrow', 'subtract']
>>> first.writes, last.writes  # the slot, then the parameter, by their numbers as inputs
({2: 5}, {0: 10})

A slot may have one number for each row of a matrix, or for each column. It changes at the end of
the pass that takes the means of the rows, or of the columns, one row or column after the other. A
mean of what has a number for each row is one number for a matrix. It is taken when a pass begins a
matrix, again in each pass, because it takes little time beside that.
"""

from collections.abc import Iterable
from typing import NamedTuple

from multiopt_kernels.extents import Extent, extents_of
from multiopt_kernels.operations import SUMS, NotTraceable, Operation, Trace

__all__ = ["Lines", "Means", "Pass", "cut"]


class Lines(NamedTuple):
    """Operations on values that are not single numbers. Values are numbered as in the trace.

    Attributes:
        operations: The operations, in order.
        reads: The arrays they read: for each value the number of the input that holds it now.
    """

    operations: tuple[Operation, ...]
    reads: dict[int, int]


class Means(NamedTuple):
    """The means of the rows, or of the columns, that a pass takes, and what follows from each.

    Attributes:
        mean: The operation, whose value is summed.
        summed: How this value is computed.
        then: What is computed from the mean.
        writes: The slots written then: for each input the number of its new value.
    """

    mean: Operation
    summed: Lines
    then: Lines
    writes: dict[int, int]


class Pass(NamedTuple):
    """One pass over the elements of a parameter. Values are numbered as in the trace.

    Attributes:
        scalars: The operations on single numbers that come before it, those of earlier passes
            included.
        operations: The operations that lead to what is written and summed, also to the means of
            rows, and not to those of columns.
        reads: The arrays it reads: for each value the number of the input that holds it now.
        writes: The arrays it writes: for each input the number of its new value.
        sums: The operations that end the pass. Each sums a value over all elements.
        rows: The means of rows; None if it takes none.
        columns: The means of columns; None if it takes none.
        totals: The means that begin a matrix, with what leads to the summed value.
    """

    scalars: tuple[Operation, ...]
    operations: tuple[Operation, ...]
    reads: dict[int, int]
    writes: dict[int, int]
    sums: tuple[Operation, ...]
    rows: Means | None
    columns: Means | None
    totals: tuple[tuple[Operation, Lines], ...]

    @property
    def every(self) -> list[Operation]:
        """All operations on values that are not single numbers; some may occur twice."""
        means = [one for one in (self.rows, self.columns) if one is not None]
        lines = [lines for _, lines in self.totals]
        lines += [lines for one in means for lines in (one.summed, one.then)]
        return [*self.operations, *(x for some in lines for x in some.operations)]


def cut(trace: Trace, arrays: Iterable[Extent]) -> list[Pass]:
    """Cut the trace of an update into passes.

    Args:
        trace: The trace.
        arrays: The extents of the inputs that are arrays: the parameter, the gradient, the slots.

    Raises:
        NotTraceable: It would take an array of the size of the parameter between two passes, or a
            number for each row or column.
    """
    given = tuple(arrays)
    extents = extents_of(trace, given)
    # How many passes must be complete before a value can be computed.
    depth = dict.fromkeys(range(len(trace.inputs) + len(trace.literals)), 0)
    for operation in trace.operations:
        is_sum = operation.function in SUMS and extents[operation.inputs[0]] is Extent.ELEMENTS
        depth[operation.output] = max(depth[x] for x in operation.inputs) + is_sum
    param, *slots = trace.results
    changed = {2 + k: value for k, value in enumerate(slots) if value != 2 + k}
    whole = {k: value for k, value in changed.items() if given[k] is Extent.ELEMENTS}
    last = max(depth[value] for value in (param, *whole.values()))
    cutter = _Cutter(trace, extents, {value: value for value in range(len(given))})
    passes, written = [], 0
    for number in range(last + 1):
        due = [
            x
            for x in trace.operations
            if x.function in SUMS
            and extents[x.inputs[0]] is Extent.ELEMENTS
            and depth[x.output] == number + 1
        ]
        sums = [x for x in due if extents[x.output] is Extent.SINGLE]
        writes = {k: value for k, value in whole.items() if depth[value] == number}
        if number == last:
            writes[0] = param
        known = {value for value, passed in depth.items() if passed <= number}
        row_means, column_means = (
            cutter.means(
                [x for x in due if extents[x.output] is extent],
                {k: x for k, x in changed.items() if given[k] is extent and depth[x] == number + 1},
                known,
            )
            for extent in (Extent.ROWS, Extent.COLUMNS)
        )
        means = [one for one in (row_means, column_means) if one is not None]
        before = writes | (row_means.writes if row_means else {})
        if column_means and not before.keys().isdisjoint(column_means.summed.reads.values()):
            raise NotTraceable("takes means of columns of what changes in the same pass")
        summed = [x.inputs[0] for x in (*sums, *([row_means.mean] if row_means else ()))]
        operations, reads = cutter.lines([*writes.values(), *summed])
        scalars = [
            x
            for x in trace.operations
            if extents[x.output] is Extent.SINGLE and x.function not in SUMS and x.output in known
        ]
        lines = [*operations, *(x for one in means for x in (*one.summed[0], *one.then[0]))]
        totals = {x.output: x for x in lines if x.function in SUMS}
        passes.append(
            Pass(
                *(tuple(scalars), operations, reads, writes, tuple(sums), row_means, column_means),
                tuple((x, cutter.lines(x.inputs)) for _, x in sorted(totals.items())),
            )
        )
        # The old values are gone, the new ones can be read.
        every = writes | {k: value for one in means for k, value in one.writes.items()}
        cutter.write(every)
        written += len(every)
    if written != len(changed) + 1:
        raise NotTraceable("changes a slot of rows or columns otherwise than after their means")
    return passes


class _Cutter:
    """Finds what some values are computed from.

    Args:
        trace: The trace.
        extents: The extent of each value.
        held: The arrays that can be read: for each value the number of the input that holds it.
    """

    def __init__(self, trace: Trace, extents: dict[int, Extent], held: dict[int, int]) -> None:
        self._made = {operation.output: operation for operation in trace.operations}
        self._extents = extents
        self._held = held

    def write(self, writes: dict[int, int]) -> None:
        """Replace the values that some inputs hold."""
        held = {value: k for value, k in self._held.items() if k not in writes}
        self._held = held | {value: k for k, value in writes.items()}

    def lines(self, ends: Iterable[int], known: Iterable[int] = ()) -> Lines:
        """What is computed for some values that are not single numbers.

        Args:
            ends: The values.
            known: Values that need not be computed.

        Raises:
            NotTraceable: They need an input that has been overwritten, or a mean that is gone.
        """
        needed, done = set[int](), set(known)
        waiting = list(ends)
        while waiting:
            value = waiting.pop()
            if value in needed or value in done or self._extents[value] is Extent.SINGLE:
                continue
            needed.add(value)
            if value in self._held:
                continue
            if value not in self._made:
                raise NotTraceable("needs a slot, or the parameter, after it has changed")
            operation = self._made[value]
            if operation.function in SUMS:
                if self._extents[value] is not Extent.MATRICES:
                    raise NotTraceable("needs a mean of rows or columns that no slot holds")
            else:
                waiting += operation.inputs
        reads = {value: self._held[value] for value in needed if value in self._held}
        return Lines(tuple(self._made[value] for value in sorted(needed - reads.keys())), reads)

    def means(self, due: list[Operation], writes: dict[int, int], known: set[int]) -> Means | None:
        """The means of the rows or columns in a pass, of which there may be one.

        Args:
            due: The operations.
            writes: The slots to be written after them.
            known: The values that can be computed before the end of the pass.

        Raises:
            NotTraceable: There are more, or what follows needs more than the mean.
        """
        if not due:
            return None
        if len(due) > 1:
            raise NotTraceable("takes more than one mean of rows or columns in a pass")
        (mean,) = due
        then = self.lines(writes.values(), [mean.output])
        made = {mean.output, *(x.output for x in then.operations)}
        if any(x not in made and x not in known for one in then.operations for x in one.inputs):
            raise NotTraceable("needs a norm where the mean of a row or column is taken")
        return Means(mean, self.lines(mean.inputs), then, writes)
