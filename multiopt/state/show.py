"""The report of ``multiopt show``."""

import json
import os
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import numpy as np

from multiopt.state.file import PARTS, listed
from multiopt.tables import table

__all__ = ["show"]

HEADINGS = ("name", "state", "rule", "step", "slots", "shape", "dtype", "bytes")

NUMBERS = {HEADINGS.index("step"), HEADINGS.index("bytes")}


def show(path: str | os.PathLike[str]) -> bool:
    """Print what is in a file, and whether its slots are as they were written.

    Args:
        path: The file.

    Returns:
        Whether they are, as far as there are checksums.

    Raises:
        CheckpointError: It is damaged as a whole, or no checkpoint of multiopt.
        OSError: It cannot be read.
    """
    state, metadata, size, checked, damaged = listed(path)
    seen, pending = len(state["entries"]), len(state["pending"])
    found = "damaged" if damaged else "checked" if checked else "without checksums"
    print(
        f"{_shown(os.fspath(path))}: multiopt checkpoint, version {state['version']}, {size} bytes,"
        f" {state.get('steps', 'unknown')} steps, {seen} names seen, {pending} pending, {found}"
    )
    for name, slot, why in damaged:
        print(f"damaged: {_shown(name)}, its slot {_shown(slot)}: {why}")
    if metadata:
        print(f"metadata: {json.dumps(metadata)}")
    rules: dict[tuple[str, str], str] = {}
    rows = [row for part in PARTS for row in _rows(part, state.get(part, {}), rules)]
    if rows:
        print()
        print(table([HEADINGS, *rows], NUMBERS))
        print()
        for (_, words), label in rules.items():
            print(f"{label}: {words}")
    if skips := state.get("skips"):
        print()
        for name, (total, run) in skips.items():
            print(f"skipped: {_shown(name)}, {total} in all, {run} in a row")
    return not damaged


def _rows(
    part: str, entries: Mapping[str, Mapping[str, Any]], rules: dict[tuple[str, str], str]
) -> Iterator[tuple[str, ...]]:
    """A row for each name, and more where its slots are not all alike."""
    for name, entry in entries.items():
        rule = dict(entry["rule"])
        kind = str(rule.pop("name", "unknown"))
        words = ", ".join(f"{json.dumps(k)[1:-1]}={json.dumps(v)}" for k, v in rule.items())
        label = rules.setdefault((kind, words), f"{_shown(kind)} {1 + len(rules)}")
        state = "pending" if part.startswith("pending") else "seen"
        head = [_shown(name), state, label, str(entry["step"])]
        alike: dict[tuple[tuple[int, ...], str], list[str]] = {}
        for slot, form in entry["slots"].items():
            alike.setdefault(form, []).append(_shown(slot))
        if not alike:
            yield (*head, "none", "", "", "0")
        for (shape, dtype), slots in alike.items():
            size = len(slots) * prod(shape) * np.dtype(dtype).itemsize
            yield (*head, ", ".join(slots), str(shape), dtype, str(size))
            head = [""] * len(head)


def _shown(name: str) -> str:
    """A name as a terminal may have it: one that would move the cursor is quoted."""
    return name if name.isprintable() and name.strip() == name != "" else repr(name)
