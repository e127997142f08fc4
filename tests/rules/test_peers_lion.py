"""Lion against optax."""

from typing import Any

import jax
import numpy as np
import optax
import pytest

import multiopt as mo
from tests.cases import TOLERANCE


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("arguments", [{}, {"betas": (0.5, 0.9)}, {"weight_decay": 0.5}])
def test_two_hundred_steps_of_lion_follow_optax(arguments: dict[str, Any], dtype: str) -> None:
    rng = np.random.default_rng(0)
    ours = {"w": rng.standard_normal(50).astype(dtype)}
    rule = mo.Lion(lr=0.01, **arguments)
    opt = mo.Optimizer(rule)
    b1, b2 = rule.betas
    peer = optax.lion(0.01, b1=b1, b2=b2, weight_decay=rule.weight_decay)
    theirs = jax.numpy.asarray(ours["w"])
    state = peer.init(theirs)
    for _ in range(200):
        grad = np.asarray(theirs) + rng.standard_normal(50).astype(dtype)
        opt.step(ours, {"w": grad})
        updates, state = peer.update(jax.numpy.asarray(grad), state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        assert theirs.dtype == dtype
    np.testing.assert_allclose(ours["w"], theirs, **TOLERANCE[dtype])
    np.testing.assert_allclose(opt.state("w").slots["exp_avg"], state[0].mu, **TOLERANCE[dtype])
