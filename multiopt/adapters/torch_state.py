"""State to and from the state dicts of torch optimizers, one parameter each, as Pyro keeps them."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from multiopt.backend import COMPUTE_DTYPE
from multiopt.rules import Rule
from multiopt.rules.arithmetic import power

__all__ = ["from_plain", "from_torch", "number", "to_torch"]


def to_torch(constructor: type[torch.optim.Optimizer], stored: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of the torch optimizer that would have made this state.

    Args:
        constructor: The class of the torch optimizer.
        stored: One entry of ``Optimizer.state_dict``, its slots NumPy arrays.
    """
    known = inspect.signature(constructor).parameters
    arguments = {k: from_plain(v) for k, v in stored["rule"].items() if k in known}
    if stored["rule"]["name"] == "AdamW" and "decoupled_weight_decay" in known:
        arguments["decoupled_weight_decay"] = True
    state_dict = constructor([torch.empty(0)], **arguments).state_dict()
    (group,) = state_dict["param_groups"]
    step = stored["step"]
    if "lrd" in group:
        group["lr"] *= power(group["lrd"], step)
    if step:
        slots = {slot: torch.from_numpy(array.copy()) for slot, array in stored["slots"].items()}
        # Pyro's ClippedAdam counts in an int, torch in a float32 tensor.
        clock = step if "lrd" in group else torch.tensor(float(step))
        state_dict["state"] = {0: {"step": clock, **slots}}
    return state_dict


def from_torch(rule_class: type[Rule], state: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of a torch optimizer of one parameter, as an ``Optimizer.state_dict`` has it.

    Args:
        rule_class: The rule that the torch optimizer follows.
        state: Its state dict, or that of a learning-rate scheduler of Pyro around it.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: It has another form.
    """
    state = state.get("optimizer", state)
    (group,) = state["param_groups"]
    kept = {}
    for values in state["state"].values():
        kept.update({key: value for key, value in values.items() if value is not None})
    # torch's SGD counts no steps; what matters is whether the first one is past.
    step = int(kept.pop("step", 1 if kept else 0))
    name = "AdamW" if group.get("decoupled_weight_decay") else rule_class.__name__
    rule = {"name": name, **{k: number(v) for k, v in group.items() if k != "params"}}
    if "lrd" in rule:
        rule["lr"] /= power(rule["lrd"], step)
    slots = {}
    for slot, tensor in kept.items():
        dtype = getattr(torch, COMPUTE_DTYPE[str(tensor.dtype).removeprefix("torch.")])
        slots[slot] = tensor.detach().cpu().to(dtype).numpy().copy()
    return {"rule": rule, "step": step, "slots": slots}


def number(value: Any) -> Any:
    """A setting as rules have it: torch allows a tensor for a number, and a list for a pair."""
    if isinstance(value, torch.Tensor):
        return value.item()
    return tuple(number(part) for part in value) if isinstance(value, list | tuple) else value


def from_plain(value: Any) -> Any:
    """A hyperparameter from plain data: pairs are lists there, infinity a word."""
    if isinstance(value, list | tuple):
        return tuple(from_plain(part) for part in value)
    return float(value) if value in ("inf", "-inf") else value
