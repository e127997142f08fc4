"""The kernel that walks through rows whose parameter or gradient does not lie as its slots do.

``walk`` runs another kernel, which knows nothing of that. It gives it one box of elements at a time
(``boxes``), as if that were a row: it copies the elements of the box into a buffer, where they lie
side by side, lets the kernel update or measure them there, and copies back what was written. Rows
that need no walk go to the kernel as they are.

So no rule is compiled a second time, and steps without such rows are as they were. The buffers are
on the stack of the thread, 64 KiB.
"""

from multiopt_kernels.cpu.boxes import (
    AXES,
    AXIS_WORDS,
    BOXES,
    COUNT,
    EXTENT,
    FIRST_AXIS,
    GRAD_ALONG,
    GRAD_STEP,
    IN_PLACE,
    LENGTH,
    LINE,
    PARAM_ALONG,
    PARAM_STEP,
    ROOM,
    SLOT_STEP,
)
from multiopt_kernels.cpu.object_cache import ObjectCode
from multiopt_kernels.cpu.rows import FIRST_SLOT, GRAD, PARAM, SIZE, WALK
from multiopt_kernels.cpu.shares import BLOCK
from multiopt_kernels.cpu.toolbox import TAKEN, TURNED, object_code, toolbox

__all__ = ["ARGUMENTS", "compile_walk"]

#: The number of arguments before those of the kernel that is run: its address, the number of slots,
#: whether it updates parameters or only reads gradients, whether it overwrites gradients, and the
#: address of memory: as many words as a row has, and one for each axis.
ARGUMENTS = 5

#: How far ahead memory is fetched where every second element is taken, in bytes. Without that, a
#: step over every second of 1e7 elements took 1.15 times as long.
AHEAD = 2**13


