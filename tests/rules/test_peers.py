"""Against torch.optim and Pyro, within the tolerances of spec/arithmetic.md."""

from functools import partial

import numpy as np
import pytest
import torch

import multiopt as mo
from tests.cases import CASES, TOLERANCE, Case


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", [c for c in CASES if c.peer], ids=lambda case: case.id)
def test_two_hundred_steps_follow_the_peer(
    case: Case, dtype: str, request: pytest.FixtureRequest
) -> None:
    rng = np.random.default_rng(0)
    ours = {"w": rng.standard_normal(50).astype(dtype)}
    theirs = torch.from_numpy(ours["w"].copy()).requires_grad_()
    opt, peer = mo.Optimizer(case.rule), case.peer([theirs], **case.arguments)
    # torch keeps numbers of ASGD and of NAdam in its default dtype, whatever that of the parameter.
    request.addfinalizer(partial(torch.set_default_dtype, torch.get_default_dtype()))
    torch.set_default_dtype(theirs.dtype)
    moved = np.zeros(50)
    for _ in range(200):
        # Around a bowl, with noise, so that the signs of moments and gradients change.
        noise = rng.standard_normal(50).astype(dtype)
        direction = -1 if case.arguments.get("maximize") else 1
        theirs.grad = torch.from_numpy(direction * theirs.detach().numpy() + noise)
        before = ours["w"].copy()
        opt.step(ours, {"w": theirs.grad.numpy().copy()})
        peer.step()
        moved += abs(ours["w"] - before)
    assert (moved > 1e-3).all()
    np.testing.assert_allclose(ours["w"], theirs.detach().numpy(), **TOLERANCE[dtype])
    for slot, array in opt.state("w").slots.items():
        np.testing.assert_allclose(array, peer.state[theirs][slot].numpy(), **TOLERANCE[dtype])


@pytest.mark.parametrize("rule_class", list(dict.fromkeys(c.rule_class for c in CASES if c.peer)))
def test_defaults_are_the_peers(rule_class: type[mo.Rule]) -> None:
    peer = next(case.peer for case in CASES if case.rule_class is rule_class)
    (group,) = peer([torch.zeros(1)]).param_groups
    rule = rule_class()
    assert (
        group.items()
        >= {
            name: getattr(rule, name)
            for name in (*rule.ranges, *rule.choices)
            # An option that the peer does not have, and that is off.
            if name in group or getattr(rule, name)
        }.items()
    )


def test_corrected_amsgrad_never_shrinks_its_denominator() -> None:
    # torch's maximum is of the raw moment, so its corrected root falls: 1, .707, .578, ...
    grads = [1.0, *[0.0] * 9]
    for amsgrad, monotone in ((True, False), ("corrected", True)):
        opt, w = mo.Optimizer(mo.Adam(amsgrad=amsgrad)), {"w": np.zeros(1)}  # type: ignore[arg-type]
        roots = []
        for step, grad in enumerate(grads, 1):
            opt.step(w, {"w": np.full(1, grad)})
            largest = list(opt.state("w").slots.values())[-1].item()
            roots.append(largest if amsgrad == "corrected" else largest / (1 - 0.999**step))
        assert (np.diff(roots) >= 0).all() == monotone


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_centered_rmsprop_stands_steady_gradients(dtype: str, momentum: float) -> None:
    # torch's variance comes out of rounding below zero, and its root is NaN: float32 at step 1207.
    opt = mo.Optimizer(mo.RMSprop(momentum=momentum, centered=True))
    w = {"w": np.zeros(5, dtype)}
    for _ in range(5000):
        opt.step(w, {"w": np.array([1.0, 0.1, -0.3, 2.7, np.nan], dtype)})
    assert np.isfinite(w["w"][:4]).all()
    assert np.isnan(w["w"][4])
