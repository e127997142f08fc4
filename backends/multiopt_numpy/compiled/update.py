"""The update of a rule over the rows of a table, compiled from its trace.

Nothing of a rule's mathematics stands here. What this file adds to the text of the formula and of
the coefficients are loops and addresses.
"""

import math
from collections.abc import Callable, Mapping
from textwrap import indent
from typing import Any

from multiopt.rules.arithmetic import BLOCK, clamp
from multiopt_numpy.compiled.object_cache import ObjectCode
from multiopt_numpy.compiled.rows import FIRST_SLOT, GRAD, PARAM, SIZE
from multiopt_numpy.compiled.source import Source
from multiopt_numpy.compiled.toolbox import compiled, object_code, toolbox
from multiopt_numpy.trace import Kind, Trace, trace_function, trace_update

__all__ = ["compile_update", "update_source"]

#: ``coefficients`` is ``Rule.coefficients``: computed in float64, rounded once to the dtype; or
#: where the host computes them, the numbers of a row are they. ``clipped`` says whether the bound
#: changed the gradient. What most rows run stands by itself and in the loop over the rows: 1000
#: parameters of 10 take 30 us; in one function with the rest, and called, 65.
TEXT = """
FIRST_NUMBER, COUNT = {first_number}, {count}

{functions}
@njit
def coefficients(numbers, step):
{coefficients}

@inlined
def plain(row, low, high, c):
{before}
    for i in range(low, high):
        grad = grads[i]
{plain}
    return 0

@njit
def clipped(row, low, high, c, own, shared, bound, writes):
{before}
    passed = 0
    if bound == inf:
        for i in range(low, high):
            grad = own * grads[i] * shared
            if writes:
                grads[i] = grad
{element}
    else:
        for i in range(low, high):
            grad = own * grads[i] * shared
            passed |= (grad > bound) | (grad < -bound)
            grad = clamp(grad, bound)
            if writes:
                grads[i] = grad
{element}
    return passed

@inlined
def update(row, low, high, c, own, shared, bound, writes):
    if bound == inf and own == 1 and shared == 1:
        return plain(row, low, high, c)
    return clipped(row, low, high, c, own, shared, bound, writes)
"""


def update_source(
    update: Callable[..., Any],
    slots: int,
    kinds: Mapping[str, bool | Kind],
    scalars: Trace | None,
) -> str:
    """The text that the update of a rule is compiled from.

    Args:
        update: As for ``trace_update``.
        slots: Likewise.
        kinds: What each coefficient is, likewise.
        scalars: How they are computed, from the numbers in a row. None if the host computes them:
            then they are the numbers in a row.

    Raises:
        NotTraceable: The formula has no trace.
    """
    count = len(kinds) if scalars is None else len(scalars.inputs) - 1
    numbers = [f"numbers[{k}]" for k in range(count)]
    source = Source()
    lines: list[str] = []
    values, switch = numbers, "{} != 0, "
    if scalars is not None:
        lines, values = source.lines(scalars, ["step", *numbers])
        switch = "{}, "
    rounded = "".join(
        ("dtype({}), " if kind is Kind.NUMBER else switch).format(value)
        for value, kind in zip(values, kinds.values(), strict=True)
    )
    arrays = ["param", *(f"slot{k}" for k in range(slots))]
    places = [PARAM, *range(FIRST_SLOT, FIRST_SLOT + slots)]
    before = [f"grads = at(row[{GRAD}])"]
    before += [f"{name}s = at(row[{place}])" for name, place in zip(arrays, places, strict=True)]
    before += [f"c{k} = c[{k}]" for k in range(len(kinds))]
    trace = trace_update(update, slots, kinds)
    inputs = ["param", "grad", *arrays[1:], *(f"c{k}" for k in range(len(kinds)))]
    body, results = source.lines(trace, inputs, lambda x: f"dtype({x!r})")
    element = [*(f"{name} = {name}s[i]" for name in arrays), *body]
    element += [f"{name}s[i] = {value}" for name, value in zip(arrays, results, strict=True)]
    clamping = source.function(trace_function(clamp, ["x", "bound"]))
    return TEXT.format(
        first_number=FIRST_SLOT + slots,
        count=count,
        functions=f"{source}{clamping}",
        coefficients=_indented([*lines, f"return ({rounded})"], 1),
        before=_indented(before, 1),
        plain=_indented(element, 2),
        element=_indented(element, 3),
    )


def _indented(lines: list[str], depth: int) -> str:
    return indent("\n".join(lines), "    " * depth)


def compile_update(text: str, dtype: str) -> ObjectCode:
    """The step of a rule over the rows of a table.

    Args:
        text: What ``update_source`` gave.
        dtype: That of the computation: ``"float32"`` or ``"float64"``.
    """
    tools = toolbox()
    known = compiled(text, at=tools.at[dtype], dtype=getattr(tools.types, dtype))
    return object_code(update=_update_kernel(dtype, known))


def _update_kernel(dtype: str, known: dict[str, Any]) -> Any:
    """The loop over the rows of a share."""
    tools = toolbox()
    coefficients, update_elements = known["coefficients"], known["update"]
    first_number, count = known["FIRST_NUMBER"], known["COUNT"]
    words, doubles, flags = tools.words, tools.doubles, tools.bytes
    number, prefetch = getattr(tools.types, dtype), tools.prefetch

    def update(arguments_at):  # type: ignore[no-untyped-def]
        a = words(arguments_at)
        index, k0, b0, k1, b1, table_at, width = words(a[0]), a[1], a[2], a[3], a[4], a[5], a[6]
        steps, own, shared, bounds = words(a[7]), doubles(a[8]), doubles(a[9]), doubles(a[10])
        clipped, write, counts = flags(a[11]), a[12], a[13]
        if k1 == k0 and b1 == 0:
            return 0
        known = doubles(table_at + (index[k0] * width + first_number) * 8)
        known_step = steps[index[k0]] + 1
        c = coefficients(known, known_step)
        for k in range(k0, k1 + 1 if b1 > 0 else k1):
            r = index[k]
            row_at = table_at + r * width * 8
            row, numbers = words(row_at), doubles(row_at + first_number * 8)
            if k + 4 < k1:
                ahead = words(table_at + index[k + 4] * width * 8)
                for i in range(FIRST_SLOT, first_number):
                    prefetch(ahead[i])
                prefetch(ahead[PARAM])
                prefetch(ahead[GRAD])
            low = b0 * BLOCK if k == k0 else 0
            high = min(b1 * BLOCK, row[SIZE]) if k == k1 else row[SIZE]
            step, bound = steps[r] + 1, bounds[r]
            # Most rows have the numbers of the row before. To compute them takes 40 ns.
            same = step == known_step
            for i in range(count):
                same &= numbers[i] == known[i]
            if not same:
                c = coefficients(numbers, step)
                known, known_step = numbers, step
            x, y, z = number(own[r]), number(shared[r]), number(bound)
            scaled = x != 1 or y != 1
            writes = write != 0 and (scaled or bound != math.inf)
            if update_elements(row, low, high, c, x, y, z, writes) != 0 or scaled:
                clipped[r] = 1
            if counts != 0:
                steps[r] = step
        return 0

    return tools.njit(update)
