"""The text of passes over matrices, for rules with slots for rows and columns, such as Adafactor.

A parameter is a stack of matrices. A pass goes through each matrix tile by tile: some rows of it,
or a part of one row, of up to ``FEW`` elements. What is summed over all elements or over a row goes
through buffers of a tile. Means of columns take a way of their own, down strips of columns
(``numbers``). What follows from the mean of a row or column is computed right after it.

One thread takes all passes over a parameter.

This rule keeps an average of the means of the rows. When the mean of row ``r`` of matrix ``m`` is
known, this is done:

>>> from multiopt.rules.means import means
>>> from multiopt_kernels.trace import trace_update
>>> def update(xp, param, grad, slots, c):
...     mean = xp.expand_dims(means(xp, xp.asarray(grad, dtype=xp.float64)), axis=-1)
...     rows = 0.5 * slots[0] + xp.asarray(mean, dtype=param.dtype)
...     return param - grad / rows, (rows,)
>>> form = Form(("rows", "columns"), (Extent.ROWS,), "float32")
>>> trace = trace_update(update, 1, {}, form)
>>> text = printed_matrices(Source(), trace, form, {}, narrow=False, masters=False).text
>>> print(next(part.strip() for part in text.split("@njit") if "def row0" in part))
def row0(row, m, r, rows, columns, c, s, t, mean):
    slot0s = at(row[8])
    slot0 = slot0s[m * rows + r]
    v6 = dtype(0.5) * slot0
    v7 = dtype(mean)
    v8 = v6 + v7
    slot0s[m * rows + r] = v8
"""

from collections.abc import Mapping
from textwrap import indent
from typing import Any, NamedTuple

from multiopt_kernels.cpu.matrix_text import (
    CALL,
    COLUMN_MEANS,
    COLUMNS,
    PASS,
    ROW_MEANS,
    THEN,
    TILE,
    TOTAL,
    TOTALS,
)
from multiopt_kernels.cpu.numbers import COLUMN, LIMBS, STRIP, TALL_STRIP, number_tools
from multiopt_kernels.cpu.pass_text import PassText, by_form, known_sums, needed, roots
from multiopt_kernels.cpu.rows import NDIM, SHAPE, SIZE, WIDE
from multiopt_kernels.cpu.source import Source
from multiopt_kernels.cpu.sums import FEW
from multiopt_kernels.cpu.toolbox import toolbox
from multiopt_kernels.cpu.update import Access, access, indented
from multiopt_kernels.extents import Extent, Form
from multiopt_kernels.operations import SUMS, Kind, Operation, Trace
from multiopt_kernels.passes import Lines, Means, Pass, cut

__all__ = ["Printed", "matrix_tools", "printed_matrices"]


class Printed(NamedTuple):
    """The text of all passes over matrices.

    Attributes:
        text: The functions.
        calls: The lines that call them, for a row.
        sums: The number of sums over all elements.
        buffers: The words of the buffers. Sums need ``ROOM`` besides.
    """

    text: str
    calls: str
    sums: int
    buffers: int


def printed_matrices(
    source: Source,
    trace: Trace,
    form: Form,
    kinds: Mapping[str, bool | Kind],
    narrow: bool,
    masters: bool,
) -> Printed:
    """Print the passes over matrices.

    Args:
        source: What collects the functions that they call.
        trace: The trace of the update.
        form: The form of the parameters.
        kinds: What each coefficient is.
        narrow: Whether parameters and gradients have 16 bits.
        masters: Whether there is one more slot, the master copy.

    Raises:
        NotTraceable: The update cannot be cut into passes.
    """
    parts, calls, sums, buffers = [], [], list[Operation](), 0
    for number, one in enumerate(cut(trace, form.extents)):
        text = PassText(trace, form, kinds, sums)
        parts.append(text.scalars(source, f"matrix_scalars{number}", one))
        for place in ("wide", "narrow") if narrow else ("wide",):
            pass_of = _MatrixPass(
                source, text, form, number, one, place, masters and place == "narrow"
            )
            if place == "wide":
                parts += pass_of.ends()
            parts += pass_of.parts(len(sums))
        call = f"{{form}}_matrices{number}(row, c, s_{number}, own, shared, bound, adding, "
        calls.append(
            CALL.format(
                number=number,
                sums=known_sums(sums),
                passed=by_form(call + "buffers, room)", narrow, f"row[{WIDE}]"),
            )
        )
        sums += one.sums
        buffers = max(buffers, FEW * (len(one.sums) + (one.rows is not None)))
    return Printed("".join(parts), "".join(calls), len(sums), buffers)


