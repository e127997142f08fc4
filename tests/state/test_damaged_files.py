"""Damaged and hostile files: an error that says so, or a correct load; never more, or less.

The files are read in a process of their own, which a crash would end. Run by itself, this module is
that process.
"""

import json
import os
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from safetensors.numpy import save
from xxhash import xxh3_64

import multiopt as mo
from tests.state.sealed import joined, parts, sealed

#: Files read by the default profile, and by the thorough one.
FILES = {"default": 300, "thorough": 20_000}

#: What an interpreter takes for an error, a traceback and the like, beside the file, and what its
#: allocators take at once.
SLACK, ARENAS = 2**19, 2**23


def optimizer() -> mo.Optimizer:
    parts = [mo.schedules.Linear(0.1, 0.01, steps=9), mo.schedules.Plateau(0.01)]
    rule = mo.Adam(lr=mo.schedules.Join(parts, [9]))
    return mo.Optimizer(rule, average=mo.Average(), on_nonfinite="skip")


def written(path: Path) -> dict[str, Any]:
    """Write a file with a bit of everything; return its state."""
    opt, here = optimizer(), {"a": np.ones(40), "b/é": np.ones((3, 5), np.float32)}
    here |= {"z": np.ones(4, np.complex64), "none": np.ones((0, 2)), "waits": np.ones(3)}
    here |= {f"more {i}": np.ones(40) for i in range(3)}
    opt.step(here, {"a": np.full(40, np.nan)})
    for step in range(3):
        opt.step(here, {name: np.full_like(x, 0.5 + step) for name, x in here.items()})
    resumed = optimizer()
    resumed.load_state_dict(opt.state_dict())
    waits = {"waits": here.pop("waits"), "half": np.ones(5, np.float16)}
    resumed.step(here, here)
    resumed.set_hyperparameters(eps=1e-7)
    resumed.set_hyperparameters(["b/é", "waits"], betas=(mo.schedules.Linear(0.5, 0.9, 4), 0.99))
    metadata = {"epoch": [1, 2], "loss": [float("nan"), float("inf")]}
    resumed.save(path, metadata=metadata, params=here | waits)
    return resumed.state_dict() | {"params": here | waits}


# Damage


