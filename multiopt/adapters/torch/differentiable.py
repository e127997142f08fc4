"""Steps that are part of an autograd graph, of optimizers with ``differentiable=True``.

They call the rule as it stands on torch's tensors, and the state is a dict of tensors with their
history, as in torch. Nothing of this is fast.
"""

from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import array_api_compat.torch
import numpy as np
import torch

from multiopt.adapters.torch.gradients import without_sparse
from multiopt.adapters.torch.state import clock_of, derived_numbers, offset, scalar
from multiopt.rules import Rule
from multiopt.state.record import described_rule

if TYPE_CHECKING:
    from multiopt.adapters.torch.groups import Followed

__all__ = ["check_settings", "step"]

#: The settings of the core that a step within a graph has no part for, where they are off.
OFF = {
    "average": None,
    "clip": None,
    "master_weights": False,
    "max_consecutive_skips": None,
    "on_nonfinite": "propagate",
    "process_group": None,
}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check that no other setting of an optimizer asks for what its steps cannot do.

    Raises:
        ValueError: One does.
    """
    for name, off in OFF.items():
        value = settings.get(name, off)
        if value != off:
            raise ValueError(
                f"differentiable=True cannot be combined with {name}={value!r}: the step is part "
                f"of an autograd graph; expected no {name}"
            )


def step(followed: "Followed", states: MutableMapping[torch.Tensor, dict[str, Any]]) -> None:
    """Update all parameters that have a gradient, with history.

    Args:
        followed: The parameters with their rules.
        states: The state of each, as torch has it, with history; it changes.

    Raises:
        RuntimeError: A parameter is a leaf that requires a gradient, or a gradient is sparse, in
            torch's words. Nothing has changed.
        ValueError: The clock in a state is not one. Nothing has changed.
    """
    params = np.fromiter((p for p in followed.params if p.grad is not None), object)
    dense = without_sparse(followed, params)
    grads = [param.grad for param in params] if dense is None else dense
    with torch.enable_grad():
        if any(param.is_leaf and param.requires_grad for param in params):
            raise RuntimeError(
                "a leaf Variable that requires grad is being used in an in-place operation."
            )
        results = [
            _result(followed.rule_for(followed.key_of(param)), param, grad, states.get(param, {}))
            for param, grad in zip(params, grads, strict=True)
        ]
        for param, (new, state) in zip(params, results, strict=True):
            param.copy_(new)
            states.setdefault(param, {}).update(state)


def _result(
    rule: Rule, param: torch.Tensor, grad: torch.Tensor, state: Mapping[str, Any]
) -> tuple[torch.Tensor, dict[str, Any]]:
    """A parameter and its state after a step."""
    x, g = _working(param), _working(grad)
    clock = clock_of(type(rule), state)
    count, shapes = clock + 1, rule.slot_shapes(tuple(x.shape))
    given = {name: _working(state[name]) for name in shapes if state.get(name) is not None}
    if not clock:
        given = offset(given, described_rule(rule, 0), -1)
    slots = [given.get(name, x.new_zeros(shape)) for name, shape in shapes.items()]
    c = rule.coefficients(count, str(x.dtype).removeprefix("torch."))
    new, after = rule.update(_NAMESPACE, x, g, tuple(slots), c)
    as_complex = torch.view_as_complex if param.is_complex() else _same
    numbers = derived_numbers(described_rule(rule, count), count)
    shown = dict(zip(shapes, map(as_complex, after), strict=True))
    return as_complex(new), {"step": scalar(count), **numbers, **shown}


class _Namespace:
    """torch's functions for rules, with roots that are rounded as they are everywhere else."""

    def __getattr__(self, name: str) -> Any:
        return getattr(array_api_compat.torch, name)

    @staticmethod
    def sqrt(x: torch.Tensor) -> torch.Tensor:
        """The square root.

        torch's own is that of MKL on processors of Intel: 7 in 1000 are off by a bit.
        """
        root = torch.sqrt(x)
        if x.device.type != "cpu":
            return root
        exact = torch.empty_like(x)
        with np.errstate(invalid="ignore"):
            np.sqrt(x.detach().numpy(), out=exact.numpy())
        # So close to each other, their difference is exact. Its gradient is that of torch's root.
        return torch.where(root == exact, root, root + (exact - root.detach()))


_NAMESPACE = _Namespace()


def _working(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in the working precision, complex numbers as their two parts."""
    x = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
