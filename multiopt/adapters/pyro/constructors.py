"""The torch optimizers that names of ``pyro.optim`` stand for, and the rules that they follow."""

from collections.abc import Callable
from typing import Any

import torch
from pyro.optim import adagrad_rmsprop, clipped_adam, dct_adam

from multiopt import rules
from multiopt.rules import Rule

__all__ = ["CONSTRUCTORS", "RULES", "Settings", "has_rule"]

#: Settings of a dict, or a callable that gives them for a name, or for a module and a name.
Settings = dict[str, Any] | Callable[..., dict[str, Any]]

#: The torch optimizers that a name of ``pyro.optim`` stands for. LBFGS is not for SVI, says Pyro.
CONSTRUCTORS: dict[str, type[torch.optim.Optimizer]] = {
    name: value
    for name, value in vars(torch.optim).items()
    if isinstance(value, type)
    and issubclass(value, torch.optim.Optimizer)
    and value not in (torch.optim.Optimizer, torch.optim.LBFGS)
} | {
    "AdagradRMSProp": adagrad_rmsprop.AdagradRMSProp,
    "ClippedAdam": clipped_adam.ClippedAdam,
    "DCTAdam": dct_adam.DCTAdam,
}

#: The rules of multiopt, by the torch optimizer whose arguments and state they take.
RULES: dict[Any, type[Rule]] = {
    constructor: getattr(rules, name)
    for name, constructor in CONSTRUCTORS.items()
    if hasattr(rules, name)
}


def has_rule(optim_constructor: Any, optim_args: Settings) -> bool:
    """Whether multiopt has a rule for a torch optimizer with these arguments."""
    aware = isinstance(optim_args, dict) and optim_args.get("subsample_aware")
    return optim_constructor in RULES and not aware
