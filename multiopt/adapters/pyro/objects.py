"""What ``optim_objs`` of the Pyro drop-in gives: live views in the place of torch optimizers.

What is read here is what the next step uses, and what is written here is what it will use; what
cannot be written is an error that says what to do instead.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import proxy, ref

import torch

from multiopt.adapters.pyro.settings import EXECUTION
from multiopt.adapters.pyro.tracking import Tracked
from multiopt.adapters.torch_state import parameter_to_torch, scalar, whole_number

if TYPE_CHECKING:
    from multiopt.adapters.pyro.optim import JointOptim

__all__ = ["Clocks", "OptimObjs", "TensorOptimizer"]

#: What helps who wants a parameter to begin again.
START_ANEW = "del optim_objs[tensor] to start it anew"


class OptimObjs(MutableMapping[torch.Tensor, Any]):
    """The live tensors of an optimizer; deleting one makes it start anew."""

    def __init__(self, owner: "JointOptim") -> None:
        """Look at an optimizer."""
        self._owner = owner

    def __getitem__(self, tensor: torch.Tensor) -> Any:
        """What stands for the torch optimizer of a tensor, or its scheduler, loaded state taken."""
        tracked = self._tracked(tensor)
        if not self._owner._guard.busy:
            self._owner._settle([tracked])
        return self._owner._object(tracked)

    def __setitem__(self, tensor: torch.Tensor, value: Any) -> NoReturn:
        """Refuse."""
        raise TypeError(
            "optim_objs takes no optimizers: its entries are made at first sight; change their "
            f"param_groups and state, or {START_ANEW}"
        )

    def __delitem__(self, tensor: torch.Tensor) -> None:
        """Forget a tensor, with loaded state that waits for it and does not fit it."""
        self._owner._start_anew(self._tracked(tensor))

    def pop(self, tensor: torch.Tensor, *default: Any) -> Any:
        """Forget a tensor; loaded state that fits waits on."""
        if tensor not in self and default:
            return default[0]
        found = self._owner._object(self._tracked(tensor))
        del self[tensor]
        return found

    def clear(self) -> None:
        """Forget all tensors."""
        # That of MutableMapping would look at each, which takes the loaded state that waits.
        for tensor in self:
            del self[tensor]

    def _tracked(self, tensor: torch.Tensor) -> Tracked:
        tracked = self._owner._tensors.get(tensor)
        if tracked is None:
            raise KeyError(tensor)
        return tracked

    def __contains__(self, tensor: object) -> bool:
        """Whether a tensor has been presented."""
        return isinstance(tensor, torch.Tensor) and self._owner._tensors.get(tensor) is not None

    def __iter__(self) -> Iterator[torch.Tensor]:
        """The tensors."""
        return iter([tracked.alive for tracked in self._owner._tensors])

    def __len__(self) -> int:
        """How many there are."""
        return len(self._owner._tensors)


class TensorOptimizer(torch.optim.Optimizer):
    """The part of ``torch.optim.Optimizer`` that users of ``optim_objs`` and schedulers touch.

    It holds neither the optimizer that it is of nor its tensor.
    """

    #: Torch's schedulers warn if they move before it: there is no view of what was never called.
    _opt_called = True

    def __init__(self, owner: "JointOptim", tracked: Tracked) -> None:
        """Look at one tensor of an optimizer."""
        # Without torch's own, which would make a state and groups of its own.
        self._owner: Any = proxy(owner)
        self._tracked = tracked
        self._groups = Groups([Group(self._owner, tracked)])

    @property
    def param_groups(self) -> Any:
        """The one group, of the settings as they are now; setting one counts from the next step."""
        return self._groups

    @param_groups.setter
    def param_groups(self, groups: Any) -> NoReturn:
        Groups.refuse()

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]  # likewise
        """The settings as they are now; they would be those of other tensors, which do not come."""
        return dict(self._owner._group(self._tracked))

    @property
    def state(self) -> Any:
        """The clock and the slots, by tensor."""
        return State(self._owner, self._tracked)

    @state.setter
    def state(self, state: Any) -> None:
        if state:
            self.state.update(state)
        else:
            self.state.clear()

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.Optimizer.state_dict``: copies."""
        self._tracked.alive  # noqa: B018 -- raises if it is gone
        self._owner._follow_if_free()
        return parameter_to_torch(self._owner._constructor, self._owner._describe(self._tracked))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As ``torch.optim.Optimizer.load_state_dict``."""
        self._tracked.alive  # noqa: B018 -- likewise
        self._owner._load(self._tracked, state_dict)

    def add_param_group(self, param_group: Any) -> NoReturn:
        """Refuse."""
        raise TypeError("this is an optimizer of one tensor; call the whole one with the tensors")

    def step(self) -> None:  # type: ignore[override]
        """A step of this tensor alone, clipped as ever."""
        self._owner([self._tracked.alive])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradient, or replace it by zeros."""
        tensor = self._tracked.alive
        if set_to_none:
            tensor.grad = None
        elif tensor.grad is not None:
            tensor.grad = torch.zeros_like(tensor.grad)


