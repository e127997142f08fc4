"""``PyroOptim``, and the one whose parameters multiopt steps.

It is keyed by tensor, as Pyro is: one entry for each live tensor, labelled with its name in the
param store.
"""

import re
import sys
import warnings
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, ValuesView
from functools import cache
from inspect import Parameter, signature
from typing import Any, Literal, NoReturn

import numpy as np
import pyro
import pyro.optim
import torch
from pyro.params.param_store import normalize_param_name

from multiopt.adapters.pyro.constructors import RULES, Settings, has_rule
from multiopt.adapters.pyro.dct import marked
from multiopt.adapters.pyro.files import read_file, write_file
from multiopt.adapters.pyro.followed import Clocks, Sources
from multiopt.adapters.pyro.names import ModuleNames
from multiopt.adapters.pyro.settings import (
    changeable,
    clips_itself,
    make_clip,
    make_rule,
    restored_rule,
    settings_of,
)
from multiopt.adapters.pyro.tensor import TensorOptimizer
from multiopt.adapters.pyro.tracking import KnownTensors
from multiopt.adapters.pyro.views import OptimObjs
from multiopt.adapters.torch_file import is_safetensors, read
from multiopt.adapters.torch_state import parameter_to_torch, parameters_from_torch
from multiopt.arrays import Array
from multiopt.averaging import Average
from multiopt.backend import named
from multiopt.changes import change
from multiopt.entry import (
    Entry,
    check_slot_names,
    chosen_average,
    restored,
    restored_average,
    restored_plateaus,
    slot_shapes,
)
from multiopt.errors import CheckpointError, brief
from multiopt.guard import exclusive
from multiopt.optimizer import Optimizer
from multiopt.rules import Rule
from multiopt.skipping import Skips
from multiopt.state.file_objects import Source, Target
from multiopt.state.plateaus import warn_of_plateaus
from multiopt.step.report import Report, explain
from multiopt.step.run import Step

__all__ = ["JointOptim", "PyroOptim"]

