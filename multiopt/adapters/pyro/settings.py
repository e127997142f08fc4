"""Translating Pyro's ``optim_args`` and ``clip_args`` to rules and clips, and changes of them.

A scheduler or a user changes a setting in torch's terms, such as ``group["lr"] = 0.1``. What that
means for a rule can depend on the clock: for example, the rate in Pyro's ClippedAdam has decayed.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import lru_cache
from inspect import Parameter, signature
from typing import Any

import numpy as np
import torch
from pyro.params.param_store import (
    module_from_param_with_module_name,
    normalize_param_name,
    user_param_name,
)

from multiopt import rules
from multiopt.adapters.pyro.constructors import Settings
from multiopt.adapters.pyro.dct import OF_TENSORS
from multiopt.adapters.torch.settings import (
    DECOUPLED,
    from_plain,
    group_settings,
    lacking,
    number,
    plain_settings,
    refuse_subsamples,
    rule_settings,
    with_decoupled,
)
from multiopt.errors import brief
from multiopt.rules import Rule
from multiopt.rules.rule import is_schedule
from multiopt.state.record import described_rule
from multiopt.step.clip import Clip

__all__ = [
    "EXECUTION",
    "SHARED",
    "changeable",
    "clips_itself",
    "differing",
    "has_schedule",
    "make_clip",
    "make_rule",
    "remembered_settings",
    "restored_rule",
    "settings_now",
    "settings_of",
    "with_setting",
]

#: Arguments of torch's optimizers that affect how they run, not what they compute.
EXECUTION = ("capturable", "foreach", "fused")

#: How many different settings are remembered.
SHARED = 64

#: The names in ``clip_args`` by those in ``Clip``; Pyro itself has no ``clip_global_norm``.
CLIPS = {"norm": "clip_norm", "global_norm": "clip_global_norm", "value": "clip_value"}


def settings_of(
    what: str, given: Settings, tensor: torch.Tensor, label: str | None
) -> dict[str, Any]:
    """The settings of a tensor; if the user passed a callable, it is called with the name.

    Args:
        what: The argument's name, for messages.
        given: The user's dict or callable.
        tensor: The tensor.
        label: Its name in the param store, if it has one.

    Raises:
        ValueError: There is a callable, and the tensor has no name.
        TypeError: The callable did not return a dict.
    """
    if isinstance(given, dict):
        return given
    if label is None:
        raise ValueError(
            f"{what} is a callable of names, but a tensor of shape {tuple(tensor.shape)} is in "
            "no param store and has none; pass a dict, or name_by(module)"
        )
    parameters = list(signature(given).parameters.values())
    by_name = len(parameters) == 1
    if what == "clip_args" and by_name:
        # Pyro always calls this one with two arguments, and *arguments accepts them.
        by_name = parameters[0].kind is not Parameter.VAR_POSITIONAL
    if by_name:
        result = given(normalize_param_name(label))
    else:
        result = given(module_from_param_with_module_name(label), user_param_name(label))
    if not isinstance(result, dict):
        raise TypeError(f"{what} gave {brief(result)} for parameter {label!r}; expected a dict")
    return result


def make_rule(rule_class: type[Rule], settings: Mapping[str, Any]) -> Rule:
    """Make a rule from the settings of a torch optimizer.

    Raises:
        TypeError: The optimizer does not have a setting.
        ValueError: A setting is out of range, or a rule cannot do what it asks for.
    """
    arguments = plain_settings(settings)
    if arguments.pop("differentiable", False):
        raise ValueError(
            "differentiable=True: the update is not part of an autograd graph here; use torch.optim"
        )
    for name in EXECUTION:
        arguments.pop(name, None)
    if rule_class is rules.DCTAdam:
        refuse_subsamples(arguments)
        arguments.pop("subsample_aware", None)
    for name in lacking(rule_class) & arguments.keys():
        raise TypeError(f"torch.optim.{rule_class.__name__} has no argument {name!r}")
    rule = rule_class(**arguments)
    if changeable(settings.get("lr")) and getattr(rule, "lrd", 1.0) != 1.0:
        raise ValueError(
            f"lr is {settings['lr']!r} and lrd={settings['lrd']!r}, so that each step would change "
            "the caller's own object, in Pyro once for each parameter; expected a number: pass "
            "float(lr)"
        )
    return rule


def make_clip(settings: Mapping[str, Any], rule: Rule) -> Clip | None:
    """Make the clip of a parameter.

    Args:
        settings: The ``clip_args`` of the parameter.
        rule: The rule of the parameter. ClippedAdam and DCTAdam clip by themselves; their bound is
            also put in the clip, because Pyro leaves the clipped gradient in ``.grad``.

    Raises:
        TypeError: A setting is unknown.
        ValueError: A setting is out of range.
    """
    if unknown := sorted(set(settings) - set(CLIPS.values())):
        raise TypeError(f"clip_args has {unknown}; expected {', '.join(CLIPS.values())}")
    bounds = {name: number(settings.get(theirs)) for name, theirs in CLIPS.items()}
    own = getattr(rule, "clip_norm", None) if clips_itself(rule) else None
    if own is not None and not callable(own):
        value = bounds["value"]
        bounds["value"] = own if value is None else min(value, own)
    return None if all(bound is None for bound in bounds.values()) else Clip(**bounds)


def clips_itself(rule: Rule) -> bool:
    """Whether a rule clips gradients by a setting of its own."""
    return isinstance(rule, rules.ClippedAdam | rules.DCTAdam)


def differing(rule: Rule, before: Rule) -> dict[str, Any]:
    """The hyperparameters of a rule that differ from those of the rule before."""
    now = {f.name: getattr(rule, f.name) for f in fields(rule)}
    return {name: value for name, value in now.items() if value != getattr(before, name)}


def with_setting(constructor: Any, rule: Rule, step: int, name: str, value: Any) -> Rule:
    """Return a rule with one setting changed, in torch's terms, after a number of steps.

    Raises:
        TypeError: The setting can only be chosen when the optimizer is made.
        ValueError: The value is out of range.
    """
    change = _with_setting if has_schedule(rule) else _with_number
    return change(constructor, rule, step, name, value)


def _with_setting(constructor: Any, rule: Rule, step: int, name: str, value: Any) -> Rule:
    before = settings_now(constructor, rule, step)
    if name == DECOUPLED and isinstance(rule, rules.AdamW):
        # torch's AdamW has the switch of Adam, and it can be turned off.
        values = {f.name: getattr(rule, f.name) for f in fields(rule)}
        rule = rules.Adam(**values, decoupled_weight_decay=True)
    names = {f.name for f in fields(rule)}
    if name not in names:
        if value != before[name]:
            raise TypeError(
                f"{name!r} cannot be changed to {value!r}; expected {before[name]!r}, with which "
                "the optimizer was made: make another one"
            )
        return rule
    old = rule_settings(before, step)
    new = rule_settings({**before, name: value}, step)
    changed = {k: v for k, v in new.items() if k in names and (k == name or v != old[k])}
    return replace(rule, **changed)


def restored_rule(description: Mapping[str, Any], rule: Rule) -> Rule:
    """Return a rule with the hyperparameters of loaded state, as Pyro restores them.

    A schedule is kept: a file has only the last number it gave.

    Args:
        description: The description of the saved rule in a state dict.
        rule: The rule that the settings here ask for.
    """
    names = {type(rule).__name__, description["name"]}
    if len(names) > 1 and names != {"Adam", "AdamW"}:
        return rule
    # As in torch, Adam loads AdamW's switch, while AdamW itself always has it on.
    saved = with_decoupled(description)
    values = {f.name: getattr(rule, f.name) for f in fields(rule)}
    for name, value in values.items():
        if name in saved and name not in OF_TENSORS and not is_schedule(value):
            values[name] = from_plain(saved[name])
    return type(rule)(**values)


def settings_now(
    constructor: Any, rule: Rule, step: int, count: int | None = None
) -> Mapping[str, Any]:
    """The settings of a torch parameter group after a number of steps; do not modify the result.

    Args:
        constructor: The class of the torch optimizer.
        rule: The rule of the parameter.
        step: How many steps the parameter has taken.
        count: How many steps the optimizer has taken; by default as many.
    """
    return group_settings(constructor, described_rule(rule, step, count), step)


#: ``settings_now`` with a cache, for rules without schedules: most parameters share one rule.
remembered_settings = lru_cache(SHARED)(settings_now)


@lru_cache(SHARED, typed=True)
def _with_number(constructor: Any, rule: Rule, step: int, name: str, value: Any) -> Rule:
    return _with_setting(constructor, rule, step, name, value)


def has_schedule(rule: Rule) -> bool:
    """Whether a rule has a schedule among its hyperparameters."""
    return any(is_schedule(getattr(rule, name)) for name in rule.ranges)


def changeable(value: Any) -> bool:
    """Whether a setting is or contains an object that the user may change in place."""
    if isinstance(value, tuple):
        return any(map(changeable, value))
    return isinstance(value, torch.Tensor | np.ndarray | list)
