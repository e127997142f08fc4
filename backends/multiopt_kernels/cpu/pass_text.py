"""How the values of a pass are written as text: what passes over elements and over matrices share.

Single numbers are computed by a function of their own, from what earlier passes have summed:

>>> from multiopt.rules.sums import norm
>>> from multiopt_kernels.extents import plain_form
>>> from multiopt_kernels.passes import cut
>>> from multiopt_kernels.trace import trace_update
>>> def update(xp, param, grad, slots, c):
...     return param - xp.asarray(c.lr * norm(xp, grad), dtype=grad.dtype) * grad, ()
>>> form, kinds = plain_form(0, "float32"), {"lr": Kind.NUMBER}
>>> trace = trace_update(update, 0, kinds, form)
>>> first, last = cut(trace, form.extents)
>>> print(PassText(trace, form, kinds, first.sums).scalars(Source(), "scalars", last))
<BLANKLINE>
@njit
def scalars(c, norms):
    c0 = c[0]
    n0 = norms[0]
    v4 = double(c0) * n0
    v5 = dtype(v4)
    return (v5, )
<BLANKLINE>
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from multiopt_kernels.cpu.rows import SIZE
from multiopt_kernels.cpu.source import Source
from multiopt_kernels.cpu.update import indented
from multiopt_kernels.extents import Form, extents_of
from multiopt_kernels.operations import Kind, Operation, Trace
from multiopt_kernels.passes import Pass

__all__ = ["PassText", "by_form", "known_sums", "needed", "roots"]

SCALARS = """
@njit
def {name}(c, norms):
{lines}
"""


class PassText:
    """Writes the values of a trace in one pass.

    Args:
        trace: The trace.
        form: The form of the parameters.
        kinds: What each coefficient is.
        sums: What earlier passes have summed.
    """

    def __init__(
        self,
        trace: Trace,
        form: Form,
        kinds: Mapping[str, bool | Kind],
        sums: Sequence[Operation],
    ) -> None:
        """Begin a pass."""
        arrays = len(form.extents)
        self.extents = extents_of(trace, form.extents)
        self._coefficients = {arrays + k: f"c{k}" for k in range(len(kinds))}
        self._numbers = [arrays + k for k, x in enumerate(kinds.values()) if x is Kind.NUMBER]
        self._wide = {x.output for x in trace.operations if x.kind is Kind.WIDE}
        self._literals = dict(trace.literals)
        self._sums = [operation.output for operation in sums]
        self._singles: list[int] = []
        self._unpacked = [f"{name} = c[{k}]" for k, name in enumerate(self._coefficients.values())]

    def line(self, source: Source, operation: Operation, names: dict[int, str]) -> str:
        """Print an operation; numbers take the precision of what they are combined with."""
        is_wide = not self._wide.isdisjoint((*operation.inputs, operation.output))
        to = "double" if is_wide else "dtype"
        given = {k: f"{to}({x!r})" for k, x in self._literals.items()} | self._coefficients
        if is_wide:
            given |= {k: f"double({self._coefficients[k]})" for k in self._numbers}
        given |= names
        line = source.line(operation, given)
        names[operation.output] = given[operation.output]
        return line

    def lines(
        self, source: Source, operations: Iterable[Operation], names: dict[int, str]
    ) -> list[str]:
        """Print some operations."""
        return [self.line(source, operation, names) for operation in operations]

    def scalars(self, source: Source, name: str, one: Pass) -> str:
        """Print the function that computes the single numbers of a pass from the sums."""
        names = {value: f"n{k}" for k, value in enumerate(self._sums)}
        before = [*self._unpacked, *(f"{x} = norms[{k}]" for k, x in enumerate(names.values()))]
        lines = self.lines(source, one.scalars, names)
        used = {value for operation in one.every for value in operation.inputs}
        self._singles = [value for value in names if value in used]
        results = "".join(f"{names[value]}, " for value in self._singles)
        lines.append(f"return ({results or '0.0, '})")
        return SCALARS.format(name=name, lines=indented([*needed(before, lines), *lines], 1))

    def known(self) -> tuple[dict[int, str], list[str]]:
        """The names of the single numbers, and the lines that unpack them and the coefficients."""
        names = {value: f"s{k}" for k, value in enumerate(self._singles)}
        return names, [*self._unpacked, *(f"s{k} = s[{k}]" for k in range(len(names)))]


def needed(before: Iterable[str], *after: Iterable[str]) -> list[str]:
    """The assignments whose name occurs in other lines: compiling the rest takes its time too.

    >>> needed(["c1 = c[1]", "c10 = c[10]"], ["v2 = c10 * grad"])
    ['c10 = c[10]']
    """
    words = set(re.findall(r"\w+", " ".join(line for lines in after for line in lines)))
    return [line for line in before if line.split(" = ")[0] in words]


def by_form(call: str, narrow: bool, wide: str) -> str:
    """A call of the function for the form of a row.

    >>> by_form("{form}0(row)", True, wide="row[7]")
    'narrow0(row) if row[7] == 0 else wide0(row)'
    """
    if not narrow:
        return call.format(form="wide")
    return f"{call.format(form='narrow')} if {wide} == 0 else {call.format(form='wide')}"


def roots(sums: Sequence[Operation]) -> int:
    """Which of some sums end as norms, as bits."""
    return sum((operation.function == "norm") << k for k, operation in enumerate(sums))


def known_sums(sums: Sequence[Operation]) -> str:
    """The values of sums of earlier passes, as arguments."""
    written = ""
    for k, operation in enumerate(sums):
        is_norm = operation.function == "norm"
        value = f"sum_of({k}, known, adding, buffers, which, {is_norm})"
        written += f"{value}, " if is_norm else f"root_mean({value}, row[{SIZE}]), "
    return written