#: What messages of the core say to do about state that does not fit; here there is other help.
REMEDY = re.compile(
    r"forget the name to start anew$"
    r"|load with the rule that was saved, step, then assign opt\.rule$"
)

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
        self._constructor, self._rule_class, self._more = constructor, RULES[constructor], more
        # The names under which Pyro's Horovod wrapper and users' code look for them.
        self.pt_optim_args = optim_args
        self.pt_clip_args = {} if clip_args is None else clip_args
        # Loaded state by label, for the next tensor that is presented under it.
        self._state_waiting_to_be_consumed: dict[str, dict[str, Any]] = {}
        self._core = Optimizer(self._rule_class(), **more)
        self._known, self._guard = self._core._registry, self._core._guard
        self._known.leave_clipped = True
        # Pyro passes over tensors without a gradient, whatever they are.
        self._known.needs_gradients = False
        self._tensors, self._names = KnownTensors(), ModuleNames()
        self._sources, self._clocks = Sources(), Clocks()
        self._rules: dict[Hashable, Rule] = {}
        # Of the last call: which objects the tensors are, the order in which they are stepped, and
        # their keys in it. A number stands for the same tensor as long as none was forgotten.
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

    def _usual_rule(self) -> Rule | None:
        """The rule of all tensors; None if it goes by their names."""
        settings = self.pt_optim_args
        return make_rule(self._rule_class, settings) if isinstance(settings, dict) else None

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
        given: Any = params if hasattr(params, "__len__") else list(params)
        tensors = np.fromiter(given, object, len(given))
        if self._sources or self._clocks:
            self._follow()
        # What an array of objects has in memory are their identities.
        ids = tensors.tobytes()
        met = self._look_up(tensors, ids) if ids != self._ids else 0
        if gone := self._tensors.abandoned(ASKED + 2 * met):
            self._forget(gone)
        tensors = tensors[self._order]
        if self._state_waiting_to_be_consumed:
            self._settle(filter(None, map(self._tensors.get, tensors)))
        before = self._known.outcome
        try:
            self._known.step(self._keys, tensors, None, _leave_clipped)
        except BaseException as error:
            explain(error, before, self._known.outcome, self._guard.torn)
            said = REMEDY.sub("del optim_objs[tensor] to start anew", str(error))
            if isinstance(error, TypeError | ValueError) and said != str(error):
                raise type(error)(said) from None
            raise
        if self._clocks:
            self._clocks.say_all()

    def __getstate__(self) -> dict[str, Any]:
        """The settings, and the state by name."""
        return {
            "arguments": self._arguments(),
            "more": self._more,
            "waiting": self._stored_or_warn(),
            "steps": self._known.steps,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin with the settings, all state waiting."""
        type(self).__init__(self, *state["arguments"], **state["more"])
        self._state_waiting_to_be_consumed = state["waiting"]
        self._known.steps = state["steps"]

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

    def _look_up(self, tensors: np.ndarray, ids: bytes) -> int:
        """Find the keys of tensors, each once; at first sight their settings are asked for.

        Returns:
            How many were seen for the first time.
        """
        self._ids, met = b"", 0
        numbers = np.frombuffer(ids, np.uintp)
        # A set has them in no order. In that of their addresses a step of 1000 that finds its
        # caches filled by other work takes 0.75 ms instead of 1.
        order = numbers.argsort()
        listed = numbers[order].tolist()
        if len(set(listed)) < len(listed):
            order = np.unique(numbers, return_index=True)[1]
            listed = numbers[order].tolist()
        keys = self._tensors.keys(listed)
        if None in keys:
            unknown = {id(one): one for one in tensors if self._tensors.get(one) is None}
            met = len(self._meet(unknown.values()))
            keys = self._tensors.keys(listed)
        self._order, self._keys, self._ids = order, keys, ids
        return met

    def _meet(self, tensors: Iterable[torch.Tensor]) -> list[TensorOptimizer]:
        """Take in tensors that are seen for the first time."""
        name, usual = self._names.of_tensors(search=True), self._usual_rule()
        met: list[TensorOptimizer] = []
        entries: dict[str, Entry] = {}
        rules: dict[Rule, Rule] = {}
        for tensor in tensors:
            label = name(tensor)
            settings = settings_of("optim_args", self.pt_optim_args, tensor, label)
            rule = marked(usual or make_rule(self._rule_class, settings), tensor)
            # Names of one rule get their rows at once.
            rule = rules.setdefault(rule, rule)
            one = TensorOptimizer(self, tensor, self._unused_key(label, entries), label)
            # Pyro leaves it at no settings, where there are none at first sight.
            one.clip_args = settings_of("clip_args", self.pt_clip_args, tensor, label) or {}
            one.given = {name: value for name, value in settings.items() if changeable(value)}
            clip = make_clip(one.clip_args, rule)
            layout = named("torch").layout(tensor, f"parameter {one.key!r}")
            slot_shapes(one.key, rule, layout)
            dotted = one.key if label is None else normalize_param_name(label)
            chosen = chosen_average(self._known.average, dotted)
            average = restored_average(one.key, None, chosen, layout)
            entries[one.key] = Entry(rule, clip, 0, {}, layout, average)
            met.append(one)
        self._known.put(entries)
        for one in met:
            self._tensors.add(one)
            self._sources.watch(one)
        return met

    def _unused_key(self, label: str | None, others: Collection[str]) -> str:
        """A name for the core that says in messages which parameter is meant."""
        if label is None:
            self._unnamed += 1
            return f"unnamed tensor {self._unnamed}"
        key, number_of_it = label, 1
        while key in self._known or key in others:
            number_of_it += 1
            key = f"{label} ({number_of_it})"
        return key

    def _forget(self, tensors: Iterable[TensorOptimizer]) -> None:
        """Drop the entries of tensors; presented again, they start anew."""
        gone = list(tensors)
        for one in gone:
            self._sources.unwatch(one)
            self._tensors.remove(one)
        self._known.forget([one.key for one in gone])

    def _forget_abandoned(self) -> None:
        """Drop the entries of tensors that nobody else holds, but not in the middle of a call."""
        if not self._guard.busy and (abandoned := self._tensors.abandoned()):
            self._ids = b""
            self._forget(abandoned)

    def _start_anew(self, one: TensorOptimizer) -> None:
        """Forget a tensor, with loaded state that waits for it and does not fit it.

        What fits waits on, as in Pyro, where only new tensors take it.
        """
        self._guard.check("deleting a tensor")
        label = self._names.of_tensors()(one.alive) or one.label
        waiting = dict(self._state_waiting_to_be_consumed)
        try:
            self._settle([one])
        except (ValueError, TypeError):
            waiting = {name: stored for name, stored in waiting.items() if name != label}
        self._state_waiting_to_be_consumed = waiting
        self._ids = b""
        self._forget([one])

    # Settings

    def _follow(self) -> None:
        """Take over what the caller has changed in his own objects, and in clocks."""
        if self._sources and (changed := self._sources.changed()):
            rules = {}
            for one in changed:
                rules[one] = one.rule
                for name, given in one.given.items():
                    rules[one] = one.with_setting(rules[one], name, given)
            self._change_rules(rules, rules)
            self._sources.renew()
        if self._clocks:
            for one, step in self._clocks.written().items():
                one.set_clock(step)

    def _follow_if_free(self) -> None:
        """The same for who looks, but not in the middle of a call."""
        if not self._guard.busy:
            self._follow()

    def _change_rules(
        self,
        rules: Mapping[TensorOptimizer, Rule],
        clipped: Collection[TensorOptimizer] | None = None,
    ) -> None:
        """Change the rules of tensors.

        Args:
            rules: The rules.
            clipped: The tensors whose clips are to be made anew; by default those whose rules clip
                by themselves.
        """
        if clipped is None:
            clipped = [one for one, rule in rules.items() if clips_itself(rule)]
        clips = {one.key: make_clip(one.clip_args, rules[one]) for one in clipped}
        change(self._known, {one.key: rule for one, rule in rules.items()}, clips)

    # Loaded state

    def _settle(self, tensors: Iterable[TensorOptimizer]) -> None:
        """Give tensors the loaded state that waits under their names, all of them or none."""
        waiting = self._state_waiting_to_be_consumed
        if not waiting:
            return
        name, in_store = self._names.of_tensors(), dict(pyro.get_param_store().named_parameters())
        takers: dict[str, TensorOptimizer] = {}
        for one in tensors:
            label = name(one.alive) or one.label
            # Of two tensors of one name, the one in the store takes it.
            if label in waiting and (label not in takers or in_store.get(label) is one.tensor):
                takers[label] = one
        self._take([(one, waiting[label]) for label, one in takers.items()])
        for label in takers:
            waiting.pop(label, None)

    def _take(self, loaded: Collection[tuple[TensorOptimizer, Mapping[str, Any]]]) -> None:
        """Give tensors loaded state with the rules that come with it, all of them or none.

        Raises:
            ValueError: A state does not fit; nothing has changed.
        """
        known, skips = self._known, dict(self._known.skips)
        entries: dict[str, Entry] = {}
        rules: dict[Rule, Rule] = {}
        try:
            for one, stored in loaded:
                _, _, _, _, layout, average = known.entry(one.key)
                rule = restored_rule(stored["rule"], one.rule)
                rule = rules.setdefault(rule, rule)
                clip = make_clip(one.clip_args, rule)
                cast_ = {**stored, "cast": True}
                entry = restored(one.key, cast_, rule, clip, layout, known.masters)
                if average is not None:
                    average = restored_average(one.key, stored.get("average"), average.rule, layout)
                entries[one.key] = entry._replace(average=average)
                if counts := stored.get("skips"):
                    skips[one.key] = Skips(*counts)
        except ValueError as error:
            remedy = "del optim_objs[tensor] to start anew without it"
            raise ValueError(REMEDY.sub(remedy, str(error))) from None
        with self._guard:
            known.put(entries)
            known.skips = skips
        for one, stored in loaded:
            restored_plateaus(entries[one.key].rule, stored["rule"], ahead=True)
            one.given = dict(stored.get("given", {}))
            self._sources.watch(one)
            if "group" in stored:
                one.extra = dict(stored["group"])

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
        self._guard.check_idle("loading")
        if (rule := self._usual_rule()) is not None:
            for label, stored in loaded.items():
                try:
                    check_slot_names(label, stored, restored_rule(stored["rule"], rule))
                except (ValueError, TypeError) as error:
                    remedy = "load it into the optimizer that was saved"
                    raise CheckpointError(REMEDY.sub(remedy, str(error))) from None
            for stored in loaded.values():
                restored_plateaus(rule, stored["rule"])
        if self._guard.torn is not None:
            # Every tensor begins anew: with the state of its name, if there is some.
            self._ids = b""
            self._forget(self._tensors)
            self._guard.torn = None
        self._state_waiting_to_be_consumed.update(loaded)
        clocks = [stored["step"] for stored in self._state_waiting_to_be_consumed.values()]
        self._known.steps = max(clocks, default=0) if steps is None else steps

    def save(self, filename: Target) -> None:
        """Write the state to a file that ``load`` and ``multiopt.Optimizer.load`` read.

        It holds what ``get_state`` lists, averages and counts of skips. Tensors that neither a
        param store nor a module names cannot be saved; a warning says how many there are. The file
        may be a binary file object.
        """
        stored = self._stored_or_warn()
        warn_of_plateaus({key: self._known.rule_of(key) for key in self._known.names})
        write_file(filename, stored, self._known.steps)

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
        loaded, steps = read_file(filename, averages=self._more.get("average") is not None)
        if (rule := self._usual_rule()) is not None:
            warn_of_plateaus(dict.fromkeys(loaded, rule))
        self._wait(loaded, steps)

    def _stored(self) -> dict[str, dict[str, Any]]:
        """The state by label as a state dict has it: of tensors that have a name, and waiting."""
        self._guard.check_whole("the state of the optimizer")
        self._forget_abandoned()
        self._follow_if_free()
        store, in_modules = pyro.get_param_store(), self._names.current()
        labelled = [
            *((in_modules.get(id(one.tensor)), one) for one in self._tensors),
            *((label, self._tensors.get(tensor)) for label, tensor in store.named_parameters()),
        ]
        found = {
            label: self._describe(one)
            for label, one in labelled
            if label is not None and one is not None
        }
        return {**found, **self._state_waiting_to_be_consumed}

    def _stored_or_warn(self) -> dict[str, dict[str, Any]]:
        stored, name = self._stored(), self._names.of_tensors()
        if unnamed := sum(name(one.alive) is None for one in self._tensors):
            warnings.warn(
                f"{unnamed} tensors are in no param store and in no known module; their state is "
                "not saved",
                stacklevel=3,
            )
        return stored

    def _describe(self, one: TensorOptimizer) -> dict[str, Any]:
        """All that is held of a tensor."""
        return one.described()

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

    def _object(self, one: TensorOptimizer) -> Any:
        """What ``optim_objs`` has for a tensor."""
        return one


def _leave_clipped(step: Step) -> None:
    """Leave the clipped gradients behind that are not in their places yet, as Pyro does."""
    backend = named("torch")
    for param, member, grad in step.left_over():
        (clipped,) = backend.closed([grad], member.layout)
        if member.layout.is_complex:
            clipped = backend.whole(clipped)
        if 0 in param.grad.stride():
            # Expanded by a backward with create_graph=True: no place for each element.
            param.grad = clipped.to(param.grad.dtype)
        else:
            param.grad.detach().copy_(clipped)
