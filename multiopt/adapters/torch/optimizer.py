"""``Optimizer``: a ``torch.optim.Optimizer`` whose parameters multiopt steps, keyed by name.

torch's schedulers, scalers and trainers write ``param_groups`` and read ``state``, and both are
what torch makes of them: what a group says is what the next step uses (``groups``), and the state
shows the slots that there are (``views``).
"""

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from copy import deepcopy
from dataclasses import fields
from inspect import signature
from typing import Any, Literal

import numpy as np
import torch

from multiopt import rules
from multiopt.adapters.torch import differentiable
from multiopt.adapters.torch.arguments import Clips, Named, Params, Settings
from multiopt.adapters.torch.gradients import held, without_sparse
from multiopt.adapters.torch.groups import Followed
from multiopt.adapters.torch.loading import loaded, matched, waiting_state
from multiopt.adapters.torch.settings import plain_settings
from multiopt.adapters.torch.shards import check_parts, ranks_for
from multiopt.adapters.torch.views import Slots, State
from multiopt.distributed.boxes import here
from multiopt.errors import brief
from multiopt.guard import exclusive, mending
from multiopt.optimizer import Optimizer as Core
from multiopt.rules import Rule
from multiopt.rules.average import Average
from multiopt.step.across import Across
from multiopt.step.report import Report, explain
from multiopt.step.skips import Skips

__all__ = ["Optimizer"]


