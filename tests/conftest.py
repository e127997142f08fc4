"""Profiles for hypothesis, strict settings of the libraries, and the ``library`` fixture."""

import os

import array_api_strict
import hypothesis
import jax
import pytest

from multiopt.arrays import Arrays, Part
from multiopt_kernels.cpu.group import CompiledGroup
from tests.libraries import LIBRARIES, Library, missing

hypothesis.settings.register_profile("default", max_examples=50, deadline=None)
hypothesis.settings.register_profile("thorough", max_examples=1000, deadline=None)
hypothesis.settings.load_profile("default")

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
array_api_strict.set_array_api_strict_flags(
    boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=()
)


def pytest_configure(config: pytest.Config) -> None:
    """Keep compiled kernels where pytest keeps what it knows, out of the user's own cache."""
    if hasattr(config, "cache"):
        os.environ.setdefault("MULTIOPT_CACHE_DIR", str(config.cache.mkdir("kernels")))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let each test run on the engine of its library; compiled kernels without one."""
    callspec = getattr(item, "callspec", None)
    library = callspec.params.get("library") if callspec else None
    engine = library.engine if isinstance(library, Library) else "compiled"
    os.environ["MULTIOPT_ENGINE"] = engine


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(library, id=library.id, marks=[pytest.mark.cuda] * library.needs_cuda)
        for library in LIBRARIES
    ],
)
def library(request: pytest.FixtureRequest) -> Library:
    """Each array library, a library with read-only gradients among them."""
    if why := missing(request.param):
        pytest.skip(why)
    return request.param


@pytest.fixture
def steps_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every step take the same opcodes, wherever its arrays happen to be in memory.

    A look takes more if the order of the addresses is not that of the look before it. Here none is:
    each is sorted again.
    """
    look = CompiledGroup.look

    def forgetful(self: CompiledGroup, part: Part, arrays: Arrays, last: bool) -> None:
        arrays.order, arrays.words.values[5] = None, 0
        look(self, part, arrays, last)

    monkeypatch.setattr(CompiledGroup, "look", forgetful)
