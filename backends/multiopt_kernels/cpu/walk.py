"""The kernel that walks through rows whose parameter or gradient does not lie as its slots do.

``walk`` runs another kernel, which knows nothing of that. It gives it one box of elements at a time
(``boxes``), as if that were a row: it copies the elements of the box into a buffer, where they lie
side by side, lets the kernel update or measure them there, and copies back what was written. Rows
that need no walk go to the kernel as they are.

So no rule is compiled a second time, and steps without such rows are as they were. The buffers are
on the stack of the thread, 64 KiB.
"""

from typing import Any

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
#: whether it works on parameters, whether it writes gradients, and the address of memory of which
#: it needs one word for each word of a row and each axis.
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
    into_up = tools.into_every_second[itemsize, False]
    into_down = tools.into_every_second[itemsize, True]
    prefetch = tools.prefetch
    reserve = tools.reserve(2 * ROOM)

    @tools.inlined
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

    @tools.inlined
    def scatter(source, target, step, n):  # type: ignore[no-untyped-def]
        x, y, first = elements(source), elements(target), 0
        if step == -1:
            for i in range(n):
                y[-i] = x[i]
            first = n
        elif step == 2:
            while first + TAKEN <= n:
                into_up(source + first * itemsize, target + 2 * first * itemsize)
                first += TAKEN
        elif step == -2:
            while first + TAKEN <= n:
                into_down(source + first * itemsize, target - 2 * first * itemsize)
                first += TAKEN
        for i in range(first, n):
            y[i * step] = x[i]

    @tools.inlined
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
    def turned(source, step, target, pitch, n, m):  # type: ignore[no-untyped-def]
        """Gather ``m`` lines of ``n`` elements, which become columns."""
        squares = n - n % TURNED
        for j in range(0, m - TURNED + 1, TURNED):
            for i in range(0, squares, TURNED):
                turn(
                    source + (j * step + i) * itemsize,
                    step * itemsize,
                    target + (i * pitch + j) * itemsize,
                    pitch * itemsize,
                )
        for j in range(m):
            first = squares if j < m - m % TURNED else 0
            place = target + (first * pitch + j) * itemsize
            move(source + (j * step + first) * itemsize, 1, place, pitch, n - first)

    @njit
    def copy(plan, extents, n, which, array, buffer, back):  # type: ignore[no-untyped-def]
        """Copy the elements of a box into a buffer, or back.

        ``which`` is 0 for a parameter, 1 for a gradient.
        """
        last, along = plan[AXES] - 1, plan[PARAM_ALONG + which]
        steps = FIRST_AXIS + PARAM_STEP + which
        step = plan[steps + along * AXIS_WORDS]
        turns = along != last and step == 1 and not back
        lines = n // extents[along] // (extents[last] if turns else 1)
        for line in range(lines):
            x, y, pitch, rest, place = 0, 0, 0, line, 1
            for axis in range(last, -1, -1):
                if axis == along:
                    pitch = place
                elif axis != last or not turns:
                    k = rest % extents[axis]
                    rest //= extents[axis]
                    x += k * plan[steps + axis * AXIS_WORDS]
                    y += k * place
                place *= extents[axis]
            first, second = array + x * itemsize, buffer + y * itemsize
            if turns:
                far = plan[steps + last * AXIS_WORDS]
                turned(first, far, second, pitch, extents[along], extents[last])
            elif back:
                move(second, pitch, first, step, extents[along])
            else:
                move(first, step, second, pitch, extents[along])

    @njit
    def walk_row(a, b, block_at, k, row_at, low, high):  # type: ignore[no-untyped-def]
        """Walk through the boxes of a row from ``low`` up to ``high``."""
        kernel, slots, has_params, writes_grads, room_at = a[0], a[1], a[2], a[3], a[4]
        width, row, plan = b[6], words(row_at), words(words(row_at)[WALK])
        part, extents = words(room_at), words(room_at + width * 8)
        param_buffer = reserve()
        grad_buffer = param_buffer + ROOM
        moves_param = has_params != 0 and plan[PARAM_ALONG] != IN_PLACE
        moves_grad = plan[GRAD_ALONG] != IN_PLACE
        axes = plan[AXES]
        for i in range(width):
            part[i] = row[i]
        b[1], b[2], b[3], b[4] = k, 0, k + 1, 0
        b[5] = room_at - words(b[0])[k] * width * 8
        for box in range(low, high):
            rest, n, param, grad, slot = box, 1, 0, 0, 0
            # Of the slots of a box, so many lie side by side.
            run_length, whole = 1, True
            for axis in range(axes - 1, -1, -1):
                words_at = FIRST_AXIS + axis * AXIS_WORDS
                first = rest % plan[words_at + COUNT] * plan[words_at + EXTENT]
                rest //= plan[words_at + COUNT]
                extents[axis] = min(plan[words_at + EXTENT], plan[words_at + LENGTH] - first)
                n *= extents[axis]
                param += first * plan[words_at + PARAM_STEP]
                grad += first * plan[words_at + GRAD_STEP]
                slot += first * plan[words_at + SLOT_STEP]
                if whole:
                    run_length = n
                    whole = extents[axis] == plan[words_at + LENGTH]
            if moves_param:
                copy(plan, extents, n, 0, row[PARAM] + param * itemsize, param_buffer, False)
            if moves_grad:
                copy(plan, extents, n, 1, row[GRAD] + grad * itemsize, grad_buffer, False)
            if has_params == 0:
                run_length = n  # the order of elements does not matter for what measures them
            part[SIZE] = run_length
            for number in range(n // run_length):
                place, rest, before = slot, number * run_length, 1
                for axis in range(axes - 1, -1, -1):
                    place += (
                        rest % extents[axis] * plan[FIRST_AXIS + axis * AXIS_WORDS + SLOT_STEP]
                    )
                    rest //= extents[axis]
                here = number * run_length * itemsize
                part[PARAM] = param_buffer + here if moves_param else row[PARAM] + place * itemsize
                part[GRAD] = grad_buffer + here if moves_grad else row[GRAD] + place * itemsize
                for i in range(FIRST_SLOT, FIRST_SLOT + slots):
                    part[i] = row[i] + place * slot_itemsize
                run(kernel, block_at)
            if moves_param:
                copy(plan, extents, n, 0, row[PARAM] + param * itemsize, param_buffer, True)
            if moves_grad and writes_grads != 0:
                copy(plan, extents, n, 1, row[GRAD] + grad * itemsize, grad_buffer, True)

    def walk(arguments_at):  # type: ignore[no-untyped-def]
        a, block_at = words(arguments_at), arguments_at + ARGUMENTS * 8
        b = words(block_at)
        index, k0, b0, k1, b1, table_at, width = words(b[0]), b[1], b[2], b[3], b[4], b[5], b[6]
        stop = k1 + 1 if b1 > 0 else k1
        k = first = k0
        while first < stop:
            row = words(table_at + index[k] * width * 8) if k < stop else words(table_at)
            if k < stop and (
                row[WALK] == 0 or (a[2] == 0 and words(row[WALK])[GRAD_ALONG] == IN_PLACE)
            ):
                k += 1
                continue
            if k > first:
                b[1], b[2], b[5] = first, b0 if first == k0 else 0, table_at
                b[3], b[4] = k, 0
                if k == stop:
                    b[3], b[4] = k1, b1
                run(a[0], block_at)
            if k < stop:
                blocks, count = -(-row[SIZE] // BLOCK), words(row[WALK])[BOXES]
                low = b0 if k == k0 else 0
                high = b1 if k == k1 else blocks
                if low < high:
                    row_at = table_at + index[k] * width * 8
                    walk_row(
                        a, b, block_at, k, row_at, low * count // blocks, high * count // blocks
                    )
                k += 1
            first = k
        return 0

    return object_code(walk=njit(walk))
