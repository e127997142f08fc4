"""Rooms stay small: a file of the product has at most 400 lines."""

from pathlib import Path

ROOT = Path(__file__).parents[2]

LONGEST = 400


def test_no_file_of_the_product_is_too_long() -> None:
    files = [file for part in ("multiopt", "backends") for file in (ROOT / part).rglob("*.py")]
    assert len(files) > 100
    long = {
        str(file.relative_to(ROOT)): len(file.read_text("utf-8").splitlines()) for file in files
    }
    assert {file: lines for file, lines in long.items() if lines > LONGEST} == {}
