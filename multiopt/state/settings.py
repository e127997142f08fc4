"""Settings: hyperparameters that were set while a run went on, which are part of its state.

The constructor's rule stays when state is loaded, but what ``set_hyperparameters`` changed since
then comes back over it. So settings are saved apart from the rules: those for all names, those of
single names, and the schedules among their values, each once, so that names which shared one
``Plateau`` share one again.

>>> from multiopt.schedules import Linear
>>> made = {None: {"lr": Linear(0.1, 0.0, 10)}, "w": {"betas": (0.5, 0.9)}}
>>> saved = described_settings(made)
>>> saved["all"], saved["names"]
({'lr': {'schedule': 0}}, {'w': {'betas': [0.5, 0.9]}})
>>> settings_in(saved).of_name("w")
{'lr': Linear(initial=0.1, final=0.0, steps=10), 'betas': (0.5, 0.9)}
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

from multiopt.errors import CheckpointError, brief, caller_level
from multiopt.schedules import Schedule
from multiopt.schedules.description import plain, recorded, revived, unworded
from multiopt.state.metadata import check_nesting
from multiopt.step.report import abridged

__all__ = [
    "Lost",
    "Made",
    "Settings",
    "described_settings",
    "record",
    "settings_in",
    "warn_of_lost",
]

#: Settings as an optimizer keeps them: by name, and under None those for all names.
Made: TypeAlias = Mapping[str | None, Mapping[str, Any]]

#: What was set to a callable that cannot be saved: hyperparameters, and for which names.
Lost: TypeAlias = dict[str, list[str | None]]


class Settings(NamedTuple):
    """Settings that were read from a checkpoint.

    Attributes:
        for_all: Those for all names.
        by_name: Those of single names, which count over those for all.
        lost: What could not be saved.
    """

    for_all: Mapping[str, Any] = {}
    by_name: Mapping[str, Mapping[str, Any]] = {}
    lost: Mapping[str, list[str | None]] = {}

    def of_name(self, name: str) -> dict[str, Any]:
        """All settings that apply to a name."""
        return {**self.for_all, **self.by_name.get(name, {})}

    def renamed(self, new: Mapping[str, str]) -> "Settings":
        """Settings of some of the names only, under their new names."""
        by_name = {new[name]: values for name, values in self.by_name.items() if name in new}
        lost: Lost = {}
        for key, names in self.lost.items():
            if here := [None if n is None else new[n] for n in names if n is None or n in new]:
                lost[key] = here
        return Settings(self.for_all, by_name, lost)


def described_settings(made: Made) -> dict[str, Any]:
    """Describe settings as plain data, empty if there are none; warn about what is lost."""
    schedules: list[Any] = []
    numbers: dict[int, int] = {}
    lost: Lost = {}

    def described(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return [described(part) for part in value]
        if not callable(value):
            return plain(value)
        if id(value) not in numbers:
            try:
                description = recorded(value)
            except ValueError:
                return {"callable": brief(value)}
            numbers[id(value)] = len(schedules)
            schedules.append(description)
        return {"schedule": numbers[id(value)]}

    described_by_name = {}
    for name, values in made.items():
        described_by_name[name] = words = {key: described(value) for key, value in values.items()}
        for key, word in words.items():
            if _is_lost(word):
                lost.setdefault(key, []).append(name)
    for_all = described_by_name.pop(None, {})
    warn_of_lost(lost, "saved")
    by_name = {str(name): words for name, words in described_by_name.items() if words}
    if not for_all and not by_name:
        return {}
    return {"all": for_all, "names": by_name, "schedules": schedules}


def _is_lost(word: Any) -> bool:
    parts = word if isinstance(word, list) else [word]
    return any(isinstance(part, Mapping) and "callable" in part for part in parts)


def record(
    settings: dict[str | None, dict[str, Any]],
    names: Iterable[str] | None,
    values: Mapping[str, Any],
) -> None:
    """Remember that some hyperparameters of some names were set.

    Args:
        settings: What was set before: by name, and under None for all names. It is changed.
        names: The names; None for all.
        values: The hyperparameters.
    """
    if names is None:
        # What is set for all replaces what was set for single names.
        for name in list(settings):
            left = {key: value for key, value in settings[name].items() if key not in values}
            if left:
                settings[name] = left
            else:
                del settings[name]
    for name in [None] if names is None else names:
        settings.setdefault(name, {}).update(values)


def settings_in(saved: Any) -> Settings:
    """Read the settings in a description, with new schedules.

    Raises:
        CheckpointError: The description is malformed.
    """
    if not saved:
        return Settings()
    try:
        check_nesting(saved)
        schedules = [revived(description) for description in saved["schedules"]]
        lost: Lost = {}

        def values_in(words: Mapping[str, Any], name: str | None) -> dict[str, Any]:
            values = {}
            for key, word in words.items():
                if _is_lost(word):
                    lost.setdefault(key, []).append(name)
                else:
                    values[key] = _value(word, schedules)
            return values

        for_all = values_in(saved["all"], None)
        by_name = {name: values_in(words, name) for name, words in saved["names"].items()}
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(f"its settings are malformed: {error}") from error
    mappings = for_all, by_name, *by_name.values()
    if not all(isinstance(key, str) for words in mappings for key in words):
        raise CheckpointError("its settings are malformed: expected strings as keys")
    return Settings(for_all, by_name, lost)


def _value(word: Any, schedules: list[Schedule]) -> Any:
    if isinstance(word, list | tuple):
        return tuple(_value(part, schedules) for part in word)
    if isinstance(word, Mapping):
        return schedules[word["schedule"]]
    return unworded(word)


def warn_of_lost(lost: Mapping[str, list[str | None]], verb: str) -> None:
    """Warn about settings that a checkpoint cannot hold.

    Args:
        lost: The settings.
        verb: ``"saved"`` or ``"loaded"``.
    """
    whose = {
        key: "all names" if None in names else abridged([str(name) for name in names])
        for key, names in lost.items()
    }
    if whose:
        what = "; ".join(f"{key} of {names}" for key, names in whose.items())
        warnings.warn(
            f"set_hyperparameters was given a callable of yours ({what}), which is not {verb}: "
            "after a load set it again, or use a schedule of multiopt.schedules, which comes back",
            stacklevel=caller_level(),
        )
