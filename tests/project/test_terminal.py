"""Tables of the commands: no line is wider than the terminal."""

import io
import os
import sys

import pytest

from multiopt.terminal import table, width

ROWS = [
    ("name", "slots", "bytes"),
    ("encoder.layers.0.self_attention.in_proj_weight", "exp_avg, exp_avg_sq", "1048576"),
    ("encoder.layers.0.self_attention.in_proj_bias", "exp_avg, exp_avg_sq", "1024"),
]


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def columns(text: str) -> int:
    """The columns that a text takes, of letters that take one, or two if they are Chinese."""
    return sum(2 if "\u4e00" <= letter <= "\u9fff" else 1 for letter in text)


def test_what_is_no_terminal_has_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr(sys, "__stdout__", io.StringIO())
    assert width() == 80
    assert max(map(len, table(ROWS).splitlines())) <= 80


def test_a_terminal_that_does_not_know_has_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((0, 0)))
    assert width() == 80


def test_a_table_that_fits_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "76")
    lines = table(ROWS, numbers={2}).splitlines()
    assert [len(line) for line in lines] == [76, 76, 76]
    for row, line in zip(ROWS, lines, strict=True):
        assert all(cell in line for cell in row)


def test_cells_are_cut_in_the_middle_the_widest_of_text_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    assert table(ROWS, numbers={2}).splitlines() == [
        "name                  slots                  bytes",
        "encoder.la…oj_weight  exp_avg, exp_avg_sq  1048576",
        "encoder.la…proj_bias  exp_avg, exp_avg_sq     1024",
    ]


@pytest.mark.parametrize("room", range(1, 100))
def test_no_line_is_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setenv("COLUMNS", str(room))
    rows = [*ROWS, "a text across all columns " * 5, ("名前" * 20, "é", "9" * 7)]
    lines = table(rows, numbers={2}).splitlines()
    assert len(lines) == len(rows)
    assert max(map(columns, lines)) <= room
    if room >= 1 + 2 + 1 + 2 + 7:  # for the numbers, and for a mark in each cell of text
        assert all(line.endswith(row[2]) for line, row in zip(lines, ROWS, strict=False))


def test_columns_of_wide_letters_stand_in_line() -> None:
    lines = table([("名前", "a"), ("loc", "b"), ("e\u0301", "c")]).splitlines()
    assert lines == ["名前  a", "loc   b", "e\u0301     c"]


def test_a_terminal_without_an_ellipsis_gets_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    lines = table([("é" * 50, "w" * 50)]).splitlines()
    # An escape has four letters, and is measured as such.
    half = "\\xe9" * 4
    assert lines == [half + "\\x" + "..." + "e9" + half + "  " + "w" * 18 + "..." + "w" * 18]
