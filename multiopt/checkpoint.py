"""The state of an optimizer in one file: safetensors, no pickle, readable by any backend.

The header's metadata has one key, ``multiopt``: JSON with the format's version, the steps of the
optimizer and, by parameter name, the rule, the step and the key of each slot's tensor.
``spec/registry.md`` says what a state is.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from multiopt.errors import CheckpointError
from multiopt.schedules import check_description

__all__ = ["VERSION", "check_state_dict", "read", "write"]

#: The version of the file format and of ``state_dict``.
VERSION = 1

#: The parts of a state dict that are entries by name, and whether it must have them.
PARTS = {"entries": True, "pending": True, "averages": False, "pending_averages": False}

#: What reading a file of another kind, or a damaged one, can raise.
MALFORMED = (SafetensorError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def write(path: str | os.PathLike[str], state_dict: Mapping[str, Any]) -> None:
    """Write a state dict with NumPy slots to a file, whole or not at all.

    Args:
        path: The file, replaced if it exists.
        state_dict: As ``Optimizer.state_dict`` gives it, its slots NumPy arrays.
    """
    tensors: dict[str, np.ndarray] = {}

    def stored(entry: Mapping[str, Any]) -> dict[str, Any]:
        slots = {}
        for slot, array in entry["slots"].items():
            slots[slot] = str(len(tensors))
            tensors[slots[slot]] = np.asarray(array, order="C")
        return {**entry, "slots": slots}

    document = {
        key: {name: stored(entry) for name, entry in value.items()} if key in PARTS else value
        for key, value in state_dict.items()
    }
    metadata = {"multiopt": json.dumps(document, allow_nan=False)}
    target = Path(path).resolve()
    beside = target.with_name(f".{target.name}.{uuid4().hex}.tmp")
    try:
        beside.touch(exist_ok=False)
        mode = beside.stat().st_mode
        save_file(tensors, beside, metadata=metadata)
        # safetensors makes files for their owner only.
        beside.chmod(target.stat().st_mode if target.exists() else mode)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a state dict with NumPy slots from a file.

    Raises:
        CheckpointError: The file is damaged or not ours.
        OSError: The file cannot be read.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            document = json.loads((file.metadata() or {})["multiopt"])
            _check_version(document)
            for part, required in PARTS.items():
                for entry in (document[part] if required else document.get(part, {})).values():
                    entry["slots"] = {
                        slot: file.get_tensor(key) for slot, key in entry["slots"].items()
                    }
    except CheckpointError as error:
        raise CheckpointError(f"{os.fspath(path)}: {error}") from error
    except MALFORMED as error:
        raise CheckpointError(
            f"{os.fspath(path)}: expected a multiopt checkpoint; it is damaged or another kind of "
            f"file ({type(error).__name__}: {error})"
        ) from error
    try:
        check_state_dict(document)
    except ValueError as error:
        raise CheckpointError(f"{os.fspath(path)}: {error}") from error
    state_dict: dict[str, Any] = document
    return state_dict


def check_state_dict(state_dict: Any) -> None:
    """Refuse what has not the form of a state dict.

    Raises:
        ValueError: It has not.
    """
    if not isinstance(state_dict, Mapping) or "version" not in state_dict:
        raise ValueError("expected a state dict with 'version', 'entries' and 'pending'")
    _check_version(state_dict)
    if not _is_clock(state_dict.get("steps", 0)):
        raise ValueError(f"expected an integer >= 0 under 'steps'; got {state_dict['steps']!r}")
    for part, required in PARTS.items():
        entries = state_dict.get(part, None if required else {})
        if not isinstance(entries, Mapping):
            raise ValueError(f"expected a mapping under {part!r}; got {type(entries).__name__}")
        for name, entry in entries.items():
            if not isinstance(name, str):
                raise ValueError(f"expected names under {part!r} to be strings; got {name!r}")
            step = entry.get("step") if isinstance(entry, Mapping) else None
            if not _is_clock(step):
                raise ValueError(
                    f"the state of {name!r} has step {step!r}; expected an integer >= 0"
                )
            slots, rule = entry.get("slots"), entry.get("rule")
            if not isinstance(slots, Mapping) or not isinstance(rule, Mapping):
                raise ValueError(f"the state of {name!r} needs mappings under 'slots' and 'rule'")
            if not all(isinstance(key, str) for key in (*slots, *rule)):
                raise ValueError(f"the state of {name!r} has a slot or setting without a name")
            schedules = rule.get("schedules", {})
            if not isinstance(schedules, Mapping):
                raise ValueError(f"the state of {name!r} needs a mapping under 'schedules'")
            try:
                check_description(schedules)
            except ValueError as error:
                raise ValueError(f"the state of {name!r}: {error}") from error


def _is_clock(step: Any) -> bool:
    return isinstance(step, int) and not isinstance(step, bool) and step >= 0


def _check_version(state_dict: Mapping[str, Any]) -> None:
    version = state_dict["version"]
    if type(version) is not int or version != VERSION:
        raise CheckpointError(
            f"expected a state dict of version {VERSION}; got version {version!r}: it needs "
            "another release of multiopt"
        )
