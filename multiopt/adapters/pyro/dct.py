"""The dimension along which DCTAdam works, which Pyro reads from a mark on the tensor."""

from dataclasses import replace

import torch

from multiopt.rules import DCTAdam, Rule

__all__ = ["OF_TENSORS", "marked"]

#: Hyperparameters that the tensor decides, not the settings or loaded state.
OF_TENSORS = ("dct_dim",)


def marked(rule: Rule, tensor: torch.Tensor) -> Rule:
    """Set DCTAdam's dimension to the one that a tensor is marked with; return other rules as is."""
    if not isinstance(rule, DCTAdam):
        return rule
    return replace(rule, dct_dim=getattr(tensor, "_pyro_dct_dim", None))
