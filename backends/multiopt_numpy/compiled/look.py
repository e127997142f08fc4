"""Where arrays are in memory, read from the objects themselves at every step."""

from multiopt_numpy.compiled.object_cache import ObjectCode
from multiopt_numpy.compiled.rows import GRAD, NDIM, PARAM, SHAPE, SIZE
from multiopt_numpy.compiled.toolbox import object_code, toolbox

__all__ = ["compile_look"]


def compile_look() -> ObjectCode:
    """What arrays are, where they are, and whether two parameters overlap, read at every step.

    ``look_numpy`` reads the fields of NumPy's public C structure (``PyArrayObject_fields``),
    ``look_torch`` asks torch through DLPack's table of C functions (DLPack 1.3,
    ``dltensor_from_py_object_no_sync``). Each fills the addresses into the table, marks the rows
    whose parameter or gradient is not exactly what the row says, and returns how many there are;
    or, if all are regular, -1 if a parameter overlaps with anything, or may, in the order given,
    and else -2 if gradients overlap with each other.
    """
    tools = toolbox()
    njit, words, halves, flags = tools.njit, tools.words, tools.halves, tools.bytes
    call, prefetch = tools.call, tools.prefetch

    @njit
    def overlap(order, n, table_at, width, itemsize):  # type: ignore[no-untyped-def]
        """-1 if a parameter overlaps with anything, or the order is not that of the addresses.

        Else -2 if gradients overlap, and 0 if nothing does.
        """
        last, reached, reached_by_params, found = 0, 0, 0, 0
        for k in range(2 * n):
            writes = order[k] < n
            row = words(table_at + (order[k] if writes else order[k] - n) * width * 8)
            if row[SIZE] > 0:
                low = row[PARAM] if writes else row[GRAD]
                high = low + row[SIZE] * itemsize
                if low < last or low < (reached if writes else reached_by_params):
                    return -1
                if low < reached:
                    found = -2
                last, reached = low, max(reached, high)
                if writes:
                    reached_by_params = max(reached_by_params, high)
        return found

    @njit
    def numpy_address(o, row, needed, kind, descr):  # type: ignore[no-untyped-def]
        """The address of the elements, or -1."""
        if words(o + 8)[0] != kind:
            return -1
        # data, number of dimensions (an int), dimensions, strides, base, descr, flags (an int)
        a = words(o + 16)
        ndim = halves(o + 24)[0]
        if ndim != row[NDIM] or (halves(o + 64)[0] & needed) != needed or a[5] != descr:
            return -1
        dims, shape = words(a[2]), words(row[SHAPE])
        for d in range(ndim):
            if dims[d] != shape[d]:
                return -1
        return a[0]

    def look_numpy(arguments_at):  # type: ignore[no-untyped-def]
        a = words(arguments_at)
        # The object arrays are NumPy arrays too: their first field is where the pointers stand.
        params, grads, n = words(words(a[0] + 16)[0]), words(words(a[1] + 16)[0]), a[2]
        table_at, width, irregular, order, itemsize = a[3], a[4], flags(a[5]), words(a[6]), a[7]
        kind, descr, count = a[9], a[10], 0
        for k in range(n):
            row = words(table_at + k * width * 8)
            if k + 4 < n:
                prefetch(params[k + 4] + 16)
                prefetch(grads[k + 4] + 16)
            # C-contiguous and aligned; the parameter writeable as well.
            p = numpy_address(params[k], row, 0x501, kind, descr)
            g = numpy_address(grads[k], row, 0x101, kind, descr)
            odd = p == -1 or g == -1
            irregular[k] = odd
            count += odd
            row[PARAM], row[GRAD] = p, g
        return overlap(order, n, table_at, width, itemsize) if count == 0 else count

    @njit
    def torch_address(o, row, call_at, kind, other, dtype, tensor_at):  # type: ignore[no-untyped-def]
        """The address of the elements, or -1."""
        if words(o + 8)[0] != kind and words(o + 8)[0] != other:
            return -1
        if call(call_at, o, tensor_at) != 0:
            return -1
        # DLTensor: data, device (two ints), dimensions and dtype, shape, strides, offset
        t = words(tensor_at)
        device, ndim = halves(tensor_at + 8)[0], halves(tensor_at + 16)[0]
        if device != 1 or ndim != row[NDIM] or t[2] >> 32 != dtype:
            return -1
        dims, strides, shape, expected = words(t[3]), words(t[4]), words(row[SHAPE]), 1
        for d in range(ndim - 1, -1, -1):
            # Strides of axes of length 1 say nothing about memory, but they tell a view such as
            # ``x.conj().imag``, whose values are the negatives of what is in its memory.
            if dims[d] != shape[d] or (strides[d] != expected and row[SIZE] > 0):
                return -1
            expected *= dims[d]
        if t[0] == 0 and row[SIZE] > 0:
            return -1
        return t[0] + t[5]

    def look_torch(arguments_at):  # type: ignore[no-untyped-def]
        a = words(arguments_at)
        params, grads, n = words(words(a[0] + 16)[0]), words(words(a[1] + 16)[0]), a[2]
        table_at, width, irregular, order, itemsize = a[3], a[4], flags(a[5]), words(a[6]), a[7]
        tensor_at, kind, other, dtype, call_at, count = a[8], a[9], a[10], a[11], a[12], 0
        for k in range(n):
            row = words(table_at + k * width * 8)
            if k + 8 < n:
                prefetch(params[k + 8] + 16)
                prefetch(grads[k + 8] + 16)
            p = torch_address(params[k], row, call_at, kind, other, dtype, tensor_at)
            g = torch_address(grads[k], row, call_at, kind, other, dtype, tensor_at)
            odd = p == -1 or g == -1
            irregular[k] = odd
            count += odd
            row[PARAM], row[GRAD] = p, g
        return overlap(order, n, table_at, width, itemsize) if count == 0 else count

    return object_code(look_numpy=njit(look_numpy), look_torch=njit(look_torch))
