"""What ``optim_objs`` of the Pyro drop-in gives: views in the place of torch optimizers."""

from collections.abc import Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import proxy

import torch
from torch.utils.weak import TensorWeakRef

from multiopt.adapters.torch_state import SCHEDULED, parameter_to_torch

if TYPE_CHECKING:
    from multiopt.adapters.pyro.optim import JointOptim

__all__ = ["Group", "OptimObjs", "TensorOptimizer"]


class OptimObjs(MutableMapping[torch.Tensor, Any]):
    """The live tensors of an optimizer; deleting one makes it start anew."""

    def __init__(self, owner: "JointOptim") -> None:
        """Look at an optimizer."""
        self._owner = owner

    def __getitem__(self, tensor: torch.Tensor) -> Any:
        """What stands for the torch optimizer of a tensor, or its scheduler, loaded state taken."""
        if tensor not in self._owner._tracked:
            raise KeyError(tensor)
        if not self._owner._changing:
            self._owner._settle([tensor])
        return self._owner._object(tensor)

    def __setitem__(self, tensor: torch.Tensor, value: Any) -> NoReturn:
        """Refuse."""
        raise TypeError("optim_objs takes no optimizers: its entries are made at first sight")

    def __delitem__(self, tensor: torch.Tensor) -> None:
        """Forget a tensor, with loaded state that waits for it and does not fit it."""
        if tensor not in self._owner._tracked:
            raise KeyError(tensor)
        self._owner._start_anew(tensor)

    def clear(self) -> None:
        """Forget all tensors."""
        # That of MutableMapping would look at each, which takes the loaded state that waits.
        for tensor in self:
            del self[tensor]

    def __contains__(self, tensor: object) -> bool:
        """Whether a tensor has been presented."""
        return isinstance(tensor, torch.Tensor) and tensor in self._owner._tracked

    def __iter__(self) -> Iterator[torch.Tensor]:
        """The tensors."""
        return iter(list(self._owner._tracked))

    def __len__(self) -> int:
        """How many there are."""
        return len(self._owner._tracked)


class TensorOptimizer(torch.optim.Optimizer):
    """The part of ``torch.optim.Optimizer`` that users of ``optim_objs`` and schedulers touch.

    It holds neither the optimizer that it is of nor its tensor.

    Attributes:
        group: The settings of the tensor; setting one changes its rule.
        param_groups: The group.
    """

    #: Torch's schedulers warn if they move before it: there is no view of what was never called.
    _opt_called = True

    def __init__(self, owner: "JointOptim", tensor: torch.Tensor) -> None:
        """Look at one tensor of an optimizer."""
        # Without torch's own, which would make a state and groups of its own.
        self._owner: Any = proxy(owner)
        self._ref = TensorWeakRef(tensor)
        self.group = Group(self._owner, self._ref)
        self.param_groups: Any = [self.group]

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]  # an attribute in torch
        """The names of the settings, and what they are now."""
        return dict(self._owner._group(_alive(self._ref)))

    @property
    def state(self) -> dict[torch.Tensor, dict[str, Any]]:  # type: ignore[override]  # likewise
        """A copy of the clock and the slots, by tensor."""
        return dict.fromkeys([_alive(self._ref)], self.state_dict()["state"].get(0, {}))

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.Optimizer.state_dict``: copies."""
        return parameter_to_torch(
            self._owner._constructor, self._owner._describe(_alive(self._ref))
        )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As ``torch.optim.Optimizer.load_state_dict``."""
        self._owner._load(_alive(self._ref), state_dict)

    def add_param_group(self, param_group: Any) -> NoReturn:
        """Refuse."""
        raise TypeError("this is an optimizer of one tensor; call the whole one with the tensors")

    def step(self) -> None:  # type: ignore[override]
        """A step of this tensor alone, clipped as ever."""
        self._owner([_alive(self._ref)])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradient, or replace it by zeros."""
        tensor = _alive(self._ref)
        if set_to_none:
            tensor.grad = None
        elif tensor.grad is not None:
            tensor.grad = torch.zeros_like(tensor.grad)


class Group(MutableMapping[str, Any]):
    """The settings of a tensor as they are now; writing one changes its rule.

    Attributes:
        extra: What schedulers keep here.
    """

    def __init__(self, owner: Any, ref: TensorWeakRef) -> None:
        """Look at one tensor of an optimizer."""
        self._owner = owner
        self._ref = ref
        self.extra: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        """A setting."""
        if name == "params":
            return [_alive(self._ref)]
        if name in self.extra:
            return self.extra[name]
        return self._owner._group(_alive(self._ref))[name]

    def __setitem__(self, name: str, value: Any) -> None:
        """Change a setting from the next step on.

        Raises:
            KeyError: There is no such setting.
            ValueError: The value is out of range.
        """
        if name in SCHEDULED:
            self.extra[name] = value
        elif name in self and name != "params":
            self._owner._change(_alive(self._ref), name, value)
        else:
            raise KeyError(f"{name!r} is no setting; expected one of {sorted(self)}")

    def __delitem__(self, name: str) -> NoReturn:
        """Refuse."""
        raise TypeError("a setting cannot be deleted")

    def __iter__(self) -> Iterator[str]:
        """The names of the settings."""
        return iter([*self._owner._group(_alive(self._ref)), *self.extra, "params"])

    def __len__(self) -> int:
        """How many there are."""
        return len(list(iter(self)))

    def __repr__(self) -> str:
        """As a dict."""
        return repr(dict(self))


def _alive(ref: TensorWeakRef) -> torch.Tensor:
    tensor: torch.Tensor | None = ref()
    if tensor is None:
        raise ReferenceError("the tensor of this optimizer is gone")
    return tensor
