"""``PyroOptim``, and the one whose parameters multiopt steps.

It is keyed by tensor, as Pyro is: one entry for each live tensor, weakly held, labelled with the
tensor's name in the param store.
"""

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping
from dataclasses import fields, replace
from functools import cache, lru_cache, partial
from inspect import Parameter, signature
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.optim
import torch
from pyro.optim import adagrad_rmsprop, clipped_adam, dct_adam
from pyro.params.param_store import (
    module_from_param_with_module_name,
    normalize_param_name,
    user_param_name,
)
from torch.utils.weak import WeakTensorKeyDictionary

from multiopt import checkpoint, rules
from multiopt.adapters.pyro.dct import OF_TENSORS, marked
from multiopt.adapters.pyro.objects import OptimObjs, TensorOptimizer
from multiopt.adapters.torch_state import (
    from_plain,
    group_settings,
    is_safetensors,
    leave_out,
    number,
    parameter_from_torch,
    parameter_to_torch,
    parameters_from_torch,
    plain_settings,
    read,
    refuse_subsamples,
    rule_settings,
)
from multiopt.backend import Layout, identities, named
from multiopt.clipping import Clip
from multiopt.entry import (
    Entry,
    check_slot_names,
    described,
    described_rule,
    in_parts,
    new_entry,
    restored,
    restored_plateaus,
    with_rule,
)
from multiopt.errors import CheckpointError
from multiopt.exclusive import check_free, exclusive
from multiopt.file_objects import Source, Target
from multiopt.interruption import uninterrupted
from multiopt.optimizer import Optimizer
from multiopt.plateaus import warn_of_plateaus
from multiopt.rules import Rule
from multiopt.rules.rule import is_schedule
from multiopt.step import Step

__all__ = ["CONSTRUCTORS", "RULES", "JointOptim", "PyroOptim", "Settings", "has_rule"]

#: Settings of a dict, or a callable that gives them for a name, or for a module and a name.
Settings = dict[str, Any] | Callable[..., dict[str, Any]]

#: The torch optimizers that a name of ``pyro.optim`` stands for. LBFGS is not for SVI, says Pyro.
CONSTRUCTORS: dict[str, type[torch.optim.Optimizer]] = {
    name: value
    for name, value in vars(torch.optim).items()
    if isinstance(value, type)
    and issubclass(value, torch.optim.Optimizer)
    and value not in (torch.optim.Optimizer, torch.optim.LBFGS)
} | {
    "AdagradRMSProp": adagrad_rmsprop.AdagradRMSProp,
    "ClippedAdam": clipped_adam.ClippedAdam,
    "DCTAdam": dct_adam.DCTAdam,
}

#: The rules of multiopt, by the torch optimizer whose arguments and state they take.
RULES: dict[Any, type[Rule]] = {
    constructor: getattr(rules, name)
    for name, constructor in CONSTRUCTORS.items()
    if hasattr(rules, name)
}


def has_rule(optim_constructor: Any, optim_args: Settings) -> bool:
    """Whether multiopt has a rule for a torch optimizer with these arguments."""
    aware = isinstance(optim_args, dict) and optim_args.get("subsample_aware")
    return optim_constructor in RULES and not aware


#: Arguments of torch's optimizers about how they run, not about what they compute.
EXECUTION = ("capturable", "foreach", "fused")


