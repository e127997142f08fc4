"""Settings of torch's and Pyro's parameter groups, and the rules that they stand for.

Names and meanings are mostly the same, so the rest is exceptions: switches that torch may give as 0
or 1, numbers that may be tensors, and Pyro's ``lr`` that decays in the group itself.
"""

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from inspect import signature
from math import prod
from typing import Any

import numpy as np
import torch

from multiopt import rules
from multiopt.rules import Rule
from multiopt.rules.arithmetic import power

__all__ = [
    "BESIDE",
    "DECOUPLED",
    "KNOWN",
    "check_settings",
    "from_plain",
    "group_settings",
    "lacking",
    "number",
    "plain_settings",
    "refuse_subsamples",
    "rule_class_of",
    "rule_of",
    "rule_settings",
    "with_decoupled",
]

#: Optimizers that Pyro has and torch does not.
OF_PYRO = ("AdagradRMSProp", "ClippedAdam", "DCTAdam")

#: The settings of all rules together.
KNOWN = {
    field.name for name in rules.__all__ if name != "Rule" for field in fields(getattr(rules, name))
}

#: Other keys that torch and Pyro keep in groups.
BESIDE = {"capturable", "differentiable", "foreach", "fused", "params", "subsample_aware"}

#: Settings that a group may lack: older versions of torch and Pyro do not have them, and in Pyro
#: the tensor says along which dimension its DCT is.
OPTIONAL = {"centered_variance", "dct_dim", "decoupled_weight_decay", "maximize"}

#: Settings that are True or False; ``amsgrad`` may also be a string.
SWITCHES = {"amsgrad"}.union(*(getattr(rules, name).switches for name in rules.__all__))

#: The switch that turns torch's Adam into its AdamW.
DECOUPLED = "decoupled_weight_decay"


def group_settings(constructor: Any, rule: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The settings of a torch parameter group after a number of steps.

    Args:
        constructor: The class of the torch optimizer.
        rule: The description of the rule in a state dict.
        step: How many steps have been taken.
    """
    defaults, rule = _default_group(constructor), with_decoupled(rule)
    group = {k: from_plain(rule[k]) if k in rule else v for k, v in defaults.items()}
    if "lrd" in group:
        # Pyro's ClippedAdam stores the decayed rate in the group.
        group["lr"] *= power(group["lrd"], step)
    return group


def rule_settings(group: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The settings of a rule, from a torch parameter group after a number of steps.

    Raises:
        ValueError: The learning rate has decayed to zero, so it cannot be set to another value.
    """
    settings = plain_settings({k: v for k, v in group.items() if k != "params"})
    if "lrd" in settings and settings["lr"]:
        decay = power(settings["lrd"], step)
        if not decay:
            raise ValueError(
                f"lr is 0 after {step} decays by lrd={settings['lrd']!r}; got {settings['lr']!r}: "
                "start over to raise it"
            )
        settings["lr"] /= decay
    return settings


def with_decoupled(rule: Mapping[str, Any]) -> dict[str, Any]:
    """Add torch's switch for decoupled decay to the description of a rule; AdamW has it on."""
    return {DECOUPLED: rule["name"] == "AdamW", **rule}


@cache
def lacking(rule_class: type[Rule]) -> frozenset[str]:
    """The options of a rule that torch's optimizer of the same name does not have."""
    theirs = getattr(torch.optim, rule_class.__name__, None)
    own = {field.name for field in fields(rule_class)}
    return frozenset(own - signature(theirs).parameters.keys() if theirs else ())


@cache
def _default_group(constructor: Any) -> dict[str, Any]:
    # Muon only accepts tensors of two dimensions.
    (group,) = constructor([torch.empty(0, 0)]).state_dict()["param_groups"]
    del group["params"]
    return dict(group)


def check_settings(rule_class: type[Rule], group: Mapping[str, Any]) -> None:
    """Raise an error for a group of another optimizer.

    Keys that no rule has are ignored, since users may have added them.

    Raises:
        ValueError: The group has settings of other rules, or lacks some of this one.
    """
    expected = {field.name for field in fields(rule_class)}
    missing = sorted(expected - OPTIONAL - group.keys())
    foreign = sorted((KNOWN - expected - OPTIONAL) & group.keys())
    if missing or foreign:
        raise ValueError(
            f"expected the settings {sorted(expected - OPTIONAL)}; got {foreign} besides and none "
            f"for {missing}: it is that of another optimizer"
        )


def refuse_subsamples(settings: Mapping[str, Any]) -> None:
    """Raise an error for ``subsample_aware=True``, which only Pyro's own class can do.

    Raises:
        ValueError: The option is on.
    """
    if settings.get("subsample_aware"):
        raise ValueError(
            "subsample_aware=True is not for a callable of names, nor for state that is loaded "
            "here: use pyro.optim.DCTAdam, which this one gives for a dict with that option"
        )


def plain_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert torch's settings to those of a rule, where a switch is a bool and not 0 or 1."""
    settings = {name: number(value) for name, value in values.items()}
    for name in SWITCHES & settings.keys():
        if settings[name] in (0, 1):
            settings[name] = bool(settings[name])
    return settings


def number(value: Any) -> Any:
    """Convert a setting to a number or a tuple; torch also allows tensors, arrays and lists."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.item() if prod(value.shape) == 1 else value.tolist()
    return tuple(number(part) for part in value) if isinstance(value, list | tuple) else value


def from_plain(value: Any) -> Any:
    """Restore a hyperparameter from plain data, where pairs are lists and infinity is a string."""
    if isinstance(value, list | tuple):
        return tuple(from_plain(part) for part in value)
    return float(value) if value in ("inf", "-inf") else value


def rule_of(name: str, description: Mapping[str, Any]) -> Rule:
    """Rebuild a rule from its description in a state dict; schedules become numbers.

    Args:
        name: The name of the parameter, for messages.
        description: The description of the rule.

    Raises:
        ValueError: It is not a description of one of multiopt's rules.
    """
    kind = description.get("name")
    if kind not in rules.__all__ or kind == "Rule":
        raise ValueError(f"parameter {name!r} has the rule {kind!r}; expected one of multiopt's")
    rule_class = getattr(rules, kind)
    names = [field.name for field in fields(rule_class)]
    try:
        rule: Rule = rule_class(
            **{key: from_plain(description[key]) for key in names if key in description}
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"parameter {name!r}: {error}") from error
    return rule


def rule_class_of(optimizer: Any) -> type[Rule]:
    """The class of multiopt's rule for a torch optimizer.

    Args:
        optimizer: The class of a torch optimizer of torch or Pyro, a function of ``pyro.optim``,
            or the class of the rule itself.

    Raises:
        TypeError: multiopt has no such rule.
    """
    name = getattr(optimizer, "__name__", "")
    rule_class: Any = getattr(rules, name, None)
    is_known = rule_class is not None and (name in OF_PYRO or hasattr(torch.optim, name))
    theirs = getattr(optimizer, "__module__", "").partition(".")[0] in ("torch", "pyro")
    if not is_known or not (optimizer is rule_class or theirs):
        raise TypeError(
            "expected the class of an optimizer of torch or Pyro that multiopt has a rule for, "
            f"such as torch.optim.Adam, or that rule; got {optimizer!r}"
        )
    found: type[Rule] = rule_class
    return found
