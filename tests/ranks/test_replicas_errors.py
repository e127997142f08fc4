"""What fails on one rank fails on all, in words that say where, and nothing has changed."""

import re
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import array_api_strict
import numpy as np
import pytest
import torch
import torch.distributed as dist

import multiopt as mo
from multiopt.distributed import Replicas
from tests.ranks.processes import on_ranks

Call = tuple[dict[str, Any], dict[str, Any]]


def _good(rank: int) -> Call:
    return {"w": np.full(2, 1.0 + rank)}, {"w": np.ones(2)}


def _on_one(bad: Callable[[], Call]) -> Callable[[int], Call]:
    return lambda rank: bad() if rank == 1 else ({"new": np.zeros(1)}, {"new": np.ones(1)})


def _nan(rank: int) -> Call:
    return {"w": np.zeros(2)}, {"w": np.array([1.0, np.nan if rank == 0 else 0.0])}


def _memory() -> Call:
    class Exhausted(dict[str, Any]):
        def items(self) -> Any:
            raise MemoryError("no room")

    return Exhausted(), {}


#: What is passed on each rank, the error on rank 0, and what both messages say.
CASES: dict[str, tuple[Callable[[int], Call], type[Exception], str]] = {
    "shape of gradient": (
        _on_one(lambda: ({"w": np.zeros(2)}, {"w": np.ones(3)})),
        *(ValueError, r"gradient of 'w' has shape \(3,\); expected \(2,\)"),
    ),
    "dtype of gradient": (
        _on_one(lambda: ({"w": np.zeros(2)}, {"w": np.ones(2, np.float32)})),
        *(TypeError, "gradient of 'w' has dtype float32; expected float64"),
    ),
    "sparse gradient": (
        _on_one(lambda: ({"t": torch.zeros(2)}, {"t": torch.ones(2).to_sparse()})),
        *(TypeError, "gradient of 't' is a sparse_coo tensor"),
    ),
    "no parameter": (
        _on_one(lambda: ({}, {"w": np.ones(2)})),
        *(KeyError, "gradient of 'w': expected the name of one of the 0 parameters"),
    ),
    "not an array": (
        _on_one(lambda: ({"w": [1.0]}, {"w": [1.0]})),
        *(TypeError, "parameter 'w' is a list"),
    ),
    "not a name": (
        _on_one(lambda: ({3: np.zeros(2)}, {})),  # type: ignore[dict-item]
        *(TypeError, "params has the name 3; expected a string"),
    ),
    "another library": (
        _on_one(lambda: ({"x": array_api_strict.zeros(2)}, {"x": array_api_strict.ones(2)})),
        *(TypeError, "parameter 'x' is a array_api_strict array; expected one of NumPy or PyTorch"),
    ),
    "no mapping": (
        _on_one(lambda: (3, {})),  # type: ignore[arg-type, return-value]
        *(TypeError, "params is a int; expected a mapping"),
    ),
    "out of memory": (_on_one(_memory), RuntimeError, "no room"),
    "other shapes": (
        lambda rank: ({"n": np.zeros(2 + rank)}, {"n": np.ones(2 + rank)}),
        *(ValueError, r"parameter 'n' has shape \(3,\) on rank 1; expected \(2,\), as on rank 0"),
    ),
    "other dtypes": (
        lambda rank: (
            {"n": np.zeros(2, f"f{4 + 4 * rank}")},
            {"n": np.ones(2, f"f{4 + 4 * rank}")},
        ),
        *(TypeError, "parameter 'n' has dtype float64 on rank 1; expected float32, as on rank 0"),
    ),
    "other libraries": (
        lambda rank: ({"n": torch.zeros(2) if rank else np.zeros(2, np.float32)},) * 2,
        *(TypeError, "parameter 'n' has library torch on rank 1; expected numpy, as on rank 0"),
    ),
    "another shape than before": (
        _on_one(lambda: ({"old": np.zeros(3)}, {"old": np.ones(3)})),
        *(ValueError, r"parameter 'old' has shape \(3,\); expected \(2,\)"),
    ),
    "read-only": (
        _on_one(lambda: ({"w": np.broadcast_to(0.0, (2,))}, {"w": np.ones(2)})),
        *(ValueError, "parameter 'w' is"),
    ),
    "local there": (
        lambda rank: ({f"local to {1 - rank}": np.zeros(1)}, {f"local to {1 - rank}": np.ones(1)}),
        *(ValueError, "parameter 'local to [01]' is local here, and on another rank it is not"),
    ),
    "a norm over local names": (
        _on_one(lambda: ({"local to 1": np.zeros(1)}, {"local to 1": np.ones(1)})),
        *(ValueError, r"parameter 'local to 1' is local, and 'old' is not, but both have Clip\("),
    ),
    "not finite": (_nan, ValueError, "the gradient of 'w' has infinities or NaNs"),
}


def _state(replicas: Replicas, params: Mapping[str, Any]) -> Any:
    dumped = replicas.optimizer.state_dict()
    entries = {
        name: (entry["step"], {slot: x.tolist() for slot, x in entry["slots"].items()})
        for name, entry in dumped["entries"].items()
    }
    values = {name: np.asarray(x).tolist() for name, x in {**params, **replicas.params}.items()}
    return entries, values, dumped["steps"], sorted(dumped["pending"])