class Groups(list["Group"]):
    """The groups of one tensor: one, which can be changed and not replaced."""

    @staticmethod
    def refuse(*_: Any, **__: Any) -> NoReturn:
        """Refuse a change of the list."""
        raise TypeError(
            "param_groups is the one group of one tensor; expected changes of its settings: "
            "param_groups[0].update(...)"
        )

    __setitem__ = __delitem__ = __iadd__ = __imul__ = refuse
    append = extend = insert = pop = remove = clear = sort = reverse = refuse


class Group(MutableMapping[str, Any]):
    """The settings of a tensor as they are now; writing one changes its rule.

    What is no setting is kept, as in torch: schedulers put their own numbers here, and users tags.
    """

    def __init__(self, owner: Any, tracked: Tracked) -> None:
        """Look at one tensor of an optimizer."""
        self._owner = owner
        self._tracked = tracked

    def __getitem__(self, name: str) -> Any:
        """A setting; the caller's own object, if he gave one that may change."""
        tensor = self._tracked.alive
        if name == "params":
            return (tensor,)
        for known in (self._tracked.extra, self._tracked.given):
            if name in known:
                return known[name]
        return self._owner._group(self._tracked)[name]

    def __setitem__(self, name: str, value: Any) -> None:
        """Change a setting from the next step on.

        Raises:
            TypeError: It cannot be changed.
            ValueError: The value is out of range.
        """
        if name == "params":
            raise TypeError("the tensor of a group cannot be changed; call the optimizer with it")
        if name == "differentiable" and value:
            raise ValueError(
                "differentiable=True: the update is not part of an autograd graph here; use "
                "torch.optim"
            )
        if name in EXECUTION or name not in self._owner._group(self._tracked):
            self._tracked.extra[name] = value
        else:
            self._owner._change(self._tracked, name, value)

    def __delitem__(self, name: str) -> None:
        """Delete what is no setting.

        Raises:
            KeyError: There is nothing of this name.
            TypeError: It is a setting.
        """
        if name not in self:
            raise KeyError(name)
        if name not in self._tracked.extra or name in EXECUTION:
            raise TypeError(f"{name!r} is a setting, which cannot be deleted: set it")
        del self._tracked.extra[name]

    def __iter__(self) -> Iterator[str]:
        """The names of the settings."""
        self._tracked.alive  # noqa: B018 -- raises if it is gone
        settings = self._owner._group(self._tracked)
        return iter(dict.fromkeys([*settings, *self._tracked.extra, "params"]))

    def __len__(self) -> int:
        """How many there are."""
        return len(list(iter(self)))

    def __repr__(self) -> str:
        """As a dict."""
        return repr(dict(self))


