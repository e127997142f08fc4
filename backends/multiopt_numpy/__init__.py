"""The NumPy backend of multiopt: the reference."""

from multiopt_numpy.backend import NumpyBackend

__all__ = ["BACKEND"]

BACKEND = NumpyBackend("numpy")
