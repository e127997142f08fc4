"""The dicts that ``optim_objs`` of the drop-in shows: live views of settings and state.

Reading looks the value up; writing changes what the next step uses, or is an error that says what
to do instead. Nothing is stored in the views themselves.
"""

from collections.abc import Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from multiopt.adapters.pyro.settings import EXECUTION

if TYPE_CHECKING:
    from multiopt.adapters.pyro.joint import JointOptim
    from multiopt.adapters.pyro.tensor import TensorOptimizer

__all__ = ["Group", "Groups", "OptimObjs", "State"]

#: The remedy in messages for users who want a parameter to start from scratch.
START_OVER = "del optim_objs[tensor] to reset it"


class OptimObjs(MutableMapping[torch.Tensor, Any]):
    """The live tensors of an optimizer; a tensor that is deleted starts from scratch."""

    def __init__(self, owner: "JointOptim") -> None:
        """Make a view of an optimizer."""
        self._owner = owner

    def __getitem__(self, tensor: torch.Tensor) -> Any:
        """The ``TensorOptimizer`` or scheduler of a tensor; state that waits is loaded first."""
        tracked = self._tracked(tensor)
        if not self._owner._guard.busy:
            self._owner._load_waiting([tracked])
        return self._owner._object(tracked)

    def __setitem__(self, tensor: torch.Tensor, value: Any) -> NoReturn:
        """Raise an error: entries are made when a tensor is first seen."""
        raise TypeError(
            "optim_objs does not accept optimizers: its entries are made at first sight; change "
            f"their param_groups and state, or {START_OVER}"
        )

    def __delitem__(self, tensor: torch.Tensor) -> None:
        """Forget a tensor, and any loaded state that waits for it but does not fit it."""
        self._owner._start_over(self._tracked(tensor))

    def pop(self, tensor: torch.Tensor, *default: Any) -> Any:
        """Forget a tensor and return its value; loaded state that fits keeps waiting."""
        if tensor not in self and default:
            return default[0]
        optimizer = self._owner._object(self._tracked(tensor))
        del self[tensor]
        return optimizer

    def clear(self) -> None:
        """Forget all tensors."""
        # MutableMapping's own would read each value, which loads the state that waits.
        for tensor in self:
            del self[tensor]

    def _tracked(self, tensor: torch.Tensor) -> "TensorOptimizer":
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
        """The number of tensors."""
        return len(self._owner._tensors)


class Groups(list["Group"]):
    """The list of a tensor's only group, which can be changed but not replaced."""

    @staticmethod
    def refuse(*_: Any, **__: Any) -> NoReturn:
        """Raise an error: the list itself cannot be changed."""
        raise TypeError(
            "param_groups is the one group of one tensor; expected changes of its settings: "
            "param_groups[0].update(...)"
        )

    __setitem__ = __delitem__ = __iadd__ = __imul__ = refuse
    append = extend = insert = pop = remove = clear = sort = reverse = refuse


class _View(MutableMapping[Any, Any]):
    """A live view of one tensor."""

    def __init__(self, tracked: "TensorOptimizer") -> None:
        """Make a view of a tensor's settings or state."""
        self._tracked = tracked

    def __len__(self) -> int:
        """The number of keys."""
        return len(list(iter(self)))

    def __repr__(self) -> str:
        """The text of a dict with the current values."""
        return repr(dict(self))


class Group(_View):
    """The current settings of a tensor; writing one changes its rule.

    Other keys are kept, as in torch: schedulers store their own numbers here, and users their tags.
    """

    def __getitem__(self, name: str) -> Any:
        """A setting; if the user passed an object that can change, it is that object."""
        tensor = self._tracked.alive
        if name == "params":
            return (tensor,)
        for values in (self._tracked.extra, self._tracked.given):
            if name in values:
                return values[name]
        return self._tracked.settings()[name]

    def __setitem__(self, name: str, value: Any) -> None:
        """Change a setting from the next step on.

        Raises:
            TypeError: The setting cannot be changed.
            ValueError: The value is out of range.
        """
        if name == "params":
            raise TypeError("the tensor of a group cannot be changed; call the optimizer with it")
        if name == "differentiable" and value:
            raise ValueError(
                "differentiable=True: the update is not part of an autograd graph here; use "
                "torch.optim"
            )
        if name in EXECUTION or name not in self._tracked.settings():
            self._tracked.extra[name] = value
        else:
            self._tracked.change(name, value)

    def __delitem__(self, name: str) -> None:
        """Delete a key that is not a setting.

        Raises:
            KeyError: There is no such key.
            TypeError: The key is a setting.
        """
        if name not in self:
            raise KeyError(name)
        if name not in self._tracked.extra or name in EXECUTION:
            raise TypeError(f"{name!r} is a setting, which cannot be deleted: set it")
        del self._tracked.extra[name]

    def __iter__(self) -> Iterator[str]:
        """The names of the settings and the other keys."""
        self._tracked.alive  # noqa: B018 -- raises if it is gone
        return iter(dict.fromkeys([*self._tracked.settings(), *self._tracked.extra, "params"]))


class State(_View):
    """The state of one tensor, keyed by that tensor, as ``torch.optim.Optimizer.state``.

    Clearing it makes the parameter start from scratch, as in torch.
    """

    def __getitem__(self, tensor: torch.Tensor) -> "Slots":
        """The clock and the slots of the tensor; empty before the first step."""
        if tensor is not self._tracked.alive:
            raise KeyError(tensor)
        return Slots(self._tracked)

    def __setitem__(self, tensor: torch.Tensor, values: Mapping[str, Any]) -> None:
        """Replace the clock and the slots of the tensor."""
        slots = self[tensor]
        if not values:
            slots.clear()
        else:
            group = {**self._tracked.settings(), **self._tracked.extra, "params": [0]}
            self._tracked.load_state_dict({"state": {0: dict(values)}, "param_groups": [group]})

    def __delitem__(self, tensor: torch.Tensor) -> None:
        """Make the parameter start from scratch."""
        self[tensor].clear()

    def clear(self) -> None:
        """Make the parameter start from scratch."""
        self[self._tracked.alive].clear()

    def __iter__(self) -> Iterator[torch.Tensor]:
        """The tensor, if it has any state."""
        tensor = self._tracked.alive
        return iter([tensor] if self[tensor] else [])


class Slots(_View):
    """The clock and the slots of a tensor under torch's names; the slots are not copies."""

    def _now(self) -> dict[str, Any]:
        self._tracked.alive  # noqa: B018 -- raises if it is gone
        return self._tracked.values()

    def __getitem__(self, name: str) -> Any:
        """A slot, the clock, or a number that follows from the clock and the settings."""
        return self._now()[name]

    def __setitem__(self, name: str, value: Any) -> None:
        """Write to a slot or the clock, with the checks of ``TensorOptimizer.write``."""
        self._tracked.write(name, value)

    def __delitem__(self, name: str) -> None:
        """Raise an error: the state would be incomplete."""
        if name not in self:
            raise KeyError(name)
        raise TypeError(
            f"the state of {self._tracked.key!r} needs {name!r}: set it, clear the state, or "
            f"{START_OVER}"
        )

    def clear(self) -> None:
        """Make the parameter start from scratch."""
        self._tracked.clear_state()

    def __iter__(self) -> Iterator[str]:
        """The names of the clock and the slots."""
        return iter(self._now())
