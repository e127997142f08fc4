"""``multiopt show``: what is in a file, as a table."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import multiopt as mo
from multiopt.cli import main


def test_a_file_is_shown_as_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = mo.Optimizer(mo.Adam(lr=0.5), average=mo.Average())
    params = {"waits": np.ones(2), "z": np.ones((), np.complex64)}
    before.step(params, params)
    opt = mo.Optimizer(
        lambda name: mo.AdamW(lr=0.5) if name == "scale" else mo.Adafactor(), average=mo.Average()
    )
    opt.load_state_dict(before.state_dict())
    params = {"scale": np.ones(3, np.float32), "m": np.ones((3, 4))}
    for _ in range(12):
        opt.step(params, params)
    path = tmp_path / "run.safetensors"
    opt.save(path, metadata={"epoch": 3})
    assert main(["show", str(path)]) == 0
    head, *rest = capsys.readouterr().out.replace(str(path), "FILE").splitlines()
    size = path.stat().st_size
    assert head == (
        f"FILE: multiopt checkpoint, version 4, {size} bytes, 13 steps, 2 names seen, 2 pending, "
        "checked"
    )
    rules = [
        "AdamW 1: lr=0.5, betas=[0.9, 0.999], eps=1e-08, weight_decay=0.01, amsgrad=false",
        "Adafactor 2: lr=0.01, beta2_decay=-0.8, eps=[null, 0.001], d=1.0, weight_decay=0.0",
        "Adam 3: lr=0.5, betas=[0.9, 0.999], eps=1e-08, weight_decay=0.0, amsgrad=false",
    ]
    more = ["", "", ", decoupled_weight_decay=false"]
    assert rest == [
        'metadata: {"epoch": 3}',
        "",
        "name   state    rule         step  slots                shape   dtype      bytes",
        "scale  seen     AdamW 1        12  exp_avg, exp_avg_sq  (3,)    float32       24",
        "m      seen     Adafactor 2    12  row_var              (3, 1)  float64       24",
        "                                   col_var              (1, 4)  float64       32",
        "waits  pending  Adam 3          1  exp_avg, exp_avg_sq  (2,)    float64       32",
        "z      pending  Adam 3          1  exp_avg, exp_avg_sq  ()      complex64     16",
        "scale  seen     Average 4      12  average              (3,)    float32       12",
        "m      seen     Average 4      12  average              (3, 4)  float64       96",
        "waits  pending  Average 4       1  average              (2,)    float64       16",
        "z      pending  Average 4       1  average              ()      complex64      8",
        "",
        *(f"{rule}, maximize=false{end}" for rule, end in zip(rules, more, strict=True)),
        "Average 4: decay=1.0, start=1.0",
    ]


def test_parameters_and_settings_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opt = mo.Optimizer(mo.SGD(lr=0.5))
    params = {"w": np.ones((2, 3), np.float16), "z": np.ones(2, np.complex64)}
    opt.step(params, params)
    opt.set_hyperparameters(lr=mo.schedules.Linear(0.5, 0.0, 9), weight_decay=0.25)
    opt.set_hyperparameters("w", momentum=0.5, lr=lambda step: 0.5)
    path = tmp_path / "run.safetensors"
    with pytest.warns(UserWarning, match=r"callable of yours \(lr of 'w'\)"):
        opt.save(path, params=params)
    assert main(["show", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if "parameter " in line] == [
        ["w", "parameter", "(2,", "3)", "float16", "12"],
        ["z", "parameter", "(2,)", "complex64", "16"],
    ]
    assert lines[-2:] == [
        "set for all names: lr=Linear(initial=0.5, final=0.0, steps=9), weight_decay=0.25",
        "set for w: momentum=0.5, lr=a callable that was not saved",
    ]


def test_the_example_in_the_documents_is_what_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    *_, example = text.split("```\n$ multiopt show run.safetensors\n")
    opt = mo.Optimizer(mo.Adam(lr=0.1))
    params = {"loc": np.zeros(3), "scale": np.ones(())}
    opt.step(params, {"loc": np.ones(3), "scale": np.ones(())})
    monkeypatch.chdir(tmp_path)
    opt.save("run.safetensors", metadata={"epoch": 1})
    assert main(["show", "run.safetensors"]) == 0
    assert example.startswith(capsys.readouterr().out + "```\n")


def test_a_slot_that_is_rotten_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opt = mo.Optimizer(mo.Adam(), average=mo.Average())
    params = {name: np.arange(1.0, size) for name, size in (("w", 10), ("a\nb", 20), ("c", 30))}
    opt.step(params, {name: w + 0.5 for name, w in params.items()})
    path = tmp_path / "run"
    opt.save(path, metadata={"loss": float("nan")})
    assert main(["show", str(path)]) == 0
    whole = capsys.readouterr().out.splitlines()
    assert whole[0].endswith(", 0 pending, checked")
    raw = bytearray(path.read_bytes())
    for name, slot in (("a\nb", "exp_avg_sq"), ("c", "exp_avg")):
        raw[raw.index(opt.state(name).slots[slot].tobytes()) + 3] ^= 1
    raw[raw.index(np.asarray(opt.average("w")).tobytes())] ^= 1
    path.write_bytes(raw)
    assert main(["show", str(path)]) == 1
    head, *rest = capsys.readouterr().out.splitlines()
    assert head == whole[0].removesuffix("checked") + "damaged"
    assert rest[:3] == [
        "damaged: w, its slot average: the checksum differs",
        r"damaged: 'a\nb', its slot exp_avg_sq: the checksum differs",
        "damaged: c, its slot exp_avg: the checksum differs",
    ]
    # The rest is shown all the same.
    assert rest[3:] == whole[1:]
    assert rest[3] == 'metadata: {"loss": NaN}'


def test_slots_that_a_disk_has_lost_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opt = mo.Optimizer(mo.Adam())
    opt.step({"w": np.ones(1000)}, {"w": np.ones(1000)})
    path = tmp_path / "run.safetensors"
    opt.save(path)
    # A file whose slots are holes.
    size = path.stat().st_size
    with path.open("rb+") as file:
        header = int.from_bytes(file.read(8), "little")
        file.truncate(8 + header)
        file.truncate(size)
    with pytest.raises(mo.CheckpointError, match="'w'"):
        mo.Optimizer(mo.Adam()).load(path)
    assert main(["show", str(path)]) == 1
    out = capsys.readouterr().out
    assert "16000" in out
    assert "damaged: w, its slot exp_avg_sq: the checksum differs" in out


def test_a_file_without_checksums_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parent / "checkpoints" / "version_1.safetensors"
    assert main(["show", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith(" pending, without checksums")


@pytest.mark.parametrize("name", ["\x1b[2J", "a\nb", "", " ", "\x9b1m", "\u202ea", "\ud800"])
def test_names_do_nothing_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    opt = mo.Optimizer(mo.SGD())
    opt.step({name: np.ones(2)}, {name: np.ones(2)})
    opt.save(tmp_path / "run", metadata={name: name})
    main(["show", str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable()
    assert repr(name) in out


def test_skips_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opt = mo.Optimizer(mo.SGD(), on_nonfinite="skip")
    params, bad = {"w": np.ones(2), "a\nb": np.ones(2)}, np.full(2, np.nan)
    opt.step(params, {"w": bad, "a\nb": bad})
    opt.step(params, {"w": np.ones(2), "a\nb": bad})
    opt.save(tmp_path / "run")
    main(["show", str(tmp_path / "run")])
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "",
        "skipped: w, 1 in all, 0 in a row",
        r"skipped: 'a\nb', 2 in all, 2 in a row",
    ]
    opt = mo.Optimizer(mo.SGD())
    opt.save(tmp_path / "run")
    main(["show", str(tmp_path / "run")])
    assert "skipped" not in capsys.readouterr().out


def command(path: Path, **environment: str) -> "subprocess.Popen[bytes]":
    """``multiopt show`` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "multiopt", "show", str(path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([".", "backends"]), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_letters_that_the_terminal_has_not_are_escaped(tmp_path: Path) -> None:
    opt, params = mo.Optimizer(mo.SGD()), {"é": np.ones(2)}
    opt.step(params, params)
    opt.save(tmp_path / "run")
    out, err = command(tmp_path / "run", PYTHONIOENCODING="ascii").communicate(timeout=60)
    assert (b"\\xe9" in out, err) == (True, b"")


@pytest.mark.parametrize("names", [1, 3000])
def test_a_reader_who_has_enough_is_no_error(tmp_path: Path, names: int) -> None:
    opt, params = mo.Optimizer(mo.SGD()), {f"w{i}": np.ones(2) for i in range(names)}
    opt.step(params, {name: np.ones(2) for name in params})
    opt.save(tmp_path / "run")
    process = command(tmp_path / "run")
    assert process.stdout is not None
    assert process.stderr is not None
    if names > 1:
        process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 1


def test_a_program_without_output_shows_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mo.Optimizer(mo.SGD()).save(tmp_path / "run")
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["show", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("kind", ["none", "a folder", "foreign", "damaged", "other dtypes"])
def test_what_cannot_be_shown_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path = tmp_path / "run"
    if kind == "a folder":
        path.mkdir()
    elif kind == "foreign":
        save_file({"w": np.ones(2)}, path)
    elif kind == "damaged":
        path.write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    elif kind == "other dtypes":
        entry = '{"rule": {"name": "Adam"}, "step": 1, "slots": {"exp_avg": "0"}}'
        text = f'{{"version": 1, "entries": {{"w": {entry}}}, "pending": {{}}}}'
        save_file({"0": np.ones(2, np.int8)}, path, metadata={"multiopt": text})
    with pytest.raises(SystemExit) as status:
        main(["show", str(path)])
    assert status.value.code == 2
    assert str(path) in capsys.readouterr().err
