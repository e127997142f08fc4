"""Reading checkpoint files; ``spec/checkpoint.md`` defines the format.

A checkpoint is a safetensors file. Its header holds the JSON description (``document``) and the
checksum of it; each slot of a table is one tensor, with a checksum per row. Whatever is wrong with
a file is a ``CheckpointError`` that names the file; ``read`` returns what is intact, so that
``strict=False`` can load the rest of a damaged file.
"""

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from io import RawIOBase
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from xxhash import xxh3_64_hexdigest

from multiopt.errors import CheckpointError
from multiopt.rules.average import AVERAGE
from multiopt.state import versions
from multiopt.state.contents import Contents, SavedParams
from multiopt.state.document import (
    TABLES,
    check_skips,
    check_steps,
    check_version,
    skips_in,
    tables_in,
)
from multiopt.state.file_objects import Source, label, on_disk
from multiopt.state.fit import SHOWN_AVERAGE
from multiopt.state.metadata import restored as restored_metadata
from multiopt.state.record import Record, Saved
from multiopt.state.settings import Settings, settings_in
from multiopt.state.tables import BLOCK, LARGE, SavedTable, host_dtype, layout_text
from multiopt.state.versions import DIFFERS
from multiopt.state.writing import CHECKSUMS, LARGEST_HEADER, bytes_of, checksums_of, too_much
from multiopt.step.skips import Skips

__all__ = ["Contents", "Listed", "listed", "read"]

#: How files of ``torch.save`` begin: the current format, and the one before.
PICKLES = b"PK\x03\x04", b"\x80"

#: Errors that can come of reading a damaged file, or a file of another kind.
MALFORMED = (
    *(SafetensorError, AttributeError, LookupError, OverflowError, RecursionError),
    *(TypeError, ValueError),
)


class Listed(NamedTuple):
    """The contents of a file, except for the numbers in the slots.

    Attributes:
        version: The version of the format.
        steps: How many steps the optimizer had taken; None if unknown.
        saved: The records without their arrays, by part and name; the part ``"params"``, which
            has the parameters, only if there are any.
        skips: How often each name was skipped.
        settings: The hyperparameters that were set while the run went on.
        metadata: What the user saved along with the state.
        size: The size of the file in bytes.
        checked: Whether the file has checksums, against which the slots were checked.
        damaged: The name, the slot and the reason of each damaged slot.
    """

    version: int
    steps: int | None
    saved: dict[str, dict[str, Saved]]
    skips: dict[str, Skips]
    settings: Settings
    metadata: dict[str, Any]
    size: int
    checked: bool
    damaged: list[tuple[str, str, str]]


def read(file: Source, names: Collection[str] | None = None, with_params: bool = False) -> Contents:
    """Read a file.

    Args:
        file: The path of the file, or a binary file object, read from where it is to its end.
        names: The names whose state to read; by default all.
        with_params: Whether to read parameters as well.

    Raises:
        CheckpointError: The whole file is unusable, or it is not a checkpoint of multiopt.
        OSError: The file cannot be read.
    """
    saved: dict[str, dict[str, Saved]] = {"pending": {}, "entries": {}, "params": {}}
    unfit, damaged_params = {}, {}
    wanted = None if names is None else set(names)
    with _opened(file) as opened:
        for part, name, record, damage in opened.records(wanted, with_params):
            if damage and part == "params":
                damaged_params[name] = f"it is damaged: {DIFFERS}"
            elif damage:
                unfit[name] = "; ".join(
                    f"its slot {k!r} is damaged: {x}" for k, x in damage.items()
                )
            else:
                saved[part][name] = record
        all_names, param_names = opened.names(), opened.names(of_params=True)
        if not opened.in_order:
            names_in = {"entries": all_names, "pending": all_names, "params": param_names}
            saved = {part: _ordered(records, names_in[part]) for part, records in saved.items()}
        if opened.skips:
            all_names = list(dict.fromkeys([*all_names, *opened.skips]))
    # Pending state may be older than an entry of the same name, which therefore wins.
    merged = saved["pending"]
    merged.update(saved["entries"])
    params = None
    if with_params and opened.has_params:
        params = SavedParams(param_names, saved["params"], damaged_params)
    return Contents(
        *(all_names, merged, opened.steps, opened.skips, opened.metadata, unfit),
        *(opened.settings, params),
    )


def listed(file: Source) -> Listed:
    """List a file's contents and check its slots, with only a few of them in memory at a time.

    Args:
        file: The path of the file, or a binary file object, read from where it is to its end.

    Raises:
        CheckpointError: The whole file is unusable, or it is not a checkpoint of multiopt.
        OSError: The file cannot be read.
    """
    saved: dict[str, dict[str, Saved]] = {"entries": {}, "pending": {}}
    damaged = []
    with _opened(file) as opened:
        if opened.has_params:
            saved["params"] = {}
        for part, name, record, damage in opened.records(None, with_params=True):
            saved[part][name] = record._replace(arrays=())
            damaged += [(name, slot, why) for slot, why in damage.items()]
        for part, records in saved.items():
            saved[part] = _ordered(records, opened.names(of_params=part == "params"))
        size = Path(opened.path).stat().st_size
    return Listed(
        *(opened.version, opened.steps, saved, opened.skips, opened.settings),
        *(opened.metadata, size, opened.checked, damaged),
    )


