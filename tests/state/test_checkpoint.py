"""Files: saving and going on anywhere equals never having stopped."""

import errno
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

import multiopt as mo
from multiopt.state.file import listed
from multiopt.state.plain_data import contents_of
from multiopt.state.tables import waiting as tables
from multiopt.state.writing import write
from tests.histories import History, arrays, histories
from tests.libraries import JAX, NUMPY, STRICT, TORCH, assert_equal

LOCAL = [NUMPY, TORCH, JAX, STRICT]


@given(history=histories(), data=st.data())
def test_save_and_load_anywhere_equals_never_having_stopped(
    tmp_path_factory: pytest.TempPathFactory, history: History, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("run") / "run.safetensors"
    stop = data.draw(st.integers(0, history.steps))
    first, second = (data.draw(st.sampled_from(LOCAL)) for _ in range(2))
    by_file = data.draw(st.booleans())

    opt, params = history.optimizer(), history.start(first)
    for step in range(stop):
        params = opt.step(params, history.grads(first, step))
    resumed = history.optimizer()
    if by_file:
        opt.save(path)
        resumed.load(path)
    else:
        resumed.load_state_dict(opt.state_dict())
    params = {name: second.param(first.numpy(param)) for name, param in params.items()}
    for step in range(stop, history.steps):
        params = resumed.step(params, history.grads(second, step))

    reference, expected = history.run(NUMPY)
    for name in expected:
        assert_equal(second.numpy(params[name]), expected[name], name)
    # State that was not seen again is still pending, as it was saved.
    state = resumed.state_dict()
    assert sorted([*resumed.names, *resumed.pending]) == sorted(reference.names)
    for name in resumed.pending:
        assert state["pending"][name]["step"] == reference.state(name).step
        for slot, array in reference.state(name).slots.items():
            waiting = state["pending"][name]["slots"][slot]
            # From a file it comes as a NumPy array.
            source = NUMPY if by_file else first
            assert type(waiting) is type(source.grad(array))
            assert_equal(source.numpy(waiting), array)
    for what, array in arrays(resumed, second):
        name, slot = what.split(" of ", 1)[1], what.split(" of ", 1)[0]
        assert_equal(array, reference.state(name).slots[slot], what)


def saved(tmp_path: Path, rule: mo.Rule | None = None, **params: np.ndarray) -> Path:
    opt = mo.Optimizer(rule or mo.Adam(lr=0.1))
    params = params or {"w": np.ones(3)}
    for _ in range(2):
        opt.step(params, {name: np.ones_like(w) for name, w in params.items()})
    opt.save(tmp_path / "run.safetensors")
    return tmp_path / "run.safetensors"


def test_pending_state_survives_save_load_save(tmp_path: Path) -> None:
    path = saved(tmp_path, a=np.ones(3), b=np.ones((2, 2)))
    first = path.read_bytes()
    for _ in range(2):
        opt = mo.Optimizer(mo.Adam(lr=0.5))
        opt.load(path)
        assert opt.pending == ("a", "b")
        opt.save(path)
    again = mo.Optimizer(mo.Adam())
    again.load(path)
    assert json.dumps(state_of(again)) == json.dumps(state_of(opt))
    with safe_open(path, "numpy") as file:
        document = json.loads(file.metadata()["multiopt"])
    # Untouched: the rule that was saved too, not the one that waited with it.
    (table,) = [table for table in document["pending"] if table["names"] == ["a"]]
    assert document["rules"][table["rule"]]["lr"] == 0.1
    assert first != path.read_bytes()  # entries have become pending


def state_of(opt: mo.Optimizer) -> object:
    state = opt.state_dict()
    for part in ("entries", "pending"):
        for entry in state[part].values():
            entry["slots"] = {slot: array.tolist() for slot, array in entry["slots"].items()}
    return state


@pytest.mark.parametrize(
    "name",
    ["__metadata__", "0", "", "a/b", "é\n\0", "x" * 300, "\U0001f600", "\ud83d", "\ude00\ud83d"],
)
def test_any_name_can_be_saved(tmp_path: Path, name: str) -> None:
    entry: dict[str, Any] = {name: np.ones(3)}
    path = saved(tmp_path, **entry)
    opt = mo.Optimizer(mo.Adam())
    opt.load(path)
    assert opt.pending == (name,)


@pytest.mark.parametrize("part", ["entries", "pending", "skips"])
def test_a_name_that_json_would_change_is_refused_before_anything_is_written(
    tmp_path: Path, part: str
) -> None:
    name = "a\ud83d\ude00"
    opt = mo.Optimizer(mo.Adam(), average=mo.Average(), on_nonfinite="skip")
    grad = np.full(2, np.nan if part == "skips" else 1.0)
    opt.step({name: np.ones(2), "a\U0001f600": np.ones(2)}, {name: grad, "a\U0001f600": grad})
    if part == "pending":
        waiting, opt = opt, mo.Optimizer(mo.Adam(), average=mo.Average())
        opt.load_state_dict(waiting.state_dict())
    contents = contents_of(opt.state_dict())
    with pytest.raises(ValueError, match=r"name 'a\\ud83d\\ude00' .* 'a😀'.*: rename it"):
        write(tmp_path / "run", tables(contents.saved), 1, contents.skips)
    with pytest.raises(ValueError, match="rename it"):
        opt.save(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    if part == "entries":
        opt.rename({name: "b"})
        opt.save(tmp_path / "run")
        assert set(listed(tmp_path / "run").saved[part]) == {"b", "a\U0001f600"}


@pytest.mark.parametrize("depth", [20, 40, 300])
def test_a_schedule_that_is_nested_deep_costs_no_state(tmp_path: Path, depth: int) -> None:
    lr: mo.schedules.Schedule = mo.schedules.Constant(0.1)
    for _ in range(depth):
        lr = mo.schedules.Join([lr, mo.schedules.Constant(0.1)], [9])
    rules = {"flat": mo.SGD(), "deep": mo.SGD(lr=lr)}
    opt = mo.Optimizer(rules.__getitem__)
    opt.step({name: np.ones(2) for name in rules}, {name: np.ones(2) for name in rules})
    opt.save(tmp_path / "run")
    assert mo.Optimizer(mo.SGD()).load(tmp_path / "run").pending == ("flat", "deep")


def test_a_description_that_is_nested_too_deep_to_be_read_is_not_written(tmp_path: Path) -> None:
    opt = mo.Optimizer(mo.SGD())
    opt.step({"w": np.ones(2)}, {"w": np.ones(2)})
    state = opt.state_dict()
    for _ in range(70):
        state["entries"]["w"]["rule"] = {
            "name": "SGD",
            "of somebody": state["entries"]["w"]["rule"],
        }
    other = mo.Optimizer(mo.SGD())
    other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"the rule in the state of 'w': .*more than 64 deep"):
        other.save(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 3)])
