"""``PyroOptim``, and the one whose parameters multiopt steps.

It is keyed by tensor, as Pyro is: one entry for each live tensor, labelled with its name in the
param store.
"""

import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, ValuesView
from copy import deepcopy
from functools import cache, lru_cache, partial
from inspect import Parameter, signature
from typing import Any, Literal, NoReturn, cast

import numpy as np
import pyro
import pyro.optim
import torch
from pyro.params.param_store import (
    module_from_param_with_module_name,
    normalize_param_name,
    user_param_name,
)

from multiopt.adapters.pyro.constructors import RULES, Settings, has_rule
from multiopt.adapters.pyro.core import Core
from multiopt.adapters.pyro.dct import marked
from multiopt.adapters.pyro.objects import Clocks, OptimObjs, TensorOptimizer
from multiopt.adapters.pyro.settings import (
    EqualRules,
    Sources,
    changeable,
    clips_itself,
    has_schedule,
    make_clip,
    make_rule,
    restored_rule,
    settings_now,
    with_setting,
)
from multiopt.adapters.pyro.tracking import ModuleNames, Tracked, TrackedTensors
from multiopt.adapters.torch_file import is_safetensors, read
from multiopt.adapters.torch_settings import number
from multiopt.adapters.torch_state import (
    derived_numbers,
    fresh_state,
    leave_out,
    parameter_from_torch,
    parameter_to_torch,
    parameters_from_torch,
    whole_number,
)
from multiopt.arrays import Array
from multiopt.averaging import Average
from multiopt.backend import identities, named
from multiopt.entry import (
    check_slot_names,
    described,
    described_rule,
    in_parts,
    restored_plateaus,
)
from multiopt.errors import CheckpointError, brief
from multiopt.guard import Guard, exclusive
from multiopt.rules import Rule
from multiopt.skipping import Skips
from multiopt.state import file as checkpoint
from multiopt.state.file_objects import Source, Target
from multiopt.state.metadata import described as describe_metadata
from multiopt.state.plateaus import warn_of_plateaus
from multiopt.step.report import Report

__all__ = ["JointOptim", "PyroOptim"]

#: What messages of the core say to do about state that does not fit; here there is other help.
REMEDY = re.compile(
    r"forget the name to start anew$"
    r"|load with the rule that was saved, step, then assign opt\.rule$"
)

#: How many different settings are remembered.
SHARED = 64

#: How many tensors a call asks whether anybody else holds them, and twice as many as it adds.
ASKED = 1


