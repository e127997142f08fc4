"""``pyro.optim.lr_scheduler``: torch's schedulers, one for each parameter, as in Pyro."""

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
from multiopt.rules.average import Average
from multiopt.state.file_objects import Target

__all__ = ["PyroLRScheduler"]


class PyroLRScheduler(pyro.optim.PyroLRScheduler, PyroOptim):  # type: ignore[misc]  # of params
    """``pyro.optim.PyroLRScheduler``: each parameter has a scheduler, from its first call on.

    Args:
        scheduler_constructor: A class of ``torch.optim.lr_scheduler``.
        optim_args: ``{"optimizer": class of a torch optimizer, "optim_args": its arguments, or a
            callable that gives them for a parameter name}``, and the arguments of the scheduler.
        clip_args: As in ``PyroOptim``.
        on_nonfinite: Likewise.
        max_consecutive_skips: Likewise.
        average: Likewise.

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
        """As in Pyro, which empties the dict that it is given."""
        self.pt_scheduler_constructor = scheduler_constructor
        self.kwargs = dict(optim_args)
        constructor, settings = self.kwargs.pop("optimizer"), self.kwargs.pop("optim_args")
        # Pyro's own ``__init__`` would pass on no more than it knows.
        super(pyro.optim.PyroLRScheduler, self).__init__(
            constructor,
            settings,
            clip_args,
            on_nonfinite=on_nonfinite,
            max_consecutive_skips=max_consecutive_skips,
            average=average,
        )


#: What a scheduler has that only counts and computes.
PLAIN = {NoneType, bool, int, float, str, list, dict, tuple}


def _state(scheduler: Any) -> dict[str, Any]:
    """What a scheduler has of its own."""
    return {name: value for name, value in vars(scheduler).items() if name != "optimizer"}


def _is_plain(value: Any) -> bool:
    """Whether a value is a number, or consists of numbers and words alone."""
    parts = value.values() if isinstance(value, dict) else value
    return type(value) in PLAIN and (
        not isinstance(value, list | dict | tuple) or all(map(_is_plain, parts))
    )


class JointLRScheduler(PyroLRScheduler, JointOptim):  # type: ignore[misc]  # of *args in Pyro
    """One whose parameters are stepped together by multiopt.

    A scheduler of torch moves the settings of each parameter. Those that stand alike fly together:
    torch steps the scheduler of the first one, and the others get its numbers, all at once. Their
    own schedulers catch up before anybody sees them; from then on they are stepped by themselves.
    """

    def _begin(self, *given: Any) -> None:
        super()._begin(*given)
        # By tensor: those that nobody has looked at since they came, those that are stepped by
        # themselves, and the others in their flights, the leader first.
        self._arrived: dict[TensorOptimizer, None] = {}
        self._alone: dict[TensorOptimizer, None] = {}
        self._flights: list[dict[TensorOptimizer, None]] = []

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step every parameter's scheduler.

        Args:
            *args: What torch's scheduler takes: the loss, for ``ReduceLROnPlateau``.
            **kwargs: Likewise.
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
                self._registry.set_numbers([tracked.key for tracked in flight], values)
            if leader.extra != extra:
                for tracked in flight:
                    tracked.extra = dict(leader.extra)
        # The functions that they hold may look at others, which then are by themselves too.
        for tracked in list(self._alone):
            tracked.scheduler.step(*args, **kwargs)

    def _arrange(self) -> None:
        """Let those that have come fly with others that stand alike, or step by themselves."""
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
        """What those have in common that move alike; None for who has to move by itself."""
        state, rule = _state(tracked.scheduler), tracked.rule
        if (
            # Only numbers tell all that a scheduler does, and only torch's own hold nothing else.
            type(tracked.scheduler).__module__ != torch.optim.lr_scheduler.__name__
            or not _is_plain(state)
            # What is set here is not what a rule has if that depends on the clock, or is given.
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
        """Write ``get_state()`` to a file in Pyro's format; a schedule is torch's own state."""
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
                # It sets the first rate, which is no change from somewhere else.
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
        """Refuse the state of a scheduler of another class.

        It does not say its class, and versions of torch differ in what they keep beside: so it must
        have the arguments that this class keeps, and no key, but for private ones, that it does not
        keep.

        Raises:
            CheckpointError: It is that of another.
        """
        kind = self.pt_scheduler_constructor
        arguments = signature(kind).parameters.keys()
        if not isinstance(state, Mapping):
            raise CheckpointError(
                f"the schedule of {label!r} is a {type(state).__name__}; expected the state of a "
                f"{kind.__name__}"
            )
        # A switch may decide what is kept, and the one that was saved wins.
        switches = {k: state[k] for k in arguments if isinstance(state.get(k), bool)}
        # Of two dimensions, since Muon takes no others.
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
        # Schedules first, for those of torch may still fail, and can be put back.
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


#: What older versions of torch keep of every scheduler, and newer ones do not.
OLDER = {"verbose"}


PyroLRScheduler.joint = JointLRScheduler
