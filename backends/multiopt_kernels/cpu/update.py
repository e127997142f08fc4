"""The kernel that updates parameters: the update of a rule, in loops over rows and elements.

This file contains no rule's mathematics. The update and the coefficients are printed from their
traces; this file adds loops, addresses and clipping. Element by element, a kernel does what the
trace says, in its order and in the compute dtype, so its results are those of the rule itself.

The lines between a parameter that is read and the same parameter written are the trace:

>>> def descend(xp, param, grad, slots, c):
...     return param - c.lr * grad, slots
>>> print(update_source(descend, 0, {"lr": Kind.NUMBER}, scalars=None))  # doctest: +ELLIPSIS
<BLANKLINE>
...
    for i in range(low, high):
        grad = grads[i]
        param = params[i]
        v3 = c0 * grad
        v4 = param - v3
        params[i] = v4
...
"""

import math
from collections.abc import Callable, Mapping
from textwrap import indent
from typing import Any, NamedTuple

from multiopt.rules.arithmetic import clamp
from multiopt_kernels.cpu.narrow import conversions
from multiopt_kernels.cpu.object_cache import ObjectCode
from multiopt_kernels.cpu.rows import FIRST_SLOT, GRAD, PARAM, SIZE, WIDE
from multiopt_kernels.cpu.shares import BLOCK
from multiopt_kernels.cpu.source import Source
from multiopt_kernels.cpu.toolbox import compiled, object_code, toolbox
from multiopt_kernels.operations import Kind, Trace
from multiopt_kernels.trace import trace_function, trace_update

__all__ = [
    "access",
    "compile_update",
    "indented",
    "memory",
    "update_head",
    "update_kernel",
    "update_source",
]

#: The beginning of the text of a kernel. ``coefficients`` does what ``Rule.coefficients`` does: it
#: computes them in float64 and rounds them once to the compute dtype. If the host computes them,
#: they are the numbers of the row.
HEAD = """
FIRST_NUMBER, COUNT = {first_number}, {count}

{functions}
@njit
def coefficients(numbers, step):
{coefficients}
"""

#: The function that updates some elements of a row.
UPDATE = """
@inlined
def update(row, k, low, high, c, own, shared, bound, writes, sums):
    is_plain = bound == inf and own == 1 and shared == 1
{choices}
"""

#: The loops over the elements of a row, without and with clipping. The latter returns whether the
#: bound on elements changed the gradient. Most rows run the loop without clipping, which is a
#: function of its own and inlined into the loop over rows: 1000 parameters of 10 elements then take
#: 30 us. They take 65 us if both loops are in one function that is called.
LOOPS = """
@inlined
def {form}_plain(row, low, high, c):
{before}
    for i in range(low, high):
        grad = {grad}
{plain}
    return 0

@njit
def {form}_clipped(row, low, high, c, own, shared, bound, writes):
{before}
    passed = 0
    if bound == inf:
        for i in range(low, high):
            grad = own * {grad} * shared
{element}
    else:
        for i in range(low, high):
            grad = own * {grad} * shared
            passed |= (grad > bound) | (grad < -bound)
            grad = clamp(grad, bound)
{element}
    # A loop of its own: a store that never happens made the loops above 1.25 times as long.
    if writes:
        for i in range(low, high):
            grad = clamp(own * {grad} * shared, bound)
            grads[i] = {left}
    return passed
"""

CHOICE = """\
if {condition}:
    if is_plain:
        return {form}_plain(row, low, high, c)
    return {form}_clipped(row, low, high, c, own, shared, bound, writes)
"""


