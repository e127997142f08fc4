"""The state of one parameter, to and from the state dict of a torch optimizer.

Pyro keeps a torch optimizer for each parameter, so its checkpoints are state dicts of one parameter
each. That is the form here; ``torch_optim`` splits and joins those of whole optimizers.
"""

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
    "DERIVED",
    "clock_of",
    "derived_numbers",
    "for_torch",
    "fresh_state",
    "leave_out",
    "offset",
    "parameter_from_torch",
    "parameter_to_torch",
    "parameters_from_torch",
    "scalar",
    "state_dict_of",
    "whole_number",
    "without_clock",
]

#: Optimizers of torch that do not count steps.
CLOCKLESS = ("SGD", "Muon")

#: Numbers that torch stores beside the slots although they follow from the settings and the clock.
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

#: Slots that torch does not start at zero, and the setting that they begin with. Ours are zero, and
#: the first step adds it.
BEGINNINGS = {
    "Adagrad": ("sum", "initial_accumulator_value"),
    "Rprop": ("step_size", "lr"),
}


def parameter_to_torch(
    constructor: type[torch.optim.Optimizer], entry: Mapping[str, Any]
) -> dict[str, Any]:
    """Make the state dict of a torch optimizer with this state.

    Args:
        constructor: The class of the torch optimizer.
        entry: One entry of ``Optimizer.state_dict`` with NumPy slots. It may also have ``"group"``,
            the keys that schedulers and users keep in the group; ``"given"``, the settings that are
            the user's own objects; and ``"complex"``, whether slots are the parts of complex ones.
    """
    step, rule = entry["step"], entry["rule"]
    group = group_settings(constructor, rule, step)
    slots = {slot: torch.from_numpy(array.copy()) for slot, array in entry["slots"].items()}
    if entry.get("complex"):
        slots = {slot: torch.view_as_complex(tensor) for slot, tensor in slots.items()}
    state = {}
    if step:
        # Pyro's optimizers count steps with an int, torch's with a tensor.
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
    """The state of a parameter before its first step; some torch optimizers have one by then.

    Args:
        constructor: The class of the torch optimizer.
        group: The settings of its group.
        like: A tensor with the shape and the dtype of the parameter.
    """
    names = signature(constructor).parameters.keys() & group.keys()
    fresh = constructor([torch.zeros_like(like)], **{name: group[name] for name in names})
    state: dict[str, Any] = fresh.state_dict()["state"].get(0, {})
    return state


def without_clock(
    constructor: type[torch.optim.Optimizer], state: Mapping[str, Any]
) -> dict[str, Any]:
    """Drop the clock from the state of a parameter if this torch optimizer does not keep one."""
    clockless = constructor.__name__ in CLOCKLESS
    return {key: value for key, value in state.items() if not (clockless and key == "step")}


def scalar(value: float) -> torch.Tensor:
    """A number as torch stores it beside the slots: a tensor without dimensions.

    Its dtype is float64 if that is torch's default, else float32. A clock above 2^24 that float32
    cannot hold is also in float64; torch carries on with that.
    """
    double = torch.tensor(value, dtype=torch.float64)
    single = double.to(torch.float32)
    is_rounded = isinstance(value, int) and single.item() != value
    return double if is_rounded or torch.get_default_dtype() == torch.float64 else single


def derived_numbers(rule: Mapping[str, Any], step: int) -> dict[str, torch.Tensor]:
    """The numbers of ``DERIVED`` for a rule, as torch stores them.

    Args:
        rule: The description of the rule in a state dict.
        step: How many steps have been taken.
    """
    derived = DERIVED.get(rule["name"], {})
    return {name: scalar(float(value(rule, step))) for name, value in derived.items()}


def offset(
    slots: Mapping[str, torch.Tensor], rule: Mapping[str, Any], sign: int
) -> dict[str, torch.Tensor]:
    """Convert slots at the clock 0 to those of torch, with the sign 1, or from them, with -1.

    Args:
        slots: The slots by name.
        rule: The description of the rule in a state dict.
        sign: Which way.
    """
    slots = dict(slots)
    slot, setting = BEGINNINGS.get(rule["name"], ("", ""))
    if slot in slots:
        begins = sign * rule[setting]
        number = complex(begins, begins) if slots[slot].is_complex() else begins
        slots[slot] = slots[slot] + number
    return slots


