"""Files of every version of the format keep loading: each is compared with its history, retold.

A new version adds a file::

    python -c "from tests.state.test_old_checkpoints import write; write()"
"""

from pathlib import Path

import numpy as np
import pytest

import multiopt as mo
from multiopt.state.document import VERSION
from tests.libraries import assert_equal

FILES = Path(__file__).parent / "checkpoints"
VERSIONS = [1, 2, 3, 4]


def optimizer() -> mo.Optimizer:
    rule = mo.Adam(lr=mo.schedules.Linear(0.1, 0.01, steps=10), amsgrad=True)
    return mo.Optimizer(rule, average=mo.Average(decay=0.5))


def params() -> dict[str, np.ndarray]:
    return {
        "loc": np.arange(3.0),
        "scale": np.ones((), np.float32),
        "": np.zeros((0, 2), np.float32),
        "a/é\n__metadata__": np.ones((2, 2), np.float32),
        "z": np.array([1 + 2j, 3 - 4j]),
        "waits": np.ones(2),
    }


def grads(step: int) -> dict[str, np.ndarray]:
    """Numbers that every library has exactly."""
    made = {}
    for name, param in params().items():
        grad = (np.arange(param.size) % 7 - 3 + step) / 8
        made[name] = grad.reshape(param.shape).astype(param.dtype)
    made["z"] *= 1 - 0.5j
    return made


def history() -> mo.Optimizer:
    """Three steps of all, two more of those that do not wait."""
    opt, here = optimizer(), params()
    for step in range(5):
        now = grads(step)
        if step >= 3:
            del now["waits"]
        opt.step(here, now)
    return opt


def write() -> None:
    """Write the file of this version, in which one name is pending."""
    opt = optimizer()
    opt.load_state_dict(history().state_dict())
    resumed, here = optimizer(), params()
    resumed.load_state_dict(opt.state_dict())
    waits = here.pop("waits")
    resumed.step(here, {name: grads(5)[name] for name in here})
    # What it is without: the rule of ``optimizer`` has it as well.
    resumed.set_hyperparameters(["loc", "waits"], eps=1e-8)
    resumed.save(FILES / f"version_{VERSION}.safetensors", params={**here, "waits": waits})


def told() -> mo.Optimizer:
    """What a file has: the history, and a step more of those that do not wait."""
    opt, here = history(), params()
    del here["waits"]
    opt.step(here, {name: grads(5)[name] for name in here})
    return opt


@pytest.mark.parametrize("version", VERSIONS)
def test_a_file_of_each_version_loads(version: int) -> None:
    opt, expected = optimizer(), told()
    opt.load(FILES / f"version_{version}.safetensors")
    assert opt.steps == expected.steps == 6
    assert set(opt.pending) == set(expected.names)
    # All are seen, with gradients of zero, by both.
    here, there = params(), params()
    for each, arrays in ((opt, here), (expected, there)):
        for step in range(2):
            each.step(arrays, grads(6 + step))
    for name in there:
        assert_equal(here[name], there[name], name)
        assert_equal(opt.average(name), expected.average(name), name)
        assert opt.state(name).step == expected.state(name).step
        for slot, array in expected.state(name).slots.items():
            assert_equal(opt.state(name).slots[slot], array, f"{slot} of {name}")


def test_the_file_of_version_4_has_parameters_and_settings() -> None:
    opt = mo.Optimizer(mo.Adam(eps=0.5, amsgrad=True), average=mo.Average(decay=0.5))
    here = {name: np.zeros_like(param) for name, param in params().items()}
    report = opt.load(FILES / "version_4.safetensors", params=here)
    assert report.params is not None
    assert opt.hyperparameters("loc")["eps"] == opt.hyperparameters("waits")["eps"] == 1e-8
    assert opt.hyperparameters("scale")["eps"] == 0.5
    expected, stepped = params(), optimizer()
    stepped.load_state_dict(history().state_dict())
    now = grads(5)
    del now["waits"]
    stepped.step(expected, now)
    for name, param in expected.items():
        assert_equal(report.params[name], param, name)


def test_there_is_a_file_of_every_version() -> None:
    assert list(range(1, VERSION + 1)) == VERSIONS
    names = {path.name for path in FILES.iterdir()}
    assert names >= {f"version_{version}.safetensors" for version in VERSIONS}
