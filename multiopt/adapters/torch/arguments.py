"""The types of what every optimizer here takes."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias, TypedDict

import torch

from multiopt.rules.average import Average
from multiopt.step.clip import Clip

__all__ = ["Clips", "Named", "Params", "Settings"]

#: Parameters as ``torch.optim`` takes them: tensors, pairs of names and tensors, or groups.
Params: TypeAlias = (
    Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | Iterable[dict[str, Any]]
)
Named: TypeAlias = Iterable[tuple[str, torch.Tensor]]
Clips: TypeAlias = Clip | Callable[[str], Clip | None] | None


class Settings(TypedDict, total=False):
    """Settings of ``multiopt.Optimizer`` that every optimizer here takes by keyword."""

    clip: Clips
    names: Named | None
    process_group: Any
    on_nonfinite: Literal["propagate", "raise", "skip"]
    threads: int | None
    master_weights: bool
    average: Average | Callable[[str], Average | None] | None
    max_consecutive_skips: int | None
