"""No kernel is compiled where a test does not ask for it, and hooks for all optimizers go again."""

from collections.abc import Iterator

import pytest
from torch.optim import optimizer


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every engine computes the same; blocks keep slots as compiled kernels do."""
    monkeypatch.setenv("MULTIOPT_ENGINE", "blocks")


@pytest.fixture(autouse=True)
def no_global_hooks() -> Iterator[None]:
    yield
    optimizer._global_optimizer_pre_hooks.clear()
    optimizer._global_optimizer_post_hooks.clear()
