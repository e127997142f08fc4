"""The PyTorch backend of multiopt."""

from multiopt_torch.backend import TorchBackend

__all__ = ["BACKEND"]

BACKEND = TorchBackend("torch")
