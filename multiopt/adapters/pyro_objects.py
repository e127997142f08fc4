"""What ``optim_objs`` of the Pyro drop-in gives: views in the place of torch optimizers."""

from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from multiopt.adapters.torch_state import to_torch

if TYPE_CHECKING:
    from multiopt.adapters.pyro import _PyroOptimizer

__all__ = ["Group", "OptimObjs", "TensorOptimizer"]


class OptimObjs(MutableMapping[torch.Tensor, "TensorOptimizer"]):
    """The live tensors of an optimizer; deleting one makes it start anew."""

    def __init__(self, owner: "_PyroOptimizer") -> None:
        """Look at an optimizer."""
        self._owner = owner

    def __getitem__(self, tensor: torch.Tensor) -> "TensorOptimizer":
        """What stands for the torch optimizer of a tensor, loaded state taken."""
        if tensor not in self._owner._tracked:
            raise KeyError(tensor)
        self._owner._settle([tensor])
        return TensorOptimizer(self._owner, tensor)

    def __setitem__(self, tensor: torch.Tensor, value: Any) -> NoReturn:
        """Refuse."""
        raise TypeError("optim_objs takes no optimizers: its entries are made at first sight")

    def __delitem__(self, tensor: torch.Tensor) -> None:
        """Forget a tensor."""
        if tensor not in self._owner._tracked:
            raise KeyError(tensor)
        self._owner._forget(tensor)

    def __contains__(self, tensor: object) -> bool:
        """Whether a tensor has been presented."""
        return isinstance(tensor, torch.Tensor) and tensor in self._owner._tracked

    def __iter__(self) -> Iterator[torch.Tensor]:
        """The tensors."""
        return iter(list(self._owner._tracked))

    def __len__(self) -> int:
        """How many there are."""
        return len(self._owner._tracked)


class TensorOptimizer:
    """The part of ``torch.optim.Optimizer`` that users of ``optim_objs`` touch.

    Attributes:
        param_groups: One group; setting a hyperparameter in it changes the rule of the tensor.
    """

    def __init__(self, owner: "_PyroOptimizer", tensor: torch.Tensor) -> None:
        """Look at one tensor of an optimizer."""
        self._owner = owner
        self._tensor = tensor
        self.param_groups = [Group(owner, tensor)]

    @property
    def state(self) -> dict[torch.Tensor, dict[str, Any]]:
        """A copy of the clock and the slots, by tensor."""
        return dict.fromkeys([self._tensor], self.state_dict()["state"].get(0, {}))

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.Optimizer.state_dict``: copies."""
        return to_torch(self._owner._constructor, self._owner._describe(self._tensor))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradient, or replace it by zeros."""
        if set_to_none:
            self._tensor.grad = None
        elif self._tensor.grad is not None:
            self._tensor.grad = torch.zeros_like(self._tensor.grad)


class Group(MutableMapping[str, Any]):
    """The settings of a tensor as they are now; writing one changes its rule."""

    def __init__(self, owner: "_PyroOptimizer", tensor: torch.Tensor) -> None:
        """Look at one tensor of an optimizer."""
        self._owner = owner
        self._tensor = tensor

    def _settings(self) -> dict[str, Any]:
        return {**self._owner._group(self._tensor), "params": [self._tensor]}

    def __getitem__(self, name: str) -> Any:
        """A setting."""
        return self._settings()[name]

    def __setitem__(self, name: str, value: Any) -> None:
        """Change a setting from the next step on.

        Raises:
            KeyError: There is no such setting.
            ValueError: The value is out of range.
        """
        settings = self._settings()
        if name not in settings or name == "params":
            raise KeyError(f"{name!r} is no setting; expected one of {sorted(settings)}")
        self._owner._change(self._tensor, name, value)

    def __delitem__(self, name: str) -> NoReturn:
        """Refuse."""
        raise TypeError("a setting cannot be deleted")

    def __iter__(self) -> Iterator[str]:
        """The names of the settings."""
        return iter(self._settings())

    def __len__(self) -> int:
        """How many there are."""
        return len(self._settings())

    def __repr__(self) -> str:
        """As a dict."""
        return repr(self._settings())
