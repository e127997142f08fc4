"""``pyro.optim.lr_scheduler``: one of torch's schedulers for each parameter, as in Pyro.

A thousand schedulers in the same state all do the same, so ``JointLRScheduler`` groups them in
*flights*: torch steps the first scheduler of a flight, and its numbers go to all members at once.
"""

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from copy import deepcopy
from inspect import signature
from types import NoneType
from typing import Any, Literal

import pyro.optim
import torch

from multiopt.adapters.pyro.constructors import Settings
from multiopt.adapters.pyro.joint import JointOptim
from multiopt.adapters.pyro.optim import PyroOptim
from multiopt.adapters.pyro.settings import differing, has_schedule
from multiopt.adapters.pyro.tensor import TensorOptimizer
from multiopt.errors import CheckpointError
from multiopt.hyperparameters import set_numbers
from multiopt.rules.average import Average
from multiopt.state.file_objects import Target

__all__ = ["PyroLRScheduler"]


class PyroLRScheduler(pyro.optim.PyroLRScheduler, PyroOptim):  # type: ignore[misc]  # of params
    """``pyro.optim.PyroLRScheduler``: each parameter gets a scheduler when it is first seen.

    Args:
        scheduler_constructor: A class of ``torch.optim.lr_scheduler``.
        optim_args: ``{"optimizer": class of a torch optimizer, "optim_args": its arguments, or a
            callable that returns them for a parameter name}``, and the scheduler's arguments.
        clip_args: Clipping of gradients, as for ``PyroOptim``.
        on_nonfinite: What to do about gradients that are not finite, as for ``PyroOptim``.
        max_consecutive_skips: How often in a row a name may be skipped, as for ``PyroOptim``.
        average: The average to keep of each parameter, as for ``PyroOptim``.

    >>> import torch
    >>> import multiopt.adapters.pyro as optim
    >>> settings = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1.0}, "gamma": 0.5}
    >>> scheduler = optim.ExponentialLR(settings)
    >>> loc = torch.zeros(2, requires_grad=True)
    >>> for epoch in range(2):
    ...     loc.grad = torch.ones(2)
    ...     scheduler([loc])
    ...     scheduler.step()
    >>> loc.tolist()
    [-1.5, -1.5]
    """

    @classmethod
    def _ruled_by(cls, given: Mapping[str, Any]) -> tuple[Any, Any]:
        return given["optim_args"]["optimizer"], given["optim_args"]["optim_args"]

    def __init__(
        self,
        scheduler_constructor: Any,
        optim_args: dict[str, Any],
        clip_args: Settings | None = None,
        *,
        on_nonfinite: Literal["propagate", "raise", "skip"] = "propagate",
        max_consecutive_skips: int | None = None,
        average: Average | Callable[[str], Average | None] | None = None,
    ) -> None:
        """Like Pyro's, except that the dict that is passed is not emptied."""
        self.pt_scheduler_constructor = scheduler_constructor
        self.kwargs = dict(optim_args)
        constructor, settings = self.kwargs.pop("optimizer"), self.kwargs.pop("optim_args")
        # Pyro's own ``__init__`` would not pass on the additional arguments.
        super(pyro.optim.PyroLRScheduler, self).__init__(
            constructor,
            settings,
            clip_args,
            on_nonfinite=on_nonfinite,
            max_consecutive_skips=max_consecutive_skips,
            average=average,
        )


#: The types of attributes in a scheduler whose state is only numbers.
PLAIN = {NoneType, bool, int, float, str, list, dict, tuple}


def _state(scheduler: Any) -> dict[str, Any]:
    """The attributes of a scheduler, except for its optimizer."""
    return {name: value for name, value in vars(scheduler).items() if name != "optimizer"}


def _is_plain(value: Any) -> bool:
    """Whether a value consists of numbers and strings only."""
    parts = value.values() if isinstance(value, dict) else value
    return type(value) in PLAIN and (
        not isinstance(value, list | dict | tuple) or all(map(_is_plain, parts))
    )


