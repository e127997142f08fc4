"""The state of an optimizer in one file, which any backend can read: ``spec/checkpoint.md``."""

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from xxhash import xxh3_64

from multiopt.arrays import Array
from multiopt.backend import backend_of, named
from multiopt.errors import CheckpointError
from multiopt.layout import Layout, parts_of
from multiopt.schedules.description import check_description
from multiopt.state.durable import replacing
from multiopt.state.file_objects import Source, Target, is_path, label, on_disk, write_whole
from multiopt.state.metadata import PAIR, check_nesting
from multiopt.state.metadata import described as described_metadata
from multiopt.state.metadata import restored as restored_metadata

__all__ = ["PARTS", "VERSION", "Contents", "Listed", "check_state_dict", "listed", "read", "write"]

#: The version of the file format and of ``state_dict``.
VERSION = 2

#: The parts of a state dict that are entries by name, and whether it must have them.
PARTS = {"entries": True, "pending": True, "averages": False, "pending_averages": False}

#: The dtypes of slots, and their names in a file.
DTYPES: dict[np.dtype, str] = {np.dtype(np.float32): "F32", np.dtype(np.float64): "F64"}

#: The largest clock, up to which every number is a float64.
LAST_STEP = 2**53

#: The largest header that safetensors reads, in bytes.
LARGEST_HEADER = 100_000_000

#: What a mapping and a list of a header count for, where a comma counts for 1: in memory they take
#: some 250, 110 and 40 bytes, and what is in them.
MAPPING, LIST = 7, 3

#: What a header of any length may count for: 10 000 mappings.
MANY = 10_000 * MAPPING

#: What files of ``torch.save`` begin with, new ones and old ones.
PICKLES = b"PK\x03\x04", b"\x80"

#: What reading a file of another kind, or a damaged one, can raise.
MALFORMED = (
    *(SafetensorError, AttributeError, LookupError, OverflowError, RecursionError),
    *(TypeError, ValueError),
)


class Contents(NamedTuple):
    """What a file has.

    Attributes:
        state_dict: A state dict with NumPy slots. Entries that were not wanted have none.
        metadata: What the user saved with it.
        damaged: Names whose slots are damaged, which it leaves out, and what is wrong.
    """

    state_dict: Mapping[str, Any]
    metadata: Mapping[str, Any] = MappingProxyType({})
    damaged: Mapping[str, str] = MappingProxyType({})

    def check_whole(self, file: Source) -> None:
        """Refuse what is not whole.

        Args:
            file: The file, for the message.

        Raises:
            CheckpointError: Something is damaged.
        """
        if self.damaged:
            what = "; ".join(f"{name!r}, {why}" for name, why in self.damaged.items())
            raise CheckpointError(
                f"{label(file)}: the state of {what}. Nothing was loaded; strict=False loads "
                "the rest"
            )


class Listed(NamedTuple):
    """What a file has, but for the numbers in the slots.

    Attributes:
        state_dict: A state dict that has the shape and the dtype of each slot in its place.
        metadata: What the user saved with it.
        size: The bytes of the file.
        checked: Whether there are checksums, to which the slots were held.
        damaged: The name and the slot of each that is damaged, and what is wrong.
    """

    state_dict: dict[str, Any]
    metadata: dict[str, Any]
    size: int
    checked: bool
    damaged: list[tuple[str, str, str]]


# Writing


