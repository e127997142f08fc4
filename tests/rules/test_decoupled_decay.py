"""Decoupled weight decay: the same in every rule that has it, and what optax puts together."""

from dataclasses import fields
from typing import Any

import numpy as np
import optax
import pytest

import multiopt as mo
from multiopt import rules
from tests.histories import fill
from tests.libraries import Library, assert_equal, engine

#: Every rule that has the option, with options that make more of its formula take part.
RULES: dict[str, list[dict[str, Any]]] = {
    "AdaBelief": [{}],
    "Adadelta": [{"lr": 0.5}],
    "Adagrad": [{"lr_decay": 0.3}],
    "Adam": [{}, {"amsgrad": True}, {"amsgrad": "corrected"}],
    "Adamax": [{}],
    "NAdam": [{}],
    "RAdam": [{"betas": (0.9, 0.999)}],
    "RMSprop": [{}, {"momentum": 0.9}, {"centered": True}, {"momentum": 0.9, "centered": True}],
    "SGD": [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}],
}
CASES = [(name, options) for name, found in RULES.items() for options in found]


def has_option(name: str) -> bool:
    return "decoupled_weight_decay" in {f.name for f in fields(getattr(rules, name))}


def test_these_are_the_rules_that_have_it() -> None:
    assert list(RULES) == sorted(filter(has_option, rules.__all__))


