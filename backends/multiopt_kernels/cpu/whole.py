"""The kernel of a rule that treats a parameter as a whole, such as LAMB: passes around exact sums.

Like that of ``update``, its text is printed from the trace of the rule. ``passes`` cuts the trace;
each pass is a function here that goes over up to ``FEW`` elements of a row. What is summed goes
through a small buffer, since it is seldom an array in memory.

One thread takes all passes over a row at once, while the row is in its cache. Several threads take
one pass after the other over all rows, and their sums are added in between.
"""

from collections.abc import Callable, Mapping, Sequence
from textwrap import indent
from typing import Any

import numpy as np

from multiopt.rules.sums import RANGES
from multiopt_kernels.cpu.object_cache import ObjectCode
from multiopt_kernels.cpu.rows import SIZE, WIDE
from multiopt_kernels.cpu.source import Source
from multiopt_kernels.cpu.sums import FEW, adder, length, sum_tools
from multiopt_kernels.cpu.toolbox import compiled, object_code, toolbox
from multiopt_kernels.cpu.update import (
    Access,
    access,
    indented,
    memory,
    update_head,
    update_kernel,
)
from multiopt_kernels.operations import Kind, Operation, Trace
from multiopt_kernels.passes import Pass, cut
from multiopt_kernels.trace import trace_update

__all__ = ["compile_whole", "whole_source"]

#: A pass over some elements of a row, and the function that computes what it needs of the sums.
PASS = """
@njit
def {form}{number}(row, low, high, c, s, own, shared, bound, buffers):
{before}
    passed = 0
    for i in range(low, high):
{element}
    return passed
"""

SCALARS = """
@njit
def scalars{number}(c, norms):
{lines}
"""

#: The function that takes all passes over a row, or one of them over a part of it. ``sums`` has
#: the number of the pass or -1, then the addresses of the sums that are known, of those to add to
#: and of the buffers, and the size of the sums of a row in bytes.
UPDATE = """
@njit
def update(row, k, low, high, c, own, shared, bound, writes, sums):
    which, known, adding, buffers = sums[0], sums[1], sums[2], sums[3]
    if which >= 0:
        known, adding = known + k * sums[4], adding + k * sums[4]
    passed = 0
{passes}
    if writes and (which < 0 or which == {last}):
        {leaving}
    return passed
"""

ONE = """
if which < 0 or which == {number}:
    s = scalars{number}(c, ({norms}))
    begin_sums(adding, {first}, {end}, which, row[{size}])
    for begin in range(low, high, {few}):
        end = min(begin + {few}, high)
        passed |= {passed}
        add_buffers(adding, {first}, {end}, buffers, end - begin, which, row[{size}])
    end_sums(adding, {first}, {end}, buffers, which, row[{size}])
"""

LEAVE = """
@njit
def {form}_leave(row, low, high, own, shared, bound):
{before}
    for i in range(low, high):
        grad = clamp(own * {grad} * shared, bound)
        grads[i] = {left}
"""


def whole_source(
    update: Callable[..., Any],
    slots: int,
    kinds: Mapping[str, bool | Kind],
    scalars: Trace | None,
    narrow: bool = False,
    masters: bool = False,
) -> tuple[str, int, int]:
    """Print the text that the update of a rule is compiled from.

    The arguments are those of ``update_source``.

    Returns:
        The text, the number of passes and the number of sums.

    Raises:
        NotTraceable: The update has no trace, or cannot be cut into passes.
    """
    trace = trace_update(update, slots, kinds, is_whole=True)
    arrays = 2 + slots
    passes = cut(trace, arrays)
    source = Source()
    parts, calls, norms = [], [], list[int]()
    for number, one in enumerate(passes):
        printed = _Printed(trace, arrays, kinds, norms)
        parts.append(printed.scalars(source, number, one))
        forms = ["wide", *(["narrow"] if narrow else [])]
        parts += [
            printed.elements(source, number, one, form, access(form, slots, masters and narrow))
            for form in forms
        ]
        call = "{form}{number}(row, begin, end, c, s, own, shared, bound, buffers)"
        first, end = len(norms), len(norms) + len(one.sums)
        calls.append(
            ONE.format(
                number=number,
                norms="".join(
                    f"norm_of({k}, known, adding, buffers, which), " for k in range(first)
                ),
                first=first,
                end=end,
                few=FEW,
                size=SIZE,
                passed=_by_form(call, narrow, number=number),
            )
        )
        norms += [operation.output for operation in one.sums]
    leaving = _by_form("{form}_leave(row, low, high, own, shared, bound)", narrow)
    for form in ("wide", "narrow") if narrow else ("wide",):
        arrays_of = access(form, 0, masters=False)
        before = indented(arrays_of.before, 1)
        parts.append(
            LEAVE.format(form=form, before=before, grad=arrays_of.grad, left=arrays_of.left)
        )
    head = update_head(source, slots + (masters and narrow), kinds, scalars)
    body = UPDATE.format(
        passes=indent("".join(calls), "    "), last=len(passes) - 1, leaving=leaving
    )
    return head + "".join(parts) + body, len(passes), len(norms)


def _by_form(call: str, narrow: bool, **others: Any) -> str:
    """A call of the function for the form of a row."""
    wide = call.format(form="wide", **others)
    return (
        f"{call.format(form='narrow', **others)} if row[{WIDE}] == 0 else {wide}"
        if narrow
        else wide
    )


