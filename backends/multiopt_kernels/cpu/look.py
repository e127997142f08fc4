"""Kernels that find the memory of arrays, by reading the array objects at every step.

Nothing about an array is remembered from one step to the next, because a user may replace or change
it at any time. So each array is checked at each step: its type, dtype, shape, and flags or strides.
An array that does not pass is left to Python, which says what is wrong or lends a copy.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from multiopt_kernels.cpu.object_cache import ObjectCode
from multiopt_kernels.cpu.rows import GRAD, NDIM, PARAM, SHAPE, SIZE, STRIDES
from multiopt_kernels.cpu.team import Kernel
from multiopt_kernels.cpu.toolbox import object_code, toolbox

__all__ = ["ODD", "OVERLAP", "Look", "compile_look"]

#: An answer is three numbers packed into one: the second is multiplied by ``ODD``, the third by
#: ``OVERLAP``.
ODD, OVERLAP = 1 << 28, 1 << 56


class Look(NamedTuple):
    """How a group looks at the arrays of a library.

    Attributes:
        kernel: The compiled function.
        facts: From a dtype to the arguments by which the function recognizes arrays of this dtype;
            None if it takes none.
        holds: Whether arrays that the function takes also pass the checks that only Python can
            make. It is given the parameters, the gradients, and whether all are known to be leaves
            with gradients of their own; then only those without dimensions are passed.
    """

    kernel: Kernel
    facts: Callable[[str], Sequence[int] | None]
    holds: Callable[[np.ndarray, np.ndarray, bool], bool] | None = None


def compile_look() -> ObjectCode:
    """Compile the kernels ``look_numpy``, ``look_torch`` and ``overlap``.

    ``look_numpy`` reads the fields of NumPy's public C structure (``PyArrayObject_fields``).
    ``look_torch`` asks torch through DLPack's table of C functions (DLPack 1.3,
    ``dltensor_from_py_object_no_sync``). Either goes through some rows of a group. It skips rows
    without a gradient, and fills in the addresses of the other arrays, in the table and in the
    spans of the step. Rows whose parameter or gradient is not exactly what the row says are odd: it
    lists them, and their spans are zero. It returns the number of rows with a gradient, plus
    ``ODD`` times the number of odd rows, plus ``OVERLAP`` times the result of ``overlap``, which is
    computed at the end for the last group, if the step has an order of spans.

    ``overlap`` goes through the spans of a step in a given order, which should be the order in
    which they begin. It returns 2 if a parameter overlaps with anything, or if the order is another
    one, so that it might; otherwise 1 if gradients overlap with each other, and 0 if nothing does.
    """
    tools = toolbox()
    njit, words, halves = tools.njit, tools.words, tools.halves
    call, prefetch = tools.call, tools.prefetch

    @njit
    def numpy_address(o, row, writes, facts, itemsize):  # type: ignore[no-untyped-def]
        """The address of the elements, or -1 if the array is odd."""
        kind, descr, in_c_order = facts[0], facts[1], row[STRIDES] == 0
        # Flags: aligned; for a parameter also writeable; C-contiguous, unless the order is another.
        needed = (0x500 if writes else 0x100) + in_c_order
        if words(o + 8)[0] != kind:
            return -1
        # The fields: data, number of dimensions (an int), dimensions, strides, base, descr, flags
        # (an int).
        a = words(o + 16)
        ndim = halves(o + 24)[0]
        if ndim != row[NDIM] or (halves(o + 64)[0] & needed) != needed or a[5] != descr:
            return -1
        dims, shape = words(a[2]), words(row[SHAPE])
        for d in range(ndim):
            if dims[d] != shape[d]:
                return -1
        if not in_c_order:
            strides, expected = words(a[3]), words(row[STRIDES])
            for d in range(ndim):
                if dims[d] > 1 and strides[d] != expected[d] * itemsize:
                    return -1
        return a[0]

    @njit
    def torch_address(o, row, writes, facts, itemsize):  # type: ignore[no-untyped-def]
        """The address of the elements, or -1 if the tensor is odd."""
        kind, other, dtype, call_at, tensor_at = facts[0], facts[1], facts[2], facts[3], facts[4]
        if words(o + 8)[0] != kind and words(o + 8)[0] != other:
            return -1
        if call(call_at, o, tensor_at) != 0:
            return -1
        # The fields of DLTensor: data, device (two ints), number of dimensions and dtype, shape,
        # strides, offset.
        t = words(tensor_at)
        device, ndim = halves(tensor_at + 8)[0], halves(tensor_at + 16)[0]
        if device != 1 or ndim != row[NDIM] or t[2] >> 32 != dtype:
            return -1
        dims, strides, shape, expected = words(t[3]), words(t[4]), words(row[SHAPE]), 1
        if row[STRIDES] != 0:
            ordered = words(row[STRIDES])
            for d in range(ndim):
                if dims[d] != shape[d] or (dims[d] > 1 and strides[d] != ordered[d]):
                    return -1
            return t[0] + t[5]
        for d in range(ndim - 1, -1, -1):
            # A view such as ``x.conj().imag``, whose values are the negatives of what is in its
            # memory, has even strides, and so is not dense. The stride of an axis of length 1 does
            # not matter for memory, but if there is no other axis, it reveals such a view.
            matters = dims[d] > 1 or row[SIZE] == 1
            if dims[d] != shape[d] or (matters and strides[d] != expected and row[SIZE] > 0):
                return -1
            expected *= dims[d]
        if t[0] == 0 and row[SIZE] > 0:
            return -1
        return t[0] + t[5]

    @njit
    def numpy_ahead(o, facts):  # type: ignore[no-untyped-def]
        """Prefetch the dimensions of an array. Other objects have no address in that field."""
        if words(o + 8)[0] == facts[0]:
            prefetch(words(o + 16)[2])

    @njit
    def torch_ahead(o, facts):  # type: ignore[no-untyped-def]
        """Prefetch the tensor that the object holds."""
        if words(o + 8)[0] == facts[0] or words(o + 8)[0] == facts[1]:
            inner = words(o + 16)[0]
            prefetch(inner)
            prefetch(inner + 64)
            prefetch(inner + 128)

    @njit
    def walked(order, n, starts, ends):  # type: ignore[no-untyped-def]
        last, reached, reached_by_params, found = 0, 0, 0, 0
        for k in range(2 * n):
            j = order[k]
            low, high, writes = starts[j], ends[j], j < n
            if high > low:
                if low < last or low < (reached if writes else reached_by_params):
                    return 2
                if low < reached:
                    found = 1
                last, reached = low, max(reached, high)
                if writes:
                    reached_by_params = max(reached_by_params, high)
        return found

    def looking(address: Any, ahead: Any) -> Any:
        def look(arguments_at):  # type: ignore[no-untyped-def]
            a, b = words(arguments_at), words(words(arguments_at)[0])
            # The arrays of objects are NumPy arrays too: their first field is the address of their
            # elements, which are pointers.
            params, grads = words(words(b[0] + 16)[0]), words(words(b[1] + 16)[0])
            starts, ends, total, order_at = words(b[2]), words(b[3]), b[4], b[5]
            n, rows, places, table_at, width = a[1], words(a[2]), words(a[3]), a[4], a[5] * 8
            found, found_places, odd = words(a[6]), words(a[7]), words(a[8])
            nothing, itemsize, last, facts = a[9], a[10], a[11], words(arguments_at + 8 * 12)
            count, odds = 0, 0
            for k in range(n):
                i, row = places[k], words(table_at + rows[k] * width)
                if k + 16 < n:
                    prefetch(params[places[k + 16]] + 16)
                    prefetch(grads[places[k + 16]] + 16)
                    prefetch(table_at + rows[k + 16] * width)
                if k + 8 < n:
                    ahead(params[places[k + 8]], facts)
                    ahead(grads[places[k + 8]], facts)
                if grads[i] == nothing:
                    starts[i] = ends[i] = starts[total + i] = ends[total + i] = 0
                    continue
                p = address(params[i], row, True, facts, itemsize)
                g = address(grads[i], row, False, facts, itemsize)
                found[count], found_places[count] = rows[k], i
                if p == -1 or g == -1:
                    odd[odds] = count
                    odds += 1
                    starts[i] = ends[i] = starts[total + i] = ends[total + i] = 0
                else:
                    row[PARAM], row[GRAD] = p, g
                    size = row[SIZE] * itemsize
                    starts[i], ends[i] = p, p + size
                    starts[total + i], ends[total + i] = g, g + size
                count += 1
            code = 0
            if last != 0 and order_at != 0:
                code = walked(words(order_at), total, starts, ends)
            return count + odds * ODD + code * OVERLAP

        return njit(look)

    def overlap(arguments_at):  # type: ignore[no-untyped-def]
        a = words(arguments_at)
        return walked(words(a[5]), a[4], words(a[2]), words(a[3]))

    return object_code(
        look_numpy=looking(numpy_address, numpy_ahead),
        look_torch=looking(torch_address, torch_ahead),
        overlap=njit(overlap),
    )
