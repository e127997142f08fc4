"""Steps that are part of an autograd graph, for groups with ``differentiable=True``.

They call the rule as it stands on torch's tensors, and keep slots with their history, as torch
does. Nothing of this is fast, nor saved with a history.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import array_api_compat.torch
import numpy as np
import torch

from multiopt.adapters.torch.state import derived_numbers, scalar
from multiopt.rules import Rule
from multiopt.state.record import described_rule

if TYPE_CHECKING:
    from multiopt.adapters.torch.groups import Followed

__all__ = ["Graphs", "is_differentiable"]


def is_differentiable(groups: Iterable[Mapping[str, Any]]) -> bool:
    """Whether any group is to be differentiated through."""
    return any(group.get("differentiable") for group in groups)


class Graphs:
    """The state of parameters that are differentiated through, each a dict as torch has it."""

    def __init__(self) -> None:
        """Start without state."""
        self.states: dict[str, dict[str, Any]] = {}

    def step(
        self, groups: Iterable[Mapping[str, Any]], followed: "Followed"
    ) -> tuple[list[str], np.ndarray]:
        """Step the parameters of the groups that are differentiable.

        Returns:
            The names and tensors of the others.
        """
        others: list[tuple[str, torch.Tensor]] = []
        for group in groups:
            for param in group["params"]:
                key = followed.key_of(param)
                if not group.get("differentiable"):
                    others.append((key, param))
                elif param.grad is not None:
                    state = self.states.setdefault(key, {})
                    with torch.enable_grad():
                        _step(followed.rule_for(key), param, param.grad, state)
        params = np.fromiter((param for _, param in others), object, len(others))
        return [key for key, _ in others], params


def _step(rule: Rule, param: torch.Tensor, grad: torch.Tensor, state: dict[str, Any]) -> None:
    """Update one parameter and its state."""
    x, g = (_working(tensor) for tensor in (param, grad))
    step = int(state.get("step", 0)) + 1
    shapes = rule.slot_shapes(tuple(x.shape))
    slots = tuple(
        _working(state[name]) if step > 1 else x.new_zeros(shape) for name, shape in shapes.items()
    )
    c = rule.coefficients(step, str(x.dtype).removeprefix("torch."))
    new, slots = rule.update(array_api_compat.torch, x, g, slots, c)
    as_complex = torch.view_as_complex if param.is_complex() else _same
    param.copy_(as_complex(new))
    state["step"] = scalar(step)
    state.update(derived_numbers(described_rule(rule, step), step))
    state.update(zip(shapes, map(as_complex, slots), strict=True))


def _working(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in the working precision, complex numbers as their two parts."""
    x = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
