"""The report of ``multiopt show``: what a checkpoint file holds, and whether it is intact."""

import json
import os
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import numpy as np

from multiopt.layout import Layout
from multiopt.rules.average import AVERAGE
from multiopt.state.file import listed
from multiopt.state.fit import SHOWN_AVERAGE
from multiopt.state.index import listed_together
from multiopt.state.record import Form, Saved
from multiopt.state.settings import Settings
from multiopt.state.tables import host_dtype
from multiopt.terminal import table

__all__ = ["show"]

HEADINGS = ("name", "state", "rule", "step", "slots", "shape", "dtype", "bytes")

#: The word for the names in each part of a file.
STATES = {"entries": "seen", "pending": "pending"}

NUMBERS = {HEADINGS.index("step"), HEADINGS.index("bytes")}


def show(path: str | os.PathLike[str]) -> bool:
    """Print what is in a checkpoint, and check its slots against their checksums.

    Args:
        path: The file, or the directory of a checkpoint of several ranks.

    Returns:
        False if a slot is damaged, else True, also for an old file without checksums.

    Raises:
        CheckpointError: The whole file is unusable, or it is not a checkpoint of multiopt.
        OSError: The file cannot be read.
    """
    files = ""
    if Path(path).is_dir():
        file, count = listed_together(path)
        files = f" in {count} files"
    else:
        file = listed(path)
    seen, pending = len(file.saved["entries"]), len(file.saved["pending"])
    condition = "damaged" if file.damaged else "checked" if file.checked else "without checksums"
    steps = "unknown" if file.steps is None else file.steps
    print(
        f"{_shown(os.fspath(path))}: multiopt checkpoint{files}, version {file.version}, "
        f"{file.size} bytes, {steps} steps, {seen} names seen, {pending} pending, {condition}"
    )
    for name, slot, why in file.damaged:
        print(f"damaged: {_shown(name)}, its slot {_shown(slot)}: {why}")
    if file.metadata:
        print(f"metadata: {json.dumps(file.metadata)}")
    rules: dict[tuple[str, str], str] = {}
    parts = [(state, file.saved[part]) for part, state in STATES.items()]
    rows = [row for state, saved in parts for row in _rows(state, saved, rules)]
    rows += [row for state, saved in parts for row in _rows(state, _averages(saved), rules)]
    rows += map(_row_of_param, file.saved.get("params", {}).items())
    if rows:
        print()
        print(table([HEADINGS, *rows], NUMBERS))
        print()
        for (_, hyperparameters), label in rules.items():
            print(f"{label}: {hyperparameters}")
    settings = list(_settings(file.settings))
    if settings:
        print()
        print("\n".join(settings))
    if file.skips:
        print()
        for name, (total, run) in file.skips.items():
            print(f"skipped: {_shown(name)}, {total} in all, {run} in a row")
    return not file.damaged


def _settings(settings: Settings) -> Iterator[str]:
    """A line for all names, and one for each name of which something was set."""
    lost: dict[str | None, dict[str, str]] = {}
    for key, whose in settings.lost.items():
        for name in whose:
            lost.setdefault(name, {})[key] = "a callable that was not saved"
    for name in dict.fromkeys([None, *settings.by_name, *lost]):
        own = settings.for_all if name is None else settings.by_name.get(name, {})
        values = {key: repr(value) for key, value in own.items()}
        values |= lost.get(name, {})
        if values:
            text = ", ".join(f"{json.dumps(key)[1:-1]}={value}" for key, value in values.items())
            yield f"set for {'all names' if name is None else _shown(name)}: {text}"


def _row_of_param(named: tuple[str, Saved]) -> tuple[str, ...]:
    """The row of a parameter."""
    name, record = named
    (slot,) = record.form.slots
    layout = Layout("", slot.shape, slot.dtype, "", record.form.is_complex)
    size = prod(slot.shape) * host_dtype(slot.dtype).itemsize
    form = str(layout.shape), layout.dtype, str(size)
    return (_shown(name), "parameter", "", "", "", *form)


def _averages(saved: Mapping[str, Saved]) -> dict[str, Saved]:
    """The averages of names as records of their own, for rows of the report."""
    averages = {}
    for name, record in saved.items():
        form = record.form
        if form.average is not None:
            slots = [x._replace(name=SHOWN_AVERAGE) for x in form.slots if x.name == AVERAGE]
            form = Form(form.average, tuple(slots), form.is_complex)
            averages[name] = Saved(form, record.seen, ())
    return averages


def _rows(
    state: str, saved: Mapping[str, Saved], rules: dict[tuple[str, str], str]
) -> Iterator[tuple[str, ...]]:
    """The rows of each name: one, or more if its slots differ in shape or dtype."""
    for name, record in saved.items():
        rule = dict(record.form.rule.settings)
        kind = str(rule.pop("name", "unknown"))
        hyperparameters = ", ".join(
            f"{json.dumps(k)[1:-1]}={json.dumps(v)}" for k, v in rule.items()
        )
        label = rules.setdefault((kind, hyperparameters), f"{_shown(kind)} {1 + len(rules)}")
        head = [_shown(name), state, label, str(record.step)]
        alike: dict[tuple[tuple[int, ...], str], list[str]] = {}
        for slot in record.form.slots:
            if slot.name != AVERAGE:
                layout = Layout("", slot.shape, slot.dtype, "", record.form.is_complex)
                form = layout.shape, layout.dtype
                alike.setdefault(form, []).append(_shown(slot.name))
        if not alike:
            yield (*head, "none", "", "", "0")
        for (shape, dtype), slots in alike.items():
            size = len(slots) * prod(shape) * np.dtype(dtype).itemsize
            yield (*head, ", ".join(slots), str(shape), dtype, str(size))
            head = [""] * len(head)


def _shown(name: str) -> str:
    """A name as it is printed: quoted if it has characters that could move the cursor."""
    return name if name.isprintable() and name.strip() == name != "" else repr(name)