def hostile(raw: bytes) -> Iterator[bytes]:
    """Files that somebody made for harm, each with the checksum of its description."""
    version = json.loads(json.loads(parts(raw)[0])["__metadata__"]["multiopt"])["version"]
    table: tuple[Any, ...] = ("entries", 0) if version == 4 else ("entries", "loc")
    columns = ("names", "steps", "counts", "average") if version == 4 else ("step",)
    first, data = parts(raw)
    header = json.loads(first)
    text = header["__metadata__"]["multiopt"]
    document = json.loads(text)

    def changed(value: Any, *keys: Any) -> bytes:
        copy = json.loads(text)
        inner = copy
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        return sealed(copy, header, data)

    odd: list[Any] = [None, True, -1, 0.5, 1e400, 2**63, 2**64, 10**30, "", "x", "0", [], [[]]]
    odd += [{}, {"": {}}]
    for value in odd:
        for key in document:
            yield changed(value, key)
        if version == 4:
            for key in ("names", "param", "complex", "places"):
                yield changed(value, "params", 0, key)
            yield changed(value, "params", 0)
            for key in ("all", "names", "schedules"):
                yield changed(value, "settings", key)
            yield changed(value, "settings", "all", "eps")
            yield changed(value, "settings", "names", "b/é")
            yield changed(value, "settings", "names", "b/é", "betas")
            yield changed(value, "settings", "names", "b/é", "betas", 0)
            yield changed(value, "settings", "names", "b/é", "betas", 0, "schedule")
            yield changed(value, "settings", "schedules", 0)
            for key in ("name", "initial", "steps", "more"):
                yield changed(value, "settings", "schedules", 0, key)
            yield changed(value, "nonfinite", "loss")
            yield changed(value, "nonfinite", "loss", "0")
            for key in document["skips"]:
                yield changed(value, "skips", key)
                yield changed(value, "skips", key, 0)
            for key in ("names", "steps", "counts"):
                yield changed(value, *table, key, 1)
            yield changed(value, "plateaus", "0")
            yield changed(value, "plateaus", "0", "lr=Join.schedules[1]=Plateau")
        for key in ("rule", "slots", "complex", *columns):
            yield changed(value, *table, key)
        yield changed(value, *table, "slots", "exp_avg")
        yield changed(value, *table)
        yield changed(value, "rules", 0)
        yield changed(value, "rules", 0, "schedules")
        yield changed(value, "rules", 0, "schedules", "lr")
        yield sealed(value, header, data)
    # One tensor twice; and other forms.
    for value in (
        "0",
        "F32[40]",
        "F64[41]",
        "F64[20,2]",
        "F64[]",
        "F64[-40]",
        "F64[4" + "0" * 5000,
    ):
        yield changed(value, *table, "slots", "exp_avg_sq")
    for depth in (100, 1000, 100_000):
        for left, right in (("[", "]"), ('{"a":', "}")):
            deep = left * depth + "0" + right * depth
            yield sealed(deep, header, data)
            for key in ("entries", "rules", "metadata", "steps"):
                yield sealed(text.replace(f'"{key}": ', f'"{key}": {deep}, "x": ', 1), header, data)
            yield joined(deep.encode(), data)
    twice = text.replace('"rules": [', '"rules": 0, "rules": [', 1)
    yield sealed(twice, header, data)
    for word in ("NaN", "Infinity", "1" * 5000, "1e999", "-0", "1.0"):
        clock = '"steps": [4' if version == 4 else '"step": 6'
        assert clock in text
        yield sealed(text.replace(clock, f"{clock[:-1]}{word}", 1), header, data)
    yield sealed("[" + "[],[]," * 300_000 + "0]", header, data)
    yield sealed(f'{{"version": {version}, "a":[' + "{}," * 500_000 + "0]}", header, data)
    # As much as is let through, and more: lists, mappings, numbers and words, and keys.
    for part in ("[]", "[0]", "0", "257", '"a"', '"ab"', '{"a":0}', '{"a":[[],[]]}'):
        weight = 7 * part.count("{") + 3 * part.count("[") + part.count(",") + 1
        for room in (0, 1.5, 2.5):
            more = ",".join([part.ljust(int(room * weight))] * 100_000)
            yield sealed(f'{{"version": {version}, "x": [{more}]}}', header, data)
    for part in ("0", "[]", "1e9"):
        more = ",".join(f'"{i:x}":{part}' for i in range(2**17, 2**18))
        yield sealed(f'{{"version": {version}, "x": {{{more}}}}}', header, data)
    if version == 2:
        names = ",".join(f'"{i}":{{}}' for i in range(200_000))
        yield sealed(
            f'{{"version": 2, "rules":[], "entries":{{{names}}},"pending":{{}}}}', header, data
        )
    tensor = {"dtype": "F64", "shape": [40], "data_offsets": [0, 320]}
    lies: list[dict[str, Any]] = [
        {"shape": [2**62]},
        {"shape": [2**31, 2**31, 8]},
        {"shape": [-1]},
        {"shape": [1] * 100_000},
        {"shape": "x"},
        {"shape": [0, 2**62], "data_offsets": [0, 0]},
        {"data_offsets": [0, 2**63]},
        {"data_offsets": [320, 0]},
        {"data_offsets": [8, 328]},
        {"data_offsets": [0]},
        {"dtype": "F128"},
        {"dtype": "I64"},
        {"dtype": "BF16", "shape": [160]},
        {"dtype": "F4", "shape": [640]},
        {"dtype": 7},
        {"x": [[1] * 1000] * 10},
    ]
    for lie in lies:
        for key in ("0", "more", "__metadata__"):
            yield joined(json.dumps({**header, key: {**tensor, **lie}}).encode(), data)
    many = {str(i): {**tensor, "shape": [0], "data_offsets": [0, 0]} for i in range(50_000)}
    yield joined(json.dumps({**header, **many}).encode(), data)
    for length in (0, 1, 2, len(first) - 1, len(first) + 1, len(raw), 10**8 + 1, 2**63, 2**64 - 1):
        yield joined(first, data, length)
    yield joined(b"{}", data)
    yield joined(b'{"__metadata__":{}}', data)
    yield joined(b"\xff" * 100, data)
    words = header["__metadata__"]["checksums"]
    for other in (
        "",
        words[:7],
        words[:17],
        words + " " + "0" * 16,
        words.replace(" ", ""),
        "x" * 50,
    ):
        metadata = {**header["__metadata__"], "checksums": other}
        yield joined(json.dumps({**header, "__metadata__": metadata}).encode(), data)
    yield save({"w": np.ones(3)}, metadata={"multiopt": text})  # as if of version 1


