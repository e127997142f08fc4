"""What a rank holds of a parameter: a ``DTensor`` is updated through the tensor that lies here."""

import torch

from multiopt.distributed.boxes import is_distributed

__all__ = ["like", "local_gradient"]


def local_gradient(param: torch.Tensor) -> torch.Tensor | None:
    """The part of a parameter's gradient that belongs to the part of it that lies here."""
    grad = param.grad
    if is_distributed(param) and is_distributed(grad):
        with torch.no_grad():
            if grad.placements != param.placements:
                # A sum that was not made yet, for example.
                grad = grad.redistribute(param.device_mesh, param.placements)
            return grad.to_local()
    return grad


def like(param: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """A slot as its parameter is: distributed, if that is and the slot has its shape."""
    if not is_distributed(param) or slot.shape != param.to_local().shape:
        return slot
    return type(param).from_local(
        slot,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )
