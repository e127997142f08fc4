"""How the update of a rule that treats a parameter as a whole is cut into passes over its elements.

A norm is known only when all elements have been seen. So what depends on a norm is computed in a
later pass than the norm. A pass reads the parameter, the gradient and the slots, computes elements,
writes new slots as soon as they are known, and sums what norms are taken of. Nothing of the size of
the parameter is kept between passes: a later pass computes again what it needs, from the slots that
an earlier one has written.

>>> from multiopt.rules.sums import norm
>>> from multiopt_kernels.operations import Kind
>>> from multiopt_kernels.trace import trace_update
>>> def update(xp, param, grad, slots, c):
...     (average,) = slots
...     average = c.beta * average + grad
...     unit = xp.asarray(average, dtype=xp.float64) / norm(xp, average)
...     return param - xp.asarray(unit, dtype=param.dtype), (average,)
>>> trace = trace_update(update, 1, {"beta": Kind.NUMBER}, is_whole=True)
>>> first, last = cut(trace, arrays=3)
>>> [operation.function for operation in first.operations], [x.function for x in first.sums]
(['multiply', 'add'], ['norm'])
>>> [operation.function for operation in last.operations]
['wide', 'divide', 'narrow', 'subtract']
>>> first.writes, last.writes  # the slot, then the parameter, by their numbers as inputs
({2: 5}, {0: 10})
"""

from collections.abc import Iterable
from typing import NamedTuple

from multiopt_kernels.operations import SUMS, NotTraceable, Operation, Trace

__all__ = ["Pass", "cut"]


class Pass(NamedTuple):
    """One pass over the elements of a parameter. Values are numbered as in the trace.

    Attributes:
        scalars: The operations on single numbers that come before it, those of earlier passes
            included.
        operations: The operations on elements.
        reads: The arrays it reads: for each value the number of the input that holds it now.
        writes: The arrays it writes: for each input the number of its new value.
        sums: The operations that end the pass. Each sums a value over all elements.
    """

    scalars: tuple[Operation, ...]
    operations: tuple[Operation, ...]
    reads: dict[int, int]
    writes: dict[int, int]
    sums: tuple[Operation, ...]


def cut(trace: Trace, arrays: int) -> list[Pass]:
    """Cut the trace of an update into passes.

    Args:
        trace: The trace.
        arrays: How many inputs are arrays: the parameter, the gradient and the slots.

    Raises:
        NotTraceable: It would take an array of the size of the parameter between two passes.
    """
    made = {operation.output: operation for operation in trace.operations}
    # How many passes must be complete before a value can be computed, and whether it has elements.
    depth = dict.fromkeys(range(len(trace.inputs) + len(trace.literals)), 0)
    has_elements = {value: value < arrays for value in depth}
    for operation in trace.operations:
        is_sum = operation.function in SUMS
        depth[operation.output] = max(depth[x] for x in operation.inputs) + is_sum
        has_elements[operation.output] = not is_sum and any(
            has_elements[x] for x in operation.inputs
        )
        if is_sum and not has_elements[operation.inputs[0]]:
            raise NotTraceable("sums something that is not an array")
    param, *slots = trace.results
    last = max(depth[value] for value in trace.results)
    held = {value: value for value in range(arrays)}
    passes = []
    for number in range(last + 1):
        sums = [x for x in trace.operations if x.function in SUMS and depth[x.output] == number + 1]
        writes = {2 + k: value for k, value in enumerate(slots) if depth[value] == number}
        writes = {k: value for k, value in writes.items() if value != k}
        if number == last:
            writes[0] = param
        elements = _needed(
            [*writes.values(), *(x.inputs[0] for x in sums)], made, has_elements, held
        )
        reads = {value: held[value] for value in elements if value in held}
        operations = [made[value] for value in sorted(elements - reads.keys())]
        scalars = [
            x
            for x in trace.operations
            if not has_elements[x.output] and x.function not in SUMS and depth[x.output] <= number
        ]
        passes.append(Pass(tuple(scalars), tuple(operations), reads, writes, tuple(sums)))
        # The old values are gone, the new ones can be read.
        held = {value: k for value, k in held.items() if k not in writes}
        held |= {value: k for k, value in writes.items()}
    return passes


def _needed(
    ends: Iterable[int],
    made: dict[int, Operation],
    has_elements: dict[int, bool],
    held: dict[int, int],
) -> set[int]:
    """The values with elements from which some values are computed, those included.

    Raises:
        NotTraceable: One of them is an input that has been overwritten.
    """
    needed: set[int] = set()
    waiting = list(ends)
    while waiting:
        value = waiting.pop()
        if value in needed or not has_elements[value]:
            continue
        needed.add(value)
        if value in held:
            continue
        if value not in made:
            raise NotTraceable("needs a slot, or the parameter, after it has changed")
        waiting += made[value].inputs
    return needed
