"""Writing checkpoint files; ``spec/checkpoint.md`` defines the format.

The bytes of the slots are read only once: each piece is written and added to its checksums, which
come last in the file. So saving needs no more memory than one piece of slots.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

from multiopt.state.document import described
from multiopt.state.durable import replacing
from multiopt.state.file_objects import Target, is_path, write_whole
from multiopt.state.tables import CODES, SavedTable, host_dtype

__all__ = ["CHECKSUMS", "LARGEST_HEADER", "bytes_of", "checksums_of", "too_much", "write"]

#: The key of the tensor that holds the checksums.
CHECKSUMS = "checksums"

#: The largest header that safetensors reads, in bytes.
LARGEST_HEADER = 100_000_000

#: The weights of a mapping and a list in a header, relative to a comma: parsed, they take about
#: 250, 110 and 40 bytes of memory, without their contents.
MAPPING, LIST = 7, 3

#: The weight that a header of any length may have: 10 000 mappings.
MANY = 10_000 * MAPPING


def write(
    file: Target,
    tables: Iterable[SavedTable],
    steps: int,
    skips: Mapping[str, Sequence[int]],
    metadata: Mapping[str, Any] | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    params: Sequence[SavedTable] | None = None,
) -> None:
    """Write a checkpoint file; a file at a path is replaced completely or not at all.

    At most one slot is copied at a time. A large one in the memory of the CPU is not copied.

    Args:
        file: The path of the file, which is replaced if it exists; or a binary file object, which
            is written from its current position.
        tables: The saved state of all names.
        steps: How many steps the optimizer has taken.
        skips: For each name, how often it was skipped: in total, and consecutively.
        metadata: The user's own data, in the forms that ``multiopt.state.metadata`` accepts.
        settings: The hyperparameters that were set while the run went on, as plain data.
        params: The tables of parameters; None if none are saved.

    Raises:
        OSError: The file cannot be written.
        TypeError: The metadata is not a mapping, or the file is neither a path nor a binary file
            object.
        ValueError: JSON cannot hold the metadata or a name, a rule is nested too deeply, or the
            header would be too large.
    """
    tables = [*tables, *(params or ())]
    metadata = {} if metadata is None else metadata
    document = described(tables, steps, skips, metadata, settings, params is not None)
    description = json.dumps(document, allow_nan=False)
    columns = [(table, k) for table in tables for k in range(len(table.form.slots))]
    # The widest first, so that in a memory-mapped file every number is aligned to its size.
    order = sorted(range(len(columns)), key=lambda i: -_itemsize(*columns[i]))
    header = _header(description, columns, order)
    parts = _parts(header, columns, order)
    if is_path(file):
        with replacing(file) as opened:
            opened.writelines(parts)
    else:
        write_whole(file, parts)


def _itemsize(table: SavedTable, k: int) -> int:
    return host_dtype(table.form.slots[k].dtype).itemsize


def _header(text: str, columns: Sequence[tuple[SavedTable, int]], order: Sequence[int]) -> bytes:
    """The header of a file, preceded by its length."""
    tensors: dict[str, Any] = {}
    end = count = 0
    for i in order:
        table, k = columns[i]
        slot, rows = table.form.slots[k], len(table.names)
        begin, end = end, end + rows * prod(slot.shape) * _itemsize(table, k)
        kind = {"dtype": CODES[slot.dtype], "shape": [rows, *slot.shape]}
        tensors[str(i)] = {**kind, "data_offsets": [begin, end]}
        count += rows
    offsets = [end, end + 8 * count]
    tensors[CHECKSUMS] = {"dtype": "U64", "shape": [count], "data_offsets": offsets}
    metadata = {"checksums": xxh3_64_hexdigest(text.encode()), "multiopt": text}
    header = json.dumps({"__metadata__": metadata, **tensors}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    if why := too_much(header):
        raise ValueError(f"{why}: save fewer names in one file, or less metadata")
    return len(header).to_bytes(8, "little") + header


def _parts(
    header: bytes, columns: Sequence[tuple[SavedTable, int]], order: Sequence[int]
) -> Iterator[bytes | memoryview]:
    """Generate the bytes of a file, with the checksums of the slots at the end."""
    yield header
    checksums: dict[int, list[int]] = {}
    for i in order:
        table, k = columns[i]
        assert table.pieces is not None
        checksums[i] = []
        for piece in map(_little_endian, table.pieces(k)):
            checksums[i] += checksums_of(piece)
            data = bytes_of(piece)
            # Free this piece before the next one is made.
            del piece
            yield data
            del data
    flat = [word for i in range(len(columns)) for word in checksums[i]]
    yield np.array(flat, "<u8").data


def _little_endian(rows: np.ndarray) -> np.ndarray:
    return rows.astype(rows.dtype.newbyteorder("<"), order="C", copy=False)


def bytes_of(array: np.ndarray) -> memoryview:
    """The memory of a contiguous array."""
    return array.reshape(-1).view(np.uint8).data


def checksums_of(rows: np.ndarray) -> list[int]:
    """The checksum of the bytes of each row of an array of two axes."""
    size = rows.shape[1] * rows.itemsize
    if not size:
        return [xxh3_64_intdigest(b"")] * len(rows)
    data = bytes_of(rows)
    return [xxh3_64_intdigest(data[at : at + size]) for at in range(0, len(data), size)]


def too_much(header: bytes) -> str | None:
    """Why a header must not be parsed; None if it may be.

    In a malicious header, a mapping or a list takes only 3 bytes. In ours, a name with its two or
    three mappings takes at least 45 bytes, and a number in a list of numbers takes 3.
    """
    if len(header) > LARGEST_HEADER:
        return f"the header has {len(header)} bytes; expected {LARGEST_HEADER} at most"
    have = MAPPING * header.count(b"{") + LIST * header.count(b"[") + header.count(b",")
    most = MANY + 2 * len(header) // 5
    if have > most:
        return (
            f"the header has mappings, lists and commas for {have}, of {MAPPING}, {LIST} and 1 "
            f"each; expected at most {most}, for {len(header)} bytes"
        )
    return None
