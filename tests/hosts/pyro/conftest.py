"""Every test of the drop-in has a param store, random numbers and notes of its own."""

from collections.abc import Iterator

import pyro
import pyro.optim
import pytest

from multiopt.adapters.pyro.optim import _warn_wrapped, warn_not_joint


@pytest.fixture(autouse=True)
def fresh_store() -> Iterator[None]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    _warn_wrapped.cache_clear()
    warn_not_joint.cache_clear()
    yield
    pyro.clear_param_store()
