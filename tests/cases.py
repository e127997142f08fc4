"""The rules with their options, each beside the peer that does the same: one table."""

from dataclasses import dataclass, field
from typing import Any

import pyro.optim.adagrad_rmsprop
import pyro.optim.clipped_adam
import pyro.optim.dct_adam
import torch

import multiopt as mo

PYRO_ADAGRAD_RMSPROP = pyro.optim.adagrad_rmsprop.AdagradRMSProp
PYRO_CLIPPED_ADAM = pyro.optim.clipped_adam.ClippedAdam
PYRO_DCT_ADAM = pyro.optim.dct_adam.DCTAdam


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
    Case(mo.SGD, {"lr": 0.1, "weight_decay": 0.3, "decoupled_weight_decay": True}),
    Case(
        mo.SGD,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3, "decoupled_weight_decay": True},
    ),
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
    Case(
        mo.Adam,
        {"lr": 0.1, "weight_decay": 0.3, "decoupled_weight_decay": True, "maximize": True},
        torch.optim.Adam,
    ),
    Case(
        mo.Adam,
        {"lr": 0.1, "weight_decay": 0.3, "decoupled_weight_decay": True, "amsgrad": True},
        torch.optim.Adam,
    ),
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
    Case(mo.AdamW, {"lr": 0.1, "betas": (0.5, 0.9), "eps": 0.1}, torch.optim.AdamW),
    Case(mo.AdamW, {"lr": 0.1, "weight_decay": 0.0}, torch.optim.AdamW),
    Case(mo.AdamW, {"lr": 0.1, "amsgrad": True, "maximize": True}, torch.optim.AdamW),
    Case(mo.AdamW, {"lr": 0.1, "amsgrad": "corrected"}),
    Case(mo.ClippedAdam, {}, PYRO_CLIPPED_ADAM),
    Case(mo.ClippedAdam, {"lr": 0.1, "clip_norm": 0.3, "lrd": 0.99}, PYRO_CLIPPED_ADAM),
    Case(mo.ClippedAdam, {"lr": 1e-3, "lrd": 1.01, "weight_decay": 0.1}, PYRO_CLIPPED_ADAM),
    Case(mo.ClippedAdam, {"lr": 0.01, "centered_variance": True}, PYRO_CLIPPED_ADAM),
    Case(mo.ClippedAdam, {"lr": 0.1, "betas": (0.5, 0.9), "eps": 0.1}, PYRO_CLIPPED_ADAM),
    Case(mo.Adagrad, {}, torch.optim.Adagrad),
    Case(mo.Adagrad, {"lr": 0.5, "lr_decay": 0.1, "eps": 0.1}, torch.optim.Adagrad),
    Case(mo.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.3}, torch.optim.Adagrad),
    Case(mo.Adagrad, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}, torch.optim.Adagrad),
    Case(
        mo.Adagrad,
        {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.3, "decoupled_weight_decay": True},
    ),
    Case(mo.Adadelta, {}, torch.optim.Adadelta),
    Case(mo.Adadelta, {"lr": 0.1, "rho": 0.5, "eps": 1e-3}, torch.optim.Adadelta),
    Case(mo.Adadelta, {"lr": 0.01, "rho": 1.0}, torch.optim.Adadelta),
    Case(mo.Adadelta, {"weight_decay": 0.1, "maximize": True}, torch.optim.Adadelta),
    Case(mo.Adadelta, {"lr": 0.1, "weight_decay": 0.3, "decoupled_weight_decay": True}),
    Case(mo.Rprop, {}, torch.optim.Rprop),
    Case(mo.Rprop, {"lr": 0.1, "etas": (0.3, 1.5)}, torch.optim.Rprop),
    Case(mo.Rprop, {"lr": 1.0, "step_sizes": (0.02, 0.1), "maximize": True}, torch.optim.Rprop),
    Case(mo.AdagradRMSProp, {}, PYRO_ADAGRAD_RMSPROP),
    Case(mo.AdagradRMSProp, {"eta": 0.1, "delta": 0.2, "t": 0.5}, PYRO_ADAGRAD_RMSPROP),
    Case(mo.AdagradRMSProp, {"delta": -0.3, "t": 1.0}, PYRO_ADAGRAD_RMSPROP),
    Case(mo.RMSprop, {}, torch.optim.RMSprop),
    Case(mo.RMSprop, {"lr": 0.1, "alpha": 0.5, "eps": 0.1}, torch.optim.RMSprop),
    Case(mo.RMSprop, {"alpha": 0.0}, torch.optim.RMSprop),
    Case(mo.RMSprop, {"weight_decay": 0.1}, torch.optim.RMSprop),
    Case(mo.RMSprop, {"momentum": 0.9}, torch.optim.RMSprop),
    Case(mo.RMSprop, {"centered": True}, torch.optim.RMSprop),
    Case(mo.RMSprop, {"maximize": True}, torch.optim.RMSprop),
    Case(mo.RMSprop, {"weight_decay": 0.3, "decoupled_weight_decay": True}),
    Case(
        mo.RMSprop,
        {
            "weight_decay": 0.3,
            "momentum": 0.5,
            "centered": True,
            "decoupled_weight_decay": True,
            "maximize": True,
        },
    ),
    Case(
        mo.RMSprop,
        {"weight_decay": 0.1, "momentum": 0.5, "centered": True, "maximize": True},
        torch.optim.RMSprop,
    ),
    Case(mo.ASGD, {}, torch.optim.ASGD),
    Case(mo.ASGD, {"lr": 0.1, "lambd": 0.1, "alpha": 0.5}, torch.optim.ASGD),
    Case(mo.ASGD, {"lambd": 0.0, "t0": 100.0}, torch.optim.ASGD),
    Case(mo.ASGD, {"t0": 0.0, "weight_decay": 0.1}, torch.optim.ASGD),
    Case(
        mo.ASGD,
        {"lr": 0.1, "lambd": 0.1, "t0": 10.0, "weight_decay": 0.1, "maximize": True},
        torch.optim.ASGD,
    ),
    Case(mo.Lion),
    Case(mo.Lion, {"lr": 0.01, "betas": (0.5, 0.9)}),
    Case(mo.Lion, {"lr": 0.01, "betas": (0.0, 0.0)}),
    Case(mo.Lion, {"lr": 0.01, "weight_decay": 0.5}),
    Case(mo.Lion, {"lr": 0.01, "weight_decay": 0.5, "maximize": True}),
    Case(mo.DCTAdam, {}, PYRO_DCT_ADAM),
    Case(mo.DCTAdam, {"lr": 0.1, "clip_norm": 0.3, "lrd": 0.99}, PYRO_DCT_ADAM),
    Case(mo.DCTAdam, {"lr": 0.1, "betas": (0.5, 0.9), "eps": 0.1}, PYRO_DCT_ADAM),
    Case(mo.Adamax, {}, torch.optim.Adamax),
    Case(mo.Adamax, {"lr": 0.1, "betas": (0.5, 0.7), "eps": 0.1}, torch.optim.Adamax),
    Case(mo.Adamax, {"lr": 0.1, "betas": (0.0, 0.0)}, torch.optim.Adamax),
    Case(mo.Adamax, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}, torch.optim.Adamax),
    Case(mo.Adamax, {"lr": 0.1, "weight_decay": 0.3, "decoupled_weight_decay": True}),
    Case(mo.NAdam, {}, torch.optim.NAdam),
    Case(mo.NAdam, {"lr": 0.1, "betas": (0.5, 0.9), "eps": 0.1}, torch.optim.NAdam),
    Case(mo.NAdam, {"lr": 0.1, "momentum_decay": 0.0}, torch.optim.NAdam),
    Case(mo.NAdam, {"lr": 0.01, "betas": (0.99, 0.999), "momentum_decay": 2.0}, torch.optim.NAdam),
    Case(mo.NAdam, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}, torch.optim.NAdam),
    Case(
        mo.NAdam,
        {"lr": 0.1, "weight_decay": 0.3, "decoupled_weight_decay": True, "maximize": True},
        torch.optim.NAdam,
    ),
    Case(mo.RAdam, {}, torch.optim.RAdam),
    Case(mo.RAdam, {"lr": 0.1, "betas": (0.5, 0.9), "eps": 0.1}, torch.optim.RAdam),
    Case(mo.RAdam, {"lr": 0.1, "betas": (0.9, 0.5)}, torch.optim.RAdam),
    Case(mo.RAdam, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}, torch.optim.RAdam),
    Case(
        mo.RAdam,
        {"lr": 0.1, "weight_decay": 0.3, "decoupled_weight_decay": True, "maximize": True},
        torch.optim.RAdam,
    ),
    Case(mo.AdaBelief),
    Case(mo.AdaBelief, {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3}),
    Case(mo.AdaBelief, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    Case(mo.AdaBelief, {"lr": 0.1, "weight_decay": 0.3, "decoupled_weight_decay": True}),
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
