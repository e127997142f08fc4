"""Checkpoint files of the drop-in.

They have the format of ``multiopt.Optimizer.save``, so ``multiopt.Optimizer.load`` reads them too.
The keys that schedulers and users keep in parameter groups are in their metadata.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from multiopt.adapters.torch.state import leave_out
from multiopt.state.file import read
from multiopt.state.file_objects import Source, Target
from multiopt.state.metadata import described
from multiopt.state.record import entry_on_host, saved_of
from multiopt.state.tables import waiting
from multiopt.state.writing import write

__all__ = ["read_file", "write_file"]

#: The key in the metadata under which the groups' other keys are stored.
GROUPS = "param_groups"


def write_file(file: Target, states: Mapping[str, Mapping[str, Any]], steps: int) -> None:
    """Write the state of a drop-in optimizer to a file.

    Args:
        file: The file.
        states: The results of ``TensorOptimizer.plain_state``, by label.
        steps: How many steps the optimizer has taken.
    """
    records = {
        label: saved_of(label, state, state.get("average")) for label, state in states.items()
    }
    skips = {label: state["skips"] for label, state in states.items() if "skips" in state}
    groups = {label: _plain(label, state.get("group", {})) for label, state in states.items()}
    groups = {label: group for label, group in groups.items() if group}
    write(file, waiting(records, "entries"), steps, skips, {GROUPS: groups} if groups else None)


def _plain(label: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """Keep those keys of a group that a file can hold, and warn about the others."""
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
    """Read the state in a file by label, and how many steps the optimizer had taken.

    Args:
        file: The file.
        averages: Whether to read averages; without, they are left out with a warning.

    Raises:
        CheckpointError: The file is damaged, or of another kind.
    """
    contents = read(file)
    contents.check_whole(file)
    loaded = {label: entry_on_host(saved) for label, saved in contents.saved.items()}
    left = (
        {} if averages else {label: state.pop("average", None) for label, state in loaded.items()}
    )
    beside = {"skips": contents.skips, "group": contents.metadata.get(GROUPS)}
    for name, by_label in beside.items():
        # The metadata may come from another program.
        for label, value in by_label.items() if isinstance(by_label, dict) else ():
            if label in loaded and (name == "skips" or isinstance(value, dict)):
                loaded[label][name] = value
    left = {label: average for label, average in left.items() if average is not None}
    leave_out({"averages": left}, loaded, stacklevel=4)
    return loaded, contents.steps
