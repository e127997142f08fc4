"""What Pyro's DCTAdam reads from its tensors, for the drop-in."""

from dataclasses import replace

import torch

from multiopt.rules import DCTAdam, Rule

__all__ = ["OF_TENSORS", "marked"]

#: Hyperparameters that tensors decide, and neither settings nor loaded state.
OF_TENSORS = ("dct_dim",)


def marked(rule: Rule, tensor: torch.Tensor) -> Rule:
    """The rule for a tensor: DCTAdam along the dimension that the tensor is marked with."""
    if not isinstance(rule, DCTAdam):
        return rule
    return replace(rule, dct_dim=getattr(tensor, "_pyro_dct_dim", None))
