"""Tables that the commands print: no line is wider than the terminal, cells are cut instead."""

import sys
from collections.abc import Collection, Sequence
from shutil import get_terminal_size
from unicodedata import combining, east_asian_width

__all__ = ["table", "width"]

GAP = "  "


def width() -> int:
    """The columns of the terminal, 80 where there is none; ``COLUMNS``, if set, overrides both."""
    return get_terminal_size().columns


def table(rows: Sequence[Sequence[str] | str], numbers: Collection[int] = ()) -> str:
    """Lay out a table.

    Cells that are too wide for the terminal are cut in the middle, since long names differ at their
    ends. The widest of those with text are cut first.

    Args:
        rows: Each of as many cells as the others, or one text across all columns.
        numbers: The columns, from 0, that are aligned to the right.

    Returns:
        The lines of the table, without a newline at the end.

    >>> print(table([("name", "bytes"), ("loc", "24"), "in all: 24"], numbers={1}))
    name  bytes
    loc      24
    in all: 24
    """
    lines = [_printable(row) if isinstance(row, str) else [*map(_printable, row)] for row in rows]
    cells = [row for row in lines if not isinstance(row, str)]
    widths = [max(map(_columns, column)) for column in zip(*cells, strict=True)]
    room, mark = width(), _mark()
    texts = [i for i in range(len(widths)) if i not in numbers]
    taken = sum(widths[i] for i in numbers) + len(GAP) * (len(widths) - 1)
    bound = _bound([widths[i] for i in texts], room - taken)
    for i in texts:
        widths[i] = min(widths[i], bound)
    laid_out = [
        row
        if isinstance(row, str)
        else GAP.join(
            _filled(_cut(cell, size, mark), size, i in numbers)
            for i, (cell, size) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in lines
    ]
    return "\n".join(_cut(line, room, mark) for line in laid_out)


def _printable(text: str) -> str:
    """The text as it will be written: letters that the terminal has not are escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _mark() -> str:
    """What stands for that which was cut."""
    return "…" if _printable("…") == "…" else "..."


def _columns(text: str) -> int:
    """How many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "FW" else 1 for c in text)


def _bound(widths: Sequence[int], room: int) -> int:
    """The largest bound to all widths with which they fit into the room, and at least 1."""
    if sum(widths) <= room:
        return max(widths, default=1)
    bounds = range(room, 1, -1)
    return next((x for x in bounds if sum(min(size, x) for size in widths) <= room), 1)


def _cut(text: str, size: int, mark: str) -> str:
    """The text in no more columns than that, its middle left out if there are too few."""
    if _columns(text) <= size:
        return text
    room = size - len(mark)
    if room < 0:
        return mark[:size]
    end = _head(text[::-1], room // 2)[::-1]
    return _head(text, room - room // 2) + mark + end


def _head(text: str, size: int) -> str:
    """As much of a text as goes into so many columns."""
    taken = 0
    for i, letter in enumerate(text):
        taken += _columns(letter)
        if taken > size:
            return text[:i]
    return text


def _filled(text: str, size: int, ends: bool) -> str:
    blanks = " " * (size - _columns(text))
    return blanks + text if ends else text + blanks
