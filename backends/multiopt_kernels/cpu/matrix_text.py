"""The texts that ``matrices`` fills in: functions that go through a matrix, and calls of them."""

__all__ = [
    "CALL",
    "COLUMNS",
    "COLUMN_MEANS",
    "PASS",
    "ROW_MEANS",
    "THEN",
    "TILE",
    "TOTAL",
    "TOTALS",
]

#: What begins a matrix: the means of what has a number for each row.
TOTALS = """
@njit
def totals{number}(row, m, rows, columns, c, s, room):
{before}
    limbs, numbers_at = words(room + {limbs}), room + {column}
    numbers = doubles(numbers_at)
{totals}
    return ({results})
"""

TOTAL = """
v{output} = 0.0
for first in range(0, max(rows, 1), {few}):
    n = min({few}, rows - first)
    for i in range(n):
        r = first + i
{lines}
        numbers[i] = {value}
    v{output} = mean(limbs, numbers_at, first, n, rows)
"""

#: A tile of a matrix: some rows and columns of it.
TILE = """
@njit
def {name}(
    row, m, first, last, low, high, rows, columns, c, s, t, own, shared, bound, buffers, filled
):
{before}
    passed, clips = 0, (bound != inf) | (own != 1) | (shared != 1)
    width, column = high - low, m * columns + low
    for r in range(first, last):
        start, k = (m * rows + r) * columns + low, filled + (r - first) * width
{line}
        for j in range(width):
            i = start + j
{element}
    return passed
"""

#: What follows from the mean of a row or of a column.
THEN = """
@njit
def {name}{number}(row, m, {index}, rows, columns, c, s, t, mean):
{before}
{lines}
"""

#: Some rows of a strip of columns: their ends, and then their pieces.
COLUMNS = """
@njit
def {name}(row, m, first, last, low, high, rows, columns, c, s, t, own, shared, bound, room):
{before}
    passed, clips = 0, (bound != inf) | (own != 1) | (shared != 1)
    width, column = high - low, m * columns + low
    state, numbers = words(room), doubles(room)
    begin_rows(room, width)
    for r in range(first, last):
        start = (m * rows + r) * columns + low
{line}
        for j in range(width):
            i = start + j
{element}
            seen(state, j, {value})
    anchored(room, width)
    for r in range(first, last):
        start = (m * rows + r) * columns + low
{line}
        for j in range(width):
            i = start + j
{element}
            added(state, numbers, j, {value})
    return passed
"""

PASS = """
@njit
def {form}_matrices{number}(row, c, s, own, shared, bound, adding, buffers, room):
    rows, columns, stack = sizes(row)
    passed, filled, several = 0, 0, max({few} // max(columns, 1), 1)
    begin_sums(adding, {first}, {end}, -1, row[{size}])
    for m in range(stack):
        t = totals{number}(row, m, rows, columns, c, s, room)
        for r in range(0, rows, several):
            last = min(r + several, rows)
            for low in range(0, max(columns, 1), {few}):
                high = min(low + {few}, columns)
                n = (last - r) * (high - low)
                if filled + n > {few}:
                    add_buffers(adding, {first}, {end}, buffers, filled, -1, row[{size}])
                    filled = 0
                passed |= {form}_tile{number}(
                    row, m, r, last, low, high, rows, columns, c, s, t, own, shared, bound,
                    buffers, filled,
                )
{row_means}
                filled += {filled}
{column_means}
    add_buffers(adding, {first}, {end}, buffers, filled, -1, row[{size}])
    end_sums(adding, {first}, {end}, buffers, -1, row[{size}], {roots})
    return passed
"""

ROW_MEANS = """
for i in range(r, last):
    at_row = buffers + 8 * ({buffer} + filled + (i - r) * (high - low))
    found = mean(words(room + {limbs}), at_row, low, high - low, columns)
    if high == columns:
        row{number}(row, m, i, rows, columns, c, s, t, found)
"""

COLUMN_MEANS = """
is_tall = rows > {few}
strip = {tall} if is_tall else {strip}
for low in range(0, columns, strip):
    high = min(low + strip, columns)
    begin_strip(room, high - low, is_tall)
    for r in range(0, max(rows, 1), {few}):
        last = min(r + {few}, rows)
        {form}_columns{number}(
            row, m, r, last, low, high, rows, columns, c, s, t, own, shared, bound, room
        )
        for j in range(high - low):
            if not settled(room, j, last - r, is_tall):
                {form}_column{number}(
                    row, m, r, last, low + j, low + j + 1, rows, columns, c, s, t, own, shared,
                    bound, room + {column}, 0,
                )
                settle(room, j, last - r, is_tall)
    for j in range(high - low):
        found = inverse(rows) * sum_of_column(room, j, is_tall)
        column{number}(row, m, low + j, rows, columns, c, s, t, found)
"""

CALL = """
s_{number} = matrix_scalars{number}(c, ({sums}))
passed |= {passed}
"""
