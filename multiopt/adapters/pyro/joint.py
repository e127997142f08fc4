"""The drop-in's optimizer, which steps all its parameters together with multiopt.

Like Pyro's, it is keyed by tensor: each live tensor has one entry in the registry, labelled with
its name in the param store. A call looks its tensors up by identity, follows what the user has
changed since the last call (``followed``), and then takes one step of the registry.
"""

import sys
from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import Any, NoReturn

import numpy as np
import pyro
import pyro.optim
import torch
from pyro.params.param_store import normalize_param_name

from multiopt.adapters.pyro.constructors import RULES, Settings
from multiopt.adapters.pyro.dct import marked
from multiopt.adapters.pyro.followed import Clocks, Sources
from multiopt.adapters.pyro.names import ModuleNames
from multiopt.adapters.pyro.optim import PyroOptim, warn_not_joint
from multiopt.adapters.pyro.settings import (
    changeable,
    clips_itself,
    make_clip,
    make_rule,
    settings_of,
)
from multiopt.adapters.pyro.stateful import REMEDY, StatefulOptim
from multiopt.adapters.pyro.tensor import TensorOptimizer
from multiopt.adapters.pyro.tracking import KnownTensors
from multiopt.adapters.pyro.views import OptimObjs
from multiopt.arrays import Array
from multiopt.backend import backend_named
from multiopt.entry import Entry, chosen_average, slot_shapes
from multiopt.errors import brief
from multiopt.guard import exclusive
from multiopt.hyperparameters import change
from multiopt.optimizer import Optimizer
from multiopt.rules import Rule
from multiopt.step.report import Report, explain
from multiopt.step.run import Step
from multiopt.step.skips import Skips

__all__ = ["JointOptim"]

#: How many tensors each call checks for other holders, besides two for each one that it adds.
ASKED = 1