class Optimizer(torch.optim.Optimizer):
    """An optimizer of PyTorch with a rule of multiopt.

    Args:
        params: Tensors, named ones (``model.named_parameters()``), or groups of them, as
            ``torch.optim`` takes them. Keys of a group are hyperparameters of the rule.
        rule: The rule; its hyperparameters are the defaults of the groups.
        clip: A clip for all parameters, a callable ``name -> Clip or None``, or None.
        names: ``model.named_parameters()``, for groups that do not name their parameters. Without
            names, a parameter is called by its position among all, as in torch's state dicts.
        process_group: The ranks that shards and partitions of parameters are on; ``"world"`` for
            all ranks. None if each rank has whole parameters, or nothing depends on the whole.
        on_nonfinite: As for ``multiopt.Optimizer``, like the rest.
        threads: The largest number of threads.
        master_weights: Whether parameters of 16 bits have float32 copies.
        average: An average to keep of every parameter, or a callable ``name -> Average or None``.
        max_consecutive_skips: How many steps in a row may skip a name.

    Raises:
        TypeError: ``rule`` is not a rule, ``params`` not what torch takes.
        ValueError: A setting is out of range.

    >>> import multiopt as mo, torch
    >>> from multiopt.adapters.torch import Optimizer
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = Optimizer(model.named_parameters(), mo.Lion(lr=0.5))
    >>> scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    >>> model(torch.ones(2)).backward()
    >>> optimizer.step()
    >>> scheduler.step()
    >>> optimizer.param_groups[0]["lr"], optimizer.last.updated
    (0.25, ('weight', 'bias'))
    >>> optimizer.state[model.bias]["exp_avg"].shape
    torch.Size([1])
    """

    def __init__(
        self,
        params: Params,
        rule: Rule,
        clip: Clips = None,
        *,
        names: Named | None = None,
        process_group: Any = None,
        on_nonfinite: Literal["propagate", "raise", "skip"] = "propagate",
        threads: int | None = None,
        master_weights: bool = False,
        average: Average | Callable[[str], Average | None] | None = None,
        max_consecutive_skips: int | None = None,
    ) -> None:
        """Create an optimizer; nothing is kept of any parameter yet."""
        if not isinstance(rule, Rule):
            raise TypeError(
                f"rule must be a rule, such as multiopt.Adam(); got {brief(rule)}: parameters with "
                "other hyperparameters go into a group of their own"
            )
        defaults = {f.name: getattr(rule, f.name) for f in fields(rule)}
        settings: Settings = {"clip": clip, "names": names, "process_group": process_group}
        settings |= {"on_nonfinite": on_nonfinite, "threads": threads, "average": average}
        settings |= {"master_weights": master_weights}
        settings |= {"max_consecutive_skips": max_consecutive_skips}
        self._begin(rule, defaults, settings)
        torch.optim.Optimizer.__init__(self, params, defaults)

    def _begin(self, rule: Rule, defaults: Mapping[str, Any], settings: Settings) -> None:
        """Start without parameters."""
        core: dict[str, Any] = {**settings}
        self._names = {id(param): (name, param) for name, param in core.pop("names", None) or ()}
        self._process_group = core.pop("process_group", None)
        self._followed = Followed(rule, defaults)
        self._core = Core(self._followed.rule_for, **core)
        # torch's optimizers leave alone what has no gradient, whatever it is.
        self._core._registry.needs_gradients = False
        self._connect()

    def _connect(self) -> None:
        """Find the parts of the core, and the other ranks if anything depends on them."""
        self._guard, self._registry = self._core._guard, self._core._registry
        #: The tensors of which it was looked where they lie.
        self._placed: np.ndarray | None = None
        self._ranks = ranks_for(self._process_group, self._registry, self._followed.rule)
        if self._ranks is not None:
            self._registry.across = Across(self._ranks)
            self._registry.before_writing = self._ranks.messages.send_last

    def _begin_as(
        self, peer: type[torch.optim.Optimizer], params: Params, settings: Settings, **given: Any
    ) -> None:
        """Start as the optimizer of torch that a class stands for.

        Args:
            peer: The class of torch.
            params: As for ``Optimizer``.
            settings: What it takes besides.
            **given: The arguments of torch's class.

        Raises:
            TypeError: There is no such setting.
            ValueError: A setting is out of range, in torch's words.
        """
        for name in settings.keys() - Settings.__annotations__:
            raise TypeError(f"{type(self).__name__} got an unexpected keyword argument {name!r}")
        # torch's constructor knows what it refuses; older ones lack options, which are off here.
        known = signature(peer).parameters
        theirs = {
            name: value for name, value in given.items() if name in known or value is not False
        }
        defaults = peer([torch.empty(0, 0)], **theirs).defaults
        kind = getattr(rules, peer.__name__)
        if given.get("differentiable"):
            differentiable.check_settings(settings)
        own = plain_settings({f.name: defaults[f.name] for f in fields(kind) if f.name in defaults})
        self._begin(kind(**own), defaults, settings)
        torch.optim.Optimizer.__init__(self, params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs; as in torch, hooks are not copied."""
        if self._process_group not in (None, "world"):
            raise TypeError(
                "an optimizer with a process group cannot be copied; expected one with "
                "process_group='world' or without: make another one and load the state dict"
            )
        kept = "defaults", "param_groups", "_core", "_followed", "_process_group"
        found = {name: vars(self)[name] for name in kept}
        return {**found, "_names": {}, **({"state": self.state} if self._is_differentiable else {})}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what ``__getstate__`` returned."""
        super().__setstate__(state)
        self._connect()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as in torch.

        Raises:
            ValueError: ``names`` was given and has none for a parameter, or torch refuses the
                group.
        """
        params = param_group.get("params") if isinstance(param_group, dict) else None
        if self._names and params is not None and not isinstance(params, set):
            listed = [params] if isinstance(params, torch.Tensor) else list(params)
            if all(isinstance(param, torch.Tensor) for param in listed):
                unknown = [tuple(param.shape) for param in listed if id(param) not in self._names]
                if unknown:
                    raise ValueError(
                        f"names has none for parameters of the shapes {brief(unknown)}; expected a "
                        "name for each: names=model.named_parameters()"
                    )
                listed = [self._names[id(param)] for param in listed]
            # What was listed may have been an iterator.
            param_group = {**param_group, "params": listed}
        super().add_param_group(param_group)

    # The step

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient.

        Args:
            closure: Evaluates the model again and returns the loss, as in torch.

        Returns:
            The loss; None without a closure.

        Raises:
            RuntimeError: A gradient is sparse, and torch's class of this name takes none either.
            TypeError: A gradient is of another dtype or device than its parameter.
            ValueError: A setting is out of range, or ``multiopt.Optimizer.step`` found something
                else wrong. Nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    @exclusive
    def _step(self) -> None:
        if self._ranks is None:
            self._step_here()
        else:
            # What is raised on one rank is raised on all.
            with self._ranks.messages.step():
                self._step_here()

    def _step_here(self) -> None:
        followed, registry = self._followed, self._registry
        before = registry.outcome
        try:
            followed.follow(self.param_groups, registry)
            if self._is_differentiable:
                differentiable.step(followed, self.state)
                return
            if followed.params is not self._placed:
                check_parts(registry, followed.rule, followed.parts, self._ranks)
                if registry.across is not None:
                    registry.across.counts, registry.across.parts = followed.counts, followed.parts
                self._placed = followed.params
            names, params = followed.keys, followed.params
            parts = held(params) if followed.counts else (params, None)
            try:
                registry.step(names, *parts)
            except (TypeError, ValueError):
                dense = without_sparse(followed, params)
                if dense is None:
                    raise
                registry.step(names, params, dense)
        except BaseException as error:
            explain(error, before, registry.outcome, self._guard.torn)
            raise

    # What the last steps did

    @property
    def last(self) -> Report:
        """What the last step did, by name, as ``multiopt.Optimizer.last``."""
        return self._core.last

    @property
    def skips(self) -> dict[str, Skips]:
        """How often each name was skipped, as ``multiopt.Optimizer.skips``."""
        return self._core.skips

    def average(self, name: str) -> torch.Tensor:
        """A copy of the average of a parameter, as ``multiopt.Optimizer.average``."""
        mean: torch.Tensor = self._core.average(name)
        return mean

    # State

    @property
    def _is_differentiable(self) -> bool:
        """Whether steps are part of a graph, and the state a dict as in torch."""
        return bool(self.defaults.get("differentiable"))

    @property  # type: ignore[override]  # a defaultdict in torch
    def state(self) -> MutableMapping[torch.Tensor, Any]:
        """The clocks and the slots, by parameter: live, and what is assigned counts."""
        return vars(self)["state"] if self._is_differentiable else State(self)

    @state.setter
    def state(self, state: Mapping[torch.Tensor, Mapping[str, Any]]) -> None:
        if self._is_differentiable:
            vars(self)["state"] = state
        # The constructor of torch's assigns an empty one before there are parameters.
        elif vars(self).get("param_groups"):
            params = self._stateful()
            self._load({self._followed.key_of(param): state.get(param, {}) for param in params})

    def state_dict(self) -> dict[str, Any]:
        """Return the groups, and the state by the positions of parameters, as in torch.

        Slots are not copies. They are float32 for parameters of 16 bits. State that waits for a
        name which no group has yet is under ``"pending"``.
        """
        if self._is_differentiable:
            return super().state_dict()
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        params = self._stateful()
        self._enter(params)
        number_of = {id(param): number for number, param in enumerate(self._followed.params)}
        groups = []
        for group in self.param_groups:
            numbers = [number_of[id(param)] for param in group["params"]]
            groups.append({**group, "params": numbers})
        states = {number_of[id(param)]: Slots(self, param).now() for param in params}
        found: dict[str, Any] = {"state": states, "param_groups": groups}
        if waiting := self._registry.pending:
            found["pending"] = {name: waiting_state(saved) for name, saved in waiting.items()}
        for changing in self._optimizer_state_dict_post_hooks.values():
            changed = changing(self, found)
            found = found if changed is None else changed
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups and state from a state dict of torch's class or of this one.

        State is found by name if both sides have names, and waits for names that no group has yet;
        otherwise it is found by position, as in torch. Unlike there, slots of parameters of 16 bits
        stay float32.

        Args:
            state_dict: As ``state_dict`` returns it.

        Raises:
            CheckpointError: The state of a parameter is malformed. Nothing has changed.
            ValueError: The groups differ, in torch's words; or state does not fit its parameter.
                Nothing has changed.
        """
        if self._is_differentiable:
            super().load_state_dict(state_dict)
            return
        state_dict = state_dict.copy()
        for changing in self._optimizer_load_state_dict_pre_hooks.values():
            changed = changing(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._followed.look(self.param_groups)
        saved = deepcopy(state_dict["param_groups"])
        key_of = matched(self.param_groups, saved, self._followed.keys)
        groups = []
        for group, new in zip(self.param_groups, saved, strict=True):
            own = {name: group[name] for name in ("params", "param_names") if name in group}
            groups.append({**self.defaults, **new, **own})
        given, waiting = state_dict["state"], state_dict.get("pending", {})
        states = {key: given.get(number) or {} for number, key in key_of.items()}
        self._load({**waiting, **states}, groups)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    @mending
    def _load(
        self, states: Mapping[str, Mapping[str, Any]], groups: list[dict[str, Any]] | None = None
    ) -> None:
        """Replace the state of parameters, and the groups, all of it or nothing.

        Args:
            states: By name the state as torch has it; a parameter without any starts over.
            groups: The new groups of the same parameters; None if they stay.
        """
        followed, registry = self._followed, self._registry
        params = self._named_params()
        rules = followed.rules_in(self.param_groups if groups is None else groups)
        entries, waiting = loaded(registry, states, rules, params)
        placed = registry.placed(entries)
        with registry.guard:
            registry.replace_rows(placed)
            left = {name: saved for name, saved in registry.pending.items() if name not in states}
            registry.pending = {**left, **waiting}
            registry.steps = max([registry.steps, *(entry.step for entry in entries.values())])
            if groups is not None:
                self.param_groups = groups
                registry.guard.torn = None
            followed.forget_settings()
        registry.sweep()

    def _named_params(self) -> dict[str, torch.Tensor]:
        """The parameters by the names that they have in the registry."""
        self._followed.look(self.param_groups)
        return dict(zip(self._followed.keys, self._followed.params, strict=True))

    def _stateful(self) -> list[torch.Tensor]:
        """The parameters that can be updated, or were."""
        named, known = self._named_params(), self._registry
        return [param for key, param in named.items() if param.requires_grad or key in known]

    @exclusive
    def _enter(self, params: Iterable[torch.Tensor]) -> None:
        """Begin the state of parameters that have none: with slots of zero, at the clock 0."""
        followed, registry = self._followed, self._registry
        followed.follow(self.param_groups, registry)
        keys = {followed.key_of(param): here(param) for param in params}
        new = {key: param for key, param in keys.items() if key not in registry}
        if new:
            registry.enter(list(new), np.fromiter(new.values(), object, len(new)))
