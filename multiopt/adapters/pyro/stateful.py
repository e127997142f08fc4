"""The state of the drop-in: what it saves and loads, in Pyro's format and in multiopt's.

As in Pyro, loading does not touch tensors at once. The state waits under its label until the next
call presents a tensor of that name, known or new, and is then loaded into it.
"""

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pyro

from multiopt.adapters.pyro.files import read_file, write_file
from multiopt.adapters.pyro.followed import Sources
from multiopt.adapters.pyro.names import ModuleNames
from multiopt.adapters.pyro.optim import PyroOptim
from multiopt.adapters.pyro.settings import make_clip, make_rule, restored_rule
from multiopt.adapters.pyro.tensor import TensorOptimizer
from multiopt.adapters.pyro.tracking import KnownTensors
from multiopt.adapters.torch.file import is_safetensors, read
from multiopt.adapters.torch.state import parameter_to_torch, parameters_from_torch
from multiopt.errors import CheckpointError
from multiopt.guard import Guard
from multiopt.registry import Registry
from multiopt.rules import Rule
from multiopt.state.file_objects import Source, Target
from multiopt.state.fit import check_slot_names
from multiopt.state.misnamed import by_ending, new_name, pairs, warn_of_other_names
from multiopt.state.plateaus import observe, warn_of_plateaus
from multiopt.state.record import entry_of, saved_of
from multiopt.step.skips import Skips

__all__ = ["REMEDY", "StatefulOptim"]

#: The remedies for state that does not fit in the core's messages; here the remedy is another.
REMEDY = re.compile(
    r"forget the name to start over$"
    r"|load with the rule that was saved, step, then assign opt\.rule$"
)