def compile_walk(itemsize: int, slot_itemsize: int) -> ObjectCode:
    """Compile the kernel ``walk``.

    Args:
        itemsize: The size of an element of a parameter or gradient.
        slot_itemsize: The size of an element of a slot.
    """
    tools = toolbox()
    njit, words, turn, run = tools.njit, tools.words, tools.turn[itemsize], tools.run
    elements = {2: tools.shorts, 4: tools.halves, 8: tools.words}[itemsize]
    up, down = tools.every_second[itemsize, False], tools.every_second[itemsize, True]
    prefetch = tools.prefetch
    reserve = tools.reserve(2 * ROOM)

    @njit
    def gather(source, step, target, n):  # type: ignore[no-untyped-def]
        """Put the elements of a line side by side."""
        x, y, first = elements(source), elements(target), 0
        if step == -1:
            for i in range(n):
                y[i] = x[-i]
            first = n
        elif step == 2:
            while first + TAKEN < n:
                here = source + 2 * first * itemsize
                for line in range(0, 2 * TAKEN * itemsize, LINE):
                    prefetch(here + AHEAD + line)
                up(here, target + first * itemsize)
                first += TAKEN
        elif step == -2:
            while first + TAKEN < n:
                here = source - 2 * first * itemsize
                for line in range(0, 2 * TAKEN * itemsize, LINE):
                    prefetch(here - AHEAD - line)
                down(here, target + first * itemsize)
                first += TAKEN
        for i in range(first, n):
            y[i] = x[i * step]

    @njit
    def scatter(source, target, step, n):  # type: ignore[no-untyped-def]
        """Put elements that lie side by side back into a line."""
        x, y = elements(source), elements(target)
        if step == -1:
            for i in range(n):
                y[-i] = x[i]
        else:
            for i in range(n):
                y[i * step] = x[i]

    @njit
    def move(source, step, target, pitch, n):  # type: ignore[no-untyped-def]
        if pitch == 1:
            gather(source, step, target, n)
        elif step == 1:
            scatter(source, target, pitch, n)
        else:
            x, y = elements(source), elements(target)
            for i in range(n):
                y[i * pitch] = x[i * step]

    @njit
    def transpose(source, step, target, pitch, n, m):  # type: ignore[no-untyped-def]
        """Make columns of ``m`` lines of ``n`` elements."""
        whole, squares = m - m % TURNED, n - n % TURNED
        for j in range(0, whole, TURNED):
            for i in range(0, squares, TURNED):
                turn(
                    source + (j * step + i) * itemsize,
                    step * itemsize,
                    target + (i * pitch + j) * itemsize,
                    pitch * itemsize,
                )
        for j in range(m):
            first = squares if j < whole else 0
            place = target + (first * pitch + j) * itemsize
            move(source + (j * step + first) * itemsize, 1, place, pitch, n - first)

    @njit
    def copy(plan, extents, n, which, array, buffer, back):  # type: ignore[no-untyped-def]
        """Copy the ``n`` elements of a box into a buffer, or back.

        ``which`` is 0 for a parameter and 1 for a gradient. The elements of the box in the buffer
        are in the order of the slots.
        """
        last, along = plan[AXES] - 1, plan[PARAM_ALONG + which]
        steps = FIRST_AXIS + PARAM_STEP + which
        step = plan[steps + along * AXIS_WORDS]
        lies_across = along != last and step == 1 and not back
        lines = n // extents[along]
        if lies_across:
            lines //= extents[last]
        for line in range(lines):
            x, y, pitch, rest, place = 0, 0, 0, line, 1
            for axis in range(last, -1, -1):
                if axis == along:
                    pitch = place
                elif axis != last or not lies_across:
                    k = rest % extents[axis]
                    rest //= extents[axis]
                    x += k * plan[steps + axis * AXIS_WORDS]
                    y += k * place
                place *= extents[axis]
            x, y = array + x * itemsize, buffer + y * itemsize
            if lies_across:
                far = plan[steps + last * AXIS_WORDS]
                transpose(x, far, y, pitch, extents[along], extents[last])
            elif back:
                move(y, pitch, x, step, extents[along])
            else:
                move(x, step, y, pitch, extents[along])

    @njit
    def walk_row(a, b, block_at, k, row_at, first_box, end_box):  # type: ignore[no-untyped-def]
        """Run the kernel for some boxes of a row."""
        kernel, slots, updates, writes_grads, room_at = a[0], a[1], a[2] != 0, a[3] != 0, a[4]
        width, row, plan = b[6], words(row_at), words(words(row_at)[WALK])
        # What the kernel takes for the row.
        box, extents = words(room_at), words(room_at + width * 8)
        for i in range(width):
            box[i] = row[i]
        b[1], b[2], b[3], b[4] = k, 0, k + 1, 0
        b[5] = room_at - words(b[0])[k] * width * 8
        param_buffer = reserve()
        grad_buffer = param_buffer + ROOM
        moves_param = updates and plan[PARAM_ALONG] != IN_PLACE
        moves_grad = plan[GRAD_ALONG] != IN_PLACE
        axes = plan[AXES]
        for number in range(first_box, end_box):
            # Where the box begins, and how many of its elements lie side by side in the slots.
            n, rest, param, grad, slot, length, goes_on = 1, number, 0, 0, 0, 1, True
            for axis in range(axes - 1, -1, -1):
                at = FIRST_AXIS + axis * AXIS_WORDS
                first = rest % plan[at + COUNT] * plan[at + EXTENT]
                rest //= plan[at + COUNT]
                extents[axis] = min(plan[at + EXTENT], plan[at + LENGTH] - first)
                param += first * plan[at + PARAM_STEP]
                grad += first * plan[at + GRAD_STEP]
                slot += first * plan[at + SLOT_STEP]
                n *= extents[axis]
                if goes_on:
                    length, goes_on = n, extents[axis] == plan[at + LENGTH]
            param_at, grad_at = row[PARAM] + param * itemsize, row[GRAD] + grad * itemsize
            if moves_param:
                copy(plan, extents, n, 0, param_at, param_buffer, False)
            if moves_grad:
                copy(plan, extents, n, 1, grad_at, grad_buffer, False)
            if not updates:
                length = n  # what measures elements takes them in any order
            box[SIZE] = length
            for part in range(n // length):
                here, place, rest = part * length * itemsize, slot, part * length
                for axis in range(axes - 1, -1, -1):
                    step = plan[FIRST_AXIS + axis * AXIS_WORDS + SLOT_STEP]
                    place += rest % extents[axis] * step
                    rest //= extents[axis]
                box[PARAM] = param_buffer + here if moves_param else row[PARAM] + place * itemsize
                box[GRAD] = grad_buffer + here if moves_grad else row[GRAD] + place * itemsize
                for i in range(FIRST_SLOT, FIRST_SLOT + slots):
                    box[i] = row[i] + place * slot_itemsize
                run(kernel, block_at)
            if moves_param:
                copy(plan, extents, n, 0, param_at, param_buffer, True)
            if moves_grad and writes_grads:
                copy(plan, extents, n, 1, grad_at, grad_buffer, True)

    @njit
    def needs_walk(row, updates):  # type: ignore[no-untyped-def]
        return row[WALK] != 0 and (updates or words(row[WALK])[GRAD_ALONG] != IN_PLACE)

    def walk(arguments_at):  # type: ignore[no-untyped-def]
        a, block_at = words(arguments_at), arguments_at + ARGUMENTS * 8
        b = words(block_at)
        index, k0, b0, k1, b1, table_at, width = words(b[0]), b[1], b[2], b[3], b[4], b[5], b[6]
        stop = k1 + 1 if b1 > 0 else k1
        first = k0
        while first < stop:
            k = first
            while k < stop and not needs_walk(words(table_at + index[k] * width * 8), a[2] != 0):
                k += 1
            if k > first:
                b[1], b[2] = first, b0 if first == k0 else 0
                b[3], b[4] = (k1, b1) if k == stop else (k, 0)
                b[5] = table_at
                run(a[0], block_at)
            if k < stop:
                row_at = table_at + index[k] * width * 8
                row = words(row_at)
                # The blocks of a share are so many of all boxes.
                blocks, boxes = -(-row[SIZE] // BLOCK), words(row[WALK])[BOXES]
                low, high = b0 if k == k0 else 0, b1 if k == k1 else blocks
                walk_row(a, b, block_at, k, row_at, low * boxes // blocks, high * boxes // blocks)
            first = k + 1
        return 0

    return object_code(walk=njit(walk))