class _MatrixPass:
    """Prints one pass for one form of memory.

    Args:
        source: What collects the functions.
        text: How values are written.
        form: The form of the parameters.
        number: The number of the pass.
        one: The pass.
        place: ``"wide"`` or ``"narrow"``, as in ``update``.
        masters: Whether there is one more slot, the master copy.
    """

    def __init__(
        self,
        source: Source,
        text: PassText,
        form: Form,
        number: int,
        one: Pass,
        place: str,
        masters: bool,
    ) -> None:
        self.source, self.text, self.form = source, text, form
        self.number, self.one, self.place, self.masters = number, one, place, masters
        # The values that begin a matrix: its totals, and what follows from them alone.
        lines = [x for means in (one.rows, one.columns) if means for x in means.summed.operations]
        lines += [x for means in (one.rows, one.columns) if means for x in means.then.operations]
        every = {x.output: x for x in (*one.operations, *lines)}
        self.begins = [x for _, x in sorted(every.items()) if self._is(x.output, Extent.MATRICES)]

    def _is(self, value: int, *extents: Extent) -> bool:
        return self.text.extents[value] in extents

    def _access(self, row: str, column: str) -> Access:
        places = {
            k: row if extent is Extent.ROWS else column
            for k, extent in enumerate(self.form.slots)
            if extent is not Extent.ELEMENTS
        }
        return access(self.place, len(self.form.slots), self.masters, places)

    def _known(self) -> tuple[dict[int, str], list[str]]:
        """The names of what is known in a matrix, and the lines that unpack it."""
        names, before = self.text.known()
        names |= {x.output: f"t{k}" for k, x in enumerate(self.begins)}
        return names, [*before, *(f"t{k} = t[{k}]" for k in range(len(self.begins)))]

    def _lines(self, lines: Lines, *extents: Extent) -> Lines:
        """Those of some lines that give values of these extents."""
        return Lines(
            tuple(x for x in lines.operations if self._is(x.output, *extents)),
            {value: k for value, k in lines.reads.items() if self._is(value, *extents)},
        )

    def _printed(self, lines: Lines, arrays: Access, names: dict[int, str]) -> list[str]:
        printed = []
        for value, array in lines.reads.items():
            names[value] = arrays.name(array)
            printed += arrays.read(array)
        return printed + self.text.lines(self.source, lines.operations, names)

    def ends(self) -> list[str]:
        """Print what begins a matrix, and what follows from the means of rows and columns."""
        parts = [self._totals()]
        for means, name, index, extent in (
            (self.one.rows, "row", "r", Extent.ROWS),
            (self.one.columns, "column", "j", Extent.COLUMNS),
        ):
            if means is not None:
                parts.append(self._then(means, name, index, extent))
        return parts

    def _totals(self) -> str:
        names, before = self.text.known()
        arrays, totals = self._access("m * rows + r", ""), []
        summed = {operation.output: lines for operation, lines in self.one.totals}
        for operation in self.begins:
            if operation.function not in SUMS:
                totals.append(self.text.line(self.source, operation, names))
                continue
            inner = dict(names)
            lines = self._printed(summed[operation.output], arrays, inner)
            total = TOTAL.format(
                output=operation.output,
                few=FEW,
                lines=indented(lines, 2),
                value=inner[operation.inputs[0]],
            )
            totals += total.strip().splitlines()
            names[operation.output] = f"v{operation.output}"
        return TOTALS.format(
            number=self.number,
            before=indented(needed([*arrays.before, *before], totals), 1),
            limbs=8 * LIMBS,
            column=8 * COLUMN,
            totals=indented(totals, 1),
            results="".join(f"{names[x.output]}, " for x in self.begins) or "0.0, ",
        )

    def _then(self, means: Means, name: str, index: str, extent: Extent) -> str:
        names, before = self._known()
        arrays = self._access("m * rows + r", "m * columns + j")
        names[means.mean.output] = "mean"
        lines = self._printed(self._lines(means.then, extent), arrays, names)
        for array, value in means.writes.items():
            lines += [line.format(names[value]) for line in arrays.writes[array]]
        return THEN.format(
            name=name,
            number=self.number,
            index=index,
            before=indented(needed([*arrays.before, *before], lines), 1),
            lines=indented(lines, 1),
        )

    def _loops(self, lines: Lines) -> tuple[list[str], list[str], list[str], dict[int, str]]:
        """What comes before the loops over rows, in it, in that over columns; and the names."""
        names, before = self._known()
        arrays = self._access("m * rows + r", "column + j")
        line = self._printed(self._lines(lines, Extent.ROWS), arrays, names)
        inner = self._lines(lines, Extent.COLUMNS, Extent.ELEMENTS)
        return [*arrays.before, *before], line, self._printed(inner, arrays, names), names

    def _tile(
        self, name: str, lines: Lines, values: Mapping[str, int], writes: Mapping[int, int]
    ) -> str:
        """Print the function of a tile.

        Args:
            name: Its name.
            lines: What it computes.
            values: The values that go into buffers, by the text that makes the pointer of each.
            writes: The arrays it writes.
        """
        before, line, element, names = self._loops(lines)
        arrays = self._access("", "column + j")
        for k, (pointer, value) in enumerate(values.items()):
            before.append(f"buffer{k} = {pointer}")
            element.append(f"buffer{k}[k + j] = {names[value]}")
        for array, value in writes.items():
            element += [x.format(names[value]) for x in arrays.writes[array]]
        return TILE.format(
            name=name,
            before=indented(needed(before, line, element), 1),
            line=indented(line, 2),
            element=indented(element, 3),
        )

    def parts(self, first: int) -> list[str]:
        """Print the pass.

        Args:
            first: How many sums over all elements earlier passes have taken.
        """
        one, number, place = self.one, self.number, self.place
        buffers = {
            f"at(buffers + {k * FEW} * ITEMSIZE)": x.inputs[0] for k, x in enumerate(one.sums)
        }
        row_means = column_means = ""
        if one.rows is not None:
            buffers[f"doubles(buffers + {8 * FEW * len(one.sums)})"] = one.rows.mean.inputs[0]
            row_means = ROW_MEANS.format(buffer=FEW * len(one.sums), limbs=8 * LIMBS, number=number)
        lines = Lines(one.operations, one.reads)
        parts = [self._tile(f"{place}_tile{number}", lines, buffers, one.writes)]
        if one.columns is not None:
            (value,) = one.columns.mean.inputs
            column = {"doubles(buffers)": value}
            before, line, element, names = self._loops(one.columns.summed)
            parts += [
                self._tile(f"{place}_column{number}", one.columns.summed, column, {}),
                COLUMNS.format(
                    name=f"{place}_columns{number}",
                    before=indented(needed(before, line, element), 1),
                    line=indented(line, 2),
                    element=indented(element, 3),
                    value=names[value],
                ),
            ]
            column_means = COLUMN_MEANS.format(
                few=FEW,
                tall=TALL_STRIP,
                strip=STRIP,
                limbs=8 * LIMBS,
                column=8 * COLUMN,
                number=number,
                form=place,
            )
        end = first + len(one.sums)
        parts.append(
            PASS.format(
                form=place,
                number=number,
                few=FEW,
                first=first,
                end=end,
                size=SIZE,
                row_means=indent(row_means, " " * 16),
                column_means=indent(column_means, " " * 8),
                filled="n" if buffers else "0",
                roots=roots(one.sums),
            )
        )
        return parts