class StatefulOptim(PyroOptim):
    """The part of ``JointOptim`` that saves and loads state."""

    _constructor: Any
    _rule_class: type[Rule]
    _more: dict[str, Any]
    _registry: Registry
    _guard: Guard
    _tensors: KnownTensors
    _names: ModuleNames
    _sources: Sources
    _ids: bytes
    _state_waiting_to_be_consumed: dict[str, dict[str, Any]]
    _has_warned_of_names = False

    def _usual_rule(self) -> Rule | None:
        """The rule of all tensors; None if it depends on their names."""
        settings = self.pt_optim_args
        return make_rule(self._rule_class, settings) if isinstance(settings, dict) else None

    def __getstate__(self) -> dict[str, Any]:
        """The settings and the state by name, for pickling and copying."""
        return {
            "arguments": self._arguments(),
            "more": self._more,
            "waiting": self._states_or_warn(),
            "steps": self._registry.steps,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start with the settings and no tensors; all state is waiting."""
        type(self).__init__(self, *state["arguments"], **state["more"])
        self._state_waiting_to_be_consumed = state["waiting"]
        self._registry.steps = state["steps"]

    def _arguments(self) -> tuple[Any, ...]:
        return self._constructor, self.pt_optim_args, self.pt_clip_args

    def _forget(self, tensors: Iterable[TensorOptimizer]) -> None:
        """Drop the entries of tensors; if presented again, they start from scratch."""
        gone = list(tensors)
        for tracked in gone:
            self._sources.unwatch(tracked)
            self._tensors.remove(tracked)
        self._registry.forget([tracked.key for tracked in gone])

    def _forget_abandoned(self) -> None:
        """Drop the entries of tensors that nobody else holds, unless a call is running."""
        if not self._guard.busy and (abandoned := self._tensors.abandoned()):
            self._ids = b""
            self._forget(abandoned)

    def _follow(self) -> None:
        """Apply what the user has changed in objects of his own, and in clocks."""
        raise NotImplementedError

    # Loaded state

    def _load_waiting(self, tensors: Iterable[TensorOptimizer]) -> None:
        """Load into tensors the state that waits under their names, all of it or nothing."""
        waiting = self._state_waiting_to_be_consumed
        if not waiting:
            return
        name, in_store = self._names.of_tensors(), dict(pyro.get_param_store().named_parameters())
        takers: dict[str, TensorOptimizer] = {}
        for tracked in tensors:
            label = name(tracked.alive) or tracked.label
            # If two tensors have the same name, the one in the store gets the state.
            if label in waiting and (label not in takers or in_store.get(label) is tracked.tensor):
                takers[label] = tracked
        self._load_states([(tracked, waiting[label]) for label, tracked in takers.items()])
        for label in takers:
            waiting.pop(label, None)

    def _warn_of_other_names(
        self, met: Iterable[TensorOptimizer], tensors: Iterable[TensorOptimizer]
    ) -> None:
        """Warn, once per load, if tensors start fresh while state waits under similar names.

        Args:
            met: The tensors that are seen for the first time.
            tensors: All tensors of the call.
        """
        waiting, name = self._state_waiting_to_be_consumed, self._names.of_tensors()
        fresh = [name(tracked.alive) or tracked.label for tracked in met]
        unmatched = [label for label in fresh if label is not None and label not in waiting]
        if not unmatched or self._has_warned_of_names:
            return
        present = {name(tracked.alive) or tracked.label for tracked in tensors}
        similar = pairs(unmatched, lambda n: n in waiting and n not in present, by_ending(waiting))
        if similar:
            self._has_warned_of_names = True
            new = new_name(similar)
            new = f"{new}.get(name, name)" if new[0] == "{" else new
            advice = (
                "load it under their names: set_state({" + new + ": state for name, state in "
                "saved.items()}), where saved is what get_state() gave"
            )
            warn_of_other_names(similar, advice)

    def _load_states(self, loaded: Collection[tuple[TensorOptimizer, Mapping[str, Any]]]) -> None:
        """Load states and the rules that come with them into tensors, all of it or nothing.

        Raises:
            ValueError: A state does not fit. Nothing has changed.
        """
        registry, skips = self._registry, dict(self._registry.skips)
        entries = {}
        rules: dict[Rule, Rule] = {}
        try:
            for tracked, state in loaded:
                key, masters = tracked.key, registry.masters
                layout, average = registry.entry(key).layout, registry.average_of(key)
                rule = restored_rule(state["rule"], tracked.rule)
                rule = rules.setdefault(rule, rule)
                clip = make_clip(tracked.clip_args, rule)
                # This copies: a copy of this optimizer, for example, may load the same state.
                saved = saved_of(key, state, state.get("average"))
                saved = saved._replace(form=saved.form._replace(cast=True))
                entries[key] = entry_of(key, saved, rule, clip, layout, masters, average)
                if counts := state.get("skips"):
                    skips[key] = Skips(*counts)
        except ValueError as error:
            remedy = "del optim_objs[tensor] to start over without it"
            raise ValueError(REMEDY.sub(remedy, str(error))) from None
        with self._guard:
            registry.put(entries)
            registry.skips = skips
        for tracked, state in loaded:
            observe(entries[tracked.key].rule, state.get("plateaus", {}), ahead=True)
            tracked.given = dict(state.get("given", {}))
            self._sources.watch(tracked)
            if "group" in state:
                tracked.extra = dict(state["group"])

    def get_state(self) -> dict[str, Any]:
        """Return the state by parameter name in Pyro's format, including state that still waits.

        It covers the tensors that are in the param store now, and those that modules name.
        """
        return {label: self._to_torch(state) for label, state in self._states().items()}

    def _to_torch(self, state: Mapping[str, Any]) -> dict[str, Any]:
        return parameter_to_torch(self._constructor, state)

    def set_state(self, state_dict: Mapping[str, Any]) -> None:
        """Load state in Pyro's format; it waits for the next tensor presented under each name.

        Args:
            state_dict: The result of ``get_state``, here or in Pyro.

        Raises:
            CheckpointError: The state is malformed or does not fit. Nothing has changed.
        """
        self._set_waiting(parameters_from_torch(self._rule_class, state_dict))

    def _set_waiting(self, loaded: dict[str, dict[str, Any]], steps: int | None = None) -> None:
        """Let loaded state wait, after checking it against the rule if all tensors share one.

        Args:
            loaded: The state by label.
            steps: How many steps the optimizer has taken; by default the largest clock.
        """
        self._guard.check_idle("loading")
        if (rule := self._usual_rule()) is not None:
            for label, state in loaded.items():
                try:
                    description, slots = state["rule"], state["slots"]
                    own = restored_rule(description, rule)
                    check_slot_names(label, slots, state["step"], description, own)
                except (ValueError, TypeError) as error:
                    remedy = "load it into the optimizer that was saved"
                    raise CheckpointError(REMEDY.sub(remedy, str(error))) from None
            for state in loaded.values():
                observe(rule, state.get("plateaus", {}))
        if self._guard.torn is not None:
            # Every tensor starts from scratch, or with the loaded state of its name.
            self._ids = b""
            self._forget(self._tensors)
            self._guard.torn = None
        self._state_waiting_to_be_consumed.update(loaded)
        self._has_warned_of_names = False
        clocks = [state["step"] for state in self._state_waiting_to_be_consumed.values()]
        self._registry.steps = max(clocks, default=0) if steps is None else steps

    def save(self, filename: Target) -> None:
        """Write the state to a file that ``load`` and ``multiopt.Optimizer.load`` read.

        The file holds what ``get_state`` lists, and averages and counts of skips. Tensors without a
        name, in neither the param store nor a known module, cannot be saved; a warning says how
        many there are.

        Args:
            filename: The path of the file, or a binary file object.

        Raises:
            OSError: The file cannot be written.
        """
        states = self._states_or_warn()
        warn_of_plateaus({key: self._registry.rule_of(key) for key in self._registry.names})
        write_file(filename, states, self._registry.steps)

    def load(self, filename: Source, map_location: Any = None) -> None:
        """Load a file that ``save`` wrote, or a Pyro checkpoint, which is read without pickle.

        A file of ``multiopt.Optimizer.save`` may have master copies, and averages that are kept
        nowhere here. They are left out, with a warning.

        Args:
            filename: The path of the file; or a seekable binary file object, read from its current
                position.
            map_location: For a Pyro checkpoint, as in ``torch.load``; by default tensors are loaded
                to the CPU first. State always ends up on the device of its parameter.

        Raises:
            CheckpointError: The file is damaged, or neither kind of file. Nothing has changed.
            OSError: The file cannot be read.
        """
        if not is_safetensors(filename):
            self.set_state(read(filename, map_location))
            return
        loaded, steps = read_file(filename, averages=self._more.get("average") is not None)
        if (rule := self._usual_rule()) is not None:
            warn_of_plateaus(dict.fromkeys(loaded, rule))
        self._set_waiting(loaded, steps)

    def _states(self) -> dict[str, dict[str, Any]]:
        """The entries of a state dict by label: for tensors with a name, and state that waits."""
        self._guard.check_whole("the state of the optimizer")
        self._forget_abandoned()
        if not self._guard.busy:
            self._follow()
        store, in_modules = pyro.get_param_store(), self._names.current()
        labelled = [
            *((in_modules.get(id(tracked.tensor)), tracked) for tracked in self._tensors),
            *((label, self._tensors.get(tensor)) for label, tensor in store.named_parameters()),
        ]
        states = {
            label: self._describe(tracked)
            for label, tracked in labelled
            if label is not None and tracked is not None
        }
        return {**states, **self._state_waiting_to_be_consumed}

    def _states_or_warn(self) -> dict[str, dict[str, Any]]:
        states, name = self._states(), self._names.of_tensors()
        if unnamed := sum(name(tracked.alive) is None for tracked in self._tensors):
            warnings.warn(
                f"{unnamed} tensors are neither in a param store nor in a known module; their "
                "state is not saved",
                stacklevel=3,
            )
        return states

    def _describe(self, tracked: TensorOptimizer) -> dict[str, Any]:
        """The complete state of a tensor as an entry of a state dict."""
        return tracked.plain_state()
