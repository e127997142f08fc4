"""Every test of the drop-in has a param store and random numbers of its own."""

from collections.abc import Iterator

import pyro
import pyro.optim
import pytest


@pytest.fixture(autouse=True)
def fresh_store() -> Iterator[None]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()
