"""The kernel of a rule that treats a parameter as a whole, such as LAMB: passes around exact sums.

Like that of ``update``, its text is printed from the trace of the rule. ``passes`` cuts the trace;
each pass is a function here that goes over up to ``FEW`` elements of a row. What is summed goes
through a small buffer, since it is seldom an array in memory.

One thread takes all passes over a row at once, while the row is in its cache. Several threads take
one pass after the other over all rows, and their sums are added in between.

If a rule has slots of other shapes than the parameter, ``matrices`` prints the passes over
parameters of two and more dimensions, and those here are for the others.
"""

from collections.abc import Callable, Mapping
from textwrap import indent
from typing import Any, NamedTuple

import numpy as np

from multiopt.rules.sums import RANGES, length
from multiopt_kernels.cpu.matrices import matrix_tools, printed_matrices
from multiopt_kernels.cpu.numbers import ROOM
from multiopt_kernels.cpu.object_cache import ObjectCode
from multiopt_kernels.cpu.pass_text import PassText, by_form, known_sums, needed, roots
from multiopt_kernels.cpu.rows import NDIM, SIZE, WIDE
from multiopt_kernels.cpu.source import Source
from multiopt_kernels.cpu.sums import FEW, adder, sum_tools
from multiopt_kernels.cpu.toolbox import compiled, object_code, toolbox
from multiopt_kernels.cpu.update import (
    Access,
    access,
    indented,
    memory,
    update_head,
    update_kernel,
)
from multiopt_kernels.extents import Form
from multiopt_kernels.operations import Kind, Operation, Trace
from multiopt_kernels.passes import Pass, cut
from multiopt_kernels.trace import trace_update

__all__ = ["Whole", "compile_whole", "whole_source"]

#: A pass over some elements of a row.
PASS = """
@njit
def {form}{number}(row, low, high, c, s, own, shared, bound, buffers):
{before}
    passed, clips = 0, (bound != inf) | (own != 1) | (shared != 1)
    for i in range(low, high):
{element}
    return passed
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
    end_sums(adding, {first}, {end}, buffers, which, row[{size}], {roots})
"""

LEAVE = """
@njit
def {form}_leave(row, low, high, own, shared, bound):
{before}
    for i in range(low, high):
        grad = clamp(own * {grad} * shared, bound)
        grads[i] = {left}
"""


class Whole(NamedTuple):
    """The text of a kernel, and what the groups that run it must know.

    Attributes:
        text: The text.
        passes: The number of passes.
        sums: The number of sums.
        words: The words of the buffers of a thread.
        divisible: Whether several threads may share any row; otherwise one without matrices.
    """

    text: str
    passes: int
    sums: int
    words: int
    divisible: bool


def whole_source(
    update: Callable[..., Any],
    slots: int,
    forms: list[Form],
    kinds: Mapping[str, bool | Kind],
    scalars: Trace | None,
    narrow: bool = False,
    masters: bool = False,
) -> Whole:
    """Print the text that the update of a rule is compiled from.

    Args:
        update: The update.
        slots: The number of slots of all forms.
        forms: The forms of the parameters.
        kinds: As for ``update_source``, like all others.
        scalars: The trace of the coefficients, or None.
        narrow: Whether parameters and gradients have 16 bits.
        masters: Whether there is one more slot, the master copy.

    Raises:
        NotTraceable: The update has no trace, or cannot be cut into passes.
    """
    source = Source()
    flat, *others = forms
    trace = trace_update(update, len(flat.slots), kinds, flat)
    passes = cut(trace, flat.extents)
    parts, calls, sums = [], [], list[Operation]()
    for number, one in enumerate(passes):
        text = PassText(trace, flat, kinds, sums)
        parts.append(text.scalars(source, f"scalars{number}", one))
        parts += [
            _elements(
                *(text, source, number, one, form),
                access(form, len(flat.slots), masters and form == "narrow"),
            )
            for form in _forms(narrow)
        ]
        call = f"{{form}}{number}(row, begin, end, c, s, own, shared, bound, buffers)"
        calls.append(
            ONE.format(
                number=number,
                norms=known_sums(sums),
                first=len(sums),
                end=len(sums) + len(one.sums),
                few=FEW,
                size=SIZE,
                passed=by_form(call, narrow, f"row[{WIDE}]"),
                roots=roots(one.sums),
            )
        )
        sums += one.sums
    count, words, choice = len(sums), len(sums) * FEW, "".join(calls)
    if others:
        (matrix,) = others
        trace = trace_update(update, len(matrix.slots), kinds, matrix)
        printed = printed_matrices(source, trace, matrix, kinds, narrow, masters)
        parts.append(printed.text)
        count = max(count, printed.sums)
        words = max(words, printed.buffers) + ROOM
        choice = f"if row[{NDIM}] < 2:\n{indent(choice, '    ')}\nelse:\n"
        choice += f"    room = buffers + {8 * (words - ROOM)}\n"
        choice += indent(printed.calls, "    ")
    leaving = by_form("{form}_leave(row, low, high, own, shared, bound)", narrow, f"row[{WIDE}]")
    for form in _forms(narrow):
        arrays_of = access(form, 0, masters=False)
        before = indented(arrays_of.before, 1)
        parts.append(
            LEAVE.format(form=form, before=before, grad=arrays_of.grad, left=arrays_of.left)
        )
    head = update_head(source, slots + (masters and narrow), kinds, scalars)
    body = UPDATE.format(passes=indent(choice, "    "), last=len(passes) - 1, leaving=leaving)
    return Whole(head + "".join(parts) + body, len(passes), count, words, not others)


