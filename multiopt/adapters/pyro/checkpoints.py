"""Convert checkpoints of Pyro's own optimizers to and from the state of an ``Optimizer``.

For programs that leave ``pyro.optim`` altogether; ``docs/pyro.md`` is the guide.

>>> import multiopt as mo
>>> import pyro, torch
>>> from multiopt.adapters.pyro.checkpoints import from_pyro, to_pyro
>>> from multiopt.adapters.torch_optim import rules_of
>>> pyro.clear_param_store()
>>> theirs = pyro.optim.SGD({"lr": 0.5, "momentum": 0.5})
>>> loc = pyro.param("loc", torch.zeros(2)).unconstrained()
>>> loc.grad = torch.ones(2)
>>> theirs([loc])
>>> state = from_pyro(theirs.get_state(), pyro.optim.SGD)
>>> opt = mo.Optimizer(rules_of(state).__getitem__)
>>> _ = opt.load_state_dict(state)
>>> params = opt.step({"loc": loc})
>>> loc.tolist()
[-1.25, -1.25]
>>> theirs.set_state(to_pyro(opt.state_dict()))
"""

import warnings
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from multiopt.adapters.pyro.constructors import CONSTRUCTORS
from multiopt.adapters.torch.settings import rule_class_of
from multiopt.adapters.torch.state import (
    for_torch,
    parameter_from_torch,
    parameter_to_torch,
    parameters_from_torch,
    state_dict_of,
    without_clock,
)

__all__ = ["from_pyro", "to_pyro"]


def from_pyro(states: Mapping[str, Any], optimizer_class: Any) -> dict[str, Any]:
    """Convert a checkpoint of a Pyro optimizer to a state dict for ``Optimizer.load_state_dict``.

    Each name carries its settings; ``torch_optim.rules_of`` turns them into rules. Schedules of
    Pyro are left out with a warning: the settings are their current values.

    Args:
        states: The result of Pyro's ``get_state()``, or of ``torch_optim.read`` for a file that
            Pyro's ``save`` wrote.
        optimizer_class: The class of the torch optimizer, the function of ``pyro.optim``, or
            multiopt's rule of the same name.

    Returns:
        The state dict. Its slots are copies on the CPU, in float32 for a 16-bit parameter.

    Raises:
        CheckpointError: The states are malformed or from another optimizer, or a setting is out of
            range.
        TypeError: multiopt has no rule for the class.
    """
    entries = parameters_from_torch(rule_class_of(optimizer_class), states)
    if scheduled := [name for name, entry in entries.items() if "scheduler" in entry]:
        warnings.warn(
            f"left out the schedules of {scheduled}: give the rule one of multiopt.schedules",
            stacklevel=2,
        )
    return state_dict_of(entries)


def to_pyro(
    state_dict: Mapping[str, Any], schedulers: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Convert a state dict of an ``Optimizer`` to a checkpoint for ``set_state`` in Pyro.

    Written with ``torch.save``, it is a file that Pyro's ``load`` reads.

    Args:
        state_dict: The state dict of the ``Optimizer``; pending state is converted as well.
        schedulers: For a ``PyroLRScheduler``: a checkpoint of one, with a schedule for each name.
            Those schedules continue.

    Returns:
        For each name, the state dict of a torch optimizer of one parameter.

    Raises:
        ValueError: Pyro does not have a rule or one of its options, or a name has no schedule.
        CheckpointError: ``schedulers`` is malformed.
    """
    states = {}
    for name, entry in for_torch(state_dict).items():
        kind = entry["rule"]["name"]
        if kind not in CONSTRUCTORS:
            raise ValueError(f"parameter {name!r} has the rule {kind}, which Pyro does not have")
        constructor = CONSTRUCTORS[kind]
        before = None
        if schedulers is not None:
            if "scheduler" not in schedulers.get(name, ()):
                raise ValueError(f"parameter {name!r} has no schedule in schedulers")
            before = parameter_from_torch(name, rule_class_of(constructor), schedulers[name])
            entry["group"] = before["group"]
        made = parameter_to_torch(constructor, entry)
        made["state"] = {
            number: state
            for number, values in made["state"].items()
            if (state := without_clock(constructor, values))
        }
        if before is not None:
            made = {"scheduler": deepcopy(before["scheduler"]), "optimizer": made}
        states[name] = made
    return states
