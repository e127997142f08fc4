"""State to and from the state dicts of torch optimizers, one parameter each, as Pyro keeps them."""

import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import fields
from inspect import signature
from typing import Any

import numpy as np
import torch

from multiopt.adapters.torch.settings import (
    BESIDE,
    KNOWN,
    check_settings,
    group_settings,
    lacking,
    number,
    refuse_subsamples,
    rule_of,
    rule_settings,
)
from multiopt.backend import backend_named
from multiopt.engine import MASTER
from multiopt.errors import CheckpointError, brief
from multiopt.layout import COMPUTE_DTYPE
from multiopt.rules import Rule
from multiopt.rules.arithmetic import power
from multiopt.rules.nadam import product_of_shares
from multiopt.state.document import LAST_STEP, VERSION
from multiopt.state.fit import check_slot_names
from multiopt.state.plain_data import check_state_dict
from multiopt.state.record import described_rule, entry_on_host, saved_of

__all__ = [
    "derived_numbers",
    "for_torch",
    "fresh_state",
    "leave_out",
    "parameter_from_torch",
    "parameter_to_torch",
    "parameters_from_torch",
    "scalar",
    "state_dict_of",
    "whole_number",
    "without_clock",
]

#: Optimizers of torch that count no steps.
CLOCKLESS = ("SGD", "Muon")

#: What torch keeps beside slots, though the settings and the steps taken say it.
DERIVED: dict[str, dict[str, Callable[[Mapping[str, Any], int], Any]]] = {
    "NAdam": {
        "mu_product": lambda rule, step: (
            power(rule["betas"][0], step) * product_of_shares(rule["momentum_decay"], step)
        ),
    },
    "ASGD": {
        "eta": lambda rule, step: (
            rule["lr"] / (1 + rule["lambd"] * rule["lr"] * step) ** rule["alpha"]
        ),
        "mu": lambda rule, step: 1 / max(1.0, step - rule["t0"]),
    },
}


def parameter_to_torch(
    constructor: type[torch.optim.Optimizer], entry: Mapping[str, Any]
) -> dict[str, Any]:
    """The state dict of the torch optimizer that would have made this state.

    Args:
        constructor: The class of the torch optimizer.
        entry: One entry of ``Optimizer.state_dict``, its slots NumPy arrays; under ``"group"``
            what schedulers and users keep in the group, under ``"given"`` settings that are the
            caller's own objects, under ``"complex"`` whether slots are the parts of complex ones.
    """
    step, rule = entry["step"], entry["rule"]
    group = group_settings(constructor, rule, step)
    slots = {slot: torch.from_numpy(array.copy()) for slot, array in entry["slots"].items()}
    if entry.get("complex"):
        slots = {slot: torch.view_as_complex(tensor) for slot, tensor in slots.items()}
    state = {}
    if step:
        # Pyro's optimizers count in an int, torch's in a tensor.
        in_pyro = constructor.__module__.startswith("pyro.")
        clock = step if in_pyro else scalar(step)
        state[0] = {"step": clock, **derived_numbers(rule, step), **slots}
    elif slots:
        fresh = fresh_state(constructor, group, next(iter(slots.values())))
        state = {0: fresh} if fresh else {}
    return {
        "state": state,
        "param_groups": [
            {**group, **entry.get("given", {}), **entry.get("group", {}), "params": [0]}
        ],
    }


def fresh_state(
    constructor: type[torch.optim.Optimizer], group: Mapping[str, Any], like: torch.Tensor
) -> dict[str, Any]:
    """The state of a parameter before its first step, which some torch optimizers have.

    Args:
        constructor: The class of the torch optimizer.
        group: Its settings.
        like: A tensor of the shape and dtype of the parameter.
    """
    names = signature(constructor).parameters.keys() & group.keys()
    fresh = constructor([torch.zeros_like(like)], **{name: group[name] for name in names})
    state: dict[str, Any] = fresh.state_dict()["state"].get(0, {})
    return state


def without_clock(
    constructor: type[torch.optim.Optimizer], state: Mapping[str, Any]
) -> dict[str, Any]:
    """The state of a parameter in torch, without a clock where torch keeps none."""
    clockless = constructor.__name__ in CLOCKLESS
    return {key: value for key, value in state.items() if not (clockless and key == "step")}


