"""Reads state dicts of ``torch.optim``, torch's own and those of the optimizers here.

A parameter's state may be that of torch's class. Slots are kept in the working precision, to which
those that torch keeps for parameters of 16 bits are raised.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from multiopt.adapters.torch.state import DERIVED, clock_of, offset, scalar, whole_number
from multiopt.backend import backend_named
from multiopt.distributed.boxes import here
from multiopt.entry import Entry, chosen_clip
from multiopt.errors import CheckpointError, brief
from multiopt.registry import Registry
from multiopt.rules import Rule
from multiopt.rules.average import Average
from multiopt.state.fit import SHOWN_AVERAGE
from multiopt.state.record import Saved, described_rule, entry_of, plain, saved_of

__all__ = ["AVERAGE_STEP", "loaded", "matched", "waiting_state"]

#: In the state of a parameter, how many steps its average has seen.
AVERAGE_STEP = "average_step"

#: The dtypes of slots of float64 parameters; those of others are float32.
DOUBLE = torch.float64, torch.complex128


def matched(
    groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]], keys: Sequence[str]
) -> dict[Any, str]:
    """Find which saved state belongs to which parameter.

    Args:
        groups: The groups of the optimizer.
        saved: The groups of the state dict.
        keys: The names in the registry of all parameters, in order.

    Returns:
        The names in the registry by the numbers in the state dict, or what it has for numbers. They
        are found by name if both sides have names, and else by position.

    Raises:
        ValueError: There are more or fewer groups, or parameters in a group without names, in
            torch's words; or no name is the same.
    """
    if len(groups) != len(saved):
        raise ValueError("loaded state dict has a different number of parameter groups")
    numbers = list(chain.from_iterable(group["params"] for group in saved))
    ours, its = _names(groups), _names(saved)
    if ours is not None and its is not None and len(its) == len(numbers):
        key_of = dict(zip(ours, keys, strict=True))
        if its and not key_of.keys() & its:
            raise ValueError(
                f"loaded state dict has the parameters {brief(its)}, of which the optimizer has "
                f"none; expected {brief(ours)}: rename them in param_groups' param_names"
            )
        # What no parameter has yet waits for it.
        return {number: key_of.get(name, name) for number, name in zip(numbers, its, strict=True)}
    if any(len(a["params"]) != len(b["params"]) for a, b in zip(groups, saved, strict=True)):
        raise ValueError(
            "loaded state dict contains a parameter group that doesn't match the size of "
            "optimizer's group"
        )
    return dict(zip(numbers, keys, strict=True))


def _names(groups: Iterable[Mapping[str, Any]]) -> list[str] | None:
    """The names of all parameters; None if some have none, or two the same."""
    names: list[str] = []
    for group in groups:
        if len(group.get("param_names", ())) != len(group["params"]):
            return None
        names += group.get("param_names", ())
    return names if len(set(names)) == len(names) else None


def loaded(
    registry: Registry,
    states: Mapping[str, Mapping[str, Any]],
    rules: Mapping[str, Rule],
    params: Mapping[str, torch.Tensor],
) -> tuple[dict[str, Entry], dict[str, Saved]]:
    """Convert the state of parameters from torch's form, and check that it fits them.

    Args:
        registry: The registry that it is for, which does not change.
        states: By name the state as torch has it; without anything a parameter starts over.
        rules: The rules of the parameters there are.
        params: The parameters there are.

    Returns:
        Entries of the parameters, and records for names that have none yet.

    Raises:
        CheckpointError: A state is malformed, or does not fit.
    """
    entries: dict[str, Entry] = {}
    waiting: dict[str, Saved] = {}
    for name, values in states.items():
        param = params.get(name)
        rule = next(iter(rules.values())) if param is None else rules[name]
        average = registry.average_of(name)
        try:
            saved = _saved(name, values, rule, param, average)
            if param is None:
                waiting[name] = saved
            elif name in registry or values:
                clip = registry.entry(name).clip if name in registry else None
                if name not in registry:
                    clip = chosen_clip(registry.clip, name)
                layout = backend_named("torch").layout(here(param), f"parameter {name!r}")
                entries[name] = entry_of(
                    *(name, saved, rule, clip, layout, registry.masters, average)
                )
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"the state of {name!r} cannot be loaded: {error}") from error
    return entries, waiting


def _saved(
    name: str,
    values: Mapping[str, Any],
    rule: Rule,
    param: torch.Tensor | None,
    average: Average | None,
) -> Saved:
    """A record of a parameter's state as torch has it."""
    step = clock_of(type(rule), values)
    slots = _slots(rule, values, param)
    mean, seen = slots.pop(SHOWN_AVERAGE, None), whole_number(values.get(AVERAGE_STEP, 0))
    described = described_rule(rule, step)
    slots = slots if step else offset(slots, described, -1)
    entry = {"rule": described, "step": step, "slots": slots}
    if average is None or mean is None or not seen:
        return saved_of(name, entry)
    kept = {"rule": described_rule(average, seen), "step": seen, "slots": {SHOWN_AVERAGE: mean}}
    return saved_of(name, entry, kept)


def _slots(
    rule: Rule, values: Mapping[str, Any], param: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The slots in a parameter's state, as far as they lie here, in the working precision."""
    others = {"step", AVERAGE_STEP, *DERIVED.get(type(rule).__name__, ())}
    slots = {}
    for name, value in values.items():
        if name in others or value is None:
            continue
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"expected a tensor under {name!r}; got a {type(value).__name__}")
        dtype = (value if param is None else param).dtype
        working = torch.float64 if dtype in DOUBLE else torch.float32
        slot = here(value).detach()
        slots[name] = slot.to(working.to_complex() if slot.is_complex() else working)
    return slots


def waiting_state(saved: Saved) -> dict[str, Any]:
    """The state of a name without a parameter, as torch has it."""
    entry, average = plain(saved)
    slots = {name: torch.as_tensor(slot) for name, slot in entry["slots"].items()}
    if average is not None:
        slots[SHOWN_AVERAGE] = torch.as_tensor(average["slots"][SHOWN_AVERAGE])
        slots[AVERAGE_STEP] = scalar(average["step"])
    return {"step": scalar(saved.step), **slots}