class _Printed:
    """How the values of a trace are written in one pass.

    Args:
        trace: The trace.
        arrays: The number of inputs that are arrays.
        kinds: What each coefficient is.
        norms: The values that earlier passes have summed.
    """

    def __init__(
        self,
        trace: Trace,
        arrays: int,
        kinds: Mapping[str, bool | Kind],
        norms: Sequence[int],
    ) -> None:
        self.coefficients = {arrays + k: f"c{k}" for k in range(len(kinds))}
        self.numbers = [arrays + k for k, x in enumerate(kinds.values()) if x is Kind.NUMBER]
        self.wide = {x.output for x in trace.operations if x.kind is Kind.WIDE}
        self.literals = dict(trace.literals)
        self.before = [f"{name} = c[{k}]" for k, name in enumerate(self.coefficients.values())]
        self.norms = norms

    def line(self, source: Source, operation: Operation, names: dict[int, str]) -> str:
        """Print an operation; numbers take the precision of what they are combined with."""
        is_wide = not self.wide.isdisjoint((*operation.inputs, operation.output))
        to = "double" if is_wide else "dtype"
        given = {k: f"{to}({x!r})" for k, x in self.literals.items()} | self.coefficients
        if is_wide:
            given |= {k: f"double({self.coefficients[k]})" for k in self.numbers}
        given |= names
        line = source.line(operation, given)
        names[operation.output] = given[operation.output]
        return line

    def scalars(self, source: Source, number: int, one: Pass) -> str:
        """Print the function that computes the single numbers of a pass from the norms."""
        names = {value: f"n{k}" for k, value in enumerate(self.norms)}
        lines = [*self.before, *(f"n{k} = norms[{k}]" for k in range(len(self.norms)))]
        lines += [self.line(source, operation, names) for operation in one.scalars]
        self.singles = list(names)
        results = "".join(f"{name}, " for name in names.values())
        lines.append(f"return ({results or '0.0, '})")
        return SCALARS.format(number=number, lines=indented(lines, 1))

    def elements(self, source: Source, number: int, one: Pass, form: str, arrays: Access) -> str:
        """Print the function that goes over elements of a row."""
        names = {value: f"s{k}" for k, value in enumerate(self.singles)}
        before = [*arrays.before, *self.before]
        before += [f"s{k} = s[{k}]" for k in range(len(self.singles))]
        before += [f"buffer{k} = at(buffers + {k * FEW} * ITEMSIZE)" for k in range(len(one.sums))]
        element: list[str] = []
        for value, array in one.reads.items():
            names[value] = ("param", "grad", *(f"slot{k}" for k in range(array - 1)))[array]
            element += arrays.reads[array]
            if array == 1:
                element += [
                    f"grad = own * {arrays.grad} * shared",
                    "passed |= (grad > bound) | (grad < -bound)",
                    "grad = clamp(grad, bound)",
                ]
        element += [self.line(source, operation, names) for operation in one.operations]
        for k, operation in enumerate(one.sums):
            element.append(f"buffer{k}[i - low] = {names[operation.inputs[0]]}")
        for array, value in one.writes.items():
            element += [line.format(names[value]) for line in arrays.writes[array]]
        return PASS.format(
            form=form, number=number, before=indented(before, 1), element=indented(element, 2)
        )


def compile_whole(text: str, sums: int, dtype: str, storage_dtype: str) -> ObjectCode:
    """Compile the kernel ``update``.

    Args:
        text: The text from ``whole_source``.
        sums: The number of sums.
        dtype: The compute dtype: ``"float32"`` or ``"float64"``.
        storage_dtype: The dtype of parameters and gradients. It differs from ``dtype`` if the text
            is for 16 bits.
    """
    tools, known, (add, few) = toolbox(), sum_tools(), adder(dtype, dtype)
    njit, words, doubles = tools.njit, tools.words, tools.doubles
    (lowest, limb_count), count = RANGES[dtype], length(dtype)
    carry, norm, one = known.carry, known.norm, getattr(np, dtype)(1)
    itemsize = np.dtype(dtype).itemsize

    @njit
    def clear(limbs):  # type: ignore[no-untyped-def]
        for i in range(count):
            limbs[i] = 0

    @njit
    def begin_sums(adding, first, end, which, size):  # type: ignore[no-untyped-def]
        if which < 0 and size > FEW:
            for r in range(first, end):
                clear(words(adding + r * count * 8))

    @njit
    def add_buffers(adding, first, end, buffers, n, which, size):  # type: ignore[no-untyped-def]
        if which >= 0 or size > FEW:
            for r in range(first, end):
                add(words(adding + r * count * 8), buffers + (r - first) * FEW * itemsize, n, one)

    @njit
    def end_sums(adding, first, end, buffers, which, size):  # type: ignore[no-untyped-def]
        """Carry the sums; one thread computes the norms right away."""
        norms = doubles(adding + sums * count * 8)
        for r in range(first, end):
            limbs, buffer = words(adding + r * count * 8), buffers + (r - first) * FEW * itemsize
            if which < 0 and size <= FEW:
                norms[r] = few(limbs, buffer, size, one)
                if norms[r] >= 0.0:
                    continue
                clear(limbs)
                add(limbs, buffer, size, one)
            carry(limbs, limb_count)
            if which < 0:
                norms[r] = norm(limbs, limb_count, lowest)

    @njit
    def norm_of(r, known, adding, buffers, which):  # type: ignore[no-untyped-def]
        if which < 0:
            return doubles(adding + sums * count * 8)[r]
        # Other threads read the sum, so it is carried in a copy.
        limbs, total = words(buffers), words(known + r * count * 8)
        for i in range(count):
            limbs[i] = total[i]
        carry(limbs, limb_count)
        return norm(limbs, limb_count, lowest)

    functions = {
        "begin_sums": begin_sums,
        "add_buffers": add_buffers,
        "end_sums": end_sums,
        "norm_of": norm_of,
        "double": tools.types.float64,
        "ITEMSIZE": itemsize,
    }
    names = memory(dtype, storage_dtype) | functions
    return object_code(update=update_kernel(dtype, compiled(text, **names)))