def crowded(names: int) -> Iterator[bytes]:
    """Files of many names, with next to nothing under them."""
    column, ones = ",".join(f'"{i:x}"' for i in range(names)), ",".join("1" * names)
    for slots, count in (("{}", 0), ('{"b": "F32[0]"}', names)):
        table = f'{{"names":[{column}],"steps":[{ones}],"rule":0,"slots":{slots}}}'
        rest = f'"rules":[{{"name":"SGD"}}],"entries":[],"pending":[{table}]'
        offsets = [0, 8 * count]
        header: dict[str, Any] = {"__metadata__": {"checksums": ""}}
        header["checksums"] = {"dtype": "U64", "shape": [count], "data_offsets": offsets}
        if count:
            header["0"] = {"dtype": "F32", "shape": [count, 0], "data_offsets": [0, 0]}
        header["__metadata__"]["checksums"] = "0"
        words = np.full(count, xxh3_64(b"").intdigest(), np.uint64)
        yield sealed(f'{{"version":4,"steps":1,{rest}}}', header, words.tobytes())


def damaged(raw: bytes, rng: np.random.Generator) -> bytes:
    """A file with some accident."""
    made = bytearray(raw)
    first = parts(raw)[0]
    match rng.integers(8):
        case 0:  # a bit anywhere
            made[rng.integers(len(made))] ^= 1 << rng.integers(8)
        case 1:  # a bit of the header
            made[rng.integers(8 + len(first))] ^= 1 << rng.integers(8)
        case 2:  # cut short
            del made[rng.integers(len(made)) :]
        case 3:  # a block of zeros, as a disk leaves it
            start = int(rng.integers(len(made)))
            size = min(int(rng.integers(1, 600)), len(made) - start)
            made[start : start + size] = bytes(size)
        case 4:  # something put in
            start = int(rng.integers(len(made)))
            made[start:start] = rng.bytes(int(rng.integers(1, 40)))
        case 5:  # something taken out
            start = int(rng.integers(len(made)))
            del made[start : start + rng.integers(1, 40)]
        case 6:  # two blocks changed places
            i, j = sorted(rng.integers(0, len(made) - 16, size=2))
            made[i : i + 16], made[j : j + 16] = made[j : j + 16], made[i : i + 16]
        case 7:  # a digit of the header, which stays JSON
            digits = [i for i, x in enumerate(first) if chr(x).isdigit()]
            made[8 + rng.choice(digits)] = ord("0") + int(rng.integers(10))
    return bytes(made)


# Reading, in the other process


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return bool(one == other)


def told(state: dict[str, Any]) -> dict[str, Any]:
    """What a state has by name, seen or pending."""
    return {
        "steps": state["steps"],
        "main": state["pending"] | state["entries"],
        "averages": state.get("pending_averages", {}) | state.get("averages", {}),
        "settings": state.get("settings", {}),
    }


class TooMuchError(AssertionError):
    """A load took too much memory."""


def check(raw: bytes, path: Path, expected: dict[str, Any] | None, names: int) -> None:
    """Load a file: it is refused, or it is what it was.

    Args:
        raw: Its bytes.
        path: Where to put it.
        expected: What it was; None if it has been made to be something else.
        names: How many names it has.
    """
    path.write_bytes(raw)
    opt, w = optimizer(), np.ones(2)
    opt.step({"own": w}, {"own": w})
    before = opt.state_dict()
    given = None if expected is None else expected["params"]
    for strict in (True, False):
        params = None if given is None else {name: np.zeros_like(x) for name, x in given.items()}
        tracemalloc.reset_peak()
        level = tracemalloc.get_traced_memory()[0]
        peak = resident(reset=True)
        report, why = None, ""
        try:
            report = opt.load(path, strict=strict, params=params)
        except mo.CheckpointError as error:
            why = str(error)
        if report is None:
            assert str(path) in why
            assert len(why) < len(raw) + 1000
            assert equal(opt.state_dict(), before), "an error changed the optimizer"
            assert not any(x.any() for x in (params or {}).values()), "an error wrote a parameter"
        else:
            if expected is not None:
                state = told(opt.state_dict())
                del state["main"]["own"], state["averages"]["own"]
                for name in report.unused:
                    assert not strict
                    assert name in expected["main"] or name == "half"
                assert params is not None
                assert report.params is params or report.params == params
                for name, param in expected["params"].items():
                    loaded = equal(params[name], param)
                    assert loaded or "parameter" in report.unused[name] or name in report.missing
                if strict:
                    state["params"] = params
                    assert equal(state, expected), "a wrong load"
                for part in ("main", "averages"):
                    for name, entry in state[part].items():
                        assert equal(entry, expected[part][name]), f"a wrong load of {name!r}"
            opt = optimizer()
            opt.step({"own": w}, {"own": w})
        # What Python allocates is known exactly; what safetensors does, only by the pages taken.
        took = max(tracemalloc.get_traced_memory()[1] - level, resident() - peak - (ARENAS - SLACK))
        most = 2 * len(raw) + SLACK
        if expected is None:
            # Objects of many names, and the tables of safetensors.
            most += 20 * len(parts(raw)[0]) + 1000 * names
        if took > most:
            raise TooMuchError(f"{took} bytes for a file of {len(raw)}")


