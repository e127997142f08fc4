"""Tables for the commands' reports. Long cells are cut, so that no line exceeds the terminal."""

import sys
from collections.abc import Collection, Sequence
from shutil import get_terminal_size
from unicodedata import combining, east_asian_width

__all__ = ["table", "width"]

GAP = "  "


def width() -> int:
    """The width of the terminal in columns, or 80 without one; ``COLUMNS`` overrides both."""
    return get_terminal_size().columns


def table(rows: Sequence[Sequence[str] | str], numbers: Collection[int] = ()) -> str:
    """Lay out a table.

    If the table is too wide for the terminal, the widest text cells are cut first. They are cut in
    the middle, since long names differ at their ends.

    Args:
        rows: The rows. Each is a sequence of cells, of the same length as the others, or one text
            across all columns.
        numbers: The columns (counted from 0) that are aligned to the right and never cut.

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
    """The text as it will be written: characters that the terminal cannot display are escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _mark() -> str:
    """The mark in place of what was cut."""
    return "…" if _printable("…") == "…" else "..."


def _columns(text: str) -> int:
    """How many columns of the terminal a text takes."""
    if text.isascii():
        return len(text)
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "FW" else 1 for c in text)


def _bound(widths: Sequence[int], room: int) -> int:
    """The largest width limit, at least 1, with which all columns fit into the room."""
    if sum(widths) <= room:
        return max(widths, default=1)
    bounds = range(room, 1, -1)
    return next((x for x in bounds if sum(min(size, x) for size in widths) <= room), 1)


def _cut(text: str, size: int, mark: str) -> str:
    """Shorten a text to a number of columns by leaving out its middle."""
    if _columns(text) <= size:
        return text
    room = size - len(mark)
    if room < 0:
        return mark[:size]
    end = _head(text[::-1], room // 2)[::-1]
    return _head(text, room - room // 2) + mark + end


def _head(text: str, size: int) -> str:
    """The longest beginning of a text that fits into a number of columns."""
    taken = 0
    for i, letter in enumerate(text):
        taken += _columns(letter)
        if taken > size:
            return text[:i]
    return text


def _filled(text: str, size: int, ends: bool) -> str:
    blanks = " " * (size - _columns(text))
    return blanks + text if ends else text + blanks