def test_any_shape_can_be_saved(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = saved(tmp_path, w=np.ones(shape, order="F"))
    opt = mo.Optimizer(mo.Adam(lr=0.1))
    opt.load(path)
    opt.step({"w": np.ones(shape)}, {"w": np.ones(shape)})
    assert opt.state("w").step == 3


def test_a_file_of_a_newer_version_says_so(tmp_path: Path) -> None:
    save_file({}, tmp_path / "new", metadata={"multiopt": '{"version": 5, "all": "different"}'})
    with pytest.raises(mo.CheckpointError, match="got version 5: it needs a newer release"):
        mo.Optimizer(mo.Adam()).load(tmp_path / "new")


def test_the_rule_in_the_file_is_a_description(tmp_path: Path) -> None:
    rule = mo.ClippedAdam(lr=lambda step: 1 / step, clip_norm=float("inf"))
    path = saved(tmp_path, rule)
    with safe_open(path, "numpy") as file:
        document = json.loads(file.metadata()["multiopt"])
    assert document["version"] == 4
    (table,) = document["entries"]
    assert (table["names"], table["steps"]) == (["w"], [2])
    assert document["rules"][table["rule"]] == {
        "name": "ClippedAdam",
        "lr": 0.5,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": 0.0,
        "clip_norm": "inf",
        "lrd": 1.0,
        "centered_variance": False,
    }
    opt = mo.Optimizer(mo.ClippedAdam(lr=0.25))
    opt.load(path)
    assert opt.rule == mo.ClippedAdam(lr=0.25)


def test_a_file_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    path = saved(tmp_path)
    opt = mo.Optimizer(mo.SGD(momentum=0.9))
    opt.step({"v": np.ones(2)}, {"v": np.ones(2)})
    with pytest.raises(mo.CheckpointError, match=r"run.safetensors: .*'w' has the slots .*of Adam"):
        opt.load(path)
    assert (opt.names, opt.pending) == (("v",), ())


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\3\4 not ours at all"),
        lambda path: path.write_bytes(path.read_bytes()[:-5]),
        lambda path: save_file({"w": np.ones(3)}, path),
        lambda path: save_file({"w": np.ones(3)}, path, metadata={"multiopt": "{"}),
        lambda path: save_file({"w": np.ones(3)}, path, metadata={"multiopt": "[]"}),
        lambda path: save_file({"w": np.ones(3)}, path, metadata={"multiopt": "[" * 100_000}),
        lambda path: save_file({"w": np.ones(3)}, path, metadata={"multiopt": '{"version": 1}'}),
        lambda path: save_file(
            {}, path, metadata={"multiopt": path_document(slots={"exp_avg": "7"})}
        ),
    ],
    ids=[
        "empty",
        "foreign",
        "short",
        "no metadata",
        "no JSON",
        "a list",
        "deep",
        "no entries",
        "no tensor",
    ],
)
def test_a_damaged_file_is_a_checkpoint_error_and_changes_nothing(
    tmp_path: Path, damage: object
) -> None:
    path = saved(tmp_path)
    damage(path)  # type: ignore[operator]
    opt = mo.Optimizer(mo.Adam())
    opt.step({"v": np.ones(2)}, {"v": np.ones(2)})
    with pytest.raises(mo.CheckpointError, match=r"run.safetensors: "):
        opt.load(path)
    assert (opt.names, opt.pending) == (("v",), ())


def path_document(slots: dict[str, str]) -> str:
    entry = {"rule": {"name": "Adam"}, "step": 1, "slots": slots}
    return json.dumps({"version": 1, "entries": {"w": entry}, "pending": {}})


def test_a_file_has_the_mode_that_others_have(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    path = saved(tmp_path)
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    path.chmod(0o664)
    saved(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o664


def test_saving_to_a_link_keeps_the_link(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "run.safetensors").symlink_to(tmp_path / "folder" / "real.safetensors")
    path = saved(tmp_path)
    assert path.is_symlink()
    assert (tmp_path / "folder" / "real.safetensors").stat().st_size > 0


def test_two_threads_may_save_to_one_file(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: saved(tmp_path), range(20)))
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        mo.Optimizer(mo.Adam()).load(tmp_path / "none.safetensors")


def test_a_failed_save_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        saved(tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]