class State(MutableMapping[torch.Tensor, Any]):
    """The state of one tensor, by that tensor, as ``torch.optim.Optimizer.state``.

    To empty it makes the parameter begin again, as it does torch's optimizers.
    """

    def __init__(self, owner: Any, tracked: Tracked) -> None:
        """Look at one tensor of an optimizer."""
        self._owner = owner
        self._tracked = tracked

    def __getitem__(self, tensor: torch.Tensor) -> "Slots":
        """Its clock and its slots, empty before the first step."""
        if tensor is not self._tracked.alive:
            raise KeyError(tensor)
        return Slots(self._owner, self._tracked)

    def __setitem__(self, tensor: torch.Tensor, values: Mapping[str, Any]) -> None:
        """Take the place of its clock and its slots."""
        slots = self[tensor]
        if not values:
            slots.clear()
        else:
            group = {**self._owner._group(self._tracked), **self._tracked.extra, "params": [0]}
            state = {"state": {0: dict(values)}, "param_groups": [group]}
            self._owner._load(self._tracked, state)

    def __delitem__(self, tensor: torch.Tensor) -> None:
        """Let it begin again."""
        self[tensor].clear()

    def clear(self) -> None:
        """Let it begin again."""
        self[self._tracked.alive].clear()

    def __iter__(self) -> Iterator[torch.Tensor]:
        """The tensor, if there is anything of it."""
        tensor = self._tracked.alive
        return iter([tensor] if self[tensor] else [])

    def __len__(self) -> int:
        """1 if there is anything of the tensor."""
        return len(list(iter(self)))

    def __repr__(self) -> str:
        """As a dict."""
        return repr(dict(self))


class Slots(MutableMapping[str, Any]):
    """The clock and the slots of a tensor, under torch's names; the slots are those in memory."""

    def __init__(self, owner: Any, tracked: Tracked) -> None:
        """Look at one tensor of an optimizer."""
        self._owner = owner
        self._tracked = tracked

    def _now(self) -> dict[str, Any]:
        self._tracked.alive  # noqa: B018 -- raises if it is gone
        now: dict[str, Any] = self._owner._state_now(self._tracked)
        return now

    def __getitem__(self, name: str) -> Any:
        """A slot, the clock, or a number that follows from clock and settings."""
        return self._now()[name]

    def __setitem__(self, name: str, value: Any) -> None:
        """Write a slot or the clock.

        Raises:
            KeyError: There is no such slot.
            TypeError: It is a number that follows from others.
            ValueError: The value does not fit.
        """
        self._owner._set_state(self._tracked, name, value)

    def __delitem__(self, name: str) -> None:
        """Refuse to leave half a state."""
        if name not in self:
            raise KeyError(name)
        raise TypeError(
            f"the state of {self._tracked.key!r} needs {name!r}: set it, clear the state, or "
            f"{START_ANEW}"
        )

    def clear(self) -> None:
        """Let the parameter begin again."""
        self._owner._clear_state(self._tracked)

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._now())

    def __len__(self) -> int:
        """How many there are."""
        return len(self._now())

    def __repr__(self) -> str:
        """As a dict."""
        return repr(self._now())


class Clocks:
    """Clocks as torch shows them: tensors, which the next call reads if they were written."""

    def __init__(self) -> None:
        """Show none."""
        # A tensor that nobody holds any more cannot be written.
        self._shown: dict[Tracked, tuple[ref[torch.Tensor], int]] = {}

    def shown(self, tracked: Tracked, step: int) -> torch.Tensor:
        """The clock of a tensor, one object for as long as anybody holds it."""
        known = self._shown.get(tracked)
        clock = None if known is None else known[0]()
        if clock is None:
            clock = scalar(step)
            self._shown[tracked] = ref(clock), step
        return clock

    def written(self) -> dict[Tracked, int]:
        """The clocks that were written, and what they say now."""
        found = {}
        for tracked, (held, step) in list(self._shown.items()):
            clock = held()
            if clock is None or tracked.tensor is None:
                del self._shown[tracked]
            elif clock.item() != step:
                found[tracked] = whole_number(clock)
        return found

    def say(self, tracked: Tracked, step: int) -> None:
        """Let a clock that is shown say how many steps were taken."""
        clock = self._shown[tracked][0]() if tracked in self._shown else None
        if clock is not None:
            clock.fill_(step)
            self._shown[tracked] = ref(clock), step

    def say_all(self, step_of: Callable[[Tracked], int]) -> None:
        """The same of all that are shown, after a call."""
        for tracked in list(self._shown):
            if tracked.tensor is not None:
                self.say(tracked, step_of(tracked))