def write(
    file: Target,
    state_dict: Mapping[str, Any],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a state dict to a file, whole or not at all.

    No more than one slot is copied at a time, and none that is in the memory of the CPU.

    Args:
        file: The path of the file, replaced if it exists; or a binary file object, to which all
            bytes are handed over, from where it is.
        state_dict: As ``Optimizer.state_dict`` gives it, with arrays of any library. An entry whose
            slots are the parts of complex ones has a true ``"complex"``.
        metadata: What else to keep: see ``multiopt.state.metadata``.

    Raises:
        OSError: The file cannot be written.
        TypeError: The metadata is no mapping, or the file neither a path nor a binary file object.
        ValueError: The metadata or a name is not what JSON can hold, a rule is nested too deep, or
            there is too much for a header.
    """
    plain, nonfinite = described_metadata({} if metadata is None else metadata)
    for part in (*PARTS, "skips"):
        for name in filter(PAIR.search, state_dict.get(part, ())):
            raise ValueError(
                f"the name {name!r} has two surrogates that JSON takes for one character, so that "
                f"it would come back as {json.loads(json.dumps(name))!r}; expected a name that "
                "comes back as it is: rename it"
            )
    slots: list[Array] = []
    layouts: list[Layout] = []
    rules: dict[str, int] = {}
    # Writing a description takes 10 us, and many names have one and the same.
    known: dict[int, int] = {}

    def described(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
        keys = {slot: str(len(slots) + i) for i, slot in enumerate(entry["slots"])}
        slots.extend(entry["slots"].values())
        forms = [backend_of(x, "a slot").layout(x, "a slot") for x in entry["slots"].values()]
        layouts.extend(forms)
        rule = entry["rule"]
        if id(rule) not in known:
            try:
                check_nesting(rule)
            except ValueError as error:
                raise ValueError(f"the rule in the state of {name!r}: {error}") from error
            known[id(rule)] = rules.setdefault(json.dumps(rule, allow_nan=False), len(rules))
        made = {"rule": known[id(rule)], "step": entry["step"], "slots": keys}
        is_complex = entry.get("complex") or any(form.is_complex for form in forms)
        return {**made, "complex": True} if is_complex else made

    document = {
        key: {name: described(name, entry) for name, entry in value.items()}
        if key in PARTS
        else value
        for key, value in state_dict.items()
    }
    document |= {"version": VERSION, "rules": list(map(json.loads, rules)), "metadata": plain}
    if nonfinite:
        document["nonfinite"] = nonfinite
    text = json.dumps(document, allow_nan=False)
    # float64 first: readers that map the file find numbers at multiples of their size.
    order = sorted(range(len(slots)), key=lambda i: layouts[i].dtype, reverse=True)
    words = [xxh3_64(text.encode()).hexdigest(), *(_checksum(_on_host(slot)) for slot in slots)]
    header = _header(text, words, {str(i): layouts[i] for i in order})
    # Not every file object can be sought, so that the checksums, which come first, are made first.
    parts: Iterator[bytes | memoryview] = chain(
        [header], (_bytes(_on_host(slots[i])) for i in order)
    )
    if is_path(file):
        with replacing(file) as opened:
            opened.writelines(parts)
    else:
        write_whole(file, parts)


def _header(text: str, words: Sequence[str], layouts: Mapping[str, Layout]) -> bytes:
    """The header of a file, with its length."""
    tensors, end = {}, 0
    for key, (_, shape, dtype, *_) in layouts.items():
        kind = np.dtype(dtype)
        begin, end = end, end + prod(shape) * kind.itemsize
        tensors[key] = {"dtype": DTYPES[kind], "shape": shape, "data_offsets": [begin, end]}
    metadata = {"checksums": " ".join(words), "multiopt": text}
    header = json.dumps({"__metadata__": metadata, **tensors}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    if why := _too_much(header):
        raise ValueError(f"{why}: save fewer names in one file, or less metadata")
    return len(header).to_bytes(8, "little") + header


def _on_host(slot: Array) -> np.ndarray:
    """A slot as a file has it, over its own memory if that is possible."""
    backend = backend_of(slot, "a slot")
    array = backend.memory(slot)
    if array is None or array.dtype.kind not in "fc":
        array = backend.to_host(slot)
    if np.iscomplexobj(array):
        array = parts_of(array)
    return np.asarray(array, array.dtype.newbyteorder("<"), order="C")


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _checksum(array: np.ndarray) -> str:
    """The checksum of a slot: of its dtype, its shape and its bytes."""
    shape = ",".join(map(str, array.shape))
    digest = xxh3_64(f"{DTYPES[array.dtype]}[{shape}]".encode())
    digest.update(_bytes(array))
    return digest.hexdigest()


# Reading


def read(file: Source, names: Collection[str] | None = None) -> Contents:
    """Read a state dict with NumPy slots from a file.

    Args:
        file: The path of the file, or a binary file object, read from where it is to its end.
        names: Those whose slots are wanted; by default all.

    Raises:
        CheckpointError: The file is damaged as a whole, or not ours.
        OSError: The file cannot be read.
    """
    damaged: dict[str, str] = {}
    wanted = None if names is None else set(names)
    with _opened(file) as (_, opened, document, words):
        for part in PARTS:
            entries = document.get(part, {})
            for name, entry in entries.items():
                keys, is_complex = entry["slots"], entry.pop("complex", False)
                if wanted is not None and name not in wanted:
                    keys = {}
                entry["slots"] = {}
                for slot, key in keys.items():
                    try:
                        array = _slot(opened, key, words, is_complex)
                    except MALFORMED as error:
                        damaged[name] = f"its slot {slot!r} is damaged: {error}"
                    else:
                        entry["slots"][slot] = array
        for part in PARTS.keys() & document.keys():
            document[part] = {n: entry for n, entry in document[part].items() if n not in damaged}
    return Contents(document, document.pop("metadata"), damaged)


def listed(file: Source) -> Listed:
    """What is in a file, and whether its slots are damaged; one at a time is in memory.

    Args:
        file: As for ``read``.

    Raises:
        CheckpointError: The file is damaged as a whole, or not ours.
        OSError: The file cannot be read.
    """
    damaged = []
    with _opened(file) as (path, opened, document, words):
        for part in PARTS:
            for name, entry in document.get(part, {}).items():
                is_complex = entry.pop("complex", False)
                for slot, key in entry["slots"].items():
                    view = opened.get_slice(key)
                    shape, dtype = tuple(view.get_shape()), _dtype_name(view.get_dtype())
                    if is_complex:
                        whole = Layout("numpy", shape, dtype, "cpu", is_complex=True)
                        shape, dtype = whole.own_shape, whole.own_dtype
                    entry["slots"][slot] = shape, dtype
                    try:
                        _slot(opened, key, words, is_complex)
                    except MALFORMED as error:
                        damaged.append((name, slot, str(error)))
        size = Path(path).stat().st_size
    return Listed(document, document.pop("metadata"), size, words is not None, damaged)


@contextmanager
def _opened(file: Source) -> Iterator[tuple[str, Any, dict[str, Any], list[str] | None]]:
    """A file on the disk: its path, its tensors, its state dict with their keys, and checksums.

    Raises:
        CheckpointError: The file is damaged or not ours, as far as can be seen without the slots.
    """
    with on_disk(file) as path:
        try:
            _check_header(path)
            # Not mapped: a file that somebody cuts short would be the end of the process.
            with safe_open(path, framework="numpy", backend="pread") as opened:
                document, words = _document(opened.metadata() or {})
                check_state_dict(document)
                _check_keys(document, opened.keys(), words)
                yield path, opened, document, words
        except CheckpointError as error:
            raise CheckpointError(f"{label(file)}: {error}") from error
        except MALFORMED as error:
            raise CheckpointError(
                f"{label(file)}: expected a multiopt checkpoint; it is damaged or another "
                f"kind of file ({type(error).__name__}: {error})"
            ) from error


def _check_header(path: str) -> None:
    """Refuse a header that would take much more memory than it has bytes.

    Raises:
        CheckpointError: It is a file of ``torch.save``.
        ValueError: It would, or is not there.
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
            raise ValueError(f"a header of {length} bytes is not in it")
        if why := _too_much(file.read(min(length, LARGEST_HEADER + 1))):
            raise ValueError(why)


def _too_much(header: bytes) -> str | None:
    """Why a header is not to be parsed, if it is not.

    In a header that is made for harm, a mapping or a list takes 3 bytes. In one of ours a name with
    its two or three mappings takes 45 bytes and more, and a number in a list of numbers 3.
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


def _document(header: Mapping[str, str]) -> tuple[dict[str, Any], list[str] | None]:
    """The state dict in the metadata of a file, with the keys of tensors, and the checksums."""
    if "multiopt" not in header:
        raise CheckpointError("it is a safetensors file with no state of multiopt in it")
    text = header["multiopt"]
    words = header["checksums"].split() if "checksums" in header else None
    if words is not None and words[0] != xxh3_64(text.encode()).hexdigest():
        raise CheckpointError("its description is damaged: the checksum differs")
    document: dict[str, Any] = json.loads(
        text, object_pairs_hook=_unique, parse_constant=_refuse_constant
    )
    _check_version(document)
    metadata = document.setdefault("metadata", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"expected a mapping under 'metadata'; got {metadata!r}")
    restored_metadata(metadata, document.pop("nonfinite", {}))
    if document["version"] == 1:
        return document, None
    if words is None:
        raise CheckpointError("it has no checksums; expected them, of version 2 and later")
    rules = document.pop("rules")
    for rule in rules:
        check_nesting(rule)
    for part in PARTS:
        for name, entry in document.get(part, {}).items():
            number = entry["rule"]
            if not (_is_clock(number) and number < len(rules)):
                raise CheckpointError(f"the state of {name!r} has no rule: {number!r}")
            entry["rule"] = rules[number]
    return document, words


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key is there twice")
    return made


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def _check_keys(
    document: Mapping[str, Any], keys: Collection[str], words: list[str] | None
) -> None:
    """Hold the keys of the slots to those of the tensors, one each.

    Raises:
        CheckpointError: They are others.
    """
    have = [
        key
        for part in PARTS
        for entry in document.get(part, {}).values()
        for key in entry["slots"].values()
    ]
    if len(have) != len(keys) or set(have) != set(keys):
        raise CheckpointError(
            f"its slots need {len(have)} tensors, one each; expected those in the file, {len(keys)}"
        )
    if words is not None and (
        len(words) != 1 + len(have) or set(have) != set(map(str, range(len(have))))
    ):
        raise CheckpointError(f"it has {len(words)} checksums; expected {1 + len(have)}")


def _slot(file: Any, key: str, words: list[str] | None, is_complex: bool) -> np.ndarray:
    """A slot.

    Raises:
        ValueError: It is damaged.
    """
    array: np.ndarray = file.get_tensor(key)
    if array.dtype not in DTYPES:
        raise ValueError(f"expected dtype float32 or float64; got {array.dtype.name}")
    if words is not None and words[1 + int(key)] != _checksum(array):
        raise ValueError("the checksum differs")
    if is_complex:
        whole: np.ndarray = named("numpy").whole(array)
        return whole
    return array


def _dtype_name(word: str) -> str:
    """The name of a dtype of a file.

    Raises:
        ValueError: It is none of a slot.
    """
    for dtype, known in DTYPES.items():
        if word == known:
            return dtype.name
    raise ValueError(f"expected the dtype F32 or F64; got {word}")


# State dicts


def check_state_dict(state_dict: Any) -> None:
    """Refuse what has not the form of a state dict.

    Raises:
        CheckpointError: It has not.
    """
    if not isinstance(state_dict, Mapping) or "version" not in state_dict:
        raise CheckpointError("expected a state dict with 'version', 'entries' and 'pending'")
    _check_version(state_dict)
    if not _is_clock(state_dict.get("steps", 0)):
        raise CheckpointError(
            f"expected an int from 0 to 2^53 under 'steps'; got {state_dict['steps']!r}"
        )
    for part, required in PARTS.items():
        entries = state_dict.get(part, None if required else {})
        if not isinstance(entries, Mapping):
            raise CheckpointError(
                f"expected a mapping under {part!r}; got {type(entries).__name__}"
            )
        for name, entry in entries.items():
            _check_entry(part, name, entry)
    parameters = state_dict["entries"].keys() | state_dict["pending"].keys()
    for part in PARTS:
        if PARTS[part] is False and (odd := state_dict.get(part, {}).keys() - parameters):
            raise CheckpointError(
                f"there are averages of {sorted(odd)}; expected them of names that have an entry"
            )
    skips = state_dict.get("skips", {})
    if not isinstance(skips, Mapping):
        raise CheckpointError(f"expected a mapping under 'skips'; got {type(skips).__name__}")
    for name, counts in skips.items():
        if not isinstance(name, str):
            raise CheckpointError(f"expected names under 'skips' to be strings; got {name!r}")
        known = (
            isinstance(counts, list | tuple) and len(counts) == 2 and all(map(_is_clock, counts))
        )
        if not known or counts[0] < counts[1]:
            raise CheckpointError(
                f"the skips of {name!r} are {counts!r}; expected how many in all, and of them in a "
                "row, ints from 0 to 2^53"
            )


def _check_entry(part: str, name: Any, entry: Any) -> None:
    if not isinstance(name, str):
        raise CheckpointError(f"expected names under {part!r} to be strings; got {name!r}")
    step = entry.get("step") if isinstance(entry, Mapping) else None
    if not _is_clock(step):
        raise CheckpointError(
            f"the state of {name!r} has step {step!r}; expected an int from 0 to 2^53"
        )
    slots, rule = entry.get("slots"), entry.get("rule")
    if not isinstance(slots, Mapping) or not isinstance(rule, Mapping):
        raise CheckpointError(f"the state of {name!r} needs mappings under 'slots' and 'rule'")
    if not all(isinstance(key, str) for key in (*slots, *rule)):
        raise CheckpointError(f"the state of {name!r} has a slot or setting without a name")
    schedules = rule.get("schedules", {})
    if not isinstance(schedules, Mapping):
        raise CheckpointError(f"the state of {name!r} needs a mapping under 'schedules'")
    try:
        check_description(schedules)
    except ValueError as error:
        raise CheckpointError(f"the state of {name!r}: {error}") from error


def _is_clock(step: Any) -> bool:
    return type(step) is int and 0 <= step <= LAST_STEP


def _check_version(state_dict: Mapping[str, Any]) -> None:
    version = state_dict["version"]
    if type(version) is int and version > VERSION:
        raise CheckpointError(
            f"expected version {VERSION} or an earlier one; got version {version}: it needs a "
            "newer release of multiopt"
        )
    if type(version) is not int or version < 1:
        raise CheckpointError(f"expected a version between 1 and {VERSION}; got {version!r}")
