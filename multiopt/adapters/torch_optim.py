"""Convert the state of a ``torch.optim`` optimizer to multiopt's and back.

torch numbers the parameters of an optimizer, so their names are needed to find them here;
``docs/from_torch.md`` is the guide.

>>> import multiopt as mo
>>> import torch
>>> from multiopt.adapters.torch_optim import from_torch, rules_of, to_torch
>>> model = torch.nn.Linear(2, 1)
>>> adam = torch.optim.Adam(model.named_parameters(), lr=0.5)
>>> model(torch.ones(2)).backward()
>>> adam.step()
>>> state = from_torch(adam.state_dict(), torch.optim.Adam)
>>> opt = mo.Optimizer(rules_of(state).__getitem__)
>>> _ = opt.load_state_dict(state)
>>> params = opt.step(dict(model.named_parameters()))
>>> opt.state("bias").step, opt.hyperparameters("bias")["lr"]
(2, 0.5)
>>> adam.load_state_dict(to_torch(opt.state_dict(), adam))
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch

from multiopt.adapters.torch.file import read
from multiopt.adapters.torch.settings import (
    DECOUPLED,
    group_settings,
    rule_class_of,
    rule_of,
    with_decoupled,
)
from multiopt.adapters.torch.state import (
    for_torch,
    fresh_state,
    parameter_from_torch,
    parameter_to_torch,
    state_dict_of,
    without_clock,
)
from multiopt.errors import CheckpointError
from multiopt.rules import Rule
from multiopt.state.fit import check_slot_names
from multiopt.state.plain_data import check_state_dict

__all__ = ["from_torch", "read", "rules_of", "to_torch"]


def from_torch(
    state_dict: Mapping[str, Any],
    optimizer_class: type[torch.optim.Optimizer] | type[Rule],
    names: Iterable[str] | None = None,
) -> dict[str, Any]:
    """Convert a torch optimizer's state dict to one for ``Optimizer.load_state_dict``.

    Each name carries the settings of its group; ``rules_of`` turns them into rules. torch's SGD and
    Muon do not count steps: their clocks become 1, or 0 before the first step.

    Args:
        state_dict: The state dict of the torch optimizer.
        optimizer_class: The class of the torch optimizer, or multiopt's rule of the same name.
        names: The names of the parameters, in the order of the groups and within them; by default
            the names that torch keeps if the optimizer was made from ``named_parameters()``.

    Returns:
        The state dict. Its slots are copies on the CPU, in float32 for a 16-bit parameter.

    Raises:
        CheckpointError: The state dict is malformed or from another optimizer, or a setting is out
            of range.
        ValueError: There are too many or too few names, or a name appears twice.
        TypeError: multiopt has no rule for the class, or a name is not a string.
    """
    rule_class = rule_class_of(optimizer_class)
    groups, states = _checked(state_dict)
    names_of = _names_of(groups, names)
    entries = {}
    for group in groups:
        for number in group["params"]:
            # torch keeps no state for a parameter that never had a gradient.
            alone = {
                "state": {number: states.get(number, {})},
                "param_groups": [{**group, "params": [number]}],
            }
            entries[names_of[number]] = parameter_from_torch(names_of[number], rule_class, alone)
    return state_dict_of(entries)


def to_torch(
    state_dict: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    names: Iterable[str] | None = None,
) -> dict[str, Any]:
    """Convert an ``Optimizer``'s state dict to one for a torch optimizer's ``load_state_dict``.

    Groups get the hyperparameters of their names, and a schedule becomes the last number it gave.
    Whatever the state dict does not mention keeps its value in the torch optimizer: parameters that
    it does not have, settings such as ``fused``, and what users and schedulers keep in groups.

    Args:
        state_dict: The state dict of the ``Optimizer``; pending state is converted as well.
        optimizer: The torch optimizer, which is not changed.
        names: The names of the torch optimizer's parameters, as in ``from_torch``.

    Returns:
        The state dict. Its tensors are copies on the CPU, with the dtypes of their parameters.

    Raises:
        ValueError: There is state for a name that the torch optimizer does not have, or state of
            another rule or shape; the names of one group differ in a hyperparameter; there are too
            many or too few names, or a name appears twice.
        TypeError: multiopt has no rule for the torch optimizer, or a name is not a string.
    """
    rule_class_of(type(optimizer))
    theirs = optimizer.state_dict()
    entries = for_torch(state_dict)
    names_of = _names_of(theirs["param_groups"], names)
    if unknown := sorted(entries.keys() - set(names_of.values())):
        raise ValueError(
            f"there is state of {unknown}; expected that of parameters of the torch optimizer, "
            f"which has {list(names_of.values())}: rename or forget the others"
        )
    states, groups = {}, []
    for group, own in zip(theirs["param_groups"], optimizer.param_groups, strict=True):
        params = {
            names_of[i]: param for i, param in zip(group["params"], own["params"], strict=True)
        }
        settings = _settings(type(optimizer), {n: entries[n] for n in params if n in entries})
        groups.append(deepcopy(group) | settings)
        for number, (name, param) in zip(group["params"], params.items(), strict=True):
            if name in entries:
                state = _state(name, entries[name], type(optimizer), settings, param.detach())
            else:
                state = deepcopy(theirs["state"].get(number, {}))
            if state:
                states[number] = state
    return {"state": states, "param_groups": groups}


def rules_of(state_dict: Mapping[str, Any]) -> dict[str, Rule]:
    """Rebuild the rules that a state dict describes, for a new ``Optimizer``.

    Args:
        state_dict: The result of ``from_torch``, ``from_pyro`` or ``Optimizer.state_dict``.

    Returns:
        The rules by name. A schedule becomes the last number it gave; equal rules are one object.

    Raises:
        ValueError: A description is not of one of multiopt's rules.

    >>> import numpy as np, multiopt as mo
    >>> from multiopt.adapters.torch_optim import rules_of
    >>> opt = mo.Optimizer(lambda name: mo.SGD(lr=0.5 if name == "scale" else 0.25))
    >>> _ = opt.step({"scale": np.ones(2)}, {"scale": np.ones(2)})
    >>> rules_of(opt.state_dict())["scale"].lr
    0.5
    """
    check_state_dict(state_dict)
    same: dict[Rule, Rule] = {}
    rules = {}
    for name, entry in {**state_dict["pending"], **state_dict["entries"]}.items():
        rule = rule_of(name, entry["rule"])
        rules[name] = same.setdefault(rule, rule)
    return rules


def _checked(state_dict: Any) -> tuple[list[Mapping[str, Any]], Mapping[int, Mapping[str, Any]]]:
    """Check a state dict of torch, and return its groups and its states.

    Raises:
        CheckpointError: It is malformed.
    """
    parts = state_dict if isinstance(state_dict, Mapping) else {}
    groups, states = parts.get("param_groups"), parts.get("state")
    if not isinstance(groups, list) or not isinstance(states, Mapping):
        what = f"the keys {list(parts)}" if parts else f"a {type(state_dict).__name__}"
        raise CheckpointError(
            "expected the state dict of a torch optimizer, which has 'state' and 'param_groups'; "
            f"got {what}"
        )
    listed: list[int] = []
    for group in groups:
        numbers = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(numbers, list) or not all(isinstance(x, int) for x in numbers):
            raise CheckpointError(
                f"expected param_groups to have a list of numbers under 'params'; got {group!r}"
            )
        listed += numbers
    if len(set(listed)) < len(listed):
        raise CheckpointError(f"expected each parameter once in the param_groups; got {listed}")
    if unlisted := [number for number in states if number not in set(listed)]:
        raise CheckpointError(f"there is state of {unlisted}; expected numbers of {listed}")
    return groups, states


def _names_of(groups: Iterable[Mapping[str, Any]], names: Iterable[str] | None) -> dict[int, str]:
    """The names of the parameters by their numbers.

    Raises:
        ValueError: There are too many or too few names, or a name appears twice.
        TypeError: A name is not a string.
    """
    numbers = [number for group in groups for number in group["params"]]
    if names is None:
        if not all("param_names" in group for group in groups):
            raise ValueError(
                "torch has no names of these parameters; expected names=[...], or an optimizer "
                "that was made from named_parameters()"
            )
        names = [name for group in groups for name in group["param_names"]]
    listed = [*names]
    if isinstance(names, str) or not all(isinstance(name, str) for name in listed):
        raise TypeError(f"expected a list of names, which are strings; got {names!r}")
    if len(listed) != len(numbers):
        raise ValueError(
            f"expected {len(numbers)} names, one for each parameter of the torch optimizer; got "
            f"{len(listed)}: {listed}"
        )
    if twice := [name for name, count in Counter(listed).items() if count > 1]:
        raise ValueError(f"expected each parameter to have a name of its own; got {twice} twice")
    return dict(zip(numbers, listed, strict=True))


def _settings(
    constructor: type[torch.optim.Optimizer], entries: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The settings of a torch group: the hyperparameters that all its names share.

    Raises:
        ValueError: The names differ in a hyperparameter, or have another rule.
    """
    first, shared = "", dict[str, Any]()
    for name, entry in entries.items():
        rule = with_decoupled(entry["rule"])
        settings = group_settings(constructor, rule, entry["step"])
        settings = {k: v for k, v in settings.items() if k in rule}
        kinds = {rule["name"]}
        if rule["name"] in ("Adam", "AdamW") and rule[DECOUPLED] and DECOUPLED in settings:
            kinds = {"Adam", "AdamW"}
        if constructor.__name__ not in kinds:
            raise ValueError(
                f"the state of parameter {name!r} is that of the rule {rule['name']!r}; "
                f"expected {constructor.__name__}, that of the torch optimizer"
            )
        first, shared = first or name, shared or settings
        for key, value in settings.items():
            if value != shared[key]:
                raise ValueError(
                    f"parameters {first!r} and {name!r} are in one group of the torch optimizer, "
                    f"but have {key}={shared[key]!r} and {value!r}: make it with a group for each"
                )
    return shared