class JointLRScheduler(PyroLRScheduler, JointOptim):  # type: ignore[misc]  # of *args in Pyro
    """A ``PyroLRScheduler`` whose parameters multiopt steps together.

    Tensors with the same rule and the same scheduler state form a flight: torch steps the scheduler
    of the first one, and the others get its numbers all at once. When the user asks for the
    scheduler of a member, it catches up, leaves the flight, and is stepped by itself from then on.
    """

    def _begin(self, *given: Any) -> None:
        super()._begin(*given)
        # Tensors not yet assigned to a flight, those that are stepped by themselves, and the
        # flights, each with its leader first.
        self._arrived: dict[TensorOptimizer, None] = {}
        self._alone: dict[TensorOptimizer, None] = {}
        self._flights: list[dict[TensorOptimizer, None]] = []

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step every parameter's scheduler.

        Args:
            *args: The arguments of torch's scheduler, such as the loss for ``ReduceLROnPlateau``.
            **kwargs: Its keyword arguments.
        """
        self._guard.check("a scheduler's step")
        self._load_waiting(self._tensors)
        if self._arrived:
            self._arrange()
        for flight in self._flights:
            leader = next(iter(flight))
            before, extra = leader.rule, dict(leader.extra)
            leader.scheduler.step(*args, **kwargs)
            if values := differing(leader.rule, before):
                set_numbers(self._registry, [tracked.key for tracked in flight], values)
            if leader.extra != extra:
                for tracked in flight:
                    tracked.extra = dict(leader.extra)
        # The functions they hold may ask for other schedulers, which then join those alone.
        for tracked in list(self._alone):
            tracked.scheduler.step(*args, **kwargs)

    def _arrange(self) -> None:
        """Assign tensors that have arrived to flights, or to those that are stepped alone."""
        flights = {self._standing(next(iter(flight))): flight for flight in self._flights}
        for tracked in self._arrived:
            standing = self._standing(tracked)
            if standing is None:
                self._alone[tracked] = None
            else:
                if standing not in flights:
                    flights[standing] = {}
                    self._flights.append(flights[standing])
                tracked.flight = flights[standing]
                tracked.flight[tracked] = None
        self._arrived = {}

    def _standing(self, tracked: TensorOptimizer) -> Hashable | None:
        """A key that is equal for tensors that may share a flight; None for one that may not."""
        state, rule = _state(tracked.scheduler), tracked.rule
        if (
            # Only if its state is all numbers do they determine what a scheduler will do, and only
            # torch's own classes are known to have no other state.
            type(tracked.scheduler).__module__ != torch.optim.lr_scheduler.__name__
            or not _is_plain(state)
            # A rule's number is not the one set here if it depends on the clock or on the user's
            # own object.
            or tracked.given
            or getattr(rule, "lrd", 1.0) != 1.0
            or has_schedule(rule)
        ):
            return None
        return rule, repr(state), repr(tracked.extra)

    def _leave(self, tracked: TensorOptimizer) -> None:
        """Take a tensor out of its flight."""
        self._arrived.pop(tracked, None)
        self._alone.pop(tracked, None)
        if (flight := tracked.flight) is None:
            return
        leader = next(iter(flight))
        del flight[tracked]
        tracked.flight = None
        self._flights = [flight for flight in self._flights if flight]
        behind = next(iter(flight), None) if tracked is leader else tracked
        if behind is not None:
            vars(behind.scheduler).update(deepcopy(_state(leader.scheduler)))

    def _forget(self, tensors: Iterable[TensorOptimizer]) -> None:
        tensors = list(tensors)
        for tracked in tensors:
            self._leave(tracked)
        super()._forget(tensors)

    def save(self, filename: Target) -> None:
        """Write ``get_state()`` to a file in Pyro's format, which can hold torch's schedules."""
        self._states_or_warn()
        file: Any = filename
        torch.save(self.get_state(), file)

    def _call_text(self) -> str:
        return f"{self.pt_scheduler_constructor.__name__} over {super()._call_text()}"

    def _arguments(self) -> tuple[Any, ...]:
        constructor, optim_args, clip_args = super()._arguments()
        settings = {"optimizer": constructor, "optim_args": optim_args, **self.kwargs}
        return self.pt_scheduler_constructor, settings, clip_args

    def _first_sight(self, tensors: Iterable[torch.Tensor]) -> list[TensorOptimizer]:
        met = super()._first_sight(tensors)
        try:
            for tracked in met:
                # It sets the first rate; that is not a reentrant change by the user.
                self._guard.busy = False
                tracked.scheduler = self.pt_scheduler_constructor(tracked, **self.kwargs)
                self._guard.busy = True
                self._arrived[tracked] = None
        except BaseException:
            self._forget(met)
            raise
        return met

    def _object(self, tracked: TensorOptimizer) -> Any:
        self._leave(tracked)
        self._alone[tracked] = None
        return tracked.scheduler

    # State

    def _describe(self, tracked: TensorOptimizer) -> dict[str, Any]:
        leader = tracked if tracked.flight is None else next(iter(tracked.flight))
        scheduler = deepcopy(leader.scheduler.state_dict())
        return {**super()._describe(tracked), "scheduler": scheduler}

    def _to_torch(self, state: Mapping[str, Any]) -> dict[str, Any]:
        scheduler = deepcopy(state["scheduler"])
        return {"scheduler": scheduler, "optimizer": super()._to_torch(state)}

    def _set_waiting(self, loaded: dict[str, dict[str, Any]], steps: int | None = None) -> None:
        for label, state in loaded.items():
            if "scheduler" not in state:
                raise CheckpointError(f"the state of {label!r} is not that of a scheduler")
            self._check_schedule(label, state["scheduler"])
        super()._set_waiting(loaded, steps)

    def _check_schedule(self, label: str, state: Any) -> None:
        """Raise an error for the state of a scheduler of another class.

        A state does not name its class, and versions of torch keep different additional keys. So it
        must have the arguments that this class keeps, and no other keys except private ones.

        Raises:
            CheckpointError: It is the state of another class.
        """
        kind = self.pt_scheduler_constructor
        arguments = signature(kind).parameters.keys()
        if not isinstance(state, Mapping):
            raise CheckpointError(
                f"the schedule of {label!r} is a {type(state).__name__}; expected the state of a "
                f"{kind.__name__}"
            )
        # A switch may decide which keys there are, and the saved one counts.
        switches = {k: state[k] for k in arguments if isinstance(state.get(k), bool)}
        # Muon only accepts tensors of two dimensions.
        stand_in = self._constructor([torch.empty(0, 0)])
        kept = kind(stand_in, **{**self.kwargs, **switches}).state_dict().keys()
        missing = sorted((kept & arguments) - state.keys())
        foreign = sorted(k for k in state.keys() - kept - OLDER if not str(k).startswith("_"))
        if missing or foreign:
            raise CheckpointError(
                f"the schedule of {label!r} is not that of a {kind.__name__}: expected the keys "
                f"{sorted(k for k in kept if not k.startswith('_'))}; got {foreign} besides and "
                f"none for {missing}"
            )

    def _load_states(self, loaded: Collection[tuple[TensorOptimizer, Mapping[str, Any]]]) -> None:
        # Schedules first: torch's may still fail, and they can be restored.
        for tracked, _ in loaded:
            if tracked not in self._alone:
                self._leave(tracked)
                self._arrived[tracked] = None
        schedulers = [tracked.scheduler for tracked, _ in loaded]
        before = [dict(vars(scheduler)) for scheduler in schedulers]
        try:
            for tracked, state in loaded:
                if "scheduler" in state:
                    self._load_schedule(tracked, state["scheduler"])
            super()._load_states(loaded)
        except BaseException:
            for scheduler, attributes in zip(schedulers, before, strict=True):
                vars(scheduler).clear()
                vars(scheduler).update(attributes)
            raise

    def _load_schedule(self, tracked: TensorOptimizer, state: Any) -> None:
        try:
            tracked.scheduler.load_state_dict(deepcopy(state))
        except Exception as error:  # of any kind: classes may be users' own
            raise CheckpointError(
                f"the schedule of {tracked.key!r} is not one that "
                f"{type(tracked.scheduler).__name__} loads ({type(error).__name__}: {error})"
            ) from error


#: Keys that only older versions of torch keep for every scheduler.
OLDER = {"verbose"}


PyroLRScheduler.joint = JointLRScheduler