class PyroOptim(pyro.optim.PyroOptim):
    """``pyro.optim.PyroOptim``: parameters that may appear at any time, each with its settings.

    Of a torch optimizer that multiopt has a rule for, it makes a ``JointOptim``. Any other is
    Pyro's affair: a torch optimizer for each parameter.

    Args:
        optim_constructor: The class of a torch optimizer.
        optim_args: Its arguments, or a callable that gives them for a parameter name (dotted, as in
            ``nn.Module.named_parameters``).
        clip_args: ``clip_norm`` and ``clip_value``, or a callable that gives them likewise; with a
            rule of multiopt's also ``clip_global_norm``, of all parameters of a call together.
        on_nonfinite: As for ``multiopt.Optimizer``; with a rule of multiopt's only.
        max_consecutive_skips: Likewise.
        average: Likewise. A callable gets the name that ``optim_args`` gets.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "PyroOptim":
        """Choose who steps."""
        chosen = cls
        if cls is PyroOptim and (args or kwargs):
            given = signature(cls.__init__).bind(None, *args, **kwargs).arguments
            if has_rule(given["optim_constructor"], given["optim_args"]):
                chosen = JointOptim
        made: PyroOptim = super().__new__(chosen)
        return made

    def __init__(
        self,
        optim_constructor: Any,
        optim_args: Settings,
        clip_args: Settings | None = None,
        *,
        on_nonfinite: Literal["propagate", "raise", "skip"] = "propagate",
        max_consecutive_skips: int | None = None,
        average: Average | Callable[[str], Average | None] | None = None,
    ) -> None:
        """As in Pyro, saying what is slow.

        Raises:
            TypeError: An argument is of another kind, a dict has an unknown key, or multiopt has no
                rule, and there is a setting that Pyro does not have.
            ValueError: A setting is out of range.
        """
        given = {"max_consecutive_skips": max_consecutive_skips, "average": average}
        more: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if on_nonfinite != "propagate":
            more["on_nonfinite"] = on_nonfinite
        self._begin(optim_constructor, optim_args, clip_args, more)

    def _begin(
        self, constructor: Any, optim_args: Settings, clip_args: Settings | None, more: Any
    ) -> None:
        """What is to be done with the arguments, ``more`` being those that Pyro does not have."""
        name = getattr(constructor, "__name__", repr(constructor))
        if more:
            raise TypeError(
                f"multiopt has no rule for {name}, which Pyro steps by torch; expected no "
                f"{', '.join(more)}"
            )
        if not has_rule(constructor, optim_args):
            _say_wrapped(f"{name} with subsample_aware" if constructor in RULES else name)
        pyro.optim.PyroOptim.__init__(self, constructor, optim_args, clip_args)

    def __call__(self, params: list[Any] | ValuesView[Any], *args: Any, **kwargs: Any) -> None:
        """As in Pyro, saying what is missing.

        Raises:
            TypeError: The torch optimizer needs a closure, and there is none.
        """
        constructor: Any = self.pt_optim_constructor
        if _needs_closure(constructor) and not any(map(callable, (*args, *kwargs.values()))):
            raise TypeError(
                f"{constructor.__name__} evaluates the loss several times in a step, and needs a "
                "closure that does; expected optimizer(params, closure): SVI passes none, so give "
                "it another optimizer, such as Adam"
            )
        super().__call__(params, *args, **kwargs)


@cache
def _needs_closure(constructor: Any) -> bool:
    step = getattr(constructor, "step", None)
    closure = None if step is None else signature(step).parameters.get("closure")
    return closure is not None and closure.default is Parameter.empty


@cache
def _say_wrapped(what: str) -> None:
    warnings.warn(
        f"multiopt has no rule for {what}: Pyro steps its parameters one by one, by torch",
        stacklevel=3,
    )


@cache
def _say_not_joint(name: str) -> None:
    warnings.warn(
        f"HorovodOptimizer makes an optimizer of torch's {name} for each parameter: they are "
        "stepped one by one, by torch and not by multiopt",
        stacklevel=4,
    )


class JointOptim(PyroOptim):
    """A ``PyroOptim`` whose parameters are stepped together by multiopt.

    A copy, or one that was pickled, has the settings and the state that ``get_state`` lists, which
    waits there for the next tensor presented under each name.
    """

    def _begin(
        self, constructor: Any, optim_args: Settings, clip_args: Settings | None, more: Any
    ) -> None:
        """Check the arguments."""
        self._constructor = constructor
        # The names under which Pyro's Horovod wrapper and users' code look for them.
        self.pt_optim_args = optim_args
        self.pt_clip_args = {} if clip_args is None else clip_args
        # Loaded state by label, for the next tensor that is presented under it.
        self._state_waiting_to_be_consumed: dict[str, dict[str, Any]] = {}
        self._rule_class = RULES[constructor]
        self._rules = EqualRules()
        # Of rules without schedules, in torch's terms: the settings, and the rule with one of them
        # changed. Most parameters are alike.
        self._read = lru_cache(SHARED)(partial(settings_now, constructor))
        self._write = lru_cache(SHARED, typed=True)(partial(with_setting, constructor))
        self._guard = Guard()
        # New rules by tensor, while they are collected.
        self._changes: dict[Tracked, Rule] = {}
        self._collects = False
        self._tensors = TrackedTensors()
        self._names = ModuleNames()
        self._sources = Sources()
        self._clocks = Clocks()
        # Of the last call: which objects the tensors are, the order in which they are stepped, and
        # their keys in it. A number stands for the same tensor as long as none was forgotten.
        self._ids = b""
        self._order = np.empty(0, np.intp)
        self._keys: list[str] = []
        self._unnamed = 0
        self._core, self._more = Core(self._rule_class(), **more), more
        for what, settings in (("optim_args", optim_args), ("clip_args", self.pt_clip_args)):
            if not isinstance(settings, dict) and not callable(settings):
                raise TypeError(f"{what} must be a dict or a callable; got {brief(settings)}")
        rule = self._rule_class()
        if isinstance(self.pt_optim_args, dict):
            rule = self._rule(self.pt_optim_args)
        if isinstance(self.pt_clip_args, dict):
            make_clip(self.pt_clip_args, rule)

    def __repr__(self) -> str:
        """How it was made, and how many tensors there are."""
        waiting = len(self._state_waiting_to_be_consumed)
        pending = f", {waiting} pending" if waiting else ""
        return f"<{self._made()}: {len(self._tensors)} tensors{pending}>"

    def _made(self) -> str:
        arguments = [repr(self.pt_optim_args)]
        if self.pt_clip_args:
            arguments.append(repr(self.pt_clip_args))
        arguments += [f"{name}={value!r}" for name, value in self._more.items()]
        return f"{self._constructor.__name__}({', '.join(arguments)})"

    @property
    def pt_optim_constructor(self) -> Any:
        """The class of torch's optimizer; who calls it, steps with torch."""
        # Pyro's wrapper of Horovod is the one that calls it.
        if sys._getframe(1).f_globals.get("__name__") == "pyro.optim.horovod":
            _say_not_joint(self._constructor.__name__)
        return self._constructor

    @pt_optim_constructor.setter
    def pt_optim_constructor(self, constructor: Any) -> NoReturn:
        raise TypeError(
            f"this is an optimizer with the rule of {self._constructor.__name__}: make another for "
            f"{constructor!r}"
        )

    @exclusive
    def __call__(self, params: Iterable[torch.Tensor]) -> None:
        """Update tensors in place by their ``.grad``; those without one are left alone.

        Args:
            params: Leaf tensors in any order, such as the set that ``SVI`` passes.

        Raises:
            ValueError: A tensor is no leaf, loaded state does not fit its tensor, and others that
                ``Optimizer.step`` raises; nothing has changed.
        """
        params = params if isinstance(params, Collection) else list(params)
        tensors = np.fromiter(params, object, len(params))
        self._follow()
        before = len(self._tensors)
        if (ids := identities(tensors)) != self._ids:
            self._look_up(tensors, ids)
        self._forget(self._tensors.abandoned(ASKED + 2 * (len(self._tensors) - before)))
        tensors = tensors[self._order]
        if self._state_waiting_to_be_consumed:
            self._settle(filter(None, map(self._tensors.get, tensors)))
        try:
            self._core.step_tensors(self._keys, tensors)
        except (TypeError, ValueError) as error:
            said = REMEDY.sub("del optim_objs[tensor] to start anew", str(error))
            if said != str(error):
                raise type(error)(said) from None
            raise
        self._clocks.say_all(self._clock)

    def __getstate__(self) -> dict[str, Any]:
        """The settings, and the state by name."""
        return {
            "arguments": self._arguments(),
            "more": self._more,
            "waiting": self._stored_or_warn(),
            "steps": self._core.steps,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin with the settings, all state waiting."""
        type(self).__init__(self, *state["arguments"], **state["more"])
        self._state_waiting_to_be_consumed = state["waiting"]
        self._core.resume(state["steps"])

    def _arguments(self) -> tuple[Any, ...]:
        return self._constructor, self.pt_optim_args, self.pt_clip_args

    # What the last calls did

    @property
    def last(self) -> Report:
        """What the last call did, by name, as ``multiopt.Optimizer.last``."""
        return self._core.last

    @property
    def skips(self) -> dict[str, Skips]:
        """How often each name was skipped, as ``multiopt.Optimizer.skips``."""
        return self._core.skips

    def average(self, name: str) -> Array:
        """The average of an unconstrained parameter, a copy, as ``multiopt.Optimizer.average``.

        Args:
            name: Its name in the param store.

        Raises:
            KeyError: None is kept, or there was no step yet.

        >>> import multiopt as mo
        >>> import multiopt.adapters.pyro as optim
        >>> import pyro, torch
        >>> pyro.clear_param_store()
        >>> sgd = optim.SGD({"lr": 1.0}, average=mo.Average())
        >>> scale = pyro.param("scale", torch.ones(1), torch.distributions.constraints.positive)
        >>> for _ in range(2):
        ...     scale.unconstrained().grad = torch.ones(1)
        ...     sgd([scale.unconstrained()])
        >>> sgd.average("scale")  # of its logarithm
        tensor([-1.5000])
        """
        store = dict(pyro.get_param_store().named_parameters())
        tracked = self._tensors.get(store[name]) if name in store else None
        return self._core.average(name if tracked is None else tracked.key)

    # Tensors

    def name_by(self, *modules: torch.nn.Module) -> None:
        """Name tensors that are in no param store as modules do.

        With ``pyro.settings.set(module_local_params=True)`` parameters are in their modules alone.
        Model and guide of an ``SVI`` are found without this; a loop of one's own says them here.

        Args:
            *modules: The modules, which are not held. Of two parameters of one name, that of the
                second module becomes ``"name (2)"``.

        >>> import multiopt.adapters.pyro as optim
        >>> import torch
        >>> sgd, linear = optim.SGD({"lr": 0.5}), torch.nn.Linear(1, 1)
        >>> sgd.name_by(linear)
        >>> linear(torch.ones(1)).backward()
        >>> sgd(linear.parameters())
        >>> list(sgd.get_state())
        ['weight', 'bias']
        """
        self._names.add(*modules)

    def _look_up(self, tensors: np.ndarray, ids: bytes) -> None:
        """Find the keys of tensors, each once; at first sight their settings are asked for."""
        self._ids = b""
        places = {number: place for place, number in enumerate(memoryview(ids).cast("Q"))}
        # A set has them in no order. In that of their addresses a step of 1000 that finds its
        # caches filled by other work takes 0.75 ms instead of 1.
        numbers = sorted(places)
        self._order = np.fromiter(map(places.__getitem__, numbers), np.intp, len(numbers))
        keys = self._tensors.keys(numbers)
        if None in keys:
            names = self._names_now(search=True)
            for tensor in tensors:
                if self._tensors.get(tensor) is None:
                    self._meet(tensor, names(tensor))
            keys = self._tensors.keys(numbers)
        self._keys, self._ids = cast("list[str]", keys), ids

    def _meet(self, tensor: torch.Tensor, label: str | None) -> Tracked:
        """Take a tensor in that is seen for the first time."""
        if (twice := self._tensors.get(tensor)) is not None:
            return twice
        settings = self._settings("optim_args", tensor, label)
        rule = marked(self._rule(settings), tensor)
        tracked = Tracked(tensor, self._unused_key(label), label)
        # Pyro leaves it at no settings, where there are none at first sight.
        tracked.clip_args = self._settings("clip_args", tensor, label) or {}
        tracked.given = {name: value for name, value in settings.items() if changeable(value)}
        clip = make_clip(tracked.clip_args, rule)
        layout = named("torch").layout(tensor, f"parameter {tracked.key!r}")
        dotted = tracked.key if label is None else normalize_param_name(label)
        self._core.enter(tracked.key, dotted, self._rules.one(rule), clip, layout)
        self._tensors.add(tracked)
        self._sources.watch(tracked)
        return tracked

    def _names_now(self, search: bool = False) -> Callable[[torch.Tensor], str | None]:
        """How tensors are called, in the param store or in modules.

        Args:
            search: Whether to look for modules if that is where parameters are.
        """
        in_store = pyro.get_param_store().param_name
        if search and pyro.settings.get("module_local_params"):
            self._names.add_callers()
        in_modules = self._names.current()

        def name(tensor: torch.Tensor) -> str | None:
            found: str | None = in_store(tensor)
            return in_modules.get(id(tensor)) if found is None else found

        return name

    def _unused_key(self, label: str | None) -> str:
        """A name for the core that says in messages which parameter is meant."""
        if label is None:
            self._unnamed += 1
            return f"unnamed tensor {self._unnamed}"
        key, number_of_it = label, 1
        while key in self._core:
            number_of_it += 1
            key = f"{label} ({number_of_it})"
        return key

    def _settings(self, what: str, tensor: torch.Tensor, label: str | None) -> dict[str, Any]:
        settings: Settings = getattr(self, f"pt_{what}")
        if isinstance(settings, dict):
            return settings
        if label is None:
            raise ValueError(
                f"{what} is a callable of names, but a tensor of shape {tuple(tensor.shape)} is in "
                "no param store and has none; pass a dict, or name_by(module)"
            )
        parameters = list(signature(settings).parameters.values())
        by_name = len(parameters) == 1
        if what == "clip_args" and by_name:
            # Pyro always gives this one two arguments, which *arguments takes.
            by_name = parameters[0].kind is not Parameter.VAR_POSITIONAL
        if by_name:
            given = settings(normalize_param_name(label))
        else:
            given = settings(module_from_param_with_module_name(label), user_param_name(label))
        if not isinstance(given, dict):
            raise TypeError(f"{what} gave {brief(given)} for parameter {label!r}; expected a dict")
        return given

    def _rule(self, settings: Mapping[str, Any]) -> Rule:
        return self._rules.one(make_rule(self._rule_class, settings))

    def _forget(self, tensors: Iterable[Tracked]) -> None:
        """Drop the entries of tensors; presented again, they start anew."""
        gone = list(tensors)
        for tracked in gone:
            self._sources.unwatch(tracked)
            self._tensors.remove(tracked)
        if gone:
            self._core.forget_all([tracked.key for tracked in gone])

    def _forget_abandoned(self) -> None:
        """Drop the entries of tensors that nobody else holds, but not in the middle of a call."""
        if not self._guard.busy and (abandoned := self._tensors.abandoned()):
            self._ids = b""
            self._forget(abandoned)

    def _start_anew(self, tracked: Tracked) -> None:
        """Forget a tensor, with loaded state that waits for it and does not fit it.

        What fits waits on, as in Pyro, where only new tensors take it.
        """
        self._guard.check("deleting a tensor")
        label = self._names_now()(tracked.alive) or tracked.label
        waiting = dict(self._state_waiting_to_be_consumed)
        try:
            self._settle([tracked])
        except (ValueError, TypeError):
            waiting = {name: stored for name, stored in waiting.items() if name != label}
        self._state_waiting_to_be_consumed = waiting
        self._ids = b""
        self._forget([tracked])

    # Settings

    def _follow(self) -> None:
        """Take over what the caller has changed in his own objects, and in clocks."""
        if changed := self._sources.changed():
            rules = {}
            for tracked in changed:
                rule = self._core.rule_of(tracked.key)
                for name, given in tracked.given.items():
                    rule = self._with_setting(tracked, rule, name, number(given))
                rules[tracked] = rule
            self._change_rules(rules, rules)
            self._sources.renew()
        for tracked, step in self._clocks.written().items():
            self._set_clock(tracked, step)

    def _follow_if_free(self) -> None:
        """The same for who looks, but not in the middle of a call."""
        if not self._guard.busy:
            self._follow()

    def _group(self, tracked: Tracked) -> Mapping[str, Any]:
        """The settings of a tensor as they are now, in torch's terms; not to be changed."""
        rule = self._changes.get(tracked) or self._core.rule_of(tracked.key)
        step = self._core.clock(tracked.key)
        if has_schedule(rule):
            return settings_now(self._constructor, rule, step, self._core.steps)
        return self._read(rule, step)

    def _change(self, tracked: Tracked, name: str, value: Any) -> None:
        """Change one setting of a tensor, in torch's terms."""
        # Schedulers change settings when they are made, in the middle of a call.
        self._core.check_free(f"changing {name!r}")
        rule = self._changes.get(tracked) or self._core.rule_of(tracked.key)
        rule = self._with_setting(tracked, rule, name, number(value))
        if changeable(value) or name in tracked.given:
            tracked.given.pop(name, None)
            if changeable(value):
                tracked.given[name] = value
            self._sources.watch(tracked)
        self._changes[tracked] = rule
        if not self._collects:
            self._take_changes()

    def _with_setting(self, tracked: Tracked, rule: Rule, name: str, value: Any) -> Rule:
        step = self._core.clock(tracked.key)
        if has_schedule(rule):
            changed = with_setting(self._constructor, rule, step, name, value)
        else:
            changed = self._write(rule, step, name, value)
        return self._rules.one(changed)

    def _take_changes(self) -> None:
        """Give the tensors their new rules."""
        self._collects = False
        changes, self._changes = self._changes, {}
        self._change_rules(changes)

    def _change_rules(
        self, rules: Mapping[Tracked, Rule], clipped: Collection[Tracked] | None = None
    ) -> None:
        """Change the rules of tensors.

        Args:
            rules: The rules.
            clipped: The tensors whose clips are to be made anew; by default those whose rules clip
                by themselves.
        """
        if clipped is None:
            clipped = [tracked for tracked, rule in rules.items() if clips_itself(rule)]
        clips = {one.key: make_clip(one.clip_args, rules[one]) for one in clipped}
        if rules:
            self._core.change({tracked.key: rule for tracked, rule in rules.items()}, clips)

    # Clocks and slots

    def _clock(self, tracked: Tracked) -> int:
        """How many steps a tensor has taken."""
        return self._core.clock(tracked.key)

    def _state_now(self, tracked: Tracked) -> dict[str, Any]:
        """The state of a tensor in torch's terms, its slots those in memory."""
        entry = self._core.entry(tracked.key)
        if not entry.step:
            return fresh_state(self._constructor, self._group(tracked), tracked.alive)
        clock: Any = entry.step
        if not self._constructor.__module__.startswith("pyro."):
            clock = self._clocks.shown(tracked, entry.step)
        rule = described_rule(entry.rule, entry.step, self._core.steps)
        derived = derived_numbers(rule, entry.step)
        return {"step": clock, **derived, **self._core.slots(tracked.key)}

    def _set_state(self, tracked: Tracked, name: str, value: Any) -> None:
        """Write the clock or a slot of a tensor.

        Raises:
            KeyError: There is no such slot.
            TypeError: It cannot be written.
            ValueError: The value does not fit.
        """
        self._core.check_free(f"changing {name!r}")
        entry = self._core.entry(tracked.key)
        slots = self._core.slots(tracked.key)
        label = f"the state of {tracked.key!r}"
        if not entry.step:
            raise TypeError(
                f"{label} is empty before the first step; expected a whole one: load_state_dict"
            )
        if name == "step":
            self._set_clock(tracked, whole_number(value))
        elif name in slots:
            given, slot = torch.as_tensor(value), slots[name]
            if given.shape != slot.shape or given.is_complex() > slot.is_complex():
                raise ValueError(
                    f"{label}: {name!r} would have shape {tuple(given.shape)} and dtype "
                    f"{given.dtype}; expected {tuple(slot.shape)} and {slot.dtype}"
                )
            slot.copy_(given)
        elif name in self._state_now(tracked):
            raise TypeError(f"{label}: {name!r} follows from the step and the settings: set those")
        else:
            raise KeyError(f"{label} has no {name!r}; it has {', '.join(self._state_now(tracked))}")

    def _set_clock(self, tracked: Tracked, step: int) -> None:
        """Set the clock of a tensor; a rate that has decayed stays where it is, as in Pyro."""
        rate = self._group(tracked).get("lr")
        self._core.set_clock(tracked.key, step)
        self._clocks.say(tracked, step)
        self._keep_rate(tracked, rate)

    def _clear_state(self, tracked: Tracked) -> None:
        """Let a tensor begin again, its settings as they are."""
        self._core.check_free("clearing the state")
        rate = self._group(tracked).get("lr")
        self._core.start_anew(tracked.key)
        self._keep_rate(tracked, rate)

    def _keep_rate(self, tracked: Tracked, rate: Any) -> None:
        rule = self._core.rule_of(tracked.key)
        if rate != self._group(tracked).get("lr") and not has_schedule(rule):
            self._change_rules({tracked: self._with_setting(tracked, rule, "lr", rate)})

    # Loaded state

    def _settle(self, tensors: Iterable[Tracked]) -> None:
        """Give tensors the loaded state that waits under their names, all of them or none."""
        waiting = self._state_waiting_to_be_consumed
        if not waiting:
            return
        name, in_store = self._names_now(), dict(pyro.get_param_store().named_parameters())
        takers: dict[str, Tracked] = {}
        for tracked in tensors:
            label = name(tracked.alive) or tracked.label
            # Of two tensors of one name, the one in the store takes it.
            if label in waiting and (label not in takers or in_store.get(label) is tracked.tensor):
                takers[label] = tracked
        self._take([(tracked, waiting[label]) for label, tracked in takers.items()])
        for label in takers:
            waiting.pop(label, None)

    def _take(self, loaded: Collection[tuple[Tracked, Mapping[str, Any]]]) -> None:
        """Give tensors loaded state, all of them or none."""
        states = {}
        for tracked, stored in loaded:
            entry = self._core.entry(tracked.key)
            dtype = entry.layout.compute_dtype
            slots = {k: array.astype(dtype) for k, array in stored["slots"].items()}
            rule = self._rules.one(restored_rule(stored["rule"], entry.rule))
            clip = make_clip(tracked.clip_args, rule)
            states[tracked.key] = {**stored, "slots": slots}, rule, clip
        try:
            self._core.restore(states)
        except ValueError as error:
            remedy = "del optim_objs[tensor] to start anew without it"
            raise ValueError(REMEDY.sub(remedy, str(error))) from None
        for stored, rule, _ in states.values():
            restored_plateaus(rule, stored["rule"], ahead=True)
        for tracked, stored in loaded:
            self._restore_beside(tracked, stored)

    def _load(self, tracked: Tracked, state: Mapping[str, Any]) -> None:
        """Load the state of one tensor in torch's format.

        Raises:
            CheckpointError: It has another form.
            ValueError: It does not fit; nothing has changed.
        """
        self._guard.check("loading")
        self._take([(tracked, parameter_from_torch(tracked.key, self._rule_class, state))])

    def _restore_beside(self, tracked: Tracked, stored: Mapping[str, Any]) -> None:
        """Give a tensor what was loaded beside its entry."""
        tracked.given = dict(stored.get("given", {}))
        self._sources.watch(tracked)
        if "group" in stored:
            tracked.extra = dict(stored["group"])

    def get_state(self) -> dict[str, Any]:
        """The state by parameter name, in Pyro's format, loaded state that waits included.

        It lists the tensors that are in the param store now, and those that modules name.
        """
        return {label: self._to_torch(stored) for label, stored in self._stored().items()}

    def _to_torch(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        return parameter_to_torch(self._constructor, stored)

    def set_state(self, state_dict: Mapping[str, Any]) -> None:
        """Load state in Pyro's format; each name's goes to the next tensor presented under it.

        Args:
            state_dict: As ``get_state`` gives it, or Pyro's own ``get_state``.

        Raises:
            CheckpointError: It has another form; nothing has changed.
        """
        self._wait(parameters_from_torch(self._rule_class, state_dict))

    def _wait(self, loaded: dict[str, dict[str, Any]], steps: int | None = None) -> None:
        """Let loaded state wait, if it fits the rule as far as that is known.

        Args:
            loaded: The state by label.
            steps: How many steps the optimizer has taken; if unknown, the largest clock.
        """
        self._guard.check("loading")
        if isinstance(self.pt_optim_args, dict):
            rule = self._rule(self.pt_optim_args)
            for label, stored in loaded.items():
                try:
                    check_slot_names(label, stored, restored_rule(stored["rule"], rule))
                except (ValueError, TypeError) as error:
                    remedy = "load it into the optimizer that was saved"
                    raise CheckpointError(REMEDY.sub(remedy, str(error))) from None
            for stored in loaded.values():
                restored_plateaus(rule, stored["rule"])
        if self._core.end_torn():
            # Every tensor begins anew: with the state of its name, if there is some.
            self._ids = b""
            self._forget(self._tensors)
        self._state_waiting_to_be_consumed.update(loaded)
        clocks = [stored["step"] for stored in self._state_waiting_to_be_consumed.values()]
        self._core.resume(max(clocks, default=0) if steps is None else steps)

    def save(self, filename: Target) -> None:
        """Write the state to a file that ``load`` and ``multiopt.Optimizer.load`` read.

        It holds what ``get_state`` lists, averages and counts of skips. Tensors that neither a
        param store nor a module names cannot be saved; a warning says how many there are. The file
        may be a binary file object.
        """
        stored = self._stored_or_warn()
        parts = "rule", "step", "slots", "complex"
        averages = {label: one["average"] for label, one in stored.items() if "average" in one}
        skips = {label: list(one["skips"]) for label, one in stored.items() if "skips" in one}
        document: dict[str, Any] = {
            "version": checkpoint.VERSION,
            "steps": self._core.steps,
            "entries": {
                label: {part: one.get(part) for part in parts} for label, one in stored.items()
            },
            "pending": {},
        }
        warn_of_plateaus({key: self._core.rule_of(key) for key in self._core})
        more = {"averages": averages, "skips": skips}
        document |= {name: part for name, part in more.items() if part}
        groups = {label: _plain_group(label, one.get("group", {})) for label, one in stored.items()}
        groups = {label: group for label, group in groups.items() if group}
        checkpoint.write(filename, document, {"param_groups": groups} if groups else None)

    def load(self, filename: Source, map_location: Any = None) -> None:
        """Load a file that ``save`` wrote, or a Pyro checkpoint, which is read without pickle.

        A file of ``multiopt.Optimizer.save`` may have master copies, and averages that are kept
        nowhere here. They are left out, with a warning.

        Args:
            filename: The file; or a binary file object that can be sought, from where it is.
            map_location: For a Pyro checkpoint, as in ``torch.load``; by default its tensors come
                by way of the CPU. State goes to its parameter's device in any case.

        Raises:
            CheckpointError: The file is damaged or neither; nothing has changed.
            OSError: The file cannot be read.
        """
        if not is_safetensors(filename):
            self.set_state(read(filename, map_location))
            return
        contents = checkpoint.read(filename)
        contents.check_whole(filename)
        document = dict(contents.state_dict)
        parts = {**document["pending"], **document["entries"]}
        loaded = {label: _in_parts(stored) for label, stored in parts.items()}
        if self._more.get("average") is not None:
            for part in ("pending_averages", "averages"):
                for label, stored in document.pop(part, {}).items():
                    loaded[label]["average"] = _in_parts(stored)
        for label, counts in document.pop("skips", {}).items():
            if label in loaded:
                loaded[label]["skips"] = counts
        for label, group in _groups_of(contents.metadata).items():
            if label in loaded:
                loaded[label]["group"] = group
        leave_out(document, loaded, stacklevel=3)
        if isinstance(self.pt_optim_args, dict):
            warn_of_plateaus(dict.fromkeys(loaded, self._rule(self.pt_optim_args)))
        self._wait(loaded, document.get("steps"))

    def _stored(self) -> dict[str, dict[str, Any]]:
        """The state by label as a state dict has it: of tensors that have a name, and waiting."""
        self._core.check_whole("the state of the optimizer")
        self._forget_abandoned()
        self._follow_if_free()
        found = {}
        in_store = [
            (label, self._tensors.get(tensor))
            for label, tensor in pyro.get_param_store().named_parameters()
        ]
        in_modules = self._names.current()
        named_by_modules = [
            (in_modules.get(id(tracked.tensor)), tracked) for tracked in self._tensors
        ]
        for label, tracked in (*named_by_modules, *in_store):
            if label is not None and tracked is not None:
                found[label] = self._describe(tracked)
        return {**found, **self._state_waiting_to_be_consumed}

    def _stored_or_warn(self) -> dict[str, dict[str, Any]]:
        stored = self._stored()
        name = self._names_now()
        unnamed = sum(name(tracked.alive) is None for tracked in self._tensors)
        if unnamed:
            warnings.warn(
                f"{unnamed} tensors are in no param store and in no known module; their state is "
                "not saved",
                stacklevel=3,
            )
        return stored

    def _describe(self, tracked: Tracked) -> dict[str, Any]:
        """The state of a tensor as a state dict has it, its slots NumPy arrays, and more."""
        entry = self._core.entry(tracked.key)
        to_host, steps = named(entry.layout.library).to_host, self._core.steps
        stored = described(entry, to_host, steps)
        stored["complex"] = entry.layout.is_complex
        stored["given"], stored["group"] = deepcopy((tracked.given, tracked.extra))
        if (average := self._core.average_entry(tracked.key)) is not None:
            stored["average"] = described(average, to_host, steps)
        if (skips := self._core.skips.get(tracked.key)) is not None:
            stored["skips"] = tuple(skips)
        return stored

    # What users of ``optim_objs`` reach

    @property  # type: ignore[override]  # a dict in Pyro
    def optim_objs(self) -> OptimObjs:
        """By live tensor what stands for the torch optimizer that Pyro has there."""
        self._forget_abandoned()
        return OptimObjs(self)

    @optim_objs.setter
    def optim_objs(self, objects: Mapping[torch.Tensor, Any]) -> None:
        if objects:
            raise TypeError("optim_objs can be emptied by assigning {}, not filled")
        self.optim_objs.clear()

    def _object(self, tracked: Tracked) -> Any:
        """What ``optim_objs`` has for a tensor."""
        return self._view(tracked)

    def _view(self, tracked: Tracked) -> TensorOptimizer:
        if tracked.view is None:
            tracked.view = TensorOptimizer(self, tracked)
        view: TensorOptimizer = tracked.view
        return view


def _in_parts(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Loaded state with the parts of complex slots, and the word that they are."""
    slots = stored["slots"]
    is_complex = any(map(np.iscomplexobj, slots.values()))
    return {**stored, "slots": in_parts(slots), "complex": is_complex}


def _plain_group(label: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """What a file can hold of the keys that schedulers and users have put into a group."""
    kept = {}
    for name, value in group.items():
        try:
            describe_metadata({name: value})
        except ValueError:
            warnings.warn(
                f"left out {name!r} in the param_groups of {label!r}, a {type(value).__name__}: a "
                "file holds numbers, strings, lists and mappings of them",
                stacklevel=4,
            )
        else:
            kept[name] = value
    return kept


def _groups_of(metadata: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The groups in the metadata of a file, which may be somebody else's."""
    groups = metadata.get("param_groups")
    known = groups if isinstance(groups, dict) else {}
    return {label: group for label, group in known.items() if isinstance(group, dict)}
