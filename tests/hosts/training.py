"""A small model and its data, which every host trains; and what training came to."""

from typing import Any

import torch
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

__all__ = [
    "ALONE",
    "assert_equal",
    "assert_near",
    "batches",
    "mse_loss",
    "network",
]


#: Lightning's Trainer on the CPU, which writes and shows nothing.
ALONE: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def network() -> torch.nn.Module:
    """A network, always with the same parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 1))


def batches() -> "DataLoader[tuple[torch.Tensor, ...]]":
    """Six batches, always the same."""
    inputs = torch.randn(96, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), 16)


def assert_near(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Check that parameters are near those that torch found, which rounds in other places."""
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-6)


def assert_equal(
    found: tuple[torch.nn.Module, torch.optim.Optimizer],
    expected: tuple[torch.nn.Module, torch.optim.Optimizer],
) -> None:
    """Check that modules, and the states of their optimizers, are equal to the last bit."""
    (module, optimizer), (other, other_optimizer) = found, expected
    ours, theirs = optimizer.state_dict(), other_optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=0.0, atol=0.0)
    torch.testing.assert_close(module.state_dict(), other.state_dict(), rtol=0.0, atol=0.0)
