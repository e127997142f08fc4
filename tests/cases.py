"""The rules with their options, each beside the peer that does the same: one table."""

from dataclasses import dataclass, field
from typing import Any

import pyro.optim.clipped_adam
import torch

import multiopt as mo

PYRO_CLIPPED_ADAM = pyro.optim.clipped_adam.ClippedAdam


@dataclass(frozen=True)
class Case:
    """A rule and its peer.

    Attributes:
        id: What is special about it.
        rule: The rule.
        peer: The class that does the same, made with the same arguments, or None.
    """

    rule_class: type[mo.Rule]
    arguments: dict[str, Any] = field(default_factory=dict)
    peer: Any = None

    @property
    def rule(self) -> mo.Rule:
        return self.rule_class(**self.arguments)

    @property
    def id(self) -> str:
        settings = ",".join(f"{name}={value}" for name, value in self.arguments.items())
        return f"{self.rule_class.__name__}({settings})"


CASES = [
    Case(mo.SGD, {}, torch.optim.SGD),
    Case(mo.SGD, {"lr": 0.1, "momentum": 0.9}, torch.optim.SGD),
    Case(mo.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}, torch.optim.SGD),
    Case(mo.SGD, {"lr": 0.01, "momentum": 0.9, "dampening": -0.5}, torch.optim.SGD),
    Case(mo.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, torch.optim.SGD),
    Case(mo.SGD, {"lr": 0.1, "weight_decay": 0.1}, torch.optim.SGD),
    Case(
        mo.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
        torch.optim.SGD,
    ),
    Case(mo.Adam, {}, torch.optim.Adam),
    Case(mo.Adam, {"lr": 0.1, "betas": (0.5, 0.9)}, torch.optim.Adam),
    Case(mo.Adam, {"lr": 0.1, "betas": (0.0, 0.0)}, torch.optim.Adam),
    Case(mo.Adam, {"lr": 0.1, "eps": 0.1}, torch.optim.Adam),
    Case(mo.Adam, {"lr": 0.1, "weight_decay": 0.1}, torch.optim.Adam),
    Case(mo.Adam, {"lr": 0.1, "amsgrad": True}, torch.optim.Adam),
    Case(mo.Adam, {"lr": 0.1, "amsgrad": "corrected"}),
    Case(mo.Adam, {"lr": 0.1, "maximize": True}, torch.optim.Adam),
    Case(
        mo.Adam,
        {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True, "maximize": True},
        torch.optim.Adam,
    ),
    Case(mo.AdamW, {}, torch.optim.AdamW),
    Case(mo.AdamW, {"lr": 0.1, "weight_decay": 0.5}, torch.optim.AdamW),
    Case(mo.AdamW, {"lr": 0.1, "weight_decay": 0.0}, torch.optim.AdamW),
    Case(mo.AdamW, {"lr": 0.1, "amsgrad": True, "maximize": True}, torch.optim.AdamW),
    Case(mo.AdamW, {"lr": 0.1, "amsgrad": "corrected"}),
    Case(mo.ClippedAdam, {}, PYRO_CLIPPED_ADAM),
    Case(mo.ClippedAdam, {"lr": 0.1, "clip_norm": 0.3, "lrd": 0.99}, PYRO_CLIPPED_ADAM),
    Case(mo.ClippedAdam, {"lr": 1e-3, "lrd": 1.01, "weight_decay": 0.1}, PYRO_CLIPPED_ADAM),
    Case(mo.ClippedAdam, {"lr": 0.01, "centered_variance": True}, PYRO_CLIPPED_ADAM),
]

#: Those that treat a parameter as a whole: no engine runs them but the rule as it stands.
WHOLE = [
    Case(mo.LAMB),
    Case(mo.LAMB, {"lr": 0.1, "betas": (0.5, 0.9), "eps": 0.1, "weight_decay": 0.1}),
    Case(mo.LAMB, {"lr": 0.1, "weight_decay": 0.5, "maximize": True}),
    Case(mo.Adafactor, {}, torch.optim.Adafactor),
    Case(mo.Adafactor, {"lr": 0.1, "weight_decay": 0.1}, torch.optim.Adafactor),
    Case(mo.Adafactor, {"lr": 1.0, "beta2_decay": -0.5, "d": 2.0}, torch.optim.Adafactor),
    Case(mo.Adafactor, {"eps": (0.1, 0.5), "maximize": True}, torch.optim.Adafactor),
    Case(mo.Adafactor, {"eps": (1e-30, 0.0), "d": float("inf")}, torch.optim.Adafactor),
]
