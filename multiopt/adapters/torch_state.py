"""State to and from the state dicts of torch optimizers, one parameter each, as Pyro keeps them."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import fields
from functools import cache
from inspect import signature
from typing import Any

import numpy as np
import torch

from multiopt import rules
from multiopt.backend import COMPUTE_DTYPE
from multiopt.entry import described_rule
from multiopt.rules import Rule
from multiopt.rules.arithmetic import power

__all__ = [
    "SCHEDULED",
    "from_plain",
    "from_torch",
    "group_settings",
    "number",
    "refuse_subsamples",
    "rule_settings",
    "to_torch",
]

#: What torch's schedulers keep in a group beside the settings of its optimizer.
SCHEDULED = ("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr")


def group_settings(constructor: Any, rule: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The settings of a parameter group of torch after a step.

    Args:
        constructor: The class of the torch optimizer.
        rule: The description of the rule in a state dict.
        step: How many steps were taken.
    """
    defaults = _default_group(constructor)
    group = {k: from_plain(rule[k]) if k in rule else v for k, v in defaults.items()}
    if "decoupled_weight_decay" in group and "decoupled_weight_decay" not in rule:
        # In torch AdamW is Adam with a switch on; here they are two rules.
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
    # Of two dimensions, since Muon takes no others.
    (group,) = constructor([torch.empty(0, 0)]).state_dict()["param_groups"]
    del group["params"]
    return dict(group)


def to_torch(constructor: type[torch.optim.Optimizer], stored: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of the torch optimizer that would have made this state.

    Args:
        constructor: The class of the torch optimizer.
        stored: One entry of ``Optimizer.state_dict``, its slots NumPy arrays; under ``"group"``
            what schedulers keep in the group, under ``"complex"`` whether slots are the parts of
            complex ones.
    """
    step, rule = stored["step"], stored["rule"]
    group = group_settings(constructor, rule, step)
    slots = {slot: torch.from_numpy(array.copy()) for slot, array in stored["slots"].items()}
    if stored.get("complex"):
        slots = {slot: torch.view_as_complex(tensor) for slot, tensor in slots.items()}
    state = {}
    if step:
        # Pyro's optimizers count in an int, torch's in a tensor of the default dtype.
        in_pyro = constructor.__module__.startswith("pyro.")
        numbers = {"step": float(step), **_derived(rule, step)}
        counts = {name: torch.tensor(value) for name, value in numbers.items()}
        state[0] = {**counts, **({"step": step} if in_pyro else {}), **slots}
    elif slots:
        # Some have a state before the first step.
        like = torch.zeros_like(next(iter(slots.values())))
        names = signature(constructor).parameters.keys() & group.keys()
        fresh = constructor([like], **{name: group[name] for name in names})
        state = fresh.state_dict()["state"]
    return {
        "state": state,
        "param_groups": [{**group, **stored.get("group", {}), "params": [0]}],
    }


def _derived(rule: Mapping[str, Any], step: int) -> dict[str, float]:
    """What torch keeps beside slots, though the step and the settings say it.

    Args:
        rule: The description of the rule in a state dict.
        step: How many steps were taken.
    """
    if rule["name"] == "NAdam":
        return {"mu_product": _mu_product(rule["betas"][0], rule["momentum_decay"], step)}
    if rule["name"] == "ASGD":
        lr, lambd = rule["lr"], rule["lambd"]
        eta = lr / (1 + lambd * lr * step) ** rule["alpha"] if step else lr
        return {"eta": eta, "mu": 1 / max(1.0, step - rule["t0"])}
    return {}


@cache
def _mu_product(beta1: float, momentum_decay: float, step: int) -> float:
    """The product of Dozat's momenta, as ``torch.optim.NAdam`` has them."""
    steps = np.arange(1, step + 1)
    return float(np.prod(beta1 * (1.0 - 0.5 * 0.96 ** (steps * momentum_decay))))


def from_torch(rule_class: type[Rule], state: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of a torch optimizer of one parameter, as an ``Optimizer.state_dict`` has it.

    Args:
        rule_class: The rule that the torch optimizer follows.
        state: Its state dict, or that of a learning-rate scheduler of Pyro around it.

    Returns:
        The entry, with what ``to_torch`` looks for, and under ``"scheduler"`` the state of the
        scheduler, if it is that of one.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: It has another form, or its settings are
            out of range.
    """
    inner = state.get("optimizer", state)
    (group,) = inner["param_groups"]
    refuse_subsamples(group)
    kept = {}
    for values in inner["state"].values():
        kept.update({key: value for key, value in values.items() if value is not None})
    if rule_class is rules.Adam and group.get("decoupled_weight_decay"):
        rule_class = rules.AdamW
    known = {f.name for f in fields(rule_class)}
    # torch's SGD counts no steps; what matters is whether the first one is past.
    step = int(kept.pop("step", 1 if kept else 0))
    settings = {k: v for k, v in rule_settings(group, step).items() if k in known}
    rule = described_rule(rule_class(**settings), step)
    for name in _derived(rule, step):
        kept.pop(name, None)
    slots = {}
    is_complex = any(tensor.is_complex() for tensor in kept.values())
    for slot, tensor in kept.items():
        tensor = torch.view_as_real(tensor) if is_complex else tensor
        dtype = getattr(torch, COMPUTE_DTYPE[str(tensor.dtype).removeprefix("torch.")])
        slots[slot] = tensor.detach().cpu().to(dtype).numpy().copy()
        if not step:
            # Slots are zero before the first step; Adagrad's sum in torch may not be.
            slots[slot] = np.zeros_like(slots[slot])
    loaded = {"rule": rule, "step": step, "slots": slots, "complex": is_complex}
    loaded["group"] = {k: number(v) for k, v in group.items() if k in SCHEDULED}
    if "scheduler" in state:
        loaded["scheduler"] = deepcopy(state["scheduler"])
    return loaded


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