def _state(
    name: str,
    entry: Mapping[str, Any],
    constructor: type[torch.optim.Optimizer],
    settings: Mapping[str, Any],
    param: torch.Tensor,
) -> dict[str, Any]:
    """The state of one parameter as torch keeps it.

    Raises:
        ValueError: A slot does not fit the parameter.
    """
    rule = rule_of(name, entry["rule"])
    try:
        shapes = rule.slot_shapes(tuple(param.shape))
    except ValueError as error:
        raise ValueError(f"parameter {name!r}: {error}") from error
    check_slot_names(name, entry["slots"], entry["step"], entry["rule"], rule, shapes)
    if not entry["step"]:
        return fresh_state(constructor, settings, param)
    slots = entry["slots"]
    if param.is_complex():
        shapes = {slot: (*shape, 2) for slot, shape in shapes.items()}
    for slot, array in slots.items():
        if array.shape != shapes[slot] or entry["complex"] > param.is_complex():
            raise ValueError(
                f"the slot {slot!r} of parameter {name!r} has shape {array.shape} and dtype "
                f"{array.dtype}; expected {shapes[slot]}, for a parameter of shape "
                f"{tuple(param.shape)} and dtype {param.dtype} in torch"
            )
    whole = {**entry, "complex": param.is_complex()}
    (state,) = parameter_to_torch(constructor, whole)["state"].values()
    cast = {k: v.to(param.dtype) if k in slots else v for k, v in state.items()}
    return without_clock(constructor, cast)