def scalar(value: float) -> torch.Tensor:
    """A number as torch keeps it beside slots.

    That is in float32, whatever the default dtype is, or in float64 if that is the default. A clock
    above 2^24 that float32 does not have comes in float64 too, which torch goes on with.
    """
    double = torch.tensor(value, dtype=torch.float64)
    single = double.to(torch.float32)
    is_rounded = isinstance(value, int) and single.item() != value
    return double if is_rounded or torch.get_default_dtype() == torch.float64 else single


def derived_numbers(rule: Mapping[str, Any], step: int) -> dict[str, torch.Tensor]:
    """The numbers of ``DERIVED``, as torch keeps them.

    Args:
        rule: The description of the rule in a state dict.
        step: How many steps were taken.
    """
    derived = DERIVED.get(rule["name"], {})
    return {name: scalar(float(value(rule, step))) for name, value in derived.items()}


def parameters_from_torch(
    rule_class: type[Rule], states: Mapping[Any, Any]
) -> dict[str, dict[str, Any]]:
    """``parameter_from_torch`` of the states of a Pyro optimizer.

    Raises:
        CheckpointError: They have another form.
    """
    if not isinstance(states, Mapping):
        raise CheckpointError(
            f"expected the states of parameters by name; got a {type(states).__name__}"
        )
    if None in states:
        # Pyro's own get_state() leaves this behind for tensors that left the store.
        warnings.warn("left out a state without a parameter name", stacklevel=3)
    return {
        name: parameter_from_torch(name, rule_class, state)
        for name, state in states.items()
        if name is not None
    }


def parameter_from_torch(
    name: str, rule_class: type[Rule], state: Mapping[str, Any]
) -> dict[str, Any]:
    """The state dict of a torch optimizer of one parameter, as an ``Optimizer.state_dict`` has it.

    Args:
        name: That of the parameter, for messages.
        rule_class: The rule that the torch optimizer follows.
        state: Its state dict, or that of a learning-rate scheduler of Pyro around it.

    Returns:
        The entry, with what ``parameter_to_torch`` looks for, and under ``"scheduler"`` the state
        of the scheduler, if it is that of one.

    Raises:
        CheckpointError: It has another form, is that of another optimizer, or its settings are out
            of range.
    """
    try:
        return _from_torch(rule_class, state)
    except (
        AttributeError,
        LookupError,
        OverflowError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise CheckpointError(
            f"the state of {name!r} is no state of {rule_class.__name__} "
            f"({type(error).__name__}: {error})"
        ) from error


def _from_torch(rule_class: type[Rule], state: Mapping[str, Any]) -> dict[str, Any]:
    inner = state.get("optimizer", state)
    (group,) = inner["param_groups"]
    refuse_subsamples(group)
    check_settings(rule_class, group)
    numbers, states = list(group["params"]), inner["state"]
    if len(numbers) != 1 or not states.keys() <= set(numbers):
        raise ValueError(
            f"expected the state of one parameter; got a group of {numbers} and the state of "
            f"{list(states)}"
        )
    values = states.get(numbers[0], {})
    step = _clock(rule_class, values)
    tensors = {key: value for key, value in values.items() if value is not None and key != "step"}
    names = {f.name for f in fields(rule_class)} - lacking(rule_class)
    settings = {k: v for k, v in rule_settings(group, step).items() if k in names}
    rule = described_rule(rule_class(**settings), step)
    for name in DERIVED.get(rule["name"], ()):
        tensors.pop(name, None)
    for slot, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"expected a tensor under {slot!r}; got a {type(tensor).__name__}")
    is_complex = any(tensor.is_complex() for tensor in tensors.values())
    slots = {slot: _on_host(tensor, is_complex) for slot, tensor in tensors.items()}
    if not step:
        # Slots are zero before the first step; Adagrad's sum in torch may not be.
        slots = {slot: np.zeros_like(array) for slot, array in slots.items()}
    arrays = {k: v for k, v in group.items() if isinstance(v, torch.Tensor | np.ndarray)}
    scheduler = {"scheduler": state["scheduler"]} if "scheduler" in state else {}
    return {
        "rule": rule,
        "step": step,
        "slots": slots,
        "complex": is_complex,
        # What schedulers and users keep in a group.
        "group": deepcopy({k: v for k, v in group.items() if k not in KNOWN | BESIDE}),
        # Settings that the caller may change in place.
        "given": deepcopy({k: v for k, v in arrays.items() if k in KNOWN}),
        **deepcopy(scheduler),
    }