def update_source(
    update: Callable[..., Any],
    slots: int,
    kinds: Mapping[str, bool | Kind],
    scalars: Trace | None,
    narrow: bool = False,
    masters: bool = False,
) -> str:
    """Print the text that the update of a rule is compiled from.

    Args:
        update: The update.
        slots: The number of slots.
        kinds: What each coefficient is, as ``trace_update`` takes it.
        scalars: The trace of the coefficients, which computes them from the numbers in a row. None
            if the host computes them; they are then the numbers in a row.
        narrow: Whether parameters and gradients have 16 bits, except in rows that are ``WIDE``.
        masters: Whether there is one more slot, the master copy of a 16-bit parameter.

    Raises:
        NotTraceable: The update has no trace.
    """
    source = Source()
    trace = trace_update(update, slots, kinds)
    arrays = ["param", *(f"slot{k}" for k in range(slots))]
    inputs = ["param", "grad", *arrays[1:], *(f"c{k}" for k in range(len(kinds)))]
    body, results = source.lines(trace, inputs, lambda x: f"dtype({x!r})")
    loops = [_loops("wide", len(kinds), body, results)]
    choices = [CHOICE.format(form="wide", condition="True")]
    if narrow:
        loops.append(_loops("narrow", len(kinds), body, results, masters))
        choices.insert(0, CHOICE.format(form="narrow", condition=f"row[{WIDE}] == 0"))
    head = update_head(source, slots + masters, kinds, scalars)
    return head + "".join(loops) + UPDATE.format(choices=indented(choices, 1))


def update_head(
    source: Source, slots: int, kinds: Mapping[str, bool | Kind], scalars: Trace | None
) -> str:
    """Print what any kernel that updates begins with: its functions, and the coefficients.

    Args:
        source: What has printed the update.
        slots: The number of slots, master copy included.
        kinds: What each coefficient is.
        scalars: The trace of the coefficients, or None.
    """
    count = len(kinds) if scalars is None else len(scalars.inputs) - 1
    numbers = [f"numbers[{k}]" for k in range(count)]
    lines: list[str] = []
    values, switch = numbers, "{} != 0, "
    if scalars is not None:
        lines, values = source.lines(scalars, ["step", *numbers])
        switch = "{}, "
    rounded = "".join(
        ("dtype({}), " if kind is Kind.NUMBER else switch).format(value)
        for value, kind in zip(values, kinds.values(), strict=True)
    )
    clamping = source.function(trace_function(clamp, ["x", "bound"]))
    return HEAD.format(
        first_number=FIRST_SLOT + slots,
        count=count,
        functions=f"{source}{clamping}",
        coefficients=indented([*lines, f"return ({rounded})"], 1),
    )


def _loops(
    form: str, coefficients: int, body: list[str], results: list[str], masters: bool = False
) -> str:
    """Print the loops over the elements of a row, with the update in them.

    Args:
        form: ``"wide"``, or ``"narrow"`` for 16-bit parameters and gradients.
        coefficients: The number of coefficients.
        body: The operations of the update, one per line.
        results: The new values of the parameter and of each slot, as they are written.
        masters: Whether there is one more slot, the master copy.
    """
    memory = access(form, len(results) - 1, masters)
    reads, writes = memory.reads, memory.writes
    element = [*reads[0], *(line for lines in reads[2:] for line in lines), *body]
    for write, result in zip((writes[0], *writes[2:]), results, strict=True):
        element += [line.format(result) for line in write]
    return LOOPS.format(
        form=form,
        before=indented([*memory.before, *(f"c{k} = c[{k}]" for k in range(coefficients))], 1),
        grad=memory.grad,
        left=memory.left,
        plain=indented(element, 2),
        element=indented(element, 3),
    )


class Access(NamedTuple):
    """How printed text reads and writes the element ``i`` of the arrays of a row.

    Attributes:
        before: The lines before a loop.
        reads: For the parameter, the gradient and each slot the lines that read it; those of the
            gradient are up to the loop.
        writes: For each the lines that write ``{}``.
        grad: The gradient in memory.
        left: The number to which a gradient is set where it is left clipped.
    """

    before: list[str]
    reads: list[list[str]]
    writes: list[list[str]]
    grad: str
    left: str

    @staticmethod
    def name(array: int) -> str:
        """The name of an element of the parameter, the gradient or a slot."""
        return ("param", "grad", f"slot{array - 2}")[min(array, 2)]

    def read(self, array: int) -> list[str]:
        """The lines that read it; a gradient is clipped, and ``passed`` if the bound changed it."""
        if array != 1:
            return self.reads[array]
        return [
            f"grad = {self.grad}",
            "if clips:",
            "    grad = own * grad * shared",
            "    passed |= (grad > bound) | (grad < -bound)",
            "    grad = clamp(grad, bound)",
        ]