class PyroOptim(pyro.optim.PyroOptim):
    """``pyro.optim.PyroOptim``: parameters that may appear at any time, each with its settings.

    Of a torch optimizer that multiopt has a rule for, it makes a ``JointOptim``. Any other is
    Pyro's affair: a torch optimizer for each parameter.

    Args:
        optim_constructor: The class of a torch optimizer.
        optim_args: Its arguments, or a callable that gives them for a parameter name (dotted, as in
            ``nn.Module.named_parameters``).
        clip_args: ``clip_norm`` and ``clip_value``, or a callable that gives them likewise.
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
        self, optim_constructor: Any, optim_args: Settings, clip_args: Settings | None = None
    ) -> None:
        """As in Pyro, saying what is slow."""
        if not has_rule(optim_constructor, optim_args):
            name = getattr(optim_constructor, "__name__", repr(optim_constructor))
            _say_wrapped(f"{name} with subsample_aware" if optim_constructor in RULES else name)
        super().__init__(optim_constructor, optim_args, clip_args)


@cache
def _say_wrapped(what: str) -> None:
    warnings.warn(
        f"multiopt has no rule for {what}: Pyro steps its parameters one by one, by torch",
        stacklevel=3,
    )


class _Tracked(NamedTuple):
    """How a live tensor is known.

    Attributes:
        key: In the core: the label, made unique.
        label: In the param store, at first sight; None if it was in none.
    """

    key: str
    label: str | None


class _Core(Optimizer):
    """The registry of a host that brings its names in and expects clipped gradients."""

    _leave_clipped = True

    def _after(self, step: Step) -> None:
        for task, grad in step.left_over:
            clipped = named("torch").closed(grad, task.param).to(task.grad.dtype)
            if 0 in task.grad.stride():
                # Expanded by a backward with create_graph=True: no place for each element.
                task.param.grad = clipped
            else:
                task.grad.detach().copy_(clipped)

    def step_tensors(self, names: list[str], tensors: np.ndarray) -> None:
        """``step`` of tensors that have names already, by their own gradients."""
        before = self._outcome
        try:
            self._changing = True
            self._advance(names, tensors, None, [])
            self._changing = False
        except BaseException as error:
            self._changing = False
            with uninterrupted():
                self._explain(error, before)
            raise

    def enter(self, name: str, rule: Rule, clip: Clip | None, layout: Layout) -> None:
        """Take a name in before its first step."""
        self._entries = {**self._entries, name: new_entry(name, rule, clip, layout)}

    def entry(self, name: str) -> Entry:
        """What is held for a name."""
        return self._entries[name]

    def change_rules(self, rules: Mapping[str, Rule]) -> None:
        """Change the rules of some names."""
        entries = self._entries
        self._entries = entries | {n: with_rule(n, entries[n], rule) for n, rule in rules.items()}

    @property
    def rules(self) -> set[Rule]:
        """Those of all names."""
        return {entry.rule for entry in self._entries.values()}

    def resume(self, steps: int) -> None:
        """Go on counting the steps of the optimizer from a number."""
        self._steps = steps

    def restore(self, states: Mapping[str, tuple[Mapping[str, Any], Rule]]) -> None:
        """Give names loaded state and the rules that came with it.

        Raises:
            ValueError: A state does not fit; nothing has changed.
        """
        entries = self._entries
        self._entries = entries | {
            name: restored(name, stored, rule, entries[name].clip, entries[name].layout)
            for name, (stored, rule) in states.items()
        }


class JointOptim(PyroOptim):
    """A ``PyroOptim`` whose parameters are stepped together by multiopt.

    A copy, or one that was pickled, has the settings and the state that ``get_state`` lists, which
    waits there for the next tensor presented under each name.
    """

    def __init__(
        self, optim_constructor: Any, optim_args: Settings, clip_args: Settings | None = None
    ) -> None:
        """Check the arguments; see ``PyroOptim``.

        Raises:
            TypeError: An argument is neither a dict nor a callable, or has an unknown key.
            ValueError: A setting is out of range.
        """
        # The names under which Pyro's Horovod wrapper and users' code look for them.
        self.pt_optim_constructor = self._constructor = optim_constructor
        self.pt_optim_args = optim_args
        self.pt_clip_args = {} if clip_args is None else clip_args
        # Loaded state by label, for the next tensor that is presented under it.
        self._state_waiting_to_be_consumed: dict[str, dict[str, Any]] = {}
        self._rule_class = RULES[optim_constructor]
        self._rules: dict[Rule, Rule] = {}
        # Of rules without schedules, in torch's terms: the settings, and the rule with one of them
        # changed. Most parameters are alike.
        self._read = lru_cache(SHARED)(partial(_settings_now, optim_constructor))
        self._write = lru_cache(SHARED, typed=True)(partial(_with_setting, optim_constructor))
        # Whether a call has begun that has not ended.
        self._changing = False
        # New rules by key, while they are collected.
        self._changes: dict[str, Rule] = {}
        self._collects = False
        # By tensor, weakly: an entry goes when its tensor does.
        self._tracked: MutableMapping[torch.Tensor, _Tracked] = WeakTensorKeyDictionary()
        self._stand_ins: MutableMapping[torch.Tensor, TensorOptimizer] = WeakTensorKeyDictionary()
        # Of the last call: which objects the tensors are, the order in which they are stepped, and
        # their keys in it. A number stands for the same tensor as long as no tensor has died.
        self._ids = b""
        self._order = np.empty(0, np.intp)
        self._keys: list[str] = []
        self._unnamed = 0
        self._core = _Core(self._rule_class())
        for what, settings in (("optim_args", optim_args), ("clip_args", self.pt_clip_args)):
            if not isinstance(settings, dict) and not callable(settings):
                raise TypeError(f"{what} must be a dict or a callable; got {settings!r}")
        if isinstance(self.pt_optim_args, dict):
            self._make_rule(self.pt_optim_args)
        if isinstance(self.pt_clip_args, dict):
            _make_clip(self.pt_clip_args)

    @exclusive
    def __call__(self, params: Iterable[torch.Tensor]) -> None:
        """Update tensors in place by their ``.grad``; those without one are left alone.

        Args:
            params: Leaf tensors in any order, such as the set that ``SVI`` passes.

        Raises:
            ValueError: A tensor is no leaf, loaded state does not fit its tensor, and others that
                ``Optimizer.step`` raises; nothing has changed.
        """
        self._forget_dead()
        params = params if isinstance(params, Collection) else list(params)
        tensors = np.fromiter(params, object, len(params))
        if identities(tensors) != self._ids:
            self._ids = b""
            places = {self._track(tensor).key: i for i, tensor in enumerate(tensors)}
            # A set has them in no order. In that of their addresses a step of 1000 that finds its
            # caches filled by other work takes 0.75 ms instead of 1.
            self._keys = sorted(places, key=lambda key: id(tensors[places[key]]))
            self._order = np.array([places[key] for key in self._keys], np.intp)
            self._ids = identities(tensors)
        tensors = tensors[self._order]
        if self._state_waiting_to_be_consumed:
            self._settle(tensors)
        try:
            self._core.step_tensors(self._keys, tensors)
        except (TypeError, ValueError) as error:
            said = REMEDY.sub("del optim_objs[tensor] to start anew", str(error))
            if said != str(error):
                raise type(error)(said) from None
            raise

    def __getstate__(self) -> dict[str, Any]:
        """The settings, and the state by name."""
        return {
            "arguments": self._arguments(),
            "waiting": self._stored_or_warn(),
            "steps": self._core.steps,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin with the settings, all state waiting."""
        type(self).__init__(self, *state["arguments"])
        self._state_waiting_to_be_consumed = state["waiting"]
        self._core.resume(state["steps"])

    def _arguments(self) -> tuple[Any, ...]:
        return self._constructor, self.pt_optim_args, self.pt_clip_args

    # Tensors

    def _track(self, tensor: torch.Tensor) -> _Tracked:
        """How a tensor is known; at first sight its settings are asked for."""
        tracked = self._tracked.get(tensor)
        if tracked is None:
            label = pyro.get_param_store().param_name(tensor)
            rule = marked(self._make_rule(self._settings("optim_args", tensor, label)), tensor)
            rule = self._rules.setdefault(rule, rule)
            clip = _make_clip(self._settings("clip_args", tensor, label))
            if isinstance(rule, rules.ClippedAdam | rules.DCTAdam):
                # Once more what the rule does, for the gradient that Pyro leaves behind is clipped.
                assert not callable(rule.clip_norm)
                clip = clip or Clip()
                value = rule.clip_norm if clip.value is None else min(clip.value, rule.clip_norm)
                clip = replace(clip, value=value)
            key = self._unused_key(label)
            layout = named("torch").layout(tensor, f"parameter {key!r}")
            self._core.enter(key, rule, clip, layout)
            tracked = self._tracked[tensor] = _Tracked(key, label)
        return tracked

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
                "no param store and has none; pass a dict"
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
            raise TypeError(f"{what} gave {given!r} for parameter {label!r}; expected a dict")
        return given

    def _make_rule(self, settings: Mapping[str, Any]) -> Rule:
        given = plain_settings(settings)
        if given.pop("differentiable", False):
            raise ValueError(
                "differentiable=True: the update is not part of an autograd graph here; "
                "use torch.optim"
            )
        for name in EXECUTION:
            given.pop(name, None)
        if self._rule_class is rules.DCTAdam:
            refuse_subsamples(given)
            given.pop("subsample_aware", None)
        rule_class = self._rule_class
        if rule_class is rules.Adam and given.pop("decoupled_weight_decay", False):
            rule_class = rules.AdamW
        rule = rule_class(**given)
        # One object for equal rules: the core computes the numbers of a step once for each.
        return self._rules.setdefault(rule, rule)

    def _drop_dead(self) -> None:
        """Forget the entries of tensors that are gone, but not in the middle of a call."""
        if not self._changing:
            self._forget_dead()

    def _forget_dead(self) -> None:
        if len(self._core) > len(self._tracked):
            self._ids = b""
            live = {tracked.key for tracked in self._tracked.values()}
            for key in self._core.names:
                if key not in live:
                    self._core.forget(key)

    # Loaded state

    def _settle(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give tensors the loaded state that waits under their names, all of them or none."""
        waiting = self._state_waiting_to_be_consumed
        if not waiting:
            return
        store = pyro.get_param_store()
        in_store = dict(store.named_parameters())
        takers: dict[str, torch.Tensor] = {}
        for tensor in tensors:
            label = store.param_name(tensor) or self._tracked[tensor].label
            # Of two tensors of one name, the one in the store takes it.
            if label in waiting and (label not in takers or in_store.get(label) is tensor):
                takers[label] = tensor
        self._take([(tensor, waiting[label]) for label, tensor in takers.items()])
        for label in takers:
            waiting.pop(label, None)

    def _take(self, loaded: Collection[tuple[torch.Tensor, Mapping[str, Any]]]) -> None:
        """Give tensors loaded state, all of them or none."""
        states = {}
        for tensor, stored in loaded:
            key = self._tracked[tensor].key
            entry = self._core.entry(key)
            dtype = entry.layout.compute_dtype
            slots = {k: array.astype(dtype) for k, array in stored["slots"].items()}
            rule = _restored_rule(stored["rule"], entry.rule)
            states[key] = {**stored, "slots": slots}, self._rules.setdefault(rule, rule)
        try:
            self._core.restore(states)
        except ValueError as error:
            remedy = "del optim_objs[tensor] to start anew without it"
            raise ValueError(REMEDY.sub(remedy, str(error))) from None
        for stored, rule in states.values():
            restored_plateaus(rule, stored["rule"], ahead=True)
        for tensor, stored in loaded:
            self._restore_beside(tensor, stored)

    def _load(self, tensor: torch.Tensor, state: Mapping[str, Any]) -> None:
        """Load the state of one tensor in torch's format.

        Raises:
            CheckpointError: It has another form.
            ValueError: It does not fit; nothing has changed.
        """
        check_free(self, "loading")
        key = self._tracked[tensor].key
        self._take([(tensor, parameter_from_torch(key, self._rule_class, state))])

    def _restore_beside(self, tensor: torch.Tensor, stored: Mapping[str, Any]) -> None:
        """Give a tensor what was loaded beside its entry."""
        if stored.get("group"):
            self._stand_in(tensor).group.extra.update(stored["group"])

    def get_state(self) -> dict[str, Any]:
        """The state by parameter name, in Pyro's format, loaded state that waits included.

        It lists the tensors that are in the param store now.
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
        check_free(self, "loading")
        if isinstance(self.pt_optim_args, dict):
            rule = self._make_rule(self.pt_optim_args)
            for label, stored in loaded.items():
                try:
                    check_slot_names(label, stored, _restored_rule(stored["rule"], rule))
                except (ValueError, TypeError) as error:
                    remedy = "load it into the optimizer that was saved"
                    raise CheckpointError(REMEDY.sub(remedy, str(error))) from None
            for stored in loaded.values():
                restored_plateaus(rule, stored["rule"])
        self._state_waiting_to_be_consumed.update(loaded)
        clocks = [stored["step"] for stored in self._state_waiting_to_be_consumed.values()]
        self._core.resume(max(clocks, default=0) if steps is None else steps)

    def save(self, filename: Target) -> None:
        """Write the state to a file that ``load`` and ``multiopt.Optimizer.load`` read.

        It holds what ``get_state`` lists. Tensors that are in no param store have no name to be
        saved under; a warning says how many there are. The file may be a binary file object.
        """
        entries = {
            label: {part: stored.get(part) for part in ("rule", "step", "slots", "complex")}
            for label, stored in self._stored_or_warn().items()
        }
        warn_of_plateaus({key: self._core.entry(key).rule for key in self._core})
        state = {"version": checkpoint.VERSION, "steps": self._core.steps}
        checkpoint.write(filename, {**state, "entries": entries, "pending": {}})

    def load(self, filename: Source, map_location: Any = None) -> None:
        """Load a file that ``save`` wrote, or a Pyro checkpoint, which is read without pickle.

        A file of ``multiopt.Optimizer.save`` may have averages, master copies and counts of skips.
        They are left out, with a warning.

        Args:
            filename: The file; or a binary file object that can be sought, from where it is.
            map_location: For a Pyro checkpoint, as in ``torch.load``; by default its tensors come
                by way of the CPU. State goes to its parameter's device in any case.

        Raises:
            CheckpointError: The file is damaged or neither; nothing has changed.
            OSError: The file cannot be read.
        """
        if is_safetensors(filename):
            contents = checkpoint.read(filename)
            contents.check_whole(filename)
            document = contents.state_dict
            parts = {**document["pending"], **document["entries"]}
            loaded = {label: _in_parts(stored) for label, stored in parts.items()}
            leave_out(document, loaded, stacklevel=3)
            if isinstance(self.pt_optim_args, dict):
                warn_of_plateaus(dict.fromkeys(loaded, self._make_rule(self.pt_optim_args)))
            self._wait(loaded, document.get("steps"))
        else:
            self.set_state(read(filename, map_location))

    def _stored(self) -> dict[str, dict[str, Any]]:
        """The state by label as a state dict has it: of the tensors in the store, and waiting."""
        self._drop_dead()
        stored = {}
        for label, tensor in pyro.get_param_store().named_parameters():
            if tensor in self._tracked:
                stored[label] = self._describe(tensor)
        return {**stored, **self._state_waiting_to_be_consumed}

    def _stored_or_warn(self) -> dict[str, dict[str, Any]]:
        param_name = pyro.get_param_store().param_name
        unnamed = sum(param_name(tensor) is None for tensor in self._tracked)
        if unnamed:
            warnings.warn(
                f"{unnamed} tensors are in no param store; their state is not saved", stacklevel=3
            )
        return self._stored()

    # What users of ``optim_objs`` reach

    @property  # type: ignore[override]  # a dict in Pyro
    def optim_objs(self) -> OptimObjs:
        """By live tensor what stands for the torch optimizer that Pyro has there."""
        self._drop_dead()
        return OptimObjs(self)

    @optim_objs.setter
    def optim_objs(self, objects: Mapping[torch.Tensor, Any]) -> None:
        if objects:
            raise TypeError("optim_objs can be emptied by assigning {}, not filled")
        self.optim_objs.clear()

    def _object(self, tensor: torch.Tensor) -> Any:
        """What ``optim_objs`` has for a tensor."""
        return self._stand_in(tensor)

    def _stand_in(self, tensor: torch.Tensor) -> TensorOptimizer:
        if tensor not in self._stand_ins:
            self._stand_ins[tensor] = TensorOptimizer(self, tensor)
        return self._stand_ins[tensor]

    def _describe(self, tensor: torch.Tensor) -> dict[str, Any]:
        """The state of a tensor as a state dict has it, its slots NumPy arrays, and more."""
        entry = self._core.entry(self._tracked[tensor].key)
        stored = described(entry, named(entry.layout.library).to_host, self._core.steps)
        stand_in = self._stand_ins.get(tensor)
        extra = {} if stand_in is None else dict(stand_in.group.extra)
        return {**stored, "complex": entry.layout.is_complex, "group": extra}

    def _group(self, tensor: torch.Tensor) -> Mapping[str, Any]:
        """The settings of a tensor as they are now, in torch's terms; not to be changed."""
        key = self._tracked[tensor].key
        entry = self._core.entry(key)
        rule = self._changes.get(key, entry.rule)
        if _has_schedule(rule):
            now = described_rule(rule, entry.step, self._core.steps)
            return group_settings(self._constructor, now, entry.step)
        return self._read(rule, entry.step)

    def _change(self, tensor: torch.Tensor, name: str, value: Any) -> None:
        """Change one setting of a tensor, in torch's terms."""
        # Schedulers change settings when they are made, in the middle of a call.
        check_free(self._core, f"changing {name!r}")
        key = self._tracked[tensor].key
        entry = self._core.entry(key)
        rule = self._changes.get(key, entry.rule)
        if _has_schedule(rule):
            rule = _with_setting(self._constructor, rule, entry.step, name, number(value))
        else:
            rule = self._write(rule, entry.step, name, number(value))
        self._changes[key] = self._rules.setdefault(rule, rule)
        if not self._collects:
            self._take_changes()

    def _take_changes(self) -> None:
        """Give the tensors their new rules."""
        self._collects = False
        changes, self._changes = self._changes, {}
        if changes:
            self._core.change_rules(changes)
            if len(self._rules) > SHARED + 2 * len(self._core):
                self._rules = {rule: rule for rule in self._core.rules}

    def _start_anew(self, tensor: torch.Tensor) -> None:
        """Forget a tensor, with loaded state that waits for it and does not fit it.

        What fits waits on, as in Pyro, where only new tensors take it.
        """
        check_free(self, "deleting a tensor")
        label = pyro.get_param_store().param_name(tensor) or self._tracked[tensor].label
        waiting = dict(self._state_waiting_to_be_consumed)
        try:
            self._settle([tensor])
        except (ValueError, TypeError):
            waiting = {name: stored for name, stored in waiting.items() if name != label}
        self._state_waiting_to_be_consumed = waiting
        self._forget(tensor)

    def _forget(self, tensor: torch.Tensor) -> None:
        """Drop the entry of a tensor; presented again, it starts anew."""
        self._ids = b""
        self._stand_ins.pop(tensor, None)
        self._core.forget(self._tracked.pop(tensor).key)


#: What messages of the core say to do about state that does not fit; here there is other help.
REMEDY = re.compile(
    r"forget the name to start anew$"
    r"|load with the rule that was saved, step, then assign opt\.rule$"
)

#: How many different settings are remembered.
SHARED = 64


def _has_schedule(rule: Rule) -> bool:
    return any(is_schedule(getattr(rule, name)) for name in rule.ranges)


def _settings_now(constructor: Any, rule: Rule, step: int) -> dict[str, Any]:
    return group_settings(constructor, described_rule(rule, step), step)


def _with_setting(constructor: Any, rule: Rule, step: int, name: str, value: Any) -> Rule:
    """A rule with one setting changed, in torch's terms, after a step."""
    before = _settings_now(constructor, rule, step)
    old = rule_settings(before, step)
    new = rule_settings({**before, name: value}, step)
    known = {f.name for f in fields(rule)}
    changed = {k: v for k, v in new.items() if k in known and (k == name or v != old[k])}
    return replace(rule, **changed)


def _restored_rule(stored: Mapping[str, Any], rule: Rule) -> Rule:
    """A rule with the hyperparameters of loaded state, as Pyro restores them.

    A schedule stays: a file knows only the number it gave.

    Args:
        stored: The description of a rule in a state dict.
        rule: The rule that the settings here ask for.
    """
    rule_class = type(rule)
    if isinstance(rule, rules.Adam) and stored["name"] in ("Adam", "AdamW"):
        # In torch AdamW is Adam with a switch on: Adam loads the switch, AdamW leaves it on.
        rule_class = rules.AdamW if "AdamW" in (stored["name"], rule_class.__name__) else rules.Adam
    elif stored["name"] != rule_class.__name__:
        return rule
    values = {f.name: getattr(rule, f.name) for f in fields(rule)}
    for name, value in values.items():
        if name in stored and name not in OF_TENSORS and not is_schedule(value):
            values[name] = from_plain(stored[name])
    return rule_class(**values)


def _in_parts(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Loaded state with the parts of complex slots, and the word that they are."""
    slots = stored["slots"]
    is_complex = any(map(np.iscomplexobj, slots.values()))
    return {**stored, "slots": in_parts(slots), "complex": is_complex}


def _make_clip(settings: Mapping[str, Any]) -> Clip | None:
    unknown = set(settings) - {"clip_norm", "clip_value"}
    if unknown:
        raise TypeError(f"clip_args has {sorted(unknown)}; expected clip_norm and clip_value")
    norm, value = (number(settings.get(name)) for name in ("clip_norm", "clip_value"))
    return None if norm is None and value is None else Clip(norm=norm, value=value)
