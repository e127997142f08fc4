"""Reading checkpoint files of versions 1 and 2.

In those, every name has a description of its own, and every slot is a tensor of its own.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
from xxhash import xxh3_64

from multiopt.errors import CheckpointError
from multiopt.state.document import is_clock
from multiopt.state.metadata import check_nesting
from multiopt.state.plain_data import SECTIONS, check_sections, saved_in
from multiopt.state.record import Form, Record, saved_of
from multiopt.state.tables import CODES, layout_text

__all__ = ["Old"]

#: What is wrong with a slot.
DIFFERS = "the checksum differs"


class Old:
    """A file of an earlier version.

    Args:
        document: The description in the file.
        opened: The open file, from which tensors are read.
        checksums: The checksums; None for version 1, which has none.

    Raises:
        CheckpointError: The description is malformed.
    """

    def __init__(
        self, document: dict[str, Any], opened: Any, checksums: Sequence[str] | None
    ) -> None:
        """Check the description."""
        self._document, self._opened, self._checksums = document, opened, checksums
        rules = document.pop("rules", []) if checksums is not None else []
        for rule in rules:
            check_nesting(rule)
        for part in SECTIONS if checksums is not None else ():
            for name, entry in document.get(part, {}).items():
                number = entry["rule"]
                if not (is_clock(number) and number < len(rules)):
                    raise CheckpointError(f"the state of {name!r} has no rule: {number!r}")
                entry["rule"] = rules[number]
        check_sections(document)
        self._check_keys()

    def names(self) -> list[str]:
        """The names that the file has state for."""
        return list(
            dict.fromkeys(name for part in SECTIONS for name in self._document.get(part, ()))
        )

    def records(self, wanted: Set[str] | None) -> Iterator[Record]:
        """Read the records of the wanted names, or of all names for None."""
        forms: dict[Hashable, Form] = {}
        for part, name, entry, average in saved_in(self._document):
            if wanted is None or name in wanted:
                damage: dict[str, str] = {}
                own = self._read(entry, damage)
                mean = None if average is None else self._read(average, damage)
                yield part, name, saved_of(name, own, mean, forms), damage

    def _read(self, entry: Mapping[str, Any], damage: dict[str, str]) -> dict[str, Any]:
        """Read the slots of an entry; those that are damaged are added to ``damage``."""
        slots = {}
        for slot, key in entry["slots"].items():
            slots[slot] = array = self._opened.get_tensor(key)
            if array.dtype.name not in CODES:
                raise CheckpointError(
                    f"expected slots of dtype float32 or float64; got {array.dtype.name}"
                )
            if self._checksums is not None and self._checksums[1 + int(key)] != _checksum(array):
                damage[slot] = DIFFERS
        return {**entry, "slots": slots}

    def _check_keys(self) -> None:
        """Check that every slot has a tensor of its own, and that no tensor is left over.

        Raises:
            CheckpointError: The slots and the tensors do not match.
        """
        have = [
            key
            for part in SECTIONS
            for entry in self._document.get(part, {}).values()
            for key in entry["slots"].values()
        ]
        keys, checksums = self._opened.keys(), self._checksums
        if len(have) != len(keys) or set(have) != set(keys):
            raise CheckpointError(
                f"its slots need {len(have)} tensors, one each; expected those in the file, "
                f"{len(keys)}"
            )
        if checksums is not None and (
            len(checksums) != 1 + len(have) or set(have) != set(map(str, range(len(have))))
        ):
            raise CheckpointError(f"it has {len(checksums)} checksums; expected {1 + len(have)}")


def _checksum(array: np.ndarray) -> str:
    """The checksum of a slot, over its dtype, shape and bytes."""
    digest = xxh3_64(layout_text(array.dtype.name, array.shape).encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
