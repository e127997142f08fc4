"""``TensorOptimizer``: one tensor of the drop-in, as users and schedulers see it.

``optim_objs[tensor]`` is such an object, in place of Pyro's torch optimizer for that tensor. It is
live: reading gives what the next step will use, and the next step uses what was written. What
cannot be written is an error that says what to do instead.
"""

from collections.abc import Hashable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import proxy

import torch

from multiopt.adapters.pyro.settings import (
    SHARED,
    changeable,
    clips_itself,
    differing,
    has_schedule,
    remembered_settings,
    settings_now,
    with_setting,
)
from multiopt.adapters.pyro.views import Group, Groups, State
from multiopt.adapters.torch.settings import number
from multiopt.adapters.torch.state import (
    derived_numbers,
    fresh_state,
    parameter_from_torch,
    parameter_to_torch,
    whole_number,
)
from multiopt.backend import backend_named
from multiopt.hyperparameters import set_numbers
from multiopt.rules import Rule
from multiopt.state.record import described_rule, description, plain_entry

if TYPE_CHECKING:
    from multiopt.adapters.pyro.followed import Source
    from multiopt.adapters.pyro.joint import JointOptim

__all__ = ["TensorOptimizer"]


class TensorOptimizer(torch.optim.Optimizer):
    """The part of ``torch.optim.Optimizer`` that users of ``optim_objs`` and schedulers touch.

    It refers to its owner only weakly.

    Args:
        owner: The drop-in's optimizer that the tensor belongs to.
        tensor: The tensor.
        key: Its name in the registry: the label, made unique.
        label: Its name in the param store or in a module at first sight; None if it had none.

    Attributes:
        tensor: The tensor; None once it is forgotten.
        clip_args: The user's settings for its clip, which may change.
        given: Those of its settings that are the user's own tensors, arrays or lists, which may
            change.
        extra: Other keys of its parameter group, from schedulers and users.
        sources: The user's objects that are watched for it.
        scheduler: Its scheduler of torch, if there is one.
        flight: The tensors whose schedulers are in the same state, if they are stepped together.
    """

    #: torch's schedulers warn if the optimizer was not called before them; this one never is.
    _opt_called = True

    def __init__(
        self, owner: "JointOptim", tensor: torch.Tensor, key: str, label: str | None
    ) -> None:
        """Start without settings and without a scheduler."""
        # torch's own __init__ would make another state and other groups.
        self._owner: Any = proxy(owner)
        self.tensor: torch.Tensor | None = tensor
        self.key, self.label = key, label
        self.clip_args: Mapping[str, Any] = {}
        self.given: dict[str, Any] = {}
        self.extra: dict[str, Any] = {}
        self.sources: list[Source] = []
        self.scheduler: Any = None
        self.flight: dict[TensorOptimizer, None] | None = None

    @property
    def alive(self) -> torch.Tensor:
        """The tensor.

        Raises:
            ReferenceError: The optimizer has forgotten it.
        """
        if self.tensor is None:
            raise ReferenceError(
                f"the tensor {self.key!r} is gone: nobody held it, or it was deleted from "
                "optim_objs"
            )
        return self.tensor

    # What torch's has

    @property
    def param_groups(self) -> Any:
        """The only group, with the current settings; a change counts from the next step on."""
        return Groups([Group(self)])

    @param_groups.setter
    def param_groups(self, groups: Any) -> NoReturn:
        Groups.refuse()

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]  # likewise
        """The current settings; no other tensors are ever added that could use them as defaults."""
        return dict(self.settings())

    @property
    def state(self) -> Any:
        """The clock and the slots, by tensor."""
        return State(self)

    @state.setter
    def state(self, state: Any) -> None:
        if state:
            self.state.update(state)
        else:
            self.state.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the state and the settings, as ``torch.optim.Optimizer.state_dict``."""
        self.alive  # noqa: B018 -- raises if it is gone
        if not self._owner._guard.busy:
            self._owner._follow()
        return parameter_to_torch(self._owner._constructor, self.plain_state())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load state and settings, as ``torch.optim.Optimizer.load_state_dict``.

        Raises:
            CheckpointError: The state dict is malformed. Nothing has changed.
            ValueError: The state does not fit. Nothing has changed.
        """
        self.alive  # noqa: B018 -- raises if it is gone
        self._owner._guard.check("loading")
        state = parameter_from_torch(self.key, self._owner._rule_class, state_dict)
        self._owner._load_states([(self, state)])

    def add_param_group(self, param_group: Any) -> NoReturn:
        """Raise an error: there is only one tensor."""
        raise TypeError("this is an optimizer of one tensor; call the whole one with the tensors")

    def step(self) -> None:  # type: ignore[override]
        """Step this tensor alone; it is clipped as usual."""
        self._owner([self.alive])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set the gradient to None, or replace it with zeros."""
        tensor = self.alive
        if set_to_none:
            tensor.grad = None
        elif tensor.grad is not None:
            tensor.grad = torch.zeros_like(tensor.grad)

    # Settings

    @property
    def rule(self) -> Rule:
        """The rule of the tensor. Most tensors share one, so a few different rules are cached."""
        group, row = self._owner._registry.row_of(self.key)
        remembered: dict[Hashable, Rule] = self._owner._rules
        key = group, int(group.schedule[row]), group.numbers[row].tobytes()
        if key not in remembered:
            if len(remembered) >= SHARED:
                remembered.clear()
            remembered[key] = self._owner._registry.rule_of(self.key)
        return remembered[key]

    @property
    def clock(self) -> int:
        """How many steps the tensor has taken."""
        clock: int = self._owner._registry.clock(self.key)
        return clock

    def settings(self) -> Mapping[str, Any]:
        """The current settings in torch's terms; do not modify the result."""
        constructor, registry = self._owner._constructor, self._owner._registry
        group, row = registry.row_of(self.key)
        if group.schedule[row]:
            return settings_now(constructor, self.rule, self.clock, registry.steps)
        return remembered_settings(constructor, self.rule, self.clock)

    def with_setting(self, rule: Rule, name: str, value: Any) -> Rule:
        """Return a rule with one setting changed, in torch's terms, at the tensor's clock."""
        return with_setting(self._owner._constructor, rule, self.clock, name, number(value))

    def change(self, name: str, value: Any) -> None:
        """Change one setting, in torch's terms.

        Raises:
            TypeError: The setting cannot be changed.
            ValueError: The value is out of range.
        """
        owner = self._owner
        owner._guard.check(f"changing {name!r}")
        before = self.rule
        rule = self.with_setting(before, name, value)
        if changeable(value) or name in self.given:
            self.given = {k: v for k, v in self.given.items() if k != name}
            if changeable(value):
                self.given[name] = value
            owner._sources.watch(self)
        if type(rule) is not type(before) or clips_itself(rule):
            owner._change_rules({self: rule})
        elif rule != before:
            set_numbers(owner._registry, [self.key], differing(rule, before))

    # Clock and slots

    def values(self) -> dict[str, Any]:
        """The clock and the slots under torch's names; the slots are not copies."""
        owner = self._owner
        constructor, entry = owner._constructor, owner._registry.entry(self.key)
        if not entry.step:
            return fresh_state(constructor, self.settings(), self.alive)
        clock: Any = entry.step
        if not constructor.__module__.startswith("pyro."):
            clock = owner._clocks.shown(self, entry.step)
        rule = described_rule(entry.rule, entry.step, owner._registry.steps)
        as_complex = backend_named(entry.layout.library).as_complex
        slots = entry.converted(as_complex) if entry.layout.is_complex else entry.slots
        return {"step": clock, **derived_numbers(rule, entry.step), **slots}

    def write(self, name: str, value: Any) -> None:
        """Write the clock or a slot.

        Raises:
            KeyError: There is no such slot.
            TypeError: The value cannot be written.
            ValueError: The value does not fit.
        """
        self._owner._guard.check(f"changing {name!r}")
        label = f"the state of {self.key!r}"
        if not self.clock:
            raise TypeError(
                f"{label} is empty before the first step; expected a whole one: load_state_dict"
            )
        values = self.values()
        if name == "step":
            self.set_clock(whole_number(value))
        elif name not in values:
            raise KeyError(f"{label} has no {name!r}; it has {', '.join(values)}")
        elif name not in self._owner._registry.entry(self.key).slots:
            raise TypeError(f"{label}: {name!r} follows from the step and the settings: set those")
        else:
            tensor, slot = torch.as_tensor(value), values[name]
            if tensor.shape != slot.shape or tensor.is_complex() > slot.is_complex():
                raise ValueError(
                    f"{label}: {name!r} would have shape {tuple(tensor.shape)} and dtype "
                    f"{tensor.dtype}; expected {tuple(slot.shape)} and {slot.dtype}"
                )
            slot.copy_(tensor)

    def set_clock(self, step: int) -> None:
        """Set the clock; a learning rate that has decayed keeps its value, as in Pyro."""
        rate = self.settings().get("lr")
        group, row = self._owner._registry.row_of(self.key)
        group.set_clock(row, step)
        self._owner._clocks.refresh(self, step)
        self._keep_rate(rate)

    def clear_state(self) -> None:
        """Drop the clock and the slots, and keep the current settings."""
        self._owner._guard.check("clearing the state")
        registry, rate = self._owner._registry, self.settings().get("lr")
        registry.put({self.key: registry.entry(self.key)._replace(step=0, slots={})})
        self._keep_rate(rate)

    def _keep_rate(self, rate: Any) -> None:
        rule = self.rule
        if rate != self.settings().get("lr") and not has_schedule(rule):
            self._owner._change_rules({self: self.with_setting(rule, "lr", rate)})

    def plain_state(self) -> dict[str, Any]:
        """The complete state as an entry of a state dict with NumPy slots, and more keys.

        Those are ``"complex"``, ``"given"``, ``"group"``, ``"average"`` and ``"skips"``.
        """
        registry = self._owner._registry
        entry = registry.entry(self.key)
        to_host, steps = backend_named(entry.layout.library).to_host, registry.steps
        rule = description(entry.rule, entry.step, steps)
        state = plain_entry(rule, entry.step, entry.converted(to_host))
        state["complex"] = entry.layout.is_complex
        state["given"], state["group"] = deepcopy((self.given, self.extra))
        if entry.average is not None and entry.average.step:
            mean = entry.average
            rule = description(mean.rule, mean.step, steps)
            state["average"] = plain_entry(rule, mean.step, mean.converted(to_host))
        if (skips := registry.skips.get(self.key)) is not None:
            state["skips"] = tuple(skips)
        return state
