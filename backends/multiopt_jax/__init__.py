"""The JAX backend of multiopt."""

from multiopt_jax.backend import JaxBackend

__all__ = ["BACKEND"]

BACKEND = JaxBackend("jax")