def rate(rule: Any, step: int) -> float:
    """The learning rate of a step."""
    rule = rule.at(step)
    return float(rule.lr / (1 + (step - 1) * getattr(rule, "lr_decay", 0.0)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_step_is_one_without_decay_from_where_the_decay_leads(
    name: str, options: dict[str, Any], dtype: str, library: Library
) -> None:
    if dtype not in library.dtypes:
        pytest.skip(f"{library.id} has no {dtype}")
    options = {"lr": lambda step: 0.1 / step, **options}
    decaying = getattr(mo, name)(**options, weight_decay=0.3, decoupled_weight_decay=True)
    plain = getattr(mo, name)(**options)
    one, other = mo.Optimizer(decaying), mo.Optimizer(plain)
    rng = np.random.default_rng(0)
    start = fill(rng, (50,), dtype, "moderate")
    param, kept, kind = library.param(start), start, np.dtype(dtype).type
    for step in range(1, 8):
        grad = fill(rng, (50,), dtype, "moderate" if step < 5 else "special")
        param = one.step({"w": param}, {"w": library.grad(grad)})["w"]
        shrunk = kind(1 - rate(decaying, step) * 0.3) * kept
        kept = other.step({"w": shrunk}, {"w": grad})["w"]
        assert_equal(library.numpy(param), kept)
        for slot, array in one.state("w").slots.items():
            assert_equal(library.numpy(array), other.state("w").slots[slot])


@pytest.mark.parametrize("amsgrad", [False, True, "corrected"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_adam_with_it_is_adamw(amsgrad: Any, dtype: str, library: Library) -> None:
    if dtype not in library.dtypes:
        pytest.skip(f"{library.id} has no {dtype}")
    numbers: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.2}
    adam = mo.Adam(**numbers, amsgrad=amsgrad, maximize=True, decoupled_weight_decay=True)
    adamw = mo.AdamW(**numbers, amsgrad=amsgrad, maximize=True)
    rng = np.random.default_rng(1)
    start = fill(rng, (50,), dtype, "moderate")
    params, optimizers = (
        [library.param(start) for _ in "ab"],
        [mo.Optimizer(adam), mo.Optimizer(adamw)],
    )
    for kind in ("moderate", "special", "wide", "moderate"):
        grad = fill(rng, (50,), dtype, kind)
        params = [
            opt.step({"w": param}, {"w": library.grad(grad)})["w"]
            for opt, param in zip(optimizers, params, strict=True)
        ]
        one, other = map(library.numpy, params)
        assert_equal(one, other)
    for one, other in zip(*(opt.state("w").slots.values() for opt in optimizers), strict=True):
        assert_equal(library.numpy(one), library.numpy(other))


def test_adamw_has_no_such_argument() -> None:
    assert [f.name for f in fields(mo.AdamW)] == [
        f.name for f in fields(mo.Adam) if f.name != "decoupled_weight_decay"
    ]
    with pytest.raises(TypeError, match="decoupled_weight_decay"):
        mo.AdamW(decoupled_weight_decay=True)
    with pytest.raises(TypeError, match="no hyperparameter decoupled_weight_decay"):
        mo.Optimizer(mo.AdamW()).set_hyperparameters(decoupled_weight_decay=False)
    rule: Any = mo.AdamW()
    assert rule.decoupled_weight_decay
    assert "decoupled" not in repr(mo.AdamW())


@pytest.mark.parametrize("name", RULES)
def test_it_is_true_or_false(name: str) -> None:
    for value in (1, None, "yes"):
        with pytest.raises(
            ValueError, match=f"{name}: decoupled_weight_decay must be True or False; got"
        ):
            getattr(mo, name)(decoupled_weight_decay=value)


@pytest.mark.parametrize("name", RULES)
def test_it_leaves_an_infinite_parameter_alone_where_the_decay_is_zero(name: str) -> None:
    w = {"w": np.array([np.inf, 1.0])}
    rule = getattr(mo, name)(lr=1.0, weight_decay=0.0, decoupled_weight_decay=True)
    mo.Optimizer(rule).step(w, {"w": np.ones(2)})
    assert w["w"][0] == np.inf


@pytest.mark.parametrize("name", RULES)
def test_it_can_be_turned_on_while_a_model_runs(name: str) -> None:
    def run(engine_: str) -> np.ndarray:
        opt = mo.Optimizer(getattr(mo, name)(lr=0.1, weight_decay=0.5))
        w = {"w": np.linspace(1, 2, 5)}
        with engine(engine_):
            for value in (False, True, True, False):
                opt.set_hyperparameters(decoupled_weight_decay=value)
                opt.step(w, {"w": np.full(5, 0.25)})
        return w["w"]

    assert_equal(run("compiled"), run("plain"))
    assert_equal(run("blocks"), run("plain"))


#: What optax has in the place of a rule, without its learning rate; eps where both put it.
PARTS: dict[str, tuple[dict[str, Any], Any]] = {
    "SGD": ({}, optax.identity()),
    "SGD, momentum": ({"momentum": 0.9}, optax.trace(0.9)),
    "SGD, nesterov": ({"momentum": 0.9, "nesterov": True}, optax.trace(0.9, nesterov=True)),
    "Adam": ({}, optax.scale_by_adam()),
    "Adamax": ({}, optax.scale_by_adamax()),
    "Adagrad": ({"eps": 0.0}, optax.scale_by_rss(0.0, eps=0.0)),
    "Adadelta": ({"rho": 0.9}, optax.scale_by_adadelta(0.9, 1e-6)),
    "RMSprop": ({"alpha": 0.9}, optax.scale_by_rms(0.9, 1e-8, eps_in_sqrt=False)),
    "RMSprop, centered": (
        {"alpha": 0.9, "eps": 0.0, "centered": True},
        optax.scale_by_stddev(0.9, 0.0),
    ),
    "AdaBelief": ({}, optax.scale_by_belief(eps=1e-16, eps_root=1e-16)),
}


@pytest.mark.parametrize("what", PARTS)
def test_optax_puts_the_same_together(what: str) -> None:
    options, part = PARTS[what]
    rule = getattr(mo, what.partition(",")[0])(
        lr=0.1, weight_decay=0.05, decoupled_weight_decay=True, **options
    )
    chain = optax.chain(part, optax.add_decayed_weights(0.05), optax.scale(-0.1))
    rng = np.random.default_rng(0)
    ours = {"w": rng.standard_normal(50)}
    theirs: Any = ours["w"].copy()
    state, opt = chain.init(theirs), mo.Optimizer(rule)
    for _ in range(100):
        grad = np.asarray(theirs) + rng.standard_normal(50)
        opt.step(ours, {"w": grad})
        updates, state = chain.update(grad, state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    np.testing.assert_allclose(ours["w"], np.asarray(theirs), rtol=1e-11, atol=1e-13)