def access(form: str, slots: int, masters: bool, places: Mapping[int, str] | None = None) -> Access:
    """How text of a form reads and writes.

    Args:
        form: As for ``_loops``.
        slots: The number of slots.
        masters: As for ``_loops``.
        places: Where the slots are that have another place than ``i``.
    """
    places = places or {}
    at, load, store = "at", "{}", "{}"
    if form == "narrow":
        at, load, store = "shorts", "load({})", "store({})"
    names = [f"slot{k}" for k in range(slots)]
    kept = [*names, *(["master"] if masters else [])]
    before = [f"grads = {at}(row[{GRAD}])", f"params = {at}(row[{PARAM}])"]
    before += [f"{name}s = at(row[{FIRST_SLOT + k}])" for k, name in enumerate(kept)]
    read = [f"param = {load.format('params[i]')}"]
    write = [f"params[i] = {store}"]
    if masters:
        # If the master copy does not round to the parameter, somebody has changed the parameter,
        # or this is its first step. The parameter itself counts then.
        read += [
            "master = masters[i]",
            "param = master if load(store(master)) == param else param",
        ]
        write += ["masters[i] = {}"]
    return Access(
        before,
        [read, [], *([f"{name} = {name}s[{places.get(k, 'i')}]"] for k, name in enumerate(names))],
        [write, [], *([f"{name}s[{places.get(k, 'i')}] = {{}}"] for k, name in enumerate(names))],
        load.format("grads[i]"),
        store.format("grad"),
    )


def indented(lines: list[str], depth: int) -> str:
    """Lines at a depth of blocks."""
    return indent("\n".join(lines), "    " * depth)


def compile_update(text: str, dtype: str, storage_dtype: str) -> ObjectCode:
    """Compile the kernel ``update``.

    Args:
        text: The text from ``update_source``.
        dtype: The compute dtype: ``"float32"`` or ``"float64"``.
        storage_dtype: The dtype of parameters and gradients. It differs from ``dtype`` if the text
            is for 16 bits.
    """
    return object_code(update=update_kernel(dtype, compiled(text, **memory(dtype, storage_dtype))))


def memory(dtype: str, storage_dtype: str) -> dict[str, Any]:
    """The names by which printed text reads and writes memory."""
    tools = toolbox()
    names = {"at": tools.at[dtype], "dtype": getattr(tools.types, dtype)}
    if storage_dtype != dtype:
        load, store = conversions(storage_dtype)
        names |= {"shorts": tools.shorts, "load": load, "store": store}
    return names


def update_kernel(dtype: str, known: dict[str, Any]) -> Any:
    """The loop over the rows of a share, as a function to compile."""
    tools = toolbox()
    coefficients, update_elements = known["coefficients"], known["update"]
    first_number, count = known["FIRST_NUMBER"], known["COUNT"]
    words, doubles, flags = tools.words, tools.doubles, tools.bytes
    number, prefetch = getattr(tools.types, dtype), tools.prefetch

    def update(arguments_at):  # type: ignore[no-untyped-def]
        a = words(arguments_at)
        index, k0, b0, k1, b1, table_at, width = words(a[0]), a[1], a[2], a[3], a[4], a[5], a[6]
        steps, own, shared, bounds = words(a[7]), doubles(a[8]), doubles(a[9]), doubles(a[10])
        clipped, write, counts, sums = flags(a[11]), a[12], a[13], words(arguments_at + 14 * 8)
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
            # Most rows have the numbers and the step of the row before, and so its coefficients,
            # which take 40 ns to compute.
            same = step == known_step
            for i in range(count):
                same &= numbers[i] == known[i]
            if not same:
                c = coefficients(numbers, step)
                known, known_step = numbers, step
            x, y, z = number(own[r]), number(shared[r]), number(bound)
            scaled = x != 1 or y != 1
            writes = write != 0 and (scaled or bound != math.inf)
            if update_elements(row, k, low, high, c, x, y, z, writes, sums) != 0 or scaled:
                clipped[r] = 1
            if counts != 0:
                steps[r] = step
        return 0

    return tools.njit(update)
