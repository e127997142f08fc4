"""Examples in the documents run like tests, in a folder of their own."""

import gc
import os
from pathlib import Path

import pytest

# Read when torch is imported. Where programs share cores, as the halves of the tests do, threads of
# torch that spin while they wait have made tests of small models ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(autouse=True)
def _own_folder(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(request.node, pytest.DoctestItem):
        monkeypatch.chdir(tmp_path)


def pytest_collection_finish() -> None:
    """Keep what importing everything has made out of collections.

    With torch, JAX, Lightning and transformers there are a million objects, and looking through
    them took most of the time of tests that call ``gc.collect`` often.
    """
    gc.collect()
    gc.freeze()
