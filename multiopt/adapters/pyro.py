"""A drop-in for ``pyro.optim``: ``import multiopt.adapters.pyro as optim``.

Calls, arguments and results are Pyro's; ``docs/pyro.md`` lists where the drop-in differs on
purpose. It is keyed by tensor, as Pyro is: one entry for each live tensor, weakly held, labelled
with the tensor's name in the param store.
"""

import inspect
import pickle
import warnings
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from pyro.optim.clipped_adam import ClippedAdam as TorchClippedAdam
from pyro.params.param_store import (
    module_from_param_with_module_name,
    normalize_param_name,
    user_param_name,
)
from torch.utils.weak import WeakTensorKeyDictionary

from multiopt import checkpoint, rules
from multiopt.adapters.torch_state import from_plain, from_torch, number, to_torch
from multiopt.backend import Array, Layout, Task, named
from multiopt.clipping import Clip
from multiopt.entry import described, described_rule, restored, with_rule
from multiopt.errors import CheckpointError
from multiopt.optimizer import Optimizer
from multiopt.rules import Rule
from multiopt.rules.arithmetic import power

__all__ = ["SGD", "Adam", "AdamW", "ClippedAdam", "PyroOptim"]

#: Settings of a dict, or a callable that gives them for a name, or for a module and a name.
Settings = dict[str, Any] | Callable[..., dict[str, Any]]

#: Arguments of torch's optimizers about how they run, not about what they compute.
EXECUTION = ("capturable", "foreach", "fused")


def SGD(optim_args: Settings, clip_args: Settings | None = None) -> PyroOptim:  # noqa: N802
    """``pyro.optim.SGD``: see ``multiopt.SGD``.

    Args:
        optim_args: Arguments of ``torch.optim.SGD``, or a callable that gives them for a parameter
            name (dotted, as in ``nn.Module.named_parameters``).
        clip_args: ``clip_norm`` and ``clip_value``, or a callable that gives them likewise.
    """
    return _PyroOptimizer(rules.SGD, torch.optim.SGD, optim_args, clip_args)


def Adam(optim_args: Settings, clip_args: Settings | None = None) -> PyroOptim:  # noqa: N802
    """``pyro.optim.Adam``: see ``multiopt.Adam``.

    Args:
        optim_args: Arguments of ``torch.optim.Adam``, or a callable that gives them for a
            parameter name (dotted, as in ``nn.Module.named_parameters``).
        clip_args: ``clip_norm`` and ``clip_value``, or a callable that gives them likewise.

    >>> import pyro, torch
    >>> import multiopt.adapters.pyro as optim
    >>> adam = optim.Adam({"lr": 0.5}, {"clip_norm": 10.0})
    >>> loc = torch.zeros(2, requires_grad=True)
    >>> (loc - 3).square().sum().backward()
    >>> adam({loc})
    >>> loc.detach().numpy().round(4).tolist()
    [0.5, 0.5]
    """
    return _PyroOptimizer(rules.Adam, torch.optim.Adam, optim_args, clip_args)


def AdamW(optim_args: Settings, clip_args: Settings | None = None) -> PyroOptim:  # noqa: N802
    """``pyro.optim.AdamW``: see ``multiopt.AdamW``.

    Args:
        optim_args: Arguments of ``torch.optim.AdamW``, or a callable that gives them for a
            parameter name (dotted, as in ``nn.Module.named_parameters``).
        clip_args: ``clip_norm`` and ``clip_value``, or a callable that gives them likewise.
    """
    return _PyroOptimizer(rules.AdamW, torch.optim.AdamW, optim_args, clip_args)


def ClippedAdam(optim_args: Settings) -> PyroOptim:  # noqa: N802
    """``pyro.optim.ClippedAdam``: see ``multiopt.ClippedAdam``.

    Args:
        optim_args: Arguments of Pyro's ``ClippedAdam``, or a callable that gives them for a
            parameter name (dotted, as in ``nn.Module.named_parameters``).
    """
    return _PyroOptimizer(rules.ClippedAdam, TorchClippedAdam, optim_args, None)


@dataclass
class _Tracked:
    """What is known of a live tensor.

    Attributes:
        key: Its name in the core: the label, made unique.
        label: Its name in the param store at first sight, or None.
        rule: Its rule.
        clip: Its clip.
    """

    key: str
    label: str | None
    rule: Rule
    clip: Clip | None