def matrix_tools() -> dict[str, Any]:
    """The functions that the text calls, by name."""
    tools, numbers = toolbox(), number_tools()
    njit, words = tools.njit, tools.words
    clear, add, rounded, few = numbers.clear, numbers.add, numbers.rounded, numbers.few

    @njit
    def sizes(row):  # type: ignore[no-untyped-def]
        """The numbers of rows and columns of a matrix, and of matrices."""
        shape, ndim, stack = words(row[SHAPE]), row[NDIM], 1
        for d in range(ndim - 2):
            stack *= shape[d]
        return shape[ndim - 2], shape[ndim - 1], stack

    @njit
    def inverse(count):  # type: ignore[no-untyped-def]
        return 1.0 / max(count, 1)

    @njit
    def mean(limbs, address, first, n, count):  # type: ignore[no-untyped-def]
        """The mean of ``count`` numbers, when the last ``n`` of them come after ``first``."""
        if n == count:
            return inverse(count) * few(limbs, address, n)
        if first == 0:
            clear(limbs)
        add(limbs, address, n)
        return inverse(count) * rounded(limbs) if first + n == count else 0.0

    return vars(numbers) | {
        "sizes": sizes,
        "inverse": inverse,
        "mean": mean,
        "words": words,
        "doubles": tools.doubles,
    }
