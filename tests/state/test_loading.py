"""What is loaded, under which names, and what the report says of the rest."""

import copy
import json
import os
import pickle
import re
import subprocess
import sys
from collections import Counter, OrderedDict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import multiopt as mo
from multiopt.adapters import torch_optim
from multiopt.state.plain_data import contents_of
from multiopt.state.tables import waiting as tables
from multiopt.state.writing import write
from tests.libraries import JAX, NUMPY, STRICT, TORCH, Library, assert_equal, engine

LOCAL = [NUMPY, TORCH, JAX, STRICT]


def ones(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.ones(shape, dtype)


def stepped(rule: Any = None, **params: np.ndarray) -> mo.Optimizer:
    opt = mo.Optimizer(mo.Adam(lr=0.1) if rule is None else rule)
    for step in range(3):
        opt.step(params, {name: (1.5 + step) * np.ones_like(w) for name, w in params.items()})
    return opt


@pytest.fixture(params=["file", "state dict"])
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Loads the state of one optimizer into another."""

    def load(source: mo.Optimizer, target: mo.Optimizer, **options: Any) -> mo.LoadReport:
        if request.param == "state dict":
            return target.load_state_dict(source.state_dict(), **options)
        source.save(tmp_path / "run.safetensors")
        return target.load(tmp_path / "run.safetensors", **options)

    return load


def test_the_report_says_what_became_of_each_name(loaded: Any) -> None:
    source = stepped(a=ones(2), b=ones(3))
    target = stepped(b=ones(3), c=ones(4))
    report = loaded(source, target)
    assert report == mo.LoadReport(restored=("b",), pending=("a",), missing=("c",))
    assert_equal(target.state("b").slots["exp_avg"], source.state("b").slots["exp_avg"])


def test_only_some_names_can_be_loaded(loaded: Any) -> None:
    source, target = stepped(a=ones(2), b=ones(3), c=ones(4)), mo.Optimizer(mo.Adam())
    report = loaded(source, target, names=(name for name in ("c", "a")))
    assert set(report.pending) == {"a", "c"}
    assert report.unused == {"b": "it was not asked for"}
    assert set(target.pending) == {"a", "c"}
    assert target.steps == 3
    report = loaded(source, stepped(a=ones(2), b=ones(3), x=ones(1)), names=["a"])
    assert (report.restored, report.missing) == (("a",), ("x",))
    assert loaded(source, target, names="b").pending == ("b",)
    with pytest.raises(KeyError, match="'d'"):
        loaded(source, target, names=["a", "d"])


def test_some_names_do_not_set_the_clock_of_the_others(loaded: Any) -> None:
    source, target = stepped(a=ones(2), b=ones(3)), mo.Optimizer(mo.Adam())
    target.step({"x": ones(1)}, {"x": ones(1)})
    loaded(source, target, names=["a"])
    assert target.steps == 1
    loaded(source, target)
    assert target.steps == 3


@pytest.mark.parametrize("rename", [{"a": "x", "b": "a"}, lambda name: {"a": "x"}.get(name, "a")])
def test_names_can_be_changed(loaded: Any, rename: Any) -> None:
    source, target = stepped(a=ones(2), b=ones(3)), stepped(a=ones(3))
    report = loaded(source, target, rename=rename)
    assert (report.restored, report.pending) == (("a",), ("x",))
    assert_equal(target.state("a").slots["exp_avg"], source.state("b").slots["exp_avg"])


@pytest.mark.parametrize(
    ("rename", "error", "message"),
    [
        ({"a": "b"}, ValueError, "'a' and 'b': both would be called 'b'"),
        ({"z": "b"}, KeyError, "'z'"),
        (lambda name: None, TypeError, "expected a string"),
    ],
)
def test_names_that_cannot_be_changed_change_nothing(
    loaded: Any, rename: Any, error: type[Exception], message: str
) -> None:
    target = mo.Optimizer(mo.Adam())
    with pytest.raises(error, match=message):
        loaded(stepped(a=ones(2), b=ones(3)), target, rename=rename)
    assert target.pending == ()


def test_what_does_not_fit_is_left_out_by_name_if_that_is_asked_for(loaded: Any) -> None:
    source = stepped(a=ones(2), b=ones(3), c=ones(4, dtype="float64"), d=ones(1))
    target = stepped(a=ones(2), b=ones(4), c=ones(4))
    before = target.state("b").slots["exp_avg"]
    with pytest.raises(ValueError, match="parameter 'b' has shape"):
        loaded(source, target)
    report = loaded(source, target, strict=False)
    assert (report.restored, report.pending, report.missing) == (("a",), ("d",), ())
    assert list(report.unused) == ["b", "c"]
    assert "has shape (3,); expected (4,)" in report.unused["b"]
    assert "has dtype float64; expected float32" in report.unused["c"]
    assert_equal(target.state("b").slots["exp_avg"], before)


def test_state_of_another_rule_is_left_out_if_that_is_asked_for(loaded: Any) -> None:
    target = mo.Optimizer(mo.SGD(momentum=0.9))
    report = loaded(stepped(a=ones(2)), target, strict=False)
    assert "has the slots ['exp_avg', 'exp_avg_sq'] (of Adam)" in report.unused["a"]
    assert (target.names, target.pending) == ((), ())


def averaging(average: Any, **params: np.ndarray) -> mo.Optimizer:
    opt = mo.Optimizer(mo.Adam(), average=average)
    for _ in range(2):
        opt.step(params, {name: np.ones_like(w) for name, w in params.items()})
    return opt


def test_an_average_that_nobody_keeps_is_reported(loaded: Any) -> None:
    source = averaging(mo.Average(), a=ones(2), b=ones(3))
    target = averaging(lambda name: mo.Average() if name == "a" else None)
    with pytest.raises(ValueError, match="averages of 'b'"):
        loaded(source, target)
    report = loaded(source, target, strict=False)
    assert set(report.pending) == {"a", "b"}
    assert report.unused == {"b": "its average: this optimizer keeps none of it"}
    report = loaded(source, mo.Optimizer(mo.Adam()), strict=False)
    assert list(report.unused) == ["a", "b"]


def test_averages_go_along_with_their_names(loaded: Any) -> None:
    source, target = averaging(mo.Average(), a=ones(2), b=ones(3)), averaging(mo.Average())
    loaded(source, target, names=["a"], rename={"a": "x"})
    w, v = ones(2), source.state_dict()
    target.step({"x": w}, {"x": ones(2)})
    here = ones(2)
    source.step({"a": here}, {"a": ones(2)})
    assert_equal(target.average("x"), source.average("a"))
    assert v["averages"]["a"]["step"] == 2


@pytest.mark.parametrize("library", LOCAL, ids=lambda library: library.id)
@pytest.mark.parametrize("seen", [False, True])
def test_the_dtype_changes_only_when_that_is_asked_for(
    loaded: Any, library: Library, seen: bool
) -> None:
    source = stepped(a=ones(3, dtype="float64") / 3)
    target, param = mo.Optimizer(mo.Adam(lr=0.1)), library.param(ones(3))
    if seen:
        target.step({"a": param}, {"a": library.grad(ones(3))})
        with pytest.raises(ValueError, match="cast=True"):
            loaded(source, target)
    loaded(source, target, cast=True)
    if not seen:
        # The last step of the source, as a float32 parameter takes it.
        reference = mo.Optimizer(mo.Adam(lr=0.1))
        state = source.state_dict()
        slots = state["entries"]["a"]["slots"]
        state["entries"]["a"]["slots"] = {k: x.astype("float32") for k, x in slots.items()}
        reference.load_state_dict(state)
        reference.step({"a": ones(3)}, {"a": ones(3)})
        target.step({"a": param}, {"a": library.grad(ones(3))})
        expected = reference.state("a").slots["exp_avg"]
    else:
        expected = source.state("a").slots["exp_avg"].astype("float32")
    assert_equal(library.numpy(target.state("a").slots["exp_avg"]), expected)


def test_slots_may_have_the_other_byte_order(library: Library) -> None:
    source = mo.Optimizer(mo.Adam(lr=0.1), average=mo.Average())
    params = {"seen": ones(3, dtype="float64") / 3, "waits": ones(2) / 7}
    source.step(params, {name: w.copy() for name, w in params.items()})
    state = source.state_dict()
    for part in ("entries", "averages"):
        for entry in state[part].values():
            swapped = {k: x.astype(x.dtype.newbyteorder()) for k, x in entry["slots"].items()}
            entry["slots"] = swapped

    def went_on(state: dict[str, Any], library: Library) -> mo.Optimizer:
        opt = mo.Optimizer(mo.Adam(lr=0.1), average=mo.Average())
        here = {name: library.param(w) for name, w in params.items()}
        grads = {name: library.grad(w) for name, w in params.items()}
        with engine(library.engine):
            here = {**here, **opt.step({"seen": here["seen"]}, {"seen": grads["seen"]})}
            opt.load_state_dict(state)
            opt.step(here, grads)
        return opt

    expected, opt = went_on(source.state_dict(), NUMPY), went_on(state, library)
    for name in params:
        assert_equal(library.numpy(opt.average(name)), expected.average(name), name)
        for slot, array in expected.state(name).slots.items():
            assert_equal(library.numpy(opt.state(name).slots[slot]), array, slot)


def test_complex_state_does_not_become_real(loaded: Any) -> None:
    source = stepped(a=ones(3, dtype="complex64"))
    with pytest.raises(ValueError, match="dtype complex64"):
        loaded(source, stepped(a=ones(3)), cast=True)
    target = stepped(a=ones(3, dtype="complex128"))
    loaded(source, target, cast=True)
    assert_equal(
        target.state("a").slots["exp_avg"],
        source.state("a").slots["exp_avg"].astype("complex128"),
    )


MISFITS = {
    "complex into real": (
        *(ones(3, dtype="complex64"), ones(3), {"cast": True}),
        (
            "dtype complex64 and shape (3,); expected a real one, for a parameter of dtype float32 "
            "and shape (3,): forget the name to start over"
        ),
    ),
    "real into complex": (
        *(ones(3), ones(3, dtype="complex128"), {"cast": True}),
        (
            "dtype float32 and shape (3,); expected a complex one, for a parameter of dtype "
            "complex128 and shape (3,): forget the name to start over"
        ),
    ),
    "another complex dtype": (
        *(ones(3, dtype="complex64"), ones(3, dtype="complex128"), {}),
        (
            "dtype complex64; expected complex128, for a parameter of dtype complex128: load it "
            "with cast=True, or forget the name to start over"
        ),
    ),
    "another complex shape": (
        *(ones(3, dtype="complex64"), ones(2, 2, dtype="complex64"), {}),
        "shape (3,); expected (2, 2) for a parameter of shape (2, 2): forget the name",
    ),
    "another real dtype": (
        *(ones(3, dtype="float64"), ones(3), {}),
        "dtype float64; expected float32, for a parameter of dtype float32: load it with cast=True",
    ),
}


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("case", MISFITS)
def test_a_misfit_is_said_as_the_arrays_are(loaded: Any, case: str, waits: bool) -> None:
    saved, param, options, message = MISFITS[case]
    message = re.escape(f"the loaded slot 'exp_avg' of parameter 'a' has {message}")
    if not waits:
        with pytest.raises(ValueError, match=message):
            loaded(stepped(a=saved), stepped(a=param), **options)
        return
    target = mo.Optimizer(mo.Adam())
    loaded(stepped(a=saved), target, **options)
    with pytest.raises(ValueError, match=message):
        target.step({"a": param}, {"a": param.copy()})


def test_the_parts_of_a_complex_slot_are_one_and_said_as_parts() -> None:
    source, target = stepped(a=ones(3, 2, dtype="float64")), stepped(a=ones(3, dtype="complex64"))
    with pytest.raises(ValueError, match=r"dtype float64; expected float32, .* dtype complex64: "):
        target.load_state_dict(source.state_dict())
    target.load_state_dict(source.state_dict(), cast=True)
    assert target.state("a").slots["exp_avg"].dtype == "complex64"


def test_a_master_copy_that_nobody_asked_for_has_a_remedy() -> None:
    source = mo.Optimizer(mo.SGD(), master_weights=True)
    half = np.ones(2, np.float16)
    source.step({"a": half}, {"a": half.copy()})
    target = mo.Optimizer(mo.SGD())
    target.load_state_dict(source.state_dict())
    with pytest.raises(ValueError, match="16 bits make the optimizer with master_weights=True, "):
        target.step({"a": half}, {"a": half.copy()})


@pytest.mark.parametrize("step", [np.int64(3), 2**53 + 1, -1, 3.0])
def test_a_clock_is_an_int(step: Any) -> None:
    state = stepped(a=ones(2)).state_dict()
    state["entries"]["a"]["step"] = step
    message = re.escape(f"has step {step!r}; expected an int from 0 to 2^53")
    with pytest.raises(mo.CheckpointError, match=message):
        mo.Optimizer(mo.Adam()).load_state_dict(state)
    state = {**stepped(a=ones(2)).state_dict(), "skips": {"a": [step, 0]}}
    with pytest.raises(mo.CheckpointError, match=r"in a row, ints from 0 to 2\^53"):
        mo.Optimizer(mo.Adam()).load_state_dict(state)


@pytest.mark.parametrize("new", [False, True])
def test_a_file_of_torch_says_what_reads_it(tmp_path: Path, new: bool) -> None:
    path = tmp_path / "run.pt"
    optimizer = torch.optim.Adam([torch.ones(2, requires_grad=True)])
    torch.save(optimizer.state_dict(), path, _use_new_zipfile_serialization=new)
    with pytest.raises(mo.CheckpointError, match=r"run.pt: .*multiopt.adapters.torch_optim.read"):
        mo.Optimizer(mo.Adam()).load(path)
    assert set(torch_optim.read(path)) == {"state", "param_groups"}


def test_a_header_of_any_length_is_no_file_of_torch(tmp_path: Path) -> None:
    # The first byte of a file is that of the length of its header.
    beginnings = set()
    for n in range(64):
        stepped(a=ones(2)).save(tmp_path / "run", metadata={"x": 8 * n * "y"})
        beginnings.add((tmp_path / "run").read_bytes()[:1])
        assert mo.Optimizer(mo.Adam()).load(tmp_path / "run").pending == ("a",)
    assert b"\x80" in beginnings


def test_a_safetensors_file_of_others_says_so(tmp_path: Path) -> None:
    for metadata in (None, {"format": "pt"}):
        save_file({"w": np.ones(3)}, tmp_path / "model", metadata=metadata)
        with pytest.raises(mo.CheckpointError, match="model: it is a safetensors file without mul"):
            mo.Optimizer(mo.Adam()).load(tmp_path / "model")


@pytest.mark.parametrize("view", [torch.conj, lambda x: torch.conj(x).imag])
def test_slots_that_are_views_with_a_bit_are_what_they_show(view: Any, tmp_path: Path) -> None:
    slot = view(torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64))
    assert slot.is_conj() or slot.is_neg()
    opt = stepped(a=slot.resolve_conj().resolve_neg().numpy())
    state = opt.state_dict()
    state["entries"]["a"]["slots"] = {"exp_avg": slot, "exp_avg_sq": slot}
    opt.load_state_dict(state)
    assert opt.state("a").slots["exp_avg"].tolist() == slot.tolist()
    write(tmp_path / "run", tables(contents_of(state).saved), 3, {})
    target = mo.Optimizer(mo.Adam())
    target.load(tmp_path / "run")
    assert target.state_dict()["pending"]["a"]["slots"]["exp_avg"].tolist() == slot.tolist()


def test_complex_state_in_a_file_is_complex_when_it_waits(tmp_path: Path) -> None:
    source, target = stepped(a=ones(3, dtype="complex64")), mo.Optimizer(mo.Adam())
    source.save(tmp_path / "one")
    target.load(tmp_path / "one")
    waiting = target.state_dict()["pending"]["a"]["slots"]
    for slot, array in source.state("a").slots.items():
        assert_equal(waiting[slot], array)
    target.save(tmp_path / "two")
    assert load_file(tmp_path / "one").keys() == load_file(tmp_path / "two").keys()
    again = mo.Optimizer(mo.Adam())
    again.load(tmp_path / "two")
    assert_equal(again.state_dict()["pending"]["a"]["slots"]["exp_avg"], waiting["exp_avg"])


# State that waits, as it is shown


def waiting(library: Library, average: bool = True) -> tuple[mo.Optimizer, dict[str, Any]]:
    """An optimizer with state of some names that waits, and the state that it came from."""
    mean = mo.Average() if average else None
    source, target = (mo.Optimizer(mo.Adam(), average=mean) for _ in range(2))
    arrays = {"a": ones(2), "b": np.ones(()), "z": ones(3, dtype="complex64"), "e": ones(0, 2)}
    params = {name: library.param(array) for name, array in arrays.items()}
    source.step(params, {name: library.grad(array) for name, array in arrays.items()})
    state = source.state_dict()
    target.load_state_dict(state)
    target.step({"a": params["a"]}, {"a": library.grad(arrays["a"])})
    return target, state


@pytest.mark.parametrize("library", LOCAL, ids=lambda one: one.id)
def test_what_waits_is_shown_as_arrays_of_the_library_it_came_from(library: Library) -> None:
    opt, state = waiting(library)
    for _ in range(2):
        shown = opt.state_dict()
        assert set(shown["pending"]) == set(shown["pending_averages"]) == {"b", "z", "e"}
        for part, was in (("pending", "entries"), ("pending_averages", "averages")):
            for name, entry in shown[part].items():
                for slot, array in state[was][name]["slots"].items():
                    found = entry["slots"][slot]
                    assert type(found) is type(array)
                    assert_equal(library.numpy(found), library.numpy(array))
        # Also when it has waited somewhere else in the meantime.
        opt = mo.Optimizer(mo.Adam(), average=mo.Average())
        opt.load_state_dict(shown)
        opt.step({"a": library.param(ones(2))}, {"a": library.grad(ones(2))})


@pytest.mark.parametrize("average", [False, True])
def test_torch_loads_a_state_dict_with_state_that_waits(tmp_path: Path, average: bool) -> None:
    opt, _ = waiting(TORCH, average)
    torch.save({"opt": opt.state_dict()}, tmp_path / "run.pt")
    again = mo.Optimizer(mo.Adam(), average=mo.Average())
    again.load_state_dict(torch.load(tmp_path / "run.pt", weights_only=True)["opt"])
    assert set(again.pending) == {"a", "b", "z", "e"}


def test_torch_loads_a_state_dict_with_state_of_torch_that_waits(tmp_path: Path) -> None:
    params = [torch.ones(2, requires_grad=True) for _ in range(2)]
    adam = torch.optim.Adam(params)
    for param in params:
        param.grad = torch.ones(2)
    adam.step()
    opt = mo.Optimizer(mo.Adam())
    opt.load_state_dict(torch_optim.from_torch(adam.state_dict(), torch.optim.Adam, ["a", "b"]))
    opt.step({"a": params[0]})
    torch.save(opt.state_dict(), tmp_path / "run.pt")
    assert set(torch.load(tmp_path / "run.pt", weights_only=True)["pending"]) == {"b"}


def test_what_waits_and_came_from_a_file_is_shown_as_numpy_arrays(tmp_path: Path) -> None:
    opt, _ = waiting(TORCH)
    opt.save(tmp_path / "run")
    again = mo.Optimizer(mo.Adam(), average=mo.Average())
    again.load(tmp_path / "run")
    for part in ("pending", "pending_averages"):
        for entry in again.state_dict()[part].values():
            assert all(type(array) is np.ndarray for array in entry["slots"].values())
    # ``torch.load`` does not take those, ``read`` does.
    torch.save(again.state_dict(), tmp_path / "run.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "run.pt", weights_only=True)
    last = mo.Optimizer(mo.Adam(), average=mo.Average())
    last.load_state_dict(torch_optim.read(tmp_path / "run.pt"))
    assert last.pending == again.pending


def test_what_is_shown_of_what_waits_is_a_copy() -> None:
    opt, _ = waiting(TORCH)
    for _ in range(2):
        slot = opt.state_dict()["pending"]["b"]["slots"]["exp_avg"]
        assert slot != 9.0
        slot.fill_(9.0)


def test_no_library_is_imported_to_show_what_waits(tmp_path: Path) -> None:
    opt, _ = waiting(TORCH)
    opt.forget("a")
    (tmp_path / "opt").write_bytes(pickle.dumps(opt))
    program = (
        "import pathlib, pickle, sys\n"
        f"opt = pickle.loads(pathlib.Path({str(tmp_path / 'opt')!r}).read_bytes())\n"
        "print(type(opt.state_dict()['pending']['b']['slots']['exp_avg']), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "<class 'numpy.ndarray'> False\n"


def test_arguments_of_another_kind_are_said(loaded: Any) -> None:
    for option in ("names", "rename"):
        with pytest.raises(TypeError, match=f"{option} must be .*; got 3"):
            loaded(stepped(a=ones(2)), mo.Optimizer(mo.Adam()), **{option: 3})


def test_paths_may_be_bytes(tmp_path: Path) -> None:
    path: Any = os.fsencode(tmp_path / "é")
    stepped(a=ones(2)).save(path)
    assert mo.Optimizer(mo.Adam()).load(path).pending == ("a",)


# Metadata


def test_metadata_comes_back(tmp_path: Path) -> None:
    metadata = {"epoch": 3, "loss": [0.5, 0.25], "nested": {"é\n": None, "yes": True}}
    stepped(a=ones(2)).save(tmp_path / "run", metadata=metadata)
    assert mo.Optimizer(mo.Adam()).load(tmp_path / "run").metadata == metadata
    # It belongs to one file.
    opt = mo.Optimizer(mo.Adam())
    opt.load(tmp_path / "run")
    opt.save(tmp_path / "run")
    assert mo.Optimizer(mo.Adam()).load(tmp_path / "run").metadata == {}


@pytest.mark.parametrize(
    "metadata",
    [
        {"loss": list(range(10)) * 30_000},
        {"pairs": [[0.5, 0.25]] * 50_000},
        {"epochs": [{"loss": 0.5, "epoch": 1}] * 20_000},
        {"dense": [[[]] * 1000] * 20},
    ],
    ids=lambda metadata: next(iter(metadata)),
)
def test_metadata_may_be_long(tmp_path: Path, metadata: Any) -> None:
    stepped(a=ones(2)).save(tmp_path / "run", metadata=metadata)
    assert mo.Optimizer(mo.Adam()).load(tmp_path / "run").metadata == metadata


def test_metadata_that_would_take_far_more_memory_than_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mappings, lists and commas .*: save fewer names"):
        stepped(a=ones(2)).save(tmp_path / "run", metadata={"x": [[]] * 50_000})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("names", [[f"{i:x}" for i in range(20_000)], ["," * 50_000, "{" * 5000]])
def test_short_names_and_odd_names_have_room(tmp_path: Path, names: list[str]) -> None:
    opt = mo.Optimizer(mo.SGD())
    params = {name: np.ones(1) for name in names}
    opt.step(params, params | {})
    opt.save(tmp_path / "run")
    assert mo.Optimizer(mo.SGD()).load(tmp_path / "run").pending == tuple(names)


@pytest.mark.parametrize("metadata", [[1], "abc", 3, [], "", 0, False])
def test_metadata_is_a_mapping(tmp_path: Path, metadata: Any) -> None:
    with pytest.raises(TypeError, match="metadata must be a mapping; got"):
        stepped(a=ones(2)).save(tmp_path / "run", metadata=metadata)


@pytest.mark.parametrize(
    "metadata",
    [
        {1: "a key that is no string"},
        {"pair": (1, 2)},
        {"array": np.ones(2)},
        {"a set": {1}},
        {"deep": eval("[" * 80 + "]" * 80)},
    ],
)
def test_metadata_that_would_not_come_back_is_refused(tmp_path: Path, metadata: Any) -> None:
    with pytest.raises(ValueError, match="metadata must be what JSON can hold"):
        stepped(a=ones(2)).save(tmp_path / "run", metadata=metadata)
    assert list(tmp_path.iterdir()) == []


def loop() -> list[Any]:
    made: list[Any] = []
    made += [made, made]
    return made


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"a": {"b": [1, 2, {3}]}}, "metadata['a']['b'][2] is a set; expected "),
        ({"a": (1,)}, "metadata['a'] is a tuple; expected "),
        ({"a": [(1,)]}, "strings as keys of these: make it a list"),
        ({"a": [b"x"]}, "metadata['a'][0] is a bytes; expected None, True, False, a number "),
        ({"a": 1j}, "metadata['a'] is a complex; "),
        ({"a": [{"b": {True: 1}}]}, "metadata['a'][0]['b'] has the key True; expected strings"),
        ({"a": {None: 1}}, "metadata['a'] has the key None; expected strings"),
        ({3: 1}, "metadata has the key 3; expected strings"),
        ({"a": np.ones((2, 3))}, "metadata['a'] is a ndarray of shape (2, 3); "),
        ({"a": torch.ones(())}, "strings as keys of these: call its tolist()"),
        ({"a": np.datetime64("2026-01-01", "ns")}, "metadata['a'] is a datetime64; "),
        ({"a": np.complex64(1)}, "metadata['a'] is a complex64; "),
        ({"a": np.bytes_(b"x")}, "metadata['a'] is a bytes_; "),
        ({"a": [10**5000]}, "metadata['a'][0] is a number of 16610 bits; "),
        ({"a": ["\ud83d\ude00"]}, "metadata['a'][0] has two surrogates that JSON takes for one"),
        ({"a": {"\ud83d\ude00": 1}}, "metadata['a'] has the key '\\ud83d\\ude00', with two surrog"),
        ({"a": loop()}, "it is nested more than 64 deep"),
        ({"a": len}, "metadata['a'] is a builtin_function_or_method; "),
        ({"é\n": {1}}, "metadata['é\\n'] is a set; "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_of_metadata_cannot_be_kept_is_said(
    tmp_path: Path, metadata: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        stepped(a=ones(2)).save(tmp_path / "run", metadata=metadata)
    assert str(caught.value).startswith("metadata must be what JSON can hold; ")
    assert list(tmp_path.iterdir()) == []


def same(one: Any, other: Any) -> bool:
    """Equal, of the same Python types, NaN equal to NaN and 0.0 not to -0.0."""
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and repr(one) == repr(other)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from(["nan", "inf", "-inf", "NaN", {"nan": "nan"}, {"0": None}, [None]]),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("a0\u00e9\0"), inner),
    max_leaves=20,
)


@given(metadata=st.dictionaries(st.text("a0nonfinite"), VALUES))
def test_any_metadata_comes_back(
    tmp_path_factory: pytest.TempPathFactory, metadata: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("run") / "run"
    before = copy.deepcopy(metadata)
    mo.Optimizer(mo.Adam()).save(path, metadata=metadata)
    assert same(metadata, before)
    assert same(mo.Optimizer(mo.Adam()).load(path).metadata, metadata)
    with safe_open(path, "numpy") as file:
        json.loads(file.metadata()["multiopt"], parse_constant=lambda word: 1 / 0)


@pytest.mark.parametrize("code", "?" + np.typecodes["AllInteger"] + "efdU")
def test_numpy_numbers_come_back_as_those_of_python(tmp_path: Path, code: str) -> None:
    number = np.array(1).astype(code)[()]
    metadata = {"number": number, "0-d": np.array(number), "inside": [{"it": number}]}
    expected = {"number": number.item(), "0-d": number.item(), "inside": [{"it": number.item()}]}
    stepped(a=ones(2)).save(tmp_path / "run", metadata=metadata)
    assert same(mo.Optimizer(mo.Adam()).load(tmp_path / "run").metadata, expected)


def test_the_numbers_of_a_run_that_has_diverged_come_back(tmp_path: Path) -> None:
    metadata = {
        "loss": float("nan"),
        "best": np.float32(3),
        "epoch": np.int64(4),
        "losses": [1.5, np.float32("nan"), np.inf, -np.inf],
        "stopped": np.True_,
    }
    stepped(a=ones(2)).save(tmp_path / "run", metadata=metadata)
    expected = {
        "loss": float("nan"),
        "best": 3.0,
        "epoch": 4,
        "losses": [1.5, float("nan"), float("inf"), float("-inf")],
        "stopped": True,
    }
    found = mo.Optimizer(mo.Adam()).load(tmp_path / "run").metadata
    assert same(found, expected)
    # In the file, and for those who read it as releases before this did, they are null.
    with safe_open(tmp_path / "run", "numpy") as file:
        document = json.loads(file.metadata()["multiopt"])
    assert document["metadata"]["losses"] == [1.5, None, None, None]
    assert document["nonfinite"] == {"loss": "nan", "losses": {"1": "nan", "2": "inf", "3": "-inf"}}


def test_metadata_may_have_many_numbers_that_are_not_finite(tmp_path: Path) -> None:
    metadata = {"l": [float("nan")] * 100_000}
    stepped(a=ones(2)).save(tmp_path / "run", metadata=metadata)
    found = mo.Optimizer(mo.Adam()).load(tmp_path / "run").metadata["l"]
    assert len(found) == 100_000
    assert np.isnan(found).all()


@pytest.mark.parametrize("kind", [MappingProxyType, OrderedDict, Counter])
def test_metadata_may_be_any_mapping(tmp_path: Path, kind: Any) -> None:
    stepped(a=ones(2)).save(tmp_path / "run", metadata=kind({"a": kind({"b": 1})}))
    assert same(mo.Optimizer(mo.Adam()).load(tmp_path / "run").metadata, {"a": {"b": 1}})


# Damage


def flipped(path: Path, slot_of: str, slot: str) -> None:
    """Flip a bit in the middle of a slot."""
    with safe_open(path, "numpy") as file:
        document, number = json.loads(file.metadata()["multiopt"]), 0
        for table in (*document["entries"], *document["pending"]):
            if slot_of in table["names"]:
                key = str(number + list(table["slots"]).index(slot))
                array = file.get_tensor(key)[table["names"].index(slot_of)]
            number += len(table["slots"])
    raw = bytearray(path.read_bytes())
    place = raw.rindex(array.tobytes())
    raw[place + array.nbytes // 2] ^= 16
    path.write_bytes(raw)


def test_a_rotten_bit_is_found_and_its_name_is_said(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    source = mo.Optimizer(mo.Adam())
    for step in range(2):
        source.step(
            {"a": ones(50), "b": ones(50)}, {"a": (step - 0.3) * ones(50), "b": 3.5 * ones(50)}
        )
    source.save(path)
    flipped(path, "b", "exp_avg_sq")
    target = stepped(b=ones(50))
    before = target.state("b")
    with pytest.raises(
        mo.CheckpointError,
        match=r"run.safetensors: the state of 'b', its slot 'exp_avg_sq' is damaged: the checksum",
    ):
        target.load(path)
    assert (target.names, target.pending) == (("b",), ())
    report = target.load(path, strict=False)
    assert report.pending == ("a",)
    assert report.missing == ()
    assert report.unused == {"b": "its slot 'exp_avg_sq' is damaged: the checksum differs"}
    assert_equal(target.state("b").slots["exp_avg_sq"], before.slots["exp_avg_sq"])
    # What is not asked for is not read.
    assert mo.Optimizer(mo.Adam()).load(path, names=["a"]).pending == ("a",)
    with pytest.raises(mo.CheckpointError, match="'b'"):
        mo.Optimizer(mo.Adam()).load(path, names=["b"])


def test_a_file_copied_by_another_program_loads(tmp_path: Path) -> None:
    source = stepped(a=ones(50), b=ones(3, dtype="float64"))
    source.save(tmp_path / "run", metadata={"epoch": 1})
    with safe_open(tmp_path / "run", "numpy") as file:
        metadata = file.metadata()
    save_file(load_file(tmp_path / "run"), tmp_path / "copy", metadata=metadata)
    target = mo.Optimizer(mo.Adam())
    assert target.load(tmp_path / "copy").metadata == {"epoch": 1}
    for name in ("a", "b"):
        waiting = target.state_dict()["pending"][name]["slots"]
        for slot, array in source.state(name).slots.items():
            assert_equal(waiting[slot], array)


@pytest.mark.parametrize(
    ("limit", "most"), [("writing.LARGEST_HEADER", 2000), ("document.MOST_NAMES", 199)]
)
def test_too_many_names_for_a_header_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, most: int
) -> None:
    monkeypatch.setattr(f"multiopt.state.{limit}", most)
    opt = stepped(**{f"w{i}": ones(1) for i in range(200)})
    with pytest.raises(
        ValueError, match=r"save fewer names in one file|200 names; expected at most"
    ):
        opt.save(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    opt.save(tmp_path / "run")
    monkeypatch.setattr(f"multiopt.state.{limit}", most)
    with pytest.raises(mo.CheckpointError, match=r"expected 2000 at most|more than 199 names"):
        opt.load(tmp_path / "run")


def test_a_cast_beyond_the_range_gives_infinity_in_silence() -> None:
    opt, its = mo.Optimizer(mo.Adam()), mo.Optimizer(mo.Adam())
    opt.step({"w": np.zeros(1)}, {"w": np.full(1, 1e30)})
    its.step({"w": np.zeros(1, np.float32)}, {"w": np.ones(1, np.float32)})
    with np.errstate(all="raise"):
        its.load_state_dict(opt.state_dict(), cast=True)
    assert its.state("w").slots["exp_avg_sq"].tolist() == [np.inf]


def test_a_load_that_takes_nothing_leaves_the_count_of_steps() -> None:
    state = stepped(w=ones(3)).state_dict()
    fresh = mo.Optimizer(mo.Adam())
    fresh.load_state_dict(state, names=[])
    assert fresh.steps == 0
    fresh = mo.Optimizer(mo.SGD(momentum=0.5))
    assert fresh.load_state_dict(state, strict=False).unused
    assert fresh.steps == 0


def test_a_plateau_does_not_go_back_for_a_name_that_is_loaded_later() -> None:
    def make() -> tuple[mo.schedules.Plateau, mo.Optimizer]:
        plateau = mo.schedules.Plateau(0.8, 0.5, patience=0)
        return plateau, mo.Optimizer(mo.SGD(lr=plateau))

    params, grads = {"a": np.ones(2), "b": np.ones(2)}, {"a": np.ones(2), "b": np.ones(2)}
    plateau, opt = make()
    opt.step(params, grads)
    plateau.observe(1.0)
    # Here the state of "b" waits with a description of that time.
    plateau, other = make()
    other.load_state_dict(opt.state_dict())
    for loss in (2.0, 3.0):
        plateau.observe(loss)
    other.step({"a": params["a"]}, {"a": grads["a"]})
    plateau, last = make()
    last.load_state_dict(other.state_dict(), names="a")
    last.load_state_dict(other.state_dict(), names="b")
    assert (plateau.observed, plateau(1)) == (3, 0.2)


@pytest.mark.parametrize("of", ["rule", "average"])
def test_a_first_step_that_fails_gives_back_what_a_plateau_had_seen(of: str) -> None:
    def make() -> tuple[mo.schedules.Plateau, mo.Optimizer]:
        plateau = mo.schedules.Plateau(0.8, 0.5, patience=0)
        average = mo.Average(decay=plateau) if of == "average" else None
        rule = mo.SGD(lr=plateau if of == "rule" else 0.1)
        return plateau, mo.Optimizer(lambda name: rule, average=average, on_nonfinite="raise")

    plateau, opt = make()
    opt.step({"w": np.ones(2)}, {"w": np.ones(2)})
    for loss in (1.0, 2.0):
        plateau.observe(loss)
    state = opt.state_dict()
    plateau, other = make()
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="nothing was changed"):
        other.step({"w": np.ones(2)}, {"w": np.array([1.0, np.nan])})
    assert (plateau.observed, plateau(1)) == (0, 0.8)
    other.step({"w": np.ones(2)}, {"w": np.ones(2)})
    assert (plateau.observed, plateau(1)) == (2, 0.4)