class JointOptim(StatefulOptim):
    """A ``PyroOptim`` whose parameters multiopt steps together.

    A copy, or an unpickled one, has the same settings. The state that ``get_state`` lists waits in
    it for the next tensor presented under each name.
    """

    def _begin(
        self, constructor: Any, optim_args: Settings, clip_args: Settings | None, more: Any
    ) -> None:
        """Check the arguments and start with no tensors."""
        self._constructor, self._rule_class, self._more = constructor, RULES[constructor], more
        # Pyro's Horovod wrapper and users' code look for these names.
        self.pt_optim_args = optim_args
        self.pt_clip_args = {} if clip_args is None else clip_args
        # Loaded state by label, waiting for the next tensor that is presented under it.
        self._state_waiting_to_be_consumed: dict[str, dict[str, Any]] = {}
        self._core = Optimizer(self._rule_class(), **more)
        self._registry, self._guard = self._core._registry, self._core._guard
        self._registry.leave_clipped = True
        # Pyro skips tensors without a gradient, whatever they are.
        self._registry.needs_gradients = False
        self._tensors, self._names = KnownTensors(), ModuleNames()
        self._sources, self._clocks = Sources(), Clocks()
        self._rules: dict[Hashable, Rule] = {}
        # The identities of the last call's tensors, the order in which they were stepped, and their
        # keys in that order. An identity is the same tensor's until a tensor is forgotten.
        self._ids = b""
        self._order = np.empty(0, np.intp)
        self._keys: list[str] = []
        self._unnamed = 0
        for what, settings in (("optim_args", optim_args), ("clip_args", self.pt_clip_args)):
            if not isinstance(settings, dict) and not callable(settings):
                raise TypeError(f"{what} must be a dict or a callable; got {brief(settings)}")
        rule = self._usual_rule() or self._rule_class()
        if isinstance(self.pt_clip_args, dict):
            make_clip(self.pt_clip_args, rule)

    def __repr__(self) -> str:
        """The call that makes such an optimizer, and how many tensors it has."""
        waiting = len(self._state_waiting_to_be_consumed)
        pending = f", {waiting} pending" if waiting else ""
        return f"<{self._call_text()}: {len(self._tensors)} tensors{pending}>"

    def _call_text(self) -> str:
        arguments = [repr(self.pt_optim_args)]
        if self.pt_clip_args:
            arguments.append(repr(self.pt_clip_args))
        arguments += [f"{name}={value!r}" for name, value in self._more.items()]
        return f"{self._constructor.__name__}({', '.join(arguments)})"

    @property
    def pt_optim_constructor(self) -> Any:
        """The class of torch's optimizer; whoever calls it gets one that torch steps."""
        # Only Pyro's Horovod wrapper calls it.
        if sys._getframe(1).f_globals.get("__name__") == "pyro.optim.horovod":
            warn_not_joint(self._constructor.__name__)
        return self._constructor

    @pt_optim_constructor.setter
    def pt_optim_constructor(self, constructor: Any) -> NoReturn:
        raise TypeError(
            f"this is an optimizer with the rule of {self._constructor.__name__}: make another for "
            f"{constructor!r}"
        )

    @exclusive
    def __call__(self, params: Iterable[torch.Tensor]) -> None:
        """Update tensors in place with their ``.grad``; those without one are left alone.

        Args:
            params: Leaf tensors in any order, such as the set that ``SVI`` passes.

        Raises:
            TypeError: A tensor or its gradient is of a kind that ``multiopt.Optimizer.step`` does
                not take. Nothing has changed.
            ValueError: A tensor is not a leaf, loaded state does not fit its tensor, or
                ``multiopt.Optimizer.step`` found something else wrong. Nothing has changed.
        """
        sized: Any = params if hasattr(params, "__len__") else list(params)
        tensors = np.fromiter(sized, object, len(sized))
        if self._sources or self._clocks:
            self._follow()
        # The memory of an array of objects holds their identities.
        ids = tensors.tobytes()
        met = self._look_up(tensors, ids) if ids != self._ids else 0
        if gone := self._tensors.abandoned(ASKED + 2 * met):
            self._forget(gone)
        tensors = tensors[self._order]
        if self._state_waiting_to_be_consumed:
            self._load_waiting(filter(None, map(self._tensors.get, tensors)))
        before = self._registry.outcome
        try:
            self._registry.step(self._keys, tensors, None, _leave_clipped)
        except BaseException as error:
            explain(error, before, self._registry.outcome, self._guard.torn)
            message = REMEDY.sub("del optim_objs[tensor] to start over", str(error))
            if isinstance(error, TypeError | ValueError) and message != str(error):
                raise type(error)(message) from None
            raise
        if self._clocks:
            self._clocks.refresh_all()

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
        """A copy of the average of an unconstrained parameter, as ``multiopt.Optimizer.average``.

        Args:
            name: The name of the parameter in the param store.

        Raises:
            KeyError: No average is kept for it, or it has taken no step yet.

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
        """Name tensors that are not in the param store by the modules that own them.

        With ``pyro.settings.set(module_local_params=True)``, parameters live only in their modules.
        The model and guide of an ``SVI`` are found automatically; in a training loop of your own,
        pass them here.

        Args:
            *modules: The modules, which are only referred to weakly. If two of them have parameters
                of the same name, the second is called ``"name (2)"``.

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

    def _look_up(self, tensors: np.ndarray, ids: bytes) -> int:
        """Look up the keys of tensors, without duplicates, and register those that are new.

        Returns:
            How many were new.
        """
        self._ids, met = b"", 0
        numbers = np.frombuffer(ids, np.uintp)
        # A set has no order. In the order of addresses, a step of 1000 tensors with cold caches
        # takes 0.75 ms instead of 1.
        order = numbers.argsort()
        listed = numbers[order].tolist()
        if len(set(listed)) < len(listed):
            order = np.unique(numbers, return_index=True)[1]
            listed = numbers[order].tolist()
        keys: list[Any] = list(map(self._tensors.keys.get, listed))
        if None in keys:
            unknown = {
                id(tensor): tensor for tensor in tensors if self._tensors.get(tensor) is None
            }
            new = self._first_sight(unknown.values())
            met = len(new)
            if self._state_waiting_to_be_consumed:
                self._warn_of_other_names(new, filter(None, map(self._tensors.get, tensors)))
            keys = [self._tensors.keys[number] for number in listed]
        self._order, self._keys, self._ids = order, keys, ids
        return met

    def _first_sight(self, tensors: Iterable[torch.Tensor]) -> list[TensorOptimizer]:
        """Register tensors that are seen for the first time."""
        name, usual = self._names.of_tensors(search=True), self._usual_rule()
        met: list[TensorOptimizer] = []
        entries: dict[str, Entry] = {}
        rules: dict[Rule, Rule] = {}
        for tensor in tensors:
            label = name(tensor)
            settings = settings_of("optim_args", self.pt_optim_args, tensor, label)
            rule = marked(usual or make_rule(self._rule_class, settings), tensor)
            # Equal rules as one object, so that their rows are made together.
            rule = rules.setdefault(rule, rule)
            tracked = TensorOptimizer(self, tensor, self._unused_key(label, entries), label)
            # As in Pyro, a tensor without clip settings at first sight never gets any.
            tracked.clip_args = settings_of("clip_args", self.pt_clip_args, tensor, label) or {}
            tracked.given = {name: value for name, value in settings.items() if changeable(value)}
            clip = make_clip(tracked.clip_args, rule)
            layout = backend_named("torch").layout(tensor, f"parameter {tracked.key!r}")
            slot_shapes(tracked.key, rule, layout)
            dotted = tracked.key if label is None else normalize_param_name(label)
            kept = chosen_average(self._registry.average, dotted)
            average = None if kept is None else Entry(kept, None, 0, {}, layout)
            entries[tracked.key] = Entry(rule, clip, 0, {}, layout, average)
            met.append(tracked)
        self._registry.put(entries)
        for tracked in met:
            self._tensors.add(tracked)
            self._sources.watch(tracked)
        return met

    def _unused_key(self, label: str | None, others: Collection[str]) -> str:
        """A unique name for the registry, by which messages can say which parameter is meant."""
        if label is None:
            self._unnamed += 1
            return f"unnamed tensor {self._unnamed}"
        key, number_of_it = label, 1
        while key in self._registry or key in others:
            number_of_it += 1
            key = f"{label} ({number_of_it})"
        return key

    def _start_over(self, tracked: TensorOptimizer) -> None:
        """Forget a tensor, and any loaded state that waits for it but does not fit it.

        State that fits keeps waiting, as in Pyro, where only new tensors take it.
        """
        self._guard.check("deleting a tensor")
        label = self._names.of_tensors()(tracked.alive) or tracked.label
        waiting = dict(self._state_waiting_to_be_consumed)
        try:
            self._load_waiting([tracked])
        except (ValueError, TypeError):
            waiting = {name: state for name, state in waiting.items() if name != label}
        self._state_waiting_to_be_consumed = waiting
        self._ids = b""
        self._forget([tracked])

    # Settings

    def _follow(self) -> None:
        """Apply what the user has changed in objects of his own, and in clocks."""
        if self._sources and (changed := self._sources.changed()):
            rules = {}
            for tracked in changed:
                rules[tracked] = tracked.rule
                for name, given in tracked.given.items():
                    rules[tracked] = tracked.with_setting(rules[tracked], name, given)
            self._change_rules(rules, rules)
            self._sources.renew()
        if self._clocks:
            for tracked, step in self._clocks.written().items():
                tracked.set_clock(step)

    def _change_rules(
        self,
        rules: Mapping[TensorOptimizer, Rule],
        clipped: Collection[TensorOptimizer] | None = None,
    ) -> None:
        """Change the rules of tensors.

        Args:
            rules: The new rules.
            clipped: The tensors whose clips are rebuilt; by default those whose rules include one.
        """
        if clipped is None:
            clipped = [tracked for tracked, rule in rules.items() if clips_itself(rule)]
        clips = {tracked.key: make_clip(tracked.clip_args, rules[tracked]) for tracked in clipped}
        change(self._registry, {tracked.key: rule for tracked, rule in rules.items()}, clips)

    # What users of ``optim_objs`` reach

    @property  # type: ignore[override]  # a dict in Pyro
    def optim_objs(self) -> OptimObjs:
        """For each live tensor, the counterpart of the torch optimizer that Pyro has there."""
        self._forget_abandoned()
        return OptimObjs(self)

    @optim_objs.setter
    def optim_objs(self, objects: Mapping[torch.Tensor, Any]) -> None:
        if objects:
            raise TypeError("optim_objs can be emptied by assigning {}, not filled")
        self.optim_objs.clear()

    def _object(self, tracked: TensorOptimizer) -> Any:
        """The value of a tensor in ``optim_objs``."""
        return tracked


def _leave_clipped(step: Step) -> None:
    """Write clipped gradients back to ``.grad``, as Pyro does, where the engine has not."""
    for part in step.parts:
        if part.clipped is not None:
            break
    else:
        return
    backend = backend_named("torch")
    for param, member, grad in step.left_over():
        (clipped,) = backend.to_slots([grad], member.layout)
        if member.layout.is_complex:
            clipped = backend.as_complex(clipped)
        if 0 in param.grad.stride():
            # Expanded, by backward(create_graph=True): its elements share memory.
            param.grad = clipped.to(param.grad.dtype)
        else:
            param.grad.detach().copy_(clipped)


PyroOptim.joint = JointOptim
