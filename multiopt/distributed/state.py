"""State that comes from another rank: packed as a checkpoint file, and taken over in a step.

What has come waits in ``pending``, as loaded state does, and the step takes it from there. If the
step fails, everything is as it was before.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import torch

from multiopt.arrays import Array
from multiopt.backend import backend_named, slot_of
from multiopt.entry import Entry
from multiopt.registry import Registry
from multiopt.state.file import read
from multiopt.state.plateaus import pending_now
from multiopt.state.record import Saved, description, plain_entry, saved_of
from multiopt.state.settings import Made, described_settings
from multiopt.state.tables import waiting
from multiopt.state.writing import write

__all__ = ["copied", "on_this_rank", "packed", "undoing", "with_state", "with_values"]


def packed(registry: Registry, names: Sequence[str]) -> bytes:
    """The state of some names, what was set for them, and how often they were skipped, as a file.

    Returns:
        The bytes of the file; none if there is nothing.
    """
    kept = pending_now(registry) if registry.pending else {}
    saved = {name: _saved(registry, name) for name in names if name in registry}
    saved |= {name: kept[name] for name in names if name in kept}
    settings: Made = {n: registry.settings[n] for n in names if n in registry.settings}
    skips = {n: registry.skips[n] for n in names if n in registry.skips}
    if not (saved or settings or skips):
        return b""
    file = BytesIO()
    made = described_settings(settings)
    write(file, waiting(saved), registry.steps, skips, settings=made)
    return file.getvalue()


def _saved(registry: Registry, name: str) -> Saved:
    """The state of a name that has been seen, with copies of its slots."""
    entry = registry.entry(name)
    mean = entry.average
    average = None if mean is None or not mean.step else _plain(mean, registry.steps)
    return saved_of(name, _plain(entry, registry.steps), average)


def _plain(entry: Entry, steps: int) -> dict[str, object]:
    to_host = backend_named(entry.layout.library).to_host
    rule = description(entry.rule, entry.step, steps)
    plain = plain_entry(rule, entry.step, entry.converted(to_host))
    return {**plain, "complex": entry.layout.is_complex}


@contextmanager
def with_state(
    registry: Registry, names: Sequence[str], states: Sequence[bytes], steps: int
) -> Iterator[None]:
    """Let the next step begin with state that has come from other ranks.

    If that step does not happen, the registry is left as it was.

    Args:
        registry: The registry.
        names: The names that come from another rank; their state here is dropped.
        states: Their states, as ``packed`` makes them.
        steps: How many steps the optimizer is to have taken.

    Raises:
        ValueError: A state is not one of an optimizer like this one.
    """
    contents = [read(BytesIO(state)) for state in states]
    before = registry.pending, registry.skips, registry.settings, registry.steps
    rows = {name: on_this_rank(registry, name) for name in names if name in registry}

    def undo() -> None:
        registry.put(rows)
        registry.pending, registry.skips, registry.settings, registry.steps = before

    with undoing(registry, undo):
        if names:
            registry.forget(names)
        for found in contents:
            kept = {name: _kept(registry, name, saved) for name, saved in found.saved.items()}
            registry.pending = registry.pending | kept
            registry.skips = registry.skips | found.skips
            own: dict[str | None, dict[str, Any]] = {
                name: dict(values) for name, values in found.settings.by_name.items()
            }
            registry.settings = {**registry.settings, **own}
        registry.steps = steps
        yield


def on_this_rank(registry: Registry, name: str) -> Entry:
    """A copy of the state of a name that has been seen, as it is on this rank."""
    entry = registry.entry(name)
    to_host = backend_named(entry.layout.library).to_host
    return entry.with_converted(lambda slot: slot_of(to_host(slot), entry.layout))


def _kept(registry: Registry, name: str, saved: Saved) -> Saved:
    """A record with the average that is kept here of its name."""
    if saved.form.average is None:
        return saved
    average = registry.average_of(name)
    if average is None:
        raise ValueError(
            f"another rank keeps an average of parameter {name!r}, and this one none; expected the "
            "same optimizer on all ranks"
        )
    return saved._replace(keeps=average)


@contextmanager
def with_values(
    registry: Registry, arrays: Mapping[str, Array], values: Mapping[str, Array]
) -> Iterator[None]:
    """Let the next step begin with values that have come from other ranks.

    If that step does not happen, the arrays have their old values again.

    Args:
        registry: The registry that takes the step.
        arrays: The arrays by name.
        values: The values of some of them.
    """
    before = {name: copied(arrays[name]) for name in values}
    with undoing(registry, partial(_write, arrays, before)):
        _write(arrays, values)
        yield


@contextmanager
def undoing(registry: Registry, undo: Callable[[], object]) -> Iterator[None]:
    """Undo something unless the next step of a registry happens."""
    outcome = registry.outcome
    try:
        yield
    except BaseException:
        # Ctrl-C that has waited is raised after the step; a torn optimizer needs a load.
        if registry.outcome is outcome and registry.guard.torn is None:
            with registry.guard:
                undo()
        raise


def copied(array: Array) -> Array:
    """A copy of an array, of NumPy or PyTorch."""
    return array.detach().clone() if isinstance(array, torch.Tensor) else np.array(array)


def _write(arrays: Mapping[str, Array], values: Mapping[str, Array]) -> None:
    for name, value in values.items():
        array = arrays[name]
        if isinstance(array, torch.Tensor):
            with torch.no_grad():
                array.copy_(value)
        else:
            np.copyto(array, value)