class _Core(Optimizer):
    """The registry of a host that names its tensors itself and expects clipped gradients."""

    def _after_clipping(self, task: Task, grad: Array) -> None:
        if task.bound is not None or any(scale != 1 for scale in task.scales):
            clipped = named("torch").closed(grad, task.param)
            task.param.grad = clipped.to(task.grad.dtype)

    def change_rule(self, name: str, rule: Rule) -> None:
        """Change the rule of one name."""
        if name in self._entries:
            self._entries[name] = with_rule(self._entries[name], rule)

    def adopt(self, states: Iterable[tuple[_Tracked, Mapping[str, Any], Rule, Layout]]) -> None:
        """Give tensors loaded state, whether they have been stepped or not.

        Raises:
            ValueError: A state does not fit; nothing has changed.
        """
        self._entries.update(
            {
                tracked.key: restored(tracked.key, stored, rule, tracked.clip, layout)
                for tracked, stored, rule, layout in states
            }
        )

    def described(self, name: str) -> dict[str, Any]:
        """The state of one name as a state dict has it, its slots NumPy arrays."""
        entry = self._entries[name]
        return described(entry, named(entry.layout.library).to_host)


class _PyroOptimizer(PyroOptim):
    """A ``PyroOptim`` whose parameters are stepped together by multiopt."""

    def __init__(
        self,
        rule_class: type[Rule],
        constructor: type[torch.optim.Optimizer],
        optim_args: Settings,
        clip_args: Settings | None,
    ) -> None:
        """Check the arguments; see ``Adam``.

        Raises:
            TypeError: An argument is neither a dict nor a callable, or has an unknown key.
            ValueError: A setting is out of range.
        """
        # The names under which Pyro's Horovod wrapper and users' tests look for them.
        self.pt_optim_constructor = self._constructor = constructor
        self.pt_optim_args = optim_args
        self.pt_clip_args = {} if clip_args is None else clip_args
        self._rule_class = rule_class
        # By tensor, weakly: an entry goes when its tensor does.
        self._tracked: MutableMapping[torch.Tensor, _Tracked] = WeakTensorKeyDictionary()
        self._by_key: dict[str, _Tracked] = {}
        # Loaded state by label, for the next tensor that is presented under it.
        self._pending: dict[str, dict[str, Any]] = {}
        self._core = _Core(lambda key: self._by_key[key].rule, lambda key: self._by_key[key].clip)
        for what, settings in (("optim_args", optim_args), ("clip_args", self.pt_clip_args)):
            if not isinstance(settings, dict) and not callable(settings):
                raise TypeError(f"{what} must be a dict or a callable; got {settings!r}")
        if isinstance(self.pt_optim_args, dict):
            self._make_rule(self.pt_optim_args)
        if isinstance(self.pt_clip_args, dict):
            _make_clip(self.pt_clip_args)

    def __call__(self, params: Iterable[torch.Tensor]) -> None:
        """Update tensors in place by their ``.grad``; those without one are left alone.

        Args:
            params: Leaf tensors in any order, such as the set that ``SVI`` passes.

        Raises:
            ValueError: Loaded state does not fit its tensor, and others that ``Optimizer.step``
                raises; nothing has changed.
        """
        self._drop_dead()
        tensors = {self._track(tensor).key: tensor for tensor in params}
        if self._pending:
            self._settle(tensors)
        self._core.step(tensors, {key: tensor.grad for key, tensor in tensors.items()})

    # Tensors

    def _track(self, tensor: torch.Tensor) -> _Tracked:
        """What is known of a tensor; at first sight its settings are asked for."""
        tracked = self._tracked.get(tensor)
        if tracked is None:
            label = pyro.get_param_store().param_name(tensor)
            rule = self._make_rule(self._settings(self.pt_optim_args, "optim_args", tensor, label))
            clip = _make_clip(self._settings(self.pt_clip_args, "clip_args", tensor, label))
            if isinstance(rule, rules.ClippedAdam):
                # Once more what the rule does, for the gradient that Pyro leaves behind is clipped.
                assert not callable(rule.clip_norm)
                clip = Clip(value=rule.clip_norm)
            tracked = _Tracked(self._unused_key(label), label, rule, clip)
            self._tracked[tensor] = self._by_key[tracked.key] = tracked
        return tracked

    def _unused_key(self, label: str | None) -> str:
        """A name for the core that says in messages which parameter is meant."""
        key = base = "unnamed tensor" if label is None else label
        number = 1
        while key in self._by_key:
            number += 1
            key = f"{base} ({number})"
        return key

    def _settings(
        self, settings: Settings, what: str, tensor: torch.Tensor, label: str | None
    ) -> dict[str, Any]:
        if isinstance(settings, dict):
            return settings
        if label is None:
            raise ValueError(
                f"{what} is a callable of names, but a tensor of shape {tuple(tensor.shape)} is in "
                "no param store and has none; pass a dict"
            )
        if len(inspect.signature(settings).parameters) == 1:
            chosen_settings = settings(normalize_param_name(label))
        else:
            chosen_settings = settings(
                module_from_param_with_module_name(label), user_param_name(label)
            )
        if not isinstance(chosen_settings, dict):
            raise TypeError(
                f"{what} gave {chosen_settings!r} for parameter {label!r}; expected a dict"
            )
        return chosen_settings

    def _make_rule(self, settings: Mapping[str, Any]) -> Rule:
        given = {name: number(value) for name, value in settings.items()}
        if given.pop("differentiable", False):
            raise ValueError(
                "differentiable=True: the update is not part of an autograd graph here; "
                "use torch.optim"
            )
        for name in EXECUTION:
            given.pop(name, None)
        rule_class = self._rule_class
        if rule_class is rules.Adam and given.pop("decoupled_weight_decay", False):
            rule_class = rules.AdamW
        return rule_class(**given)

    def _drop_dead(self) -> None:
        """Forget the entries of tensors that are gone."""
        if len(self._by_key) > len(self._tracked):
            live = {tracked.key for tracked in self._tracked.values()}
            for key in [key for key in self._by_key if key not in live]:
                del self._by_key[key]
                if key in self._core:
                    self._core.forget(key)

    # Loaded state

    def _settle(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give tensors the loaded state that waits under their names, all of them or none."""
        states = []
        for key, tensor in tensors.items():
            tracked = self._by_key[key]
            stored = self._pending.get(tracked.label) if tracked.label is not None else None
            if stored is not None:
                rule = self._stored_rule(stored, tracked.rule)
                layout = named("torch").layout(tensor, f"parameter {key!r}")
                states.append((tracked, stored, rule, layout))
        stepped = [state for state in states if state[1]["step"]]
        self._core.adopt(stepped)
        for tracked, stored, rule, _ in states:
            tracked.rule = rule
            if not stored["step"] and tracked.key in self._core:
                self._core.forget(tracked.key)
            if tracked.label is not None:
                del self._pending[tracked.label]

    def _stored_rule(self, stored: Mapping[str, Any], rule: Rule) -> Rule:
        """The rule with the hyperparameters of loaded state, as Pyro restores them.

        A schedule stays: a file knows only the number it gave.
        """
        if stored["rule"]["name"] != type(rule).__name__:
            return rule
        values = {
            f.name: from_plain(stored["rule"][f.name])
            for f in fields(rule)  # type: ignore[arg-type]  # every rule is a dataclass
            if f.name in stored["rule"] and not callable(getattr(rule, f.name))
        }
        changed: Rule = replace(rule, **values)  # type: ignore[type-var]
        return changed

    def get_state(self) -> dict[str, Any]:
        """The state by parameter name, in Pyro's format, loaded state that waits included.

        It lists the tensors that are in the param store now.
        """
        return {
            label: to_torch(self._constructor, stored) for label, stored in self._stored().items()
        }

    def set_state(self, state_dict: Mapping[str, Any]) -> None:
        """Load state in Pyro's format; each name's goes to the next tensor presented under it.

        Args:
            state_dict: As ``get_state`` gives it, or Pyro's own ``get_state``.

        Raises:
            CheckpointError: It has another form; nothing has changed.
        """
        loaded = {}
        for label, state in state_dict.items():
            if label is None:
                # Pyro's own get_state() leaves this behind for tensors that left the store.
                warnings.warn("left out a state without a parameter name", stacklevel=2)
                continue
            try:
                loaded[label] = from_torch(self._rule_class, state)
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                raise CheckpointError(
                    f"the state of {label!r} is no state of {self._constructor.__name__} "
                    f"in Pyro's format ({type(error).__name__}: {error})"
                ) from error
        self._pending.update(loaded)

    def save(self, filename: str | PathLike[str]) -> None:
        """Write the state to a file that ``load`` and ``multiopt.Optimizer.load`` read.

        It holds what ``get_state`` lists. Tensors that are in no param store have no name to be
        saved under; a warning says how many there are.
        """
        param_name = pyro.get_param_store().param_name
        unnamed = sum(param_name(tensor) is None for tensor in self._tracked)
        if unnamed:
            warnings.warn(
                f"{unnamed} tensors are in no param store; their state is not saved", stacklevel=2
            )
        stored = {label: entry for label, entry in self._stored().items() if entry["step"]}
        checkpoint.write(
            filename, {"version": checkpoint.VERSION, "entries": stored, "pending": {}}
        )

    def load(self, filename: str | PathLike[str], map_location: Any = None) -> None:
        """Load a file that ``save`` wrote, or a Pyro checkpoint, which is read without pickle.

        Args:
            filename: The file.
            map_location: For a Pyro checkpoint, as in ``torch.load``; by default its tensors come
                by way of the CPU. State goes to its parameter's device in any case.

        Raises:
            CheckpointError: The file is damaged or neither; nothing has changed.
            OSError: The file cannot be read.
        """
        with Path(filename).open("rb") as file:
            # safetensors: the length of the header in 8 bytes, then the header, in JSON.
            is_safetensors = file.read(9)[8:] == b"{"
            file.seek(0)
            if not is_safetensors:
                try:
                    state = torch.load(file, map_location or "cpu", weights_only=True)
                except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
                    raise CheckpointError(
                        f"{filename}: expected a checkpoint of multiopt or of Pyro ({error})"
                    ) from error
        if is_safetensors:
            document = checkpoint.read(filename)
            self._pending.update({**document["pending"], **document["entries"]})
        else:
            self.set_state(state)

    def _stored(self) -> dict[str, dict[str, Any]]:
        """The state by label as a state dict has it: of the tensors in the store, and pending."""
        self._drop_dead()
        stored = {}
        for label, tensor in pyro.get_param_store().named_parameters():
            tracked = self._tracked.get(tensor)
            if tracked is not None:
                stored[label] = self._stored_entry(tracked)
        return {**stored, **self._pending}

    def _stored_entry(self, tracked: _Tracked) -> dict[str, Any]:
        if tracked.key in self._core:
            return self._core.described(tracked.key)
        return {"rule": described_rule(tracked.rule, 0), "step": 0, "slots": {}}

    # What Pyro's users look at

    @property
    def optim_objs(  # type: ignore[override]  # an attribute in Pyro, which nobody assigns
        self,
    ) -> dict[torch.Tensor, "_TensorOptimizer"]:
        """For each live tensor what stands for the torch optimizer that Pyro has there."""
        self._drop_dead()
        return {t: _TensorOptimizer(self, t, tracked) for t, tracked in self._tracked.items()}


class _TensorOptimizer:
    """The part of ``torch.optim.Optimizer`` that users of ``optim_objs`` touch.

    Attributes:
        param_groups: One group; setting a hyperparameter in it changes the rule of the tensor.
    """

    def __init__(self, owner: _PyroOptimizer, tensor: torch.Tensor, tracked: _Tracked) -> None:
        self._owner = owner
        self._tensor = tensor
        self._tracked = tracked
        (group,) = self.state_dict()["param_groups"]
        self.param_groups = [_Group(owner, tracked, {**group, "params": [tensor]})]

    @property
    def state(self) -> dict[torch.Tensor, dict[str, Any]]:
        """A copy of the clock and the slots, by tensor."""
        return dict.fromkeys([self._tensor], self.state_dict()["state"].get(0, {}))

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.Optimizer.state_dict``: copies."""
        return to_torch(self._owner._constructor, self._owner._stored_entry(self._tracked))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradient, or fill it with zeros."""
        if set_to_none:
            self._tensor.grad = None
        elif self._tensor.grad is not None:
            self._tensor.grad = torch.zeros_like(self._tensor.grad)


class _Group(dict[str, Any]):
    """The settings of a tensor; writing one changes its rule."""

    def __init__(self, owner: _PyroOptimizer, tracked: _Tracked, values: dict[str, Any]) -> None:
        super().__init__(values)
        self._owner = owner
        self._tracked = tracked

    def __setitem__(self, key: str, value: Any) -> None:
        rule = self._tracked.rule
        if key in rule.ranges or key in rule.switches:
            value = number(value)
            if key == "lr" and "lrd" in self:
                value /= power(self["lrd"], self._owner._stored_entry(self._tracked)["step"])
            changed = replace(rule, **{key: value})  # type: ignore[type-var]
            self._owner._core.change_rule(self._tracked.key, changed)
            self._tracked.rule = changed
        super().__setitem__(key, value)


def _make_clip(settings: Mapping[str, Any]) -> Clip | None:
    unknown = set(settings) - {"clip_norm", "clip_value"}
    if unknown:
        raise TypeError(f"clip_args has {sorted(unknown)}; expected clip_norm and clip_value")
    if all(value is None for value in settings.values()):
        return None
    return Clip(norm=settings.get("clip_norm"), value=settings.get("clip_value"))
