"""Which torch optimizer each name of ``pyro.optim`` stands for, and which rule replaces it."""

from collections.abc import Callable
from typing import Any

import torch
from pyro.optim import adagrad_rmsprop, clipped_adam, dct_adam

from multiopt import rules
from multiopt.rules import Rule

__all__ = ["CONSTRUCTORS", "RULES", "Settings", "has_rule"]

#: Settings: a dict, or a callable that returns one for a name, or for a module and a name.
Settings = dict[str, Any] | Callable[..., dict[str, Any]]

#: The torch optimizer that each name of ``pyro.optim`` stands for. Pyro excludes LBFGS from SVI.
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

#: multiopt's rules, by the torch optimizer whose arguments and state they accept.
RULES: dict[Any, type[Rule]] = {
    constructor: getattr(rules, name)
    for name, constructor in CONSTRUCTORS.items()
    if hasattr(rules, name)
}


def has_rule(optim_constructor: Any, optim_args: Settings) -> bool:
    """Whether multiopt has a rule for a torch optimizer with these arguments."""
    aware = isinstance(optim_args, dict) and optim_args.get("subsample_aware")
    return optim_constructor in RULES and not aware