def parameters_from_torch(
    rule_class: type[Rule], states: Mapping[Any, Any]
) -> dict[str, dict[str, Any]]:
    """Apply ``parameter_from_torch`` to every state of a Pyro optimizer.

    Raises:
        CheckpointError: The states are malformed.
    """
    if not isinstance(states, Mapping):
        raise CheckpointError(
            f"expected the states of parameters by name; got a {type(states).__name__}"
        )
    if None in states:
        # Pyro's own get_state() gives this for tensors that are no longer in the store.
        warnings.warn("left out a state without a parameter name", stacklevel=3)
    return {
        name: parameter_from_torch(name, rule_class, state)
        for name, state in states.items()
        if name is not None
    }


def parameter_from_torch(
    name: str, rule_class: type[Rule], state: Mapping[str, Any]
) -> dict[str, Any]:
    """Convert the state dict of a torch optimizer of one parameter to an entry.

    Args:
        name: The name of the parameter, for messages.
        rule_class: The rule that the torch optimizer follows.
        state: The state dict of the torch optimizer, or of a learning-rate scheduler of Pyro that
            wraps one.

    Returns:
        An entry as in ``Optimizer.state_dict``, with the additional keys of
        ``parameter_to_torch``, and ``"scheduler"``, the state of the scheduler, if there is one.

    Raises:
        CheckpointError: The state is malformed or from another optimizer, or a setting is out of
            range.
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
            f"the state of {name!r} is not a state of {rule_class.__name__} "
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
    step = clock_of(rule_class, values)
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
        # Our slots are zero before the first step, while torch's Adagrad may start its sum higher.
        slots = {slot: np.zeros_like(array) for slot, array in slots.items()}
    arrays = {k: v for k, v in group.items() if isinstance(v, torch.Tensor | np.ndarray)}
    scheduler = {"scheduler": state["scheduler"]} if "scheduler" in state else {}
    return {
        "rule": rule,
        "step": step,
        "slots": slots,
        "complex": is_complex,
        # Keys that schedulers and users keep in the group.
        "group": deepcopy({k: v for k, v in group.items() if k not in KNOWN | BESIDE}),
        # Settings that the user may change in place.
        "given": deepcopy({k: v for k, v in arrays.items() if k in KNOWN}),
        **deepcopy(scheduler),
    }


def _on_host(slot: torch.Tensor, is_complex: bool) -> np.ndarray:
    """A torch slot as a NumPy array; complex numbers as their two parts."""
    slot = torch.view_as_real(slot.resolve_conj()) if is_complex else slot
    dtype = getattr(torch, COMPUTE_DTYPE[str(slot.dtype).removeprefix("torch.")])
    return backend_named("torch").to_host(slot.to(dtype))


def clock_of(rule_class: type[Rule], values: Mapping[str, Any]) -> int:
    """The clock in torch's state of a parameter.

    torch's SGD and Muon do not count steps; for them the clock is 1 after the first step.

    Raises:
        ValueError: The clock is missing, or not a number of steps.
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
    """Convert a clock of torch to an int.

    Raises:
        ValueError: It is not a number of steps.
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
    """Make a state dict from the entries that ``parameter_from_torch`` returned.

    Raises:
        CheckpointError: The slots of an entry are not those of its rule.
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
    """The entries of a state dict, including pending ones, reduced to what torch can hold.

    Raises:
        ValueError: The state dict is malformed, a rule is not multiopt's, or it has an option that
            torch does not have.
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
    """Remove master copies from entries, and warn about everything torch and Pyro cannot hold.

    Args:
        state_dict: The state dict of an ``Optimizer``.
        entries: Its entries, including pending ones; their slots are changed.
        stacklevel: The ``stacklevel`` of ``warnings.warn``, counted from here.
    """
    lost = {*state_dict.get("averages", {}), *state_dict.get("pending_averages", {})}
    lost |= {n for n, entry in entries.items() if entry["slots"].pop(MASTER, None) is not None}
    parts = {"averages and master copies": lost, "counts of skips": state_dict.get("skips", {})}
    left = [f"{what}, of {sorted(names)}" for what, names in parts.items() if names]
    if left:
        warnings.warn(
            f"left out {' and '.join(left)}: torch and Pyro have none", stacklevel=stacklevel
        )