def _forms(narrow: bool) -> tuple[str, ...]:
    return ("wide", "narrow") if narrow else ("wide",)


def _elements(
    text: PassText, source: Source, number: int, one: Pass, form: str, arrays: Access
) -> str:
    """Print the function that goes over elements of a row."""
    names, before = text.known()
    before = [*arrays.before, *before]
    before += [f"buffer{k} = at(buffers + {k * FEW} * ITEMSIZE)" for k in range(len(one.sums))]
    element: list[str] = []
    for value, array in one.reads.items():
        names[value] = arrays.name(array)
        element += arrays.read(array)
    element += text.lines(source, one.operations, names)
    for k, operation in enumerate(one.sums):
        element.append(f"buffer{k}[i - low] = {names[operation.inputs[0]]}")
    for array, value in one.writes.items():
        element += [line.format(names[value]) for line in arrays.writes[array]]
    return PASS.format(
        form=form,
        number=number,
        before=indented(needed(before, element), 1),
        element=indented(element, 2),
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
    carry, norm, total, one = known.carry, known.norm, known.total, getattr(np, dtype)(1)
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
    def finished(limbs, is_norm):  # type: ignore[no-untyped-def]
        return norm(limbs, limb_count, lowest) if is_norm else total(limbs, limb_count, lowest)

    @njit
    def end_sums(adding, first, end, buffers, which, size, roots):  # type: ignore[no-untyped-def]
        """Carry the sums; one thread rounds them right away, or takes norms (``roots``)."""
        norms = doubles(adding + sums * count * 8)
        for r in range(first, end):
            is_norm = (roots >> (r - first)) & 1 != 0
            limbs, buffer = words(adding + r * count * 8), buffers + (r - first) * FEW * itemsize
            if which < 0 and size <= FEW:
                norms[r] = few(limbs, buffer, size, one, is_norm)
                if norms[r] >= 0.0:
                    continue
                clear(limbs)
                add(limbs, buffer, size, one)
            carry(limbs, limb_count)
            if which < 0:
                norms[r] = finished(limbs, is_norm)

    @njit
    def sum_of(r, known, adding, buffers, which, is_norm):  # type: ignore[no-untyped-def]
        if which < 0:
            return doubles(adding + sums * count * 8)[r]
        # Other threads read the sum, so it is carried in a copy.
        limbs, total = words(buffers), words(known + r * count * 8)
        for i in range(count):
            limbs[i] = total[i]
        carry(limbs, limb_count)
        return finished(limbs, is_norm)

    @njit
    def root_mean(total, size):  # type: ignore[no-untyped-def]
        return np.sqrt((1.0 / max(size, 1)) * total)

    functions = {
        "begin_sums": begin_sums,
        "add_buffers": add_buffers,
        "end_sums": end_sums,
        "sum_of": sum_of,
        "root_mean": root_mean,
        "double": tools.types.float64,
        "ITEMSIZE": itemsize,
    }
    names = memory(dtype, storage_dtype) | functions | matrix_tools()
    return object_code(update=update_kernel(dtype, compiled(text, **names)))
