"""AdaBelief against optax, within the tolerances of spec/arithmetic.md."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import multiopt as mo
from tests.cases import TOLERANCE


def optax_adabelief(
    lr: float, betas: tuple[float, float], eps: float, decay: float, decoupled: bool
) -> optax.GradientTransformation:
    """The same rule: in optax the two places of eps have each a name, and no decay."""
    belief = optax.scale_by_belief(*betas, eps=eps, eps_root=eps)
    weights = optax.add_decayed_weights(decay)
    parts = (belief, weights) if decoupled else (weights, belief)
    return optax.chain(*parts, optax.scale_by_learning_rate(lr))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("lr", "betas", "eps", "decay", "decoupled"),
    [
        (1e-3, (0.9, 0.999), 1e-16, 0.0, False),
        (0.1, (0.5, 0.9), 1e-16, 0.0, False),
        (0.1, (0.9, 0.99), 0.1, 0.0, False),
        (0.1, (0.9, 0.999), 1e-8, 0.1, False),
        (0.1, (0.9, 0.999), 1e-8, 0.1, True),
    ],
)
def test_two_hundred_steps_follow_optax(
    lr: float, betas: tuple[float, float], eps: float, decay: float, decoupled: bool, dtype: str
) -> None:
    rng = np.random.default_rng(0)
    ours = {"w": rng.standard_normal(50).astype(dtype)}
    theirs = jnp.asarray(ours["w"])
    rule = mo.AdaBelief(lr, betas, eps, decay, decoupled_weight_decay=decoupled)
    opt, peer = mo.Optimizer(rule), optax_adabelief(lr, betas, eps, decay, decoupled)
    state = peer.init(theirs)
    for _ in range(200):
        grad = theirs + rng.standard_normal(50).astype(dtype)
        opt.step(ours, {"w": np.array(grad)})
        updates, state = peer.update(grad, state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    np.testing.assert_allclose(ours["w"], theirs, **TOLERANCE[dtype])
    (belief,) = (part for part in state if isinstance(part, optax.ScaleByBeliefState))
    slots = opt.state("w").slots
    np.testing.assert_allclose(slots["exp_avg"], belief.mu, **TOLERANCE[dtype])
    np.testing.assert_allclose(slots["exp_avg_var"], belief.nu, **TOLERANCE[dtype])


def test_defaults_are_those_of_optax() -> None:
    rng = np.random.default_rng(0)
    grads = rng.standard_normal((20, 50))
    ours, theirs = {"w": np.zeros(50)}, jnp.zeros(50)
    opt, peer = mo.Optimizer(mo.AdaBelief()), optax.adabelief(1e-3)
    state = peer.init(theirs)
    for grad in grads:
        opt.step(ours, {"w": grad})
        updates, state = peer.update(jnp.asarray(grad), state)
        theirs = optax.apply_updates(theirs, updates)
    np.testing.assert_allclose(ours["w"], theirs, **TOLERANCE["float64"])
