"""``pyro.optim.lr_scheduler``: torch's schedulers, one for each parameter, as in Pyro."""

from collections.abc import Collection, Mapping, MutableMapping
from copy import deepcopy
from inspect import signature
from typing import Any

import pyro.optim
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from multiopt.adapters.pyro.optim import JointOptim, PyroOptim, Settings, _Tracked, has_rule
from multiopt.errors import CheckpointError
from multiopt.exclusive import check_free
from multiopt.file_objects import Target

__all__ = ["PyroLRScheduler"]


class PyroLRScheduler(pyro.optim.PyroLRScheduler, PyroOptim):
    """``pyro.optim.PyroLRScheduler``: each parameter has a scheduler, from its first call on.

    Args:
        scheduler_constructor: A class of ``torch.optim.lr_scheduler``.
        optim_args: ``{"optimizer": class of a torch optimizer, "optim_args": its arguments, or a
            callable that gives them for a parameter name}``, and the arguments of the scheduler.
        clip_args: As in ``PyroOptim``.

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

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Choose who steps."""
        chosen = cls
        if cls is PyroLRScheduler and (args or kwargs):
            given = signature(cls.__init__).bind(None, *args, **kwargs).arguments
            settings = given["optim_args"]
            if has_rule(settings["optimizer"], settings["optim_args"]):
                chosen = JointLRScheduler
        return super().__new__(chosen)

    def __init__(
        self,
        scheduler_constructor: Any,
        optim_args: dict[str, Any],
        clip_args: Any = None,
    ) -> None:
        """As in Pyro, which empties the dict that it is given."""
        super().__init__(scheduler_constructor, dict(optim_args), clip_args)


class JointLRScheduler(PyroLRScheduler, JointOptim):  # type: ignore[misc]  # of *args in Pyro
    """One whose parameters are stepped together by multiopt.

    A scheduler of torch moves the settings of each parameter.
    """

    def __init__(
        self,
        scheduler_constructor: Any,
        optim_args: dict[str, Any],
        clip_args: Settings | None = None,
    ) -> None:
        """As ``PyroLRScheduler``."""
        self._schedulers: MutableMapping[torch.Tensor, Any] = WeakTensorKeyDictionary()
        super().__init__(scheduler_constructor, optim_args, clip_args)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step every parameter's scheduler.

        Args:
            *args: What torch's scheduler takes: the loss, for ``ReduceLROnPlateau``.
            **kwargs: Likewise.
        """
        check_free(self, "a scheduler's step")
        self._collects = True
        try:
            super().step(*args, **kwargs)
        finally:
            self._take_changes()

    def save(self, filename: Target) -> None:
        """Write ``get_state()`` to a file in Pyro's format; a schedule is torch's own state."""
        self._stored_or_warn()
        file: Any = filename
        torch.save(self.get_state(), file)

    def _arguments(self) -> tuple[Any, ...]:
        constructor, optim_args, clip_args = super()._arguments()
        settings = {"optimizer": constructor, "optim_args": optim_args, **self.kwargs}
        return self.pt_scheduler_constructor, settings, clip_args

    def _track(self, tensor: torch.Tensor) -> _Tracked:
        tracked = super()._track(tensor)
        if tensor not in self._schedulers:
            try:
                scheduler = self.pt_scheduler_constructor(self._stand_in(tensor), **self.kwargs)
            except BaseException:
                self._forget(tensor)
                raise
            self._schedulers[tensor] = scheduler
        return tracked

    def _object(self, tensor: torch.Tensor) -> Any:
        return self._schedulers[tensor]

    def _forget(self, tensor: torch.Tensor) -> None:
        super()._forget(tensor)
        self._schedulers.pop(tensor, None)

    # State

    def _describe(self, tensor: torch.Tensor) -> dict[str, Any]:
        scheduler = deepcopy(self._schedulers[tensor].state_dict())
        return {**super()._describe(tensor), "scheduler": scheduler}

    def _to_torch(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        scheduler = deepcopy(stored["scheduler"])
        return {"scheduler": scheduler, "optimizer": super()._to_torch(stored)}

    def _wait(self, loaded: dict[str, dict[str, Any]], steps: int | None = None) -> None:
        for label, stored in loaded.items():
            if "scheduler" not in stored:
                raise CheckpointError(f"the state of {label!r} is not that of a scheduler")
            self._check_schedule(label, stored["scheduler"])
        super()._wait(loaded, steps)

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

    def _take(self, loaded: Collection[tuple[torch.Tensor, Mapping[str, Any]]]) -> None:
        # Schedules first, for those of torch may still fail, and can be put back.
        schedulers = [self._schedulers[tensor] for tensor, _ in loaded]
        before = [dict(vars(scheduler)) for scheduler in schedulers]
        try:
            for scheduler, (tensor, stored) in zip(schedulers, loaded, strict=True):
                if "scheduler" in stored:
                    self._load_schedule(scheduler, tensor, stored["scheduler"])
            super()._take(loaded)
        except BaseException:
            for scheduler, attributes in zip(schedulers, before, strict=True):
                vars(scheduler).clear()
                vars(scheduler).update(attributes)
            raise

    def _load_schedule(self, scheduler: Any, tensor: torch.Tensor, state: Any) -> None:
        try:
            scheduler.load_state_dict(deepcopy(state))
        except Exception as error:  # of any kind: classes may be users' own
            raise CheckpointError(
                f"the schedule of {self._tracked[tensor].key!r} is not one that "
                f"{type(scheduler).__name__} loads ({type(error).__name__}: {error})"
            ) from error


#: What older versions of torch keep of every scheduler, and newer ones do not.
OLDER = {"verbose"}
