"""The JSON description in a checkpoint file, and reading it back.

A file is a list of tables. Names with the same ``Form`` (rule, slot shapes and so on) are the rows
of one table, and each of its slots is one tensor of the file:

>>> import json
>>> import numpy as np
>>> from multiopt.state.document import described, tables_in
>>> from multiopt.state.record import saved_of
>>> from multiopt.state.tables import waiting
>>> one = saved_of("a", {"rule": {"name": "SGD"}, "step": 3, "slots": {"m": np.ones(2)}})
>>> document = described(waiting({"a": one, "b": one}), 3, {}, {})
>>> document["pending"]
[{'names': ['a', 'b'], 'steps': [3, 3], 'rule': 0, 'slots': {'m': 'F64[2]'}}]
>>> [table.names for table in tables_in(document)]
[['a', 'b']]
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from multiopt.errors import CheckpointError
from multiopt.rules.average import AVERAGE
from multiopt.schedules.plateau import is_observed
from multiopt.state.metadata import PAIR, check_nesting
from multiopt.state.metadata import described as described_metadata
from multiopt.state.record import Description, Form, Slot
from multiopt.state.tables import CODES, PARAM, SavedTable, layout_text, table_of_params
from multiopt.step.skips import Skips

__all__ = [
    "LAST_STEP",
    "PARTS",
    "TABLES",
    "VERSION",
    "check_clock",
    "check_observed",
    "check_skips",
    "check_steps",
    "check_version",
    "described",
    "is_clock",
    "skips_in",
    "tables_in",
]

#: The version of the file format and of ``state_dict``.
VERSION = 4

#: The first version whose files have tables.
TABLES = 3

#: The lists of tables in a description: names seen, names with pending state, and parameters. The
#: last is missing if no parameters were saved.
PARTS = "entries", "pending", "params"

#: The dtypes of slots.
SLOT_DTYPES = "float32", "float64"

#: The largest clock: every whole number up to it is exact as a float64.
LAST_STEP = 2**53

#: The most names in one file. A name may take only 10 bytes in the header but 1 kB in memory.
MOST_NAMES = 2_500_000


def described(
    tables: Iterable[SavedTable],
    steps: int,
    skips: Mapping[str, Sequence[int]],
    metadata: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
    has_params: bool = False,
) -> dict[str, Any]:
    """Describe a file as plain data, ready for ``json.dumps``.

    Args:
        tables: The saved state of all names.
        steps: How many steps the optimizer has taken.
        skips: For each name, how often it was skipped: in total, and consecutively.
        metadata: The user's own data, in the forms that ``multiopt.state.metadata`` accepts.
        settings: The hyperparameters that were set while the run went on, as plain data.
        has_params: Whether parameters are saved, perhaps none.

    Raises:
        TypeError: The metadata is not a mapping.
        ValueError: JSON cannot hold the metadata or a name, a rule is nested too deeply, or there
            are too many names.
    """
    plain, nonfinite = described_metadata(metadata)
    rules: list[Mapping[str, Any]] = []
    observed: dict[str, Mapping[str, Any]] = {}
    # Writing a description takes 10 us, and many tables share the same one.
    numbers_by_text: dict[str, int] = {}
    numbers_by_id: dict[int, int] = {}

    def number_of(rule: Description, names: Sequence[str]) -> int:
        if id(rule) not in numbers_by_id:
            try:
                check_nesting(rule.settings)
            except ValueError as error:
                raise ValueError(f"the rule in the state of {names[0]!r}: {error}") from error
            text = json.dumps(rule, allow_nan=False)
            numbers_by_id[id(rule)] = number = numbers_by_text.setdefault(text, len(rules))
            if number == len(rules):
                rules.append(rule.settings)
                if rule.observed:
                    observed[str(number)] = rule.observed
        return numbers_by_id[id(rule)]

    parts: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
    ends = dict.fromkeys(PARTS, 0)
    for table in tables:
        form = table.form
        _check_names(table.names)
        entry: dict[str, Any] = {"names": table.names}
        first = ends[table.part]
        ends[table.part] = end = first + len(table.names)
        if list(table.places) != list(range(first, end)):
            entry["places"] = table.places
        if table.part != "params":
            entry |= {"steps": table.steps, "rule": number_of(form.rule, table.names)}
        if form.average is not None:
            entry |= {"average": number_of(form.average, table.names), "counts": table.counts}
        if form.is_complex:
            entry["complex"] = True
        layouts = {slot.name: layout_text(slot.dtype, slot.shape) for slot in form.slots}
        entry |= layouts if table.part == "params" else {"slots": layouts}
        parts[table.part].append(entry)
    if not has_params:
        del parts["params"]
    if (count := sum(ends.values())) > MOST_NAMES:
        raise ValueError(f"there are {count} names; expected at most {MOST_NAMES} in one file")
    document = {"version": VERSION, "steps": steps, "metadata": plain}
    if nonfinite:
        document["nonfinite"] = nonfinite
    document |= {"rules": rules, **({"plateaus": observed} if observed else {}), **parts}
    if settings:
        _check_names(list(settings["names"]))
        document["settings"] = settings
    if skips:
        _check_names(list(skips))
        total, consecutive = zip(*skips.values(), strict=True)
        counts = {"total": list(total), "consecutive": list(consecutive)}
        document["skips"] = {"names": list(skips), **counts}
    return document


def _check_names(names: Sequence[str]) -> None:
    """Raise an error for a name that JSON would change.

    Raises:
        ValueError: A name has a pair of surrogates.
    """
    # One search for all names: the newline between two names is not a surrogate.
    for name in names if PAIR.search("\n".join(names)) else ():
        if PAIR.search(name):
            raise ValueError(
                f"the name {name!r} has two surrogates that JSON takes for one character, so that "
                f"it would come back as {json.loads(json.dumps(name))!r}; expected a name that "
                "comes back as it is: rename it"
            )


def tables_in(document: Mapping[str, Any]) -> list[SavedTable]:
    """Read the tables in a description, in the order of their tensors.

    Raises:
        CheckpointError: The description is malformed.
        ValueError: A rule is nested too deeply, or a value is not one that a table can have.
    """
    rules = _rules(document)
    tables: list[SavedTable] = []
    count, with_state, with_params = 0, set[str](), set[str]()
    for part in PARTS if "params" in document else PARTS[:-1]:
        seen = with_params if part == "params" else with_state
        end = 0
        for table in _list(document[part], part):
            names = _column(table, "names", str)
            places: Sequence[int] = range(end, end + len(names))
            end += len(names)
            count += len(names)
            seen.update(names)
            if count > MOST_NAMES:
                raise CheckpointError(f"it has more than {MOST_NAMES} names")
            if "places" in table:
                places = _column(table, "places", int)
            if part == "params":
                tables.append(_table_of_params(table, names, places))
                continue
            steps = _column(table, "steps", int)
            if len(names) != len(steps) or not names:
                raise CheckpointError(f"a table of {len(names)} names has {len(steps)} clocks")
            for name, step in zip(names, steps, strict=True):
                check_clock(name, step)
            average, counts = None, []
            if "average" in table:
                average, counts = (
                    _rule(rules, table["average"], names),
                    _column(table, "counts", int),
                )
                if len(counts) != len(names) or not all(map(is_clock, counts)):
                    raise CheckpointError(
                        f"the average of {names[0]!r} needs as many counts as steps"
                    )
            slots = tuple(_slot(name, text, names) for name, text in table["slots"].items())
            if (average is not None) != any(slot.name == AVERAGE for slot in slots):
                raise CheckpointError(f"the average of {names[0]!r} has no slot, or no rule")
            is_complex = _is_complex(table, slots, names)
            form = Form(_rule(rules, table["rule"], names), slots, is_complex, average)
            tables.append(SavedTable(part, form, names, places, steps, counts))
    if len(with_state) + len(with_params) < count:
        raise CheckpointError("a name appears twice")
    return tables


def _table_of_params(
    table: Mapping[str, Any], names: list[str], places: Sequence[int]
) -> SavedTable:
    if not names:
        raise CheckpointError("a table of parameters has no names")
    slot = _slot(PARAM, table[PARAM], names, CODES)
    return table_of_params(slot, _is_complex(table, [slot], names), names, places)


def _is_complex(table: Mapping[str, Any], slots: Sequence[Slot], names: Sequence[str]) -> bool:
    is_complex = table.get("complex", False)
    has_parts = all(slot.shape[-1:] == (2,) and slot.dtype in SLOT_DTYPES for slot in slots)
    if type(is_complex) is not bool or is_complex > has_parts:
        raise CheckpointError(
            f"the complex arrays of {names[0]!r} do not have a real and an imaginary part"
        )
    return is_complex


def _rules(document: Mapping[str, Any]) -> list[Description]:
    """The descriptions of rules, each with the state of its ``Plateau`` schedules."""
    observed = document.get("plateaus", {})
    rules = []
    for number, settings in enumerate(_list(document["rules"], "rules")):
        check_nesting(settings)
        states = observed.get(str(number), {})
        if not isinstance(settings, dict) or not isinstance(settings.get("schedules", {}), dict):
            raise CheckpointError("the rules need mappings, under 'schedules' too")
        rules.append(Description(settings, states))
    return rules


def _rule(rules: Sequence[Description], number: Any, names: Sequence[str]) -> Description:
    if not (is_clock(number) and number < len(rules)):
        raise CheckpointError(f"the state of {names[0]!r} has no rule: {number!r}")
    rule: Description = rules[number]
    check_observed(names[0], rule.observed)
    return rule


def check_observed(name: str, observed: Any) -> None:
    """Raise an error unless every state is one that a ``Plateau`` can have.

    Raises:
        CheckpointError: A state is malformed.
    """
    for state in observed.values() if isinstance(observed, Mapping) else [observed]:
        if not is_observed(state):
            raise CheckpointError(
                f"the state of {name!r}: expected the state of a Plateau; got {state!r}"
            )


def _slot(name: str, text: Any, names: Sequence[str], dtypes: Iterable[str] = SLOT_DTYPES) -> Slot:
    match = re.fullmatch(r"(B?F[0-9]{2})\[((?:[0-9]{1,18},)*[0-9]{1,18})?\]", text)
    found = [dtype for dtype in dtypes if match is not None and CODES[dtype] == match[1]]
    if match is None or not found:
        codes = ", ".join(CODES[dtype] for dtype in dtypes)
        raise CheckpointError(
            f"the slot {name!r} of {names[0]!r} is {text!r}; expected a dtype of {codes}, and a "
            "shape, such as F32[2,3]"
        )
    shape = tuple(map(int, match[2].split(","))) if match[2] else ()
    return Slot(name, shape, found[0])


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise CheckpointError(f"expected a list under {what!r}; got {type(value).__name__}")
    return value


def _column(table: Mapping[str, Any], what: str, kind: type) -> list[Any]:
    column = _list(table[what], what)
    for value in column:
        if type(value) is not kind:
            raise CheckpointError(f"expected {kind.__name__} under {what!r}; got {value!r}")
    return column


def check_skips(skips: Any) -> dict[str, Skips]:
    """Check the counts of skips, and return them by name.

    Raises:
        CheckpointError: The counts are malformed.
    """
    if not isinstance(skips, Mapping):
        raise CheckpointError(f"expected a mapping under 'skips'; got {type(skips).__name__}")
    for name, counts in skips.items():
        if not isinstance(name, str):
            raise CheckpointError(f"expected names under 'skips' to be strings; got {name!r}")
        is_pair = (
            isinstance(counts, list | tuple) and len(counts) == 2 and all(map(is_clock, counts))
        )
        if not is_pair or counts[0] < counts[1]:
            raise CheckpointError(
                f"the skips of {name!r} are {counts!r}; expected how many in all, and of them in a "
                "row, ints from 0 to 2^53"
            )
    return {name: Skips(*counts) for name, counts in skips.items()}


def skips_in(document: Mapping[str, Any]) -> dict[str, Skips]:
    """Read the counts of skips in a description, where they are columns.

    Raises:
        CheckpointError: The counts are malformed.
    """
    skips = document.get("skips")
    if not skips:
        return {}
    columns = zip(skips["total"], skips["consecutive"], strict=True)
    return check_skips(dict(zip(skips["names"], columns, strict=True)))


def is_clock(step: Any) -> bool:
    """Whether a value can be a clock: an int from 0 to 2^53."""
    return type(step) is int and 0 <= step <= LAST_STEP


def check_clock(name: str, step: Any) -> None:
    """Raise an error unless a step can be the clock of a name.

    Raises:
        CheckpointError: It cannot.
    """
    if not is_clock(step):
        raise CheckpointError(
            f"the state of {name!r} has step {step!r}; expected an int from 0 to 2^53"
        )


def check_steps(document: Mapping[str, Any]) -> int | None:
    """How many steps the optimizer has taken; None if the description does not say.

    Raises:
        CheckpointError: The value is not a number of steps.
    """
    if not is_clock(document.get("steps", 0)):
        raise CheckpointError(
            f"expected an int from 0 to 2^53 under 'steps'; got {document['steps']!r}"
        )
    return document.get("steps")


def check_version(document: Mapping[str, Any]) -> None:
    """Raise an error for a version that this release cannot read.

    Raises:
        CheckpointError: The version is newer, or not a version at all.
    """
    version = document["version"]
    if type(version) is int and version > VERSION:
        raise CheckpointError(
            f"expected version {VERSION} or an earlier one; got version {version}: it needs a "
            "newer release of multiopt"
        )
    if type(version) is not int or version < 1:
        raise CheckpointError(f"expected a version between 1 and {VERSION}; got {version!r}")
