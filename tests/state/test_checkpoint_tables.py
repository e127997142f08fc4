"""Tables of a file: names of all kinds come back from it, and from the same file of version 2."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import multiopt as mo
from tests.libraries import assert_equal

#: What ``Mixed`` had saved after three steps when version 2 was written.
EARLIER = Path(__file__).parent / "checkpoints" / "version_2_mixed.safetensors"


class Mixed:
    """Five names of one table, and others: 16 bits with a master copy, complex, whole, skipped."""

    def __init__(self) -> None:
        self.plateau = mo.schedules.Plateau(0.5, factor=0.5, patience=0)
        usual = mo.Adam(lr=mo.schedules.Join([mo.schedules.Constant(0.5), self.plateau], [1]))
        self.rules: dict[str, mo.Rule] = {"plain": mo.SGD(lr=0.1), "whole": mo.Adafactor()}
        self.rules |= {f"row {i}": mo.SGD(lr=0.5, momentum=0.5) for i in range(5)}
        self.opt = mo.Optimizer(
            lambda name: self.rules.get(name, usual),
            average=lambda name: None if name in ("plain", "row 1") else mo.Average(decay=0.5),
            master_weights=True,
            on_nonfinite="skip",
        )
        self.params: dict[str, np.ndarray] = {
            f"row {i}": np.full((2, 3), i / 4, np.float32) for i in range(5)
        }
        self.params |= {"plain": np.ones(4), "whole": np.ones((3, 2))}
        self.params |= {"half": np.ones(3, np.float16)}
        self.params |= {"z": np.array([1 + 2j, 3 - 4j], np.complex64), "scheduled": np.ones(2)}

    def step(self, step: int) -> None:
        grads = {}
        for name, param in self.params.items():
            grad = (np.arange(param.size) % 5 - 2 + step) / 4
            grads[name] = grad.reshape(param.shape).astype(param.dtype)
        if step == 1:
            grads["row 2"][0] = np.nan
        if step == 2:
            del grads["row 3"]
        self.opt.step(self.params, grads)
        self.plateau.observe(1.0)


def stepped(steps: int = 3) -> Mixed:
    made = Mixed()
    for step in range(steps):
        made.step(step)
    return made


def resumed(path: Path) -> Mixed:
    """The same history, whose optimizer is a new one after three steps."""
    made = Mixed()
    made.params = stepped().params
    made.opt.load(path)
    return made


def assert_same(one: Mixed, other: Mixed) -> None:
    assert one.opt.steps == other.opt.steps
    assert one.opt.skips == other.opt.skips
    assert one.plateau.state() == other.plateau.state()
    for name, param in other.params.items():
        assert_equal(one.params[name], param, name)
        assert one.opt.state(name).step == other.opt.state(name).step
        for slot, array in other.opt.state(name).slots.items():
            assert_equal(one.opt.state(name).slots[slot], array, f"{slot} of {name}")
        if name not in ("plain", "row 1"):
            assert_equal(one.opt.average(name), other.opt.average(name), name)


def document(path: Path) -> dict[str, Any]:
    with safe_open(path, "numpy") as file:
        found: dict[str, Any] = json.loads(file.metadata()["multiopt"])
        return found


@pytest.mark.parametrize("earlier", [False, True])
def test_names_of_all_kinds_go_on_as_if_they_had_never_stopped(
    tmp_path: Path, earlier: bool
) -> None:
    path = EARLIER if earlier else tmp_path / "run"
    if not earlier:
        stepped().opt.save(path)
    for _ in range(2):
        here, whole = resumed(path), stepped()
        for step in (3, 4):
            here.step(step)
            whole.step(step)
        assert_same(here, whole)
        # And from what waits, saved again.
        waits = Mixed()
        waits.opt.load(path)
        path = tmp_path / "again"
        waits.opt.save(path)


def test_a_file_of_version_2_becomes_the_file_that_is_written_now(tmp_path: Path) -> None:
    assert document(EARLIER)["version"] == 2
    opt = Mixed().opt
    report = opt.load(EARLIER)
    opt.save(tmp_path / "new")
    again, now = Mixed().opt, Mixed().opt
    assert again.load(tmp_path / "new") == report
    stepped().opt.save(tmp_path / "now")
    now.load(tmp_path / "now")
    assert repr(again.state_dict()) == repr(opt.state_dict()) == repr(now.state_dict())


def test_names_that_are_alike_are_one_table(tmp_path: Path) -> None:
    stepped().opt.save(tmp_path / "run")
    found = document(tmp_path / "run")
    tables = {tuple(table["names"]): table for table in found["entries"]}
    # One keeps no average; another was skipped, a third left out: these have other clocks.
    rows = tables[("row 0", "row 2", "row 3", "row 4")]
    assert (rows["steps"], rows["counts"]) == ([3, 2, 2, 3], [3, 2, 2, 3])
    assert rows["slots"] == {"momentum_buffer": "F32[2,3]", "param_average": "F32[2,3]"}
    assert "average" not in tables[("row 1",)]
    assert tables[("plain",)]["slots"] == {}
    assert tables[("half",)]["slots"]["master_param"] == "F32[3]"
    assert tables[("z",)]["complex"] is True
    assert found["skips"] == {"names": ["row 2"], "total": [1], "consecutive": [0]}
    # The order of names is that of the optimizer, whichever table they are in.
    assert resumed(tmp_path / "run").opt.pending == tuple(Mixed().params)


@pytest.mark.parametrize("what", ["row", "checksum"])
def test_a_damaged_bit_costs_one_name(tmp_path: Path, what: str) -> None:
    path, opt = tmp_path / "run", mo.Optimizer(mo.Adam())
    params = {f"w{i}": np.full(5, 1.0 + i) for i in range(1000)}
    opt.step(params, {name: w.copy() for name, w in params.items()})
    opt.save(path)
    raw = bytearray(path.read_bytes())
    if what == "row":
        place = raw.index(opt.state("w700").slots["exp_avg_sq"].tobytes())
    else:
        place = len(raw) - 8 * 1000 + 8 * 700  # of the rows of the second slot
    raw[place + 3] ^= 4
    path.write_bytes(raw)
    with pytest.raises(mo.CheckpointError, match=r"'w700', its slot 'exp_avg_sq' is damaged"):
        mo.Optimizer(mo.Adam()).load(path)
    report = mo.Optimizer(mo.Adam()).load(path, strict=False)
    assert list(report.unused) == ["w700"]
    assert set(report.pending) == params.keys() - {"w700"}
    assert mo.Optimizer(mo.Adam()).load(path, names=["w699"]).pending == ("w699",)