def _fails(case: str) -> tuple[str, str, bool, Any]:
    rank = dist.get_rank()
    clip = mo.Clip(global_norm=1.0) if case == "a norm over local names" else None
    policy: Any = "raise" if case == "not finite" else "propagate"
    replicas = Replicas(
        mo.Optimizer(mo.Adam(lr=0.1), clip, on_nonfinite=policy),
        local=lambda name: name == f"local to {rank}",
    )
    replicas.step({"old": np.full(2, float(rank))}, {"old": np.ones(2)})
    params, grads = CASES[case][0](rank)
    kept = (
        {n: x for n, x in params.items() if isinstance(x, np.ndarray)}
        if type(params) is dict
        else {}
    )
    before = _state(replicas, kept)
    try:
        replicas.step(params, grads)
        raise AssertionError("no error")
    except (KeyError, RuntimeError, TypeError, ValueError, MemoryError) as error:
        kind, text = type(error).__name__, str(error)
    unchanged = _state(replicas, kept) == before
    good, good_grads = _good(rank)
    replicas.step(good, good_grads)
    return kind, text, unchanged, _state(replicas, good)


@pytest.mark.parametrize("case", CASES)
def test_an_error_on_one_rank_is_an_error_on_all(case: str) -> None:
    results = on_ranks(2, _fails, case)
    _, error, message = CASES[case]
    for kind, text, unchanged, _ in results:
        assert kind in (error.__name__, "MemoryError" if case == "out of memory" else "")
        assert re.search(message, text), text
        assert unchanged
    assert results[0][3] == results[1][3]


def _with_reductions() -> str:
    replicas = Replicas(mo.Optimizer(mo.SGD()), reduction="fast" if dist.get_rank() else "ordered")
    with pytest.raises(
        ValueError, match="must be the same on all ranks; got 'ordered', 'fast'"
    ) as e:
        replicas.step(*_good(0))
    return str(e.value)


def test_ranks_with_other_reductions() -> None:
    assert len(set(on_ranks(2, _with_reductions))) == 1


def _out_of_step() -> None:
    one, other = (Replicas(mo.Optimizer(mo.SGD())) for _ in range(2))
    if dist.get_rank():
        other.step(*_good(1))
    else:
        one.step(*_good(0))
    with pytest.raises(RuntimeError, match="the ranks have taken 1, 0 steps"):
        one.step(*_good(0))


def test_ranks_at_other_steps() -> None:
    on_ranks(2, _out_of_step)


def _forgotten_on_one() -> None:
    replicas = Replicas(mo.Optimizer(mo.SGD()))
    replicas.step(*_good(0))
    if dist.get_rank():
        replicas.optimizer.forget("w")
    with pytest.raises(RuntimeError, match="the ranks do not hold the same names; expected names"):
        replicas.step(*_good(0))


def test_a_name_forgotten_on_one_rank() -> None:
    on_ranks(2, _forgotten_on_one)


def _constructed() -> None:
    opt = mo.Optimizer(mo.SGD())
    with pytest.raises(ValueError, match="reduction must be 'ordered' or 'fast'; got 'order'"):
        Replicas(opt, reduction="order")  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"must be a multiopt\.Optimizer; got .*for one of multiopt"
    ):
        Replicas(torch.optim.SGD([torch.zeros(1)]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="optimizer has in_place=False; expected one that updates"):
        Replicas(mo.Optimizer(mo.SGD(), in_place=False))
    with pytest.raises(TypeError, match="local must be a callable name -> bool or None; got 'w'"):
        Replicas(opt, local="w")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="group must be a process group or None; got 3"):
        Replicas(opt, group=3)
    first = dist.new_group([0])
    if dist.get_rank():
        with pytest.raises(ValueError, match="group does not have this process"):
            Replicas(opt, group=first)
    else:
        assert Replicas(opt, group=first).step(*_good(0))["w"].tolist() == [0.999, 0.999]


def test_what_cannot_be_constructed() -> None:
    on_ranks(2, _constructed)


def test_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match="there is no process group; expected one: call torch"):
        Replicas(mo.Optimizer(mo.SGD()))


def _interrupted() -> None:
    replicas = Replicas(mo.Optimizer(mo.Adam()))
    params, grads = _good(0)
    replicas.step(params, grads)
    if dist.get_rank():
        time.sleep(1.0)
        return
    before = _state(replicas, params)
    threading.Timer(0.2, signal.raise_signal, [signal.SIGINT]).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        replicas.step(params, grads)
    assert time.monotonic() - start < 0.9
    assert _state(replicas, params) == before
    with pytest.raises(RuntimeError, match="an earlier step was broken off while ranks waited"):
        replicas.step(params, grads)


def test_waiting_for_ranks_can_be_interrupted() -> None:
    on_ranks(2, _interrupted)


def _reentered() -> None:
    def rule(name: str) -> mo.Rule:
        replicas.step({}, {})
        return mo.SGD()

    replicas = Replicas(mo.Optimizer(rule))
    with pytest.raises(RuntimeError, match="a step has not ended; expected no other from a signal"):
        replicas.step(*_good(0))


def test_a_step_within_a_step() -> None:
    on_ranks(2, _reentered)


def _fails_while_preparing() -> Any:
    """One rank cannot take over the state of a name, after everything was exchanged."""
    rank = dist.get_rank()
    opt = mo.Optimizer(mo.SGD(lr=0.5, momentum=0.9) if rank else mo.Adam())
    mine = np.full(2, 1.0 + rank)
    opt.step({"w": mine}, {"w": np.ones(2)})
    replicas = Replicas(opt)
    before = _state(replicas, {"w": mine})
    with pytest.raises(ValueError, match="'w'") as error:
        replicas.step({"w": mine, "v": np.zeros(1)}, {"w": np.ones(2), "v": np.ones(1)})
    assert _state(replicas, {"w": mine}) == before
    return str(error.value)


def test_state_that_does_not_fit_another_rank() -> None:
    first, second = on_ranks(2, _fails_while_preparing)
    assert first == f"rank 1 cannot take the step: {second}"