def _ordered(saved: dict[str, Saved], names: Iterable[str]) -> dict[str, Saved]:
    return {name: saved[name] for name in names if name in saved}


class _File:
    """An open checkpoint file.

    Attributes:
        version: The version of the format.
        steps: How many steps the optimizer had taken; None if unknown.
        skips: How often each name was skipped.
        settings: The hyperparameters that were set while the run went on.
        metadata: What the user saved along with the state.
        has_params: Whether parameters were saved, perhaps none.
        checked: Whether the file has checksums.
        in_order: Whether the records come in the order of the names.
    """

    def __init__(self, path: str, opened: Any, data: RawIOBase) -> None:
        """Read and check everything except the slots.

        Raises:
            CheckpointError: The file is damaged, or not a checkpoint of multiopt.
        """
        self.path, self._data = path, data
        # safetensors has opened the file, so the offsets in its header are valid.
        self._begin = 8 + int.from_bytes(data.read(8), "little")
        self._tensors: dict[str, Any] = json.loads(data.read(self._begin - 8))
        header = self._tensors.pop("__metadata__", {})
        if "multiopt" not in header:
            raise CheckpointError("it is a safetensors file without multiopt state")
        description = header["multiopt"]
        checksums = header["checksums"].split() if "checksums" in header else None
        if checksums is not None and checksums[0] != xxh3_64_hexdigest(description.encode()):
            raise CheckpointError("its description is damaged: the checksum differs")
        document: dict[str, Any] = json.loads(
            description, object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
        check_version(document)
        self.version = document["version"]
        metadata = document.setdefault("metadata", {})
        if not isinstance(metadata, dict):
            raise CheckpointError(f"expected a mapping under 'metadata'; got {metadata!r}")
        self.metadata = restored_metadata(metadata, document.pop("nonfinite", {}))
        if checksums is None and self.version > 1:
            raise CheckpointError("it has no checksums; every file of version 2 or later has them")
        self.checked = checksums is not None and self.version > 1
        self.steps = check_steps(document)
        self._old, self.in_order = None, True
        self.has_params = self.version >= TABLES and "params" in document
        self.settings = settings_in(document.get("settings"))
        if self.version < TABLES:
            self._old = versions.Old(document, opened, checksums if self.checked else None)
            self.skips = check_skips(document.get("skips", {}))
            return
        if checksums is not None and len(checksums) != 1:
            raise CheckpointError(
                f"it has {len(checksums)} checksums of its description; expected 1"
            )
        self.skips = skips_in(document)
        self._tables = tables_in(document)
        self.in_order = all(isinstance(table.places, range) for table in self._tables)
        self._check_tensors()

    def _check_tensors(self) -> None:
        """Check the tensors of the file against its tables.

        Raises:
            CheckpointError: A tensor is missing, left over, or of another dtype or shape.
        """
        columns = [(len(table.names), x) for table in self._tables for x in table.form.slots]
        expected = {
            str(i): layout_text(slot.dtype, (rows, *slot.shape))
            for i, (rows, slot) in enumerate(columns)
        }
        expected[CHECKSUMS] = f"U64[{sum(rows for rows, _ in columns)}]"
        keys = self._tensors
        if len(keys) != len(expected) or set(keys) != expected.keys():
            raise CheckpointError(
                f"its slots need {len(columns)} tensors, and one of checksums; expected those in "
                f"the file, {len(keys)}"
            )
        for key, shape in expected.items():
            tensor = self._tensors[key]
            if f"{tensor['dtype']}[{','.join(map(str, tensor['shape']))}]" != shape:
                raise CheckpointError(f"its tensor {key!r} is not {shape}")

    def _rows(self, key: str, rows: slice, size: int, dtype: str) -> np.ndarray:
        """Read some rows of a tensor; safetensors itself can only read whole tensors.

        Args:
            key: The key of the tensor.
            rows: The rows.
            size: How many elements a row has.
            dtype: The dtype of the elements.

        Raises:
            ValueError: The file ends too early.
        """
        block = np.empty((rows.stop - rows.start, size), host_dtype(dtype).newbyteorder("<"))
        offset = rows.start * size * block.itemsize
        self._data.seek(self._begin + self._tensors[key]["data_offsets"][0] + offset)
        into = bytes_of(block)
        while into:
            read = self._data.readinto(into)
            if not read:
                raise ValueError(f"the file ends in the middle of tensor {key!r}")
            into = into[read:]
        return block

    def names(self, of_params: bool = False) -> list[str]:
        """The names that the file has state for, or parameters."""
        if self._old is not None:
            return [] if of_params else self._old.names()
        tables = [table for table in self._tables if (table.part == "params") == of_params]
        names = [name for table in tables for name in table.names]
        if self.in_order:
            return names
        places = [(table.part, place) for table in tables for place in table.places]
        return [names[k] for k in sorted(range(len(names)), key=places.__getitem__)]

    def records(self, wanted: Set[str] | None, with_params: bool) -> Iterator[Record]:
        """Read the records of the wanted names, or of all names for None.

        Args:
            wanted: The names.
            with_params: Whether to read parameters as well.
        """
        if self._old is not None:
            yield from self._old.records(wanted)
            return
        (count,) = self._tensors[CHECKSUMS]["shape"]
        checksums = self._rows(CHECKSUMS, slice(0, count), 1, "uint64").reshape(-1)
        number = begin = 0
        for table in self._tables:
            count, slots = len(table.names), table.form.slots
            sizes = [prod(slot.shape) for slot in slots]
            # So few rows at once that an array which is kept holds little memory of other names.
            most = 1 if max(sizes, default=0) >= LARGE else BLOCK // max([1, *sizes])
            for first in range(0, count, most):
                rows = slice(first, min(first + most, count))
                if table.part == "params" and not with_params:
                    break
                if wanted is not None and wanted.isdisjoint(table.names[rows]):
                    continue
                columns: list[list[np.ndarray]] = []
                damage: dict[int, dict[str, str]] = {}
                for k, size in enumerate(sizes):
                    block = self._rows(str(number + k), rows, size, slots[k].dtype)
                    at = begin + k * count
                    expected = checksums[at + first : at + rows.stop].tolist()
                    if (actual := checksums_of(block)) != expected:
                        for i, (have, want) in enumerate(zip(actual, expected, strict=True)):
                            if have != want:
                                damage.setdefault(i, {})[_shown(slots[k].name)] = DIFFERS
                    columns.append(list(block.astype(host_dtype(slots[k].dtype), copy=False)))
                for record in _records(table, rows, columns, damage):
                    if wanted is None or record[1] in wanted:
                        yield record
            number += len(slots)
            begin += len(slots) * count


def _shown(slot: str) -> str:
    """The name of a slot in a state dict."""
    return SHOWN_AVERAGE if slot == AVERAGE else slot


def _records(
    table: SavedTable,
    rows: slice,
    columns: Sequence[Sequence[np.ndarray]],
    damage: Mapping[int, dict[str, str]],
) -> Iterator[Record]:
    """Make records of some rows of a table.

    Args:
        table: The table.
        rows: The rows.
        columns: For each slot, its arrays for these rows.
        damage: For each damaged row, by its position among these, the reasons by slot.
    """
    names, steps = table.names[rows], table.steps[rows]
    arrays = list(zip(*columns, strict=True)) if columns else [()] * len(names)
    counts = table.counts[rows] if table.counts else [0] * len(names)
    for i, (name, step, slots, count) in enumerate(zip(names, steps, arrays, counts, strict=True)):
        yield table.part, name, Saved(table.form, step, slots, count), damage.get(i, {})


@contextmanager
def _opened(file: Source) -> Iterator[_File]:
    """Open a file and read everything except its slots.

    Raises:
        CheckpointError: The file is damaged, or not a checkpoint of multiopt.
    """
    with on_disk(file) as path:
        try:
            _check_header(path)
            # Not memory-mapped: if somebody truncated the file, the process would be killed.
            with (
                safe_open(path, framework="numpy", backend="pread") as opened,
                Path(path).open("rb", buffering=0) as data,
            ):
                yield _File(path, opened, data)
        except CheckpointError as error:
            raise CheckpointError(f"{label(file)}: {error}") from error
        except MALFORMED as error:
            raise CheckpointError(
                f"{label(file)}: expected a multiopt checkpoint; it is damaged or another "
                f"kind of file ({type(error).__name__}: {error})"
            ) from error


def _check_header(path: str) -> None:
    """Raise an error for a header whose parsed form would take far more memory than its bytes.

    Raises:
        CheckpointError: It is a file of ``torch.save``.
        ValueError: The header is too large, or missing.
    """
    with Path(path).open("rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if not 2 <= length <= os.fstat(file.fileno()).st_size - 8:
            if first.startswith(PICKLES):
                raise CheckpointError(
                    "expected a multiopt checkpoint; it is a zip file or a pickle, as torch.save "
                    "writes: for the state of a torch optimizer use "
                    "multiopt.adapters.torch_optim.read"
                )
            raise ValueError(f"it is too short for a header of {length} bytes")
        if why := too_much(file.read(min(length, LARGEST_HEADER + 1))):
            raise ValueError(why)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise ValueError("a key appears twice")
    return mapping


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not valid JSON")
