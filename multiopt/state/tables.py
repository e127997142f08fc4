"""Tables of saved state: names of one form are rows in a file, as they are rows in memory.

Rows of a group that share a rule and a shape form one table, so saving copies their slots in a few
large pieces, whatever the number of names:

>>> import numpy as np
>>> import multiopt as mo
>>> opt = mo.Optimizer(mo.Adam())
>>> _ = opt.step({n: np.ones(2) for n in "abc"}, {n: np.ones(2) for n in "abc"})
>>> [(table.names, table.steps) for table in held(opt._registry)]
[(['a', 'b', 'c'], [1, 1, 1])]
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from multiopt.engine import Group
from multiopt.kinds import formulas
from multiopt.rules.average import AVERAGE
from multiopt.state.record import Description, Form, Saved, Slot, description

if TYPE_CHECKING:
    from multiopt.registry import Registry

__all__ = [
    "BLOCK",
    "CODES",
    "LARGE",
    "PARAM",
    "Pieces",
    "SavedTable",
    "held",
    "host_dtype",
    "layout_text",
    "pieces",
    "table_of_params",
    "waiting",
]

#: A slot of ``LARGE`` elements or more is read and written by itself; smaller ones are joined into
#: blocks of about ``BLOCK`` elements.
LARGE, BLOCK = 2**12, 2**14

#: The names of dtypes in a file. Slots have the first two.
CODES = {"float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16"}

#: What a parameter is called where slots have names.
PARAM = "param"

#: A function from the index of a slot to its arrays, in pieces of several rows (and two axes) each.
Pieces = Callable[[int], Iterator[np.ndarray]]


class SavedTable(NamedTuple):
    """The saved state of names of one form.

    Attributes:
        part: ``"entries"``, ``"pending"`` or ``"params"``.
        form: The form.
        names: The names, one per row.
        places: Their positions in the order of all names of the part.
        steps: Their clocks.
        counts: How many steps their averages have seen; empty if they have none.
        pieces: Their slots; None for a table that was read from a file.
    """

    part: str
    form: Form
    names: Sequence[str]
    places: Sequence[int]
    steps: Sequence[int]
    counts: Sequence[int]
    pieces: Pieces | None = None


def table_of_params(
    slot: Slot,
    is_complex: bool,
    names: Sequence[str],
    places: Sequence[int],
    pieces: Pieces | None = None,
) -> SavedTable:
    """A table of parameters: they have one column, and neither a rule nor a clock."""
    form = Form(Description({}, {}), (slot,), is_complex)
    return SavedTable("params", form, names, places, [0] * len(names), [], pieces)


def layout_text(dtype: str, shape: Sequence[int]) -> str:
    """The dtype and the shape of a slot as a file writes them, such as ``F32[2,3]``."""
    return f"{CODES[dtype]}[{','.join(map(str, shape))}]"


def host_dtype(dtype: str) -> np.dtype:
    """The NumPy dtype of the numbers of a dtype in a file; NumPy has no bfloat16."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


def held(registry: "Registry", wanted: Iterable[str] | None = None) -> Iterator[SavedTable]:
    """The tables of names in a registry; they read the memory of the slots, without a copy.

    Args:
        registry: The registry.
        wanted: The names; by default all.
    """
    for group, names, order, rows in registry.names_by_group(wanted):
        descriptions: dict[bytes, tuple[Description, Description | None]] = {}
        clocks, seen = group.steps[rows], group.counts(rows)
        for (key, shape), places in _alike(group, rows).items():
            alike = rows[places]
            if key not in descriptions:
                step, count = int(clocks[places[0]]), int(seen[places[0]])
                own, *average = formulas(group.rule_at(int(alike[0])))
                # An average that has seen no steps is not saved.
                average_rule = (
                    description(average[0], count, registry.steps) if average and count else None
                )
                descriptions[key] = description(own, step, registry.steps), average_rule
            rule, average_rule = descriptions[key]
            columns, slots = group.slot_names(shape), []
            forms = group.rule.slot_shapes(shape)
            for name in columns:
                if name != AVERAGE or average_rule is not None:
                    slots.append(Slot(name, forms.get(name, shape), group.dtype.name))
            form = Form(rule, tuple(slots), group.layout.is_complex, average_rule)
            numbers = [columns.index(slot.name) for slot in slots]
            yield SavedTable(
                "entries",
                form,
                [names[place] for place in places] if len(places) < len(names) else names,
                order[places].tolist(),
                clocks[places].tolist(),
                seen[places].tolist() if average_rule is not None else [],
                partial(_rows_of, group, alike, numbers),
            )


def _rows_of(
    group: Group, rows: np.ndarray, numbers: Sequence[int], k: int
) -> Iterator[np.ndarray]:
    return group.slots_on_host(rows, numbers[k])


def _alike(group: Group, rows: np.ndarray) -> dict[tuple[bytes, tuple[int, ...]], list[int]]:
    """The positions of rows, sorted by rule, average and shape: equal rows share a key."""
    # A description computes scheduled numbers from the clock.
    numbers, schedule = group.settings(rows), group.schedule[rows]
    clocks = np.stack([group.steps[rows], group.counts(rows)])
    if group.has_averages:
        numbers[:, -1] = clocks[1] > 0
    table = np.column_stack([numbers, schedule, *np.where(schedule != 0, clocks, 0)])
    keys: list[Any] = table.view(np.dtype((np.void, table.strides[0]))).ravel().tolist()
    shapes = map(group.shapes.__getitem__, rows.tolist())
    positions: dict[tuple[bytes, tuple[int, ...]], list[int]] = {}
    for place, key in enumerate(zip(keys, shapes, strict=True)):
        positions.setdefault(key, []).append(place)
    return positions


def waiting(saved: Mapping[str, Saved], part: str = "pending") -> list[SavedTable]:
    """The tables of records, one for each form."""
    alike: dict[int, list[int]] = {}
    names, records = list(saved), list(saved.values())
    for place, one in enumerate(records):
        alike.setdefault(id(one.form), []).append(place)
    tables = []
    for places in alike.values():
        mine = [records[place] for place in places]
        form, steps = mine[0].form, [one.step for one in mine]
        counts = [one.seen for one in mine] if form.average is not None else []
        own_names = [names[place] for place in places]
        columns = pieces(partial(_array_of, mine), len(mine), [slot.shape for slot in form.slots])
        tables.append(SavedTable(part, form, own_names, places, steps, counts, columns))
    return tables


def _array_of(saved: Sequence[Saved], row: int, k: int) -> np.ndarray:
    return saved[row].arrays[k]


def pieces(
    array: Callable[[int, int], np.ndarray], count: int, shapes: Sequence[Sequence[int]]
) -> Pieces:
    """The slots of a table whose rows are arrays of their own.

    Args:
        array: Returns the array of a row and a slot.
        count: The number of rows.
        shapes: The shape of each slot.
    """

    def of_slot(k: int) -> Iterator[np.ndarray]:
        size = prod(shapes[k])
        most = 1 if size >= LARGE else BLOCK // max(size, 1)
        for first in range(0, count, most):
            rows = range(first, min(first + most, count))
            arrays = [array(row, k).reshape(-1) for row in rows]
            joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
            yield joined.reshape(len(arrays), size)

    return of_slot