def _on_host(slot: torch.Tensor, is_complex: bool) -> np.ndarray:
    """A slot of torch as a NumPy array, complex numbers in two parts."""
    slot = torch.view_as_real(slot.resolve_conj()) if is_complex else slot
    dtype = getattr(torch, COMPUTE_DTYPE[str(slot.dtype).removeprefix("torch.")])
    return backend_named("torch").to_host(slot.to(dtype))


def _clock(rule_class: type[Rule], values: Mapping[str, Any]) -> int:
    """The clock in the state of a parameter in torch.

    SGD and Muon of torch count no steps; what matters there is whether the first one is past.

    Raises:
        ValueError: There is none where one is counted, or it is no number of steps.
    """
    step = values.get("step")
    if step is None and (not values or rule_class.__name__ in CLOCKLESS):
        return 1 if any(value is not None for value in values.values()) else 0
    if "step" not in values:
        raise ValueError(
            "expected a whole number up to 2^53 under 'step', a step >= 0; got none, beside "
            f"{sorted(map(str, values))}"
        )
    return whole_number(step)


def whole_number(value: Any) -> int:
    """A clock in torch's terms as an int.

    Raises:
        ValueError: It is no number of steps.
    """
    step = number(value)
    is_number = isinstance(step, int | float) and not isinstance(step, bool)
    if not (is_number and 0 <= step <= LAST_STEP and step == int(step)):
        raise ValueError(
            "expected a whole number up to 2^53 under 'step', a step >= 0; got "
            f"{brief(step if is_number else value)}"
        )
    return int(step)


def state_dict_of(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A state dict of what ``parameter_from_torch`` gave, by name.

    Raises:
        CheckpointError: Slots are not those of the rule.
    """
    for name, entry in entries.items():
        try:
            description, slots = entry["rule"], entry["slots"]
            check_slot_names(name, slots, entry["step"], description, rule_of(name, description))
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    return {
        "version": VERSION,
        "steps": max((entry["step"] for entry in entries.values()), default=0),
        "entries": {
            name: {"rule": entry["rule"], "step": entry["step"], "slots": _shown_slots(entry)}
            for name, entry in entries.items()
        },
        "pending": {},
    }


def _shown_slots(entry: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    tensors = {slot: torch.from_numpy(array) for slot, array in entry["slots"].items()}
    return {k: torch.view_as_complex(x) if entry["complex"] else x for k, x in tensors.items()}


def for_torch(state_dict: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries of a state dict, pending ones too, with NumPy slots, and what torch can have.

    Raises:
        ValueError: It has another form, or a rule that is not multiopt's, or one with an option
            that torch does not have.
    """
    check_state_dict(state_dict)
    parts = {**state_dict["pending"], **state_dict["entries"]}
    entries = {name: entry_on_host(saved_of(name, entry)) for name, entry in parts.items()}
    for name, entry in entries.items():
        rule = rule_of(name, entry["rule"])
        options = [option for option in lacking(type(rule)) if getattr(rule, option)]
        if getattr(rule, "amsgrad", None) == "corrected":
            options.append("amsgrad")
        if options:
            found = ", ".join(f"{option}={getattr(rule, option)!r}" for option in options)
            raise ValueError(
                f"parameter {name!r} has {found}, which torch does not have: assign opt.rule first"
            )
    leave_out(state_dict, entries, stacklevel=4)
    return entries


def leave_out(
    state_dict: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]], stacklevel: int
) -> None:
    """Take master copies out of entries, and warn of all that torch and Pyro have no place for.

    Args:
        state_dict: That of an ``Optimizer``.
        entries: Its entries, pending ones too, with slots that may be changed.
        stacklevel: As for ``warnings.warn``, from here.
    """
    lost = {*state_dict.get("averages", {}), *state_dict.get("pending_averages", {})}
    lost |= {n for n, entry in entries.items() if entry["slots"].pop(MASTER, None) is not None}
    parts = {"averages and master copies": lost, "counts of skips": state_dict.get("skips", {})}
    left = [f"{what}, of {sorted(names)}" for what, names in parts.items() if names]
    if left:
        warnings.warn(
            f"left out {' and '.join(left)}: torch and Pyro have none", stacklevel=stacklevel
        )
