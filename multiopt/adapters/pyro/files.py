"""Files of the drop-in: those of ``multiopt.Optimizer.save``, with what groups hold beside."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from multiopt.adapters.torch_state import leave_out
from multiopt.entry import in_parts
from multiopt.state import file as checkpoint
from multiopt.state.file_objects import Source, Target
from multiopt.state.metadata import described

__all__ = ["read_file", "write_file"]

#: What of the state of a tensor is an entry of a file.
PARTS = ("rule", "step", "slots", "complex")

#: The name of the metadata under which keys of schedulers and users are.
GROUPS = "param_groups"


def write_file(file: Target, stored: Mapping[str, Mapping[str, Any]], steps: int) -> None:
    """Write state to a file.

    Args:
        file: The file.
        stored: The state by label, as ``TensorOptimizer.described``.
        steps: How many steps the optimizer has taken.
    """
    document: dict[str, Any] = {
        "version": checkpoint.VERSION,
        "steps": steps,
        "entries": {
            label: {part: one.get(part) for part in PARTS} for label, one in stored.items()
        },
        "pending": {},
    }
    if averages := {label: one["average"] for label, one in stored.items() if "average" in one}:
        document["averages"] = averages
    if skips := {label: list(one["skips"]) for label, one in stored.items() if "skips" in one}:
        document["skips"] = skips
    groups = {label: _plain(label, one.get("group", {})) for label, one in stored.items()}
    groups = {label: group for label, group in groups.items() if group}
    checkpoint.write(file, document, {GROUPS: groups} if groups else None)


def _plain(label: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """What a file can hold of the keys that schedulers and users have put into a group."""
    kept = {}
    for name, value in group.items():
        try:
            described({name: value})
        except ValueError:
            warnings.warn(
                f"left out {name!r} in the param_groups of {label!r}, a {type(value).__name__}: a "
                "file holds numbers, strings, lists and mappings of them",
                stacklevel=5,
            )
        else:
            kept[name] = value
    return kept


def read_file(file: Source, averages: bool) -> tuple[dict[str, dict[str, Any]], int | None]:
    """The state in a file by label, and how many steps the optimizer had taken.

    Args:
        file: The file.
        averages: Whether averages are wanted.

    Raises:
        CheckpointError: The file is damaged, or of another kind.
    """
    contents = checkpoint.read(file)
    contents.check_whole(file)
    document = dict(contents.state_dict)
    parts = {**document["pending"], **document["entries"]}
    loaded = {label: _in_parts(stored) for label, stored in parts.items()}
    if averages:
        for part in ("pending_averages", "averages"):
            for label, stored in document.pop(part, {}).items():
                loaded[label]["average"] = _in_parts(stored)
    groups = contents.metadata.get(GROUPS)
    beside = {"skips": document.pop("skips", {}), "group": groups}
    for name, by_label in beside.items():
        # The metadata may be somebody else's.
        for label, value in by_label.items() if isinstance(by_label, dict) else ():
            if label in loaded and (name == "skips" or isinstance(value, dict)):
                loaded[label][name] = value
    leave_out(document, loaded, stacklevel=4)
    return loaded, document.get("steps")


def _in_parts(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Loaded state with the parts of complex slots, and the word that they are."""
    slots = stored["slots"]
    is_complex = any(map(np.iscomplexobj, slots.values()))
    return {**stored, "slots": in_parts(slots), "complex": is_complex}
