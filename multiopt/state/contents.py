"""What comes in, from a file or from a state dict."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from multiopt.errors import CheckpointError
from multiopt.state.file_objects import Source, label
from multiopt.state.record import Saved
from multiopt.step.skips import Skips

__all__ = ["Contents"]


class Contents(NamedTuple):
    """What a file, or a state dict, has.

    Attributes:
        names: The names of which it has anything.
        saved: What is saved of those that are wanted.
        steps: How many steps were taken; None if it is not known.
        skips: How often names were skipped.
        metadata: What the user saved with it.
        unfit: Names whose state is damaged, or of no use, and why.
    """

    names: list[str]
    saved: dict[str, Saved]
    steps: int | None
    skips: dict[str, Skips]
    metadata: Mapping[str, Any]
    unfit: dict[str, str]

    def check_whole(self, file: Source) -> None:
        """Refuse what is not whole.

        Args:
            file: The file, for the message.

        Raises:
            CheckpointError: Something is damaged.
        """
        if self.unfit:
            damage = "; ".join(f"{name!r}, {why}" for name, why in self.unfit.items())
            raise CheckpointError(
                f"{label(file)}: the state of {damage}. Nothing was loaded; strict=False loads "
                "the rest"
            )
