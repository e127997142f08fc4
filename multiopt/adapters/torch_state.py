"""State to and from the state dicts of torch optimizers, one parameter each, as Pyro keeps them."""

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any

import numpy as np
import torch

from multiopt import rules
from multiopt.adapters.pyro_dct import refuse_subsamples
from multiopt.backend import COMPUTE_DTYPE
from multiopt.entry import described_rule
from multiopt.rules import Rule
from multiopt.rules.arithmetic import power

__all__ = ["from_plain", "from_torch", "group_settings", "number", "rule_settings", "to_torch"]


def group_settings(constructor: Any, rule: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The settings of a parameter group of torch after a step.

    Args:
        constructor: The class of the torch optimizer.
        rule: The description of the rule in a state dict.
        step: How many steps were taken.
    """
    defaults = _default_group(constructor)
    group = {k: from_plain(rule[k]) if k in rule else v for k, v in defaults.items()}
    if "decoupled_weight_decay" in group:
        group["decoupled_weight_decay"] = rule["name"] == "AdamW"
    if "lrd" in group:
        # Pyro's ClippedAdam keeps the rate that it has come to.
        group["lr"] *= power(group["lrd"], step)
    return group


def rule_settings(group: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The settings of a group of torch after a step, as a rule has them.

    Raises:
        ValueError: A decay has brought the learning rate so far down that it cannot be another.
    """
    settings = {name: number(value) for name, value in group.items() if name != "params"}
    if "lrd" in settings and settings["lr"]:
        decay = power(settings["lrd"], step)
        if not decay:
            raise ValueError(
                f"lr is 0 after {step} decays by lrd={settings['lrd']!r}; got {settings['lr']!r}: "
                "start anew to raise it"
            )
        settings["lr"] /= decay
    return settings


@cache
def _default_group(constructor: Any) -> dict[str, Any]:
    (group,) = constructor([torch.empty(0)]).state_dict()["param_groups"]
    del group["params"]
    return dict(group)


def to_torch(constructor: type[torch.optim.Optimizer], stored: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of the torch optimizer that would have made this state.

    Args:
        constructor: The class of the torch optimizer.
        stored: One entry of ``Optimizer.state_dict``, its slots NumPy arrays.
    """
    step = stored["step"]
    group = group_settings(constructor, stored["rule"], step)
    state = {}
    if step:
        slots = {slot: torch.from_numpy(array.copy()) for slot, array in stored["slots"].items()}
        # Pyro's ClippedAdam counts in an int, torch in a float32 tensor.
        state[0] = {"step": step if "lrd" in group else torch.tensor(float(step)), **slots}
    return {"state": state, "param_groups": [{**group, "params": [0]}]}


def from_torch(rule_class: type[Rule], state: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of a torch optimizer of one parameter, as an ``Optimizer.state_dict`` has it.

    Args:
        rule_class: The rule that the torch optimizer follows.
        state: Its state dict, or that of a learning-rate scheduler of Pyro around it.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: It has another form, or its settings are
            out of range.
    """
    state = state.get("optimizer", state)
    (group,) = state["param_groups"]
    refuse_subsamples(group)
    kept = {}
    for values in state["state"].values():
        kept.update({key: value for key, value in values.items() if value is not None})
    if rule_class is rules.Adam and group.get("decoupled_weight_decay"):
        rule_class = rules.AdamW
    known = {f.name for f in fields(rule_class)}
    # torch's SGD counts no steps; what matters is whether the first one is past.
    step = int(kept.pop("step", 1 if kept else 0))
    settings = {k: v for k, v in rule_settings(group, step).items() if k in known}
    rule = rule_class(**settings)
    slots = {}
    for slot, tensor in kept.items():
        dtype = getattr(torch, COMPUTE_DTYPE[str(tensor.dtype).removeprefix("torch.")])
        slots[slot] = tensor.detach().cpu().to(dtype).numpy().copy()
    return {"rule": described_rule(rule, step), "step": step, "slots": slots}


def number(value: Any) -> Any:
    """A setting as rules have it: torch allows tensors, arrays and lists for numbers and pairs."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.tolist()
    return tuple(number(part) for part in value) if isinstance(value, list | tuple) else value


def from_plain(value: Any) -> Any:
    """A hyperparameter from plain data: pairs are lists there, infinity a word."""
    if isinstance(value, list | tuple):
        return tuple(from_plain(part) for part in value)
    return float(value) if value in ("inf", "-inf") else value
