"""What a load reads, whether from a file or from a state dict."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from multiopt.errors import CheckpointError
from multiopt.state.file_objects import Source, label
from multiopt.state.record import Saved
from multiopt.state.settings import Settings
from multiopt.step.skips import Skips

__all__ = ["Contents", "SavedParams"]


class SavedParams(NamedTuple):
    """The parameters in a file.

    Attributes:
        names: The names of all of them.
        saved: Those that were asked for, each as a record with one array.
        damaged: The names of damaged ones, each with the reason.
    """

    names: list[str]
    saved: dict[str, Saved]
    damaged: dict[str, str]


class Contents(NamedTuple):
    """The contents of a file or a state dict.

    Attributes:
        names: Every name that appears in it.
        saved: The saved state of the names that were asked for.
        steps: How many steps the optimizer had taken; None if unknown.
        skips: How often each name was skipped.
        metadata: What the user saved along with the state.
        unfit: The names whose state is damaged or unusable, each with the reason.
        settings: The hyperparameters that were set while the run went on.
        params: The parameters; None if there are none, or if they were not asked for.
    """

    names: list[str]
    saved: dict[str, Saved]
    steps: int | None
    skips: dict[str, Skips]
    metadata: Mapping[str, Any]
    unfit: dict[str, str]
    settings: Settings
    params: SavedParams | None = None

    def all_names(self) -> list[str]:
        """Every name that appears in it, with state or as a parameter."""
        if self.params is None:
            return self.names
        return list(dict.fromkeys([*self.names, *self.params.names]))

    def check_whole(self, file: Source) -> None:
        """Raise an error if the state of any name is damaged.

        Args:
            file: The file, for the message.

        Raises:
            CheckpointError: The state of a name is damaged.
        """
        damaged_params = self.params.damaged if self.params else {}
        if self.unfit or damaged_params:
            damage = "; ".join(
                [f"{name!r}, {why}" for name, why in self.unfit.items()]
                + [f"the parameter {name!r}, {why}" for name, why in damaged_params.items()]
            )
            raise CheckpointError(
                f"{label(file)}: the state of {damage}. Nothing was loaded; strict=False loads "
                "the rest"
            )
