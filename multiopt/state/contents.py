"""What a load reads, whether from a file or from a state dict."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from multiopt.errors import CheckpointError
from multiopt.state.file_objects import Source, label
from multiopt.state.record import Saved
from multiopt.step.skips import Skips

__all__ = ["Contents"]


class Contents(NamedTuple):
    """The contents of a file or a state dict.

    Attributes:
        names: Every name that appears in it.
        saved: The saved state of the names that were asked for.
        steps: How many steps the optimizer had taken; None if unknown.
        skips: How often each name was skipped.
        metadata: What the user saved along with the state.
        unfit: The names whose state is damaged or unusable, each with the reason.
    """

    names: list[str]
    saved: dict[str, Saved]
    steps: int | None
    skips: dict[str, Skips]
    metadata: Mapping[str, Any]
    unfit: dict[str, str]

    def check_whole(self, file: Source) -> None:
        """Raise an error if the state of any name is damaged.

        Args:
            file: The file, for the message.

        Raises:
            CheckpointError: The state of a name is damaged.
        """
        if self.unfit:
            damage = "; ".join(f"{name!r}, {why}" for name, why in self.unfit.items())
            raise CheckpointError(
                f"{label(file)}: the state of {damage}. Nothing was loaded; strict=False loads "
                "the rest"
            )