def resident(reset: bool = False) -> int:
    """The largest number of bytes that the process has had in memory since the last reset."""
    if not Path("/proc/self/clear_refs").exists():
        return 0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return int(peak) * 1024


def read_all(count: int, seed: int) -> None:
    """Read many damaged files; print the first that is not taken as it should be."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.safetensors"
        state = written(path)
        expected = told(state) | {"params": state["params"]}
        raw = path.read_bytes()
        tracemalloc.start()
        check(raw, path, expected, 0)
        rng = np.random.default_rng(seed)
        for number in range(count):
            run(f"damaged file {number}", damaged(raw, rng), path, expected, 0)
        for number, bad in enumerate(hostile(raw)):
            run(f"hostile file {number}", bad, path, None, 0)
        for number, bad in enumerate(crowded(30_000)):
            run(f"crowded file {number}", bad, path, None, 30_000)
    print("all read")


def read_earlier() -> None:
    """The same, of hostile files of an earlier version."""
    raw = (Path(__file__).parent / "checkpoints" / "version_2.safetensors").read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        tracemalloc.start()
        for number, bad in enumerate(hostile(raw)):
            run(f"hostile file {number}", bad, Path(folder) / "run.safetensors", None, 0)
    print("all read")


def run(label: str, bad: bytes, path: Path, expected: dict[str, Any] | None, names: int) -> None:
    try:
        try:
            check(bad, path, expected, names)
        except TooMuchError:
            # Once in some thousand files the interpreter resizes a table of its own.
            check(bad, path, expected, names)
    except BaseException as error:
        print(f"{label} ({len(bad)} bytes): {type(error).__name__}: {error}")
        print(bad[:300])
        raise


@pytest.mark.parametrize("earlier", [False, True])
def test_damaged_files_are_refused_or_load_as_they_were(earlier: bool) -> None:
    thorough = hypothesis.settings().max_examples > 100
    count = FILES["thorough" if thorough else "default"]
    counts = 2 * [str(count)] * (not earlier)
    done = subprocess.run(
        [sys.executable, "-m", "tests.state.test_damaged_files", *counts],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([".", "backends"])},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.stdout.endswith("all read\n"), done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d, h: first(d)["steps"].__setitem__(0, -1),
            "'a' has step -1; expected an int from 0",
        ),
        (lambda d, h: first(d)["steps"].__setitem__(1, 2**53 + 1), "expected an int from 0"),
        (lambda d, h: first(d)["steps"].__setitem__(0, True), "expected int under 'steps'"),
        (lambda d, h: first(d)["steps"].pop(), "a table of 4 names has 3 clocks"),
        (lambda d, h: first(d).update(names=[], steps=[]), "a table of 0 names"),
        (lambda d, h: first(d)["names"].__setitem__(0, 1), "expected str under 'names'; got 1"),
        (lambda d, h: first(d)["names"].__setitem__(0, "more 1"), "a name appears twice"),
        (lambda d, h: d["pending"].append(first(d)), "a name appears twice"),
        (lambda d, h: first(d).update(rule=-1), "'a' has no rule: -1"),
        (lambda d, h: first(d).update(average=9), "'a' has no rule: 9"),
        (lambda d, h: first(d)["counts"].pop(), "the average of 'a' needs as many counts"),
        (lambda d, h: first(d)["counts"].__setitem__(0, -1), "the average of 'a' needs as many"),
        (lambda d, h: first(d).pop("average"), "the average of 'a' has no slot, or no rule"),
        (lambda d, h: first(d)["slots"].pop("param_average"), "the average of 'a' has no slot"),
        (
            lambda d, h: first(d).update(complex=True),
            "complex arrays of 'a' do not have a real and an imaginary part",
        ),
        (
            lambda d, h: first(d)["slots"].update(exp_avg="F64[041,]"),
            r"'exp_avg' of 'a' is 'F64\[04",
        ),
        (
            lambda d, h: first(d)["slots"].update(exp_avg="F64[41]"),
            r"'0' is not F64\[4,41",
        ),
        (
            lambda d, h: first(d)["slots"].update(more="F64[40]"),
            "need 22 tensors, and one of checks",
        ),
        (lambda d, h: d["entries"].pop(0), "need 18 tensors, and one of checksums"),
        (
            lambda d, h: d["plateaus"].update({"0": {"x": {}}}),
            "'a': expected the state of a Plateau",
        ),
        (lambda d, h: d["skips"]["total"].append(1), "damaged or another kind of file"),
        (lambda d, h: d["skips"]["total"].__setitem__(0, -1), "the skips of 'a' are"),
        (lambda d, h: d["rules"][0].update(x=[[]] * 2 + [nested(70)]), "more than 64 deep"),
        (lambda d, h: d.update(metadata=nested(70)), "more than 64 deep"),
        (lambda d, h: d.update(metadata=[]), "expected a mapping under 'metadata'"),
        (lambda d, h: d.update(nonfinite=nested(70)), "more than 64 deep"),
        (lambda d, h: d.update(nonfinite=[]), r"expected a mapping or one of .* got \[\]"),
        (
            lambda d, h: d["nonfinite"].update(loss="NaN"),
            "expected a mapping or one of .* got 'NaN'",
        ),
        (lambda d, h: d["nonfinite"].update(more="nan"), "has 'more', a place that .* not have"),
        (lambda d, h: d["nonfinite"]["loss"].update({"2": "nan"}), "has '2', a place that"),
        (lambda d, h: d["nonfinite"]["loss"].update({"-1": "nan"}), "has '-1', a place that"),
        (lambda d, h: d["nonfinite"].update(epoch={"0": "nan"}), "has 'nan' for 1; expected null"),
        (lambda d, h: d["nonfinite"].update(epoch={"0": {"0": "nan"}}), "has '0', a place that"),
        (lambda d, h: h["6"].update(shape=[1, 5, 3]), r"'6' is not F32\[1,3,5\]"),
        (lambda d, h: h["__metadata__"].update(checksums="0 1"), "2 checksums of its desc"),
        (lambda d, h: d["params"].append(d["params"][0]), "a name appears twice"),
        (lambda d, h: d["params"][0].update(names=[]), "a table of parameters has no names"),
        (lambda d, h: d["params"][0].update(param="F8[40]"), "expected a dtype of F32, F64, F16"),
        (lambda d, h: d["params"][0].update(complex=True), "'a' do not have a real and an imag"),
        (lambda d, h: d["settings"].pop("all"), "its settings are malformed: 'all'"),
        (
            lambda d, h: d["settings"]["schedules"][0].update(name="Rule"),
            "its settings are malformed: expected a schedule of multiopt.schedules; got",
        ),
        (
            lambda d, h: d["settings"]["schedules"][0].update(steps=0.5),
            "its settings are malformed: Linear: steps",
        ),
        (
            lambda d, h: d["settings"]["names"]["b/é"].update(betas=[{"schedule": 1}, 0.9]),
            "its settings are malformed: list index",
        ),
        (
            lambda d, h: d["settings"]["names"]["b/é"].update(more=1.0),
            "do not fit.*Adam has no hype",
        ),
        (
            lambda d, h: d["settings"]["all"].update(eps=-1.0),
            "do not fit: Adam: eps must be .* got -1.0",
        ),
    ],
)
def test_what_a_hostile_file_says_is_checked(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "run"
    written(path)
    head, data = parts(path.read_bytes())
    header = json.loads(head)
    assert header["6"]["shape"] == [1, 3, 5]
    document = json.loads(header["__metadata__"]["multiopt"])
    change(document, header)
    path.write_bytes(sealed(document, header, data))
    with pytest.raises(mo.CheckpointError, match=message):
        optimizer().load(path)


def first(document: Any) -> Any:
    """Its first table, of the name a and others."""
    return document["entries"][0]


def nested(depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for _ in range(depth):
        made = {"a": made}
    return made


if __name__ == "__main__":
    if len(sys.argv) > 1:
        read_all(int(sys.argv[1]), int(sys.argv[2]))
    else:
        read_earlier()
