"""What Pyro's DCTAdam reads from its tensors, for the drop-in."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from multiopt.rules import DCTAdam, Rule

__all__ = ["OF_TENSORS", "marked", "refuse_subsamples"]

#: Hyperparameters that tensors decide, and neither settings nor loaded state.
OF_TENSORS = ("dct_dim",)


def marked(rule: Rule, tensor: torch.Tensor) -> Rule:
    """The rule for a tensor: DCTAdam along the dimension that the tensor is marked with."""
    if not isinstance(rule, DCTAdam):
        return rule
    return replace(rule, dct_dim=getattr(tensor, "_pyro_dct_dim", None))


def refuse_subsamples(settings: Mapping[str, Any]) -> None:
    """Refuse the option that only Pyro's own class has.

    Raises:
        ValueError: It is on.
    """
    if settings.get("subsample_aware"):
        raise ValueError(
            "subsample_aware=True is not for a callable of names, nor for state that is loaded "
            "here: use pyro.optim.DCTAdam, which this one gives for a dict with that option"
        )
