"""Distributed: SVI on ranks that see other data and other sites, with the bits of one process."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributed
from pyro.infer import SVI, Trace_ELBO
from torch.distributions import constraints

import multiopt as mo
import multiopt.adapters.pyro as optim
from tests.ranks.processes import on_ranks
from tests.ranks.training import rank_order_mean

SIZE, STEPS = 24, 9

#: By name: an optimizer, made anew each time.
OPTIMIZERS: dict[str, Any] = {
    "adam": lambda: optim.Adam({"lr": 0.1}),
    "by name": lambda: optim.SGD(
        lambda name: {"lr": 0.01 if name == "scale" else 0.02, "momentum": 0.9},
        lambda name: (
            {} if name.startswith("local") else {"clip_norm": 9.0, "clip_global_norm": 5.0}
        ),
    ),
    "average": lambda: optim.AdamW({"lr": 0.1}, average=mo.Average()),
    "skip": lambda: optim.ClippedAdam({"lr": 0.1, "lrd": 0.9}, on_nonfinite="skip"),
    "scheduler": lambda: optim.StepLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "step_size": 2, "gamma": 0.5}
    ),
}

DATA = torch.from_numpy(np.random.default_rng(0).standard_normal(SIZE)).float()


def _rows(rank: int, step: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng([rank, step]).permutation(SIZE)[:6])


def _sites(rank: int, step: int) -> list[str]:
    """The sites of the guide besides "loc" and "scale": one is born late on rank 1, one locally."""
    late = ["late"] if (rank == 1 and step >= 3) or step >= 6 else []
    return [*late, f"local {rank}", *(["first"] if rank == 0 and step == 0 else [])]


def _model(rank: int, step: int) -> None:
    loc = pyro.sample("z", dist.Normal(0.0, 10.0))
    offset = sum(pyro.sample(f"z {name}", dist.Normal(0.0, 1.0)) for name in _sites(rank, step))
    with pyro.plate("data", SIZE, subsample=_rows(rank, step)) as rows:
        pyro.sample("x", dist.Normal(loc + offset, 1.0), obs=DATA[rows])


def _guide(rank: int, step: int) -> None:
    # Ranks begin with other values.
    loc = pyro.param("loc", torch.tensor(1.0 + rank))
    scale = pyro.param("scale", torch.tensor(0.5 + rank), constraint=constraints.positive)
    pyro.sample("z", dist.Normal(loc, scale))
    for name in _sites(rank, step):
        own = pyro.param(name, torch.tensor(3.0 + rank))
        pyro.sample(f"z {name}", dist.Normal(own, 0.1))


class Recording(optim.Distributed):
    """It remembers what it was called with.

    Attributes:
        poisoned: Whether "late" has a gradient that is not finite in one step.
    """

    poisoned = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[dict[str, tuple[np.ndarray, np.ndarray | None]]] = []

    def __call__(self, params: Iterable[torch.Tensor]) -> None:
        params = list(params)
        name = pyro.get_param_store().param_name
        for x in params:
            if name(x) == "late" and len(self.calls) == 4 and self.skips == {} and self.poisoned:
                x.grad = torch.full_like(x, float("nan"))
        self.calls.append(
            {
                str(name(x)): (
                    x.detach().numpy().copy(),
                    None if x.grad is None else x.grad.numpy().copy(),
                )
                for x in params
            }
        )
        super().__call__(params)


def _site(name: str, value: torch.Tensor) -> Any:
    """The unconstrained parameter of a site that is born now."""
    param: Any = pyro.param(name, value)
    return param.unconstrained()


def _is_local(name: str) -> bool:
    return name.startswith("local")


def _train(kind: str) -> Any:
    rank = torch.distributed.get_rank()
    pyro.clear_param_store()
    pyro.set_rng_seed(rank)
    wrapped = OPTIMIZERS[kind]()
    optimizer = Recording(wrapped, local=_is_local)
    optimizer.poisoned = kind == "skip"
    svi = SVI(_model, _guide, optimizer, Trace_ELBO())
    for step in range(STEPS):
        svi.step(rank, step)
        if kind == "scheduler":
            optimizer.step()
    store = dict(pyro.get_param_store().named_parameters())
    held = optimizer.params
    assert sorted(held) == ["first", "late", "loc", "scale"]
    assert all(held[name] is store[name] for name in held if name in store)
    assert ("first" in store) == (rank == 0)
    own = {name: x for name, x in store.items() if _is_local(name)}
    assert list(optimizer.skips) == ["late"] * (kind == "skip")
    return optimizer.calls, _text(wrapped, {**held, **own})


def _text(optimizer: Any, params: dict[str, torch.Tensor]) -> dict[str, Any]:
    found = {}
    for name, state in optimizer.get_state().items():
        found[name] = [params[name].tolist(), repr(state)]
        if optimizer._more.get("average"):
            tracked = optimizer._tensors.get(params[name])
            found[name].append(optimizer._core.average(tracked.key).tolist())
    return found


def _in_one_process(kind: str, calls: list[Any]) -> dict[str, Any]:
    """The same steps in one process, on the means of the gradients that the ranks had."""
    pyro.clear_param_store()
    store, optimizer = pyro.get_param_store(), OPTIMIZERS[kind]()
    for step in range(STEPS):
        ranks = [rank_calls[step] for rank_calls in calls]
        stepped = []
        for name in dict.fromkeys(name for rank in ranks for name in rank):
            having = [rank[name] for rank in ranks if name in rank]
            if name not in store:
                store[name] = torch.from_numpy(having[0][0])
            grads = [rank[name][1] if name in rank else None for rank in ranks]
            zero = np.zeros_like(having[0][0])
            every = (
                having[0][1]
                if _is_local(name)
                else rank_order_mean([zero if grad is None else grad for grad in grads])
            )
            param = dict(store.named_parameters())[name]
            param.grad = torch.from_numpy(np.asarray(every))
            stepped.append(param)
        optimizer(stepped)
        for param in stepped:
            param.grad = None
        if kind == "scheduler":
            optimizer.step()
    return _text(optimizer, dict(store.named_parameters()))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_ranks_have_the_bits_of_one_process(ranks: int, kind: str) -> None:
    results = on_ranks(ranks, _train, kind)
    expected = _in_one_process(kind, [calls for calls, _ in results])
    for rank, (_, found) in enumerate(results):
        own = {n: x for n, x in expected.items() if not _is_local(n) or n == f"local {rank}"}
        assert found == own


def _errors() -> None:
    rank = torch.distributed.get_rank()
    pyro.clear_param_store()
    with pytest.raises(TypeError, match="optimizer must be one of multiopt"):
        optim.Distributed(optim.SparseAdam({"lr": 0.1}))
    with pytest.raises(ValueError, match="reduction must be 'ordered' or 'fast'; got 'slow'"):
        optim.Distributed(optim.Adam({"lr": 0.1}), reduction="slow")  # type: ignore[arg-type]
    adam = optim.Distributed(optim.Adam({"lr": 0.1}), local=_is_local)
    loc = _site("loc", torch.zeros(2))
    loc.grad = grad = torch.ones(2)
    nameless = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"a tensor of shape \(3,\) has no name by which other"):
        adam([loc, nameless] if rank else [loc])
    assert loc.grad is grad
    assert loc.tolist() == [0.0, 0.0]
    assert len(adam.optim_objs) == 0
    # A site that only rank 0 has does not fit the rule there, after everything was exchanged.
    pyro.clear_param_store()
    site = _site("site", torch.full((2,), 1.0 + rank))
    site.grad = grad = torch.full((2,), 1.0 + rank)
    if rank == 0:
        adam.set_state(
            {"site": {**_STATE, "state": {0: {**_STATE["state"][0], "exp_avg": torch.zeros(3)}}}}
        )
    with pytest.raises(ValueError, match="'site'"):
        adam([site])
    assert site.tolist() == [1.0 + rank] * 2
    assert site.grad is grad
    assert len(adam.optim_objs) == 0
    assert ("site" in adam.get_state()) == (rank == 0)
    # Names go on alike on both.
    pyro.clear_param_store()
    loc = _site("loc", torch.full((2,), 1.0 + rank))
    loc.grad = torch.full((2,), 1.0 + rank)
    adam([loc])
    assert loc.grad.tolist() == [1.5, 1.5]
    assert round(loc[0].item(), 5) == 0.9


_STATE: dict[str, Any] = {
    "state": {0: {"step": 3, "exp_avg": torch.zeros(2), "exp_avg_sq": torch.ones(2)}},
    "param_groups": [
        {
            "lr": 0.5,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "weight_decay": 0.0,
            "amsgrad": False,
            "params": [0],
        }
    ],
}


def test_errors_are_raised_on_all_ranks() -> None:
    on_ranks(2, _errors)


def _resumed(kind: str, by_all: bool) -> Any:
    """Rank 0, or all, load a state; a site is passed first by rank 1."""
    rank = torch.distributed.get_rank()
    pyro.clear_param_store()
    optimizer = optim.Distributed(OPTIMIZERS[kind]())
    tensor = _site("w", torch.full((2,), 4.0 + rank))
    if rank == 0 or by_all:
        optimizer.set_state(_before(kind))
    for _ in range(2):
        tensor.grad = torch.ones(2)
        optimizer([tensor])
    return tensor.tolist(), repr(optimizer.get_state())


def _before(kind: str) -> dict[str, Any]:
    """The state of an optimizer that has taken three steps."""
    pyro_store = pyro.get_param_store().get_state()
    pyro.clear_param_store()
    optimizer = OPTIMIZERS[kind]()
    tensor = _site("w", torch.zeros(2))
    for _ in range(3):
        tensor.grad = torch.full((2,), 0.5)
        optimizer([tensor])
        if kind == "scheduler":
            optimizer.step()
    state: dict[str, Any] = optimizer.get_state()
    pyro.clear_param_store()
    pyro.get_param_store().set_state(pyro_store)
    return state


@pytest.mark.parametrize(("kind", "by_all"), [("adam", False), ("adam", True), ("scheduler", True)])
def test_state_comes_from_the_lowest_rank(kind: str, by_all: bool) -> None:
    first, second = on_ranks(2, _resumed, kind, by_all)
    assert first == second
    pyro.clear_param_store()
    optimizer = OPTIMIZERS[kind]()
    optimizer.set_state(_before(kind))
    tensor = _site("w", torch.full((2,), 4.0))
    for _ in range(2):
        tensor.grad = torch.ones(2)
        optimizer([tensor])
    assert first == (tensor.tolist(), repr(optimizer.get_state()))


def _with_scheduler_on_one() -> None:
    rank = torch.distributed.get_rank()
    pyro.clear_param_store()
    optimizer = optim.Distributed(OPTIMIZERS["scheduler"]())
    tensor = _site("w", torch.full((2,), 4.0 + rank))
    if rank == 0:
        optimizer.set_state(_before("scheduler"))
    tensor.grad = torch.ones(2)
    with pytest.raises(ValueError, match="with the state of a scheduler, which does not travel"):
        optimizer([tensor])
    assert tensor.tolist() == [4.0 + rank] * 2


def test_the_state_of_a_scheduler_does_not_travel() -> None:
    on_ranks(2, _with_scheduler_on_one)


def _born_without_a_step() -> None:
    """A site in the store of rank 1 follows, although only rank 0 passes it."""
    rank = torch.distributed.get_rank()
    pyro.clear_param_store()
    sgd = optim.Distributed(optim.SGD({"lr": 1.0}))
    early = _site("early", torch.full((1,), 5.0 * rank))
    if rank == 0:
        late = _site("late", torch.zeros(1))
        early.grad, late.grad = torch.ones(1), torch.ones(1)
    sgd([early, late] if rank == 0 else [])
    assert early.tolist() == [-0.5]
    assert sgd.params["early"] is early
    # Born there after its first step, and not passed either.
    if rank == 1:
        late = _site("late", torch.full((1,), 7.0))
    late.grad = torch.ones(1)
    sgd([late] if rank == 0 else [])
    assert late.tolist() == [-1.0]
    assert late.grad.tolist() == [0.5 if rank == 0 else 1.0]
    assert sgd.params["late"] is late
    assert len(sgd.optim_objs) == 2


def test_a_site_in_the_store_follows_without_being_passed() -> None:
    on_ranks(2, _born_without_a_step)


def _replaced() -> list[Any]:
    """A site that is replaced in the store of all ranks is new."""
    rank = torch.distributed.get_rank()
    pyro.clear_param_store()
    adam = optim.Distributed(optim.Adam({"lr": 1.0}))
    site = _site("site", torch.zeros(1))
    for _ in range(2):
        site.grad = torch.ones(1)
        adam([site])
    pyro.get_param_store()["site"] = torch.full((1,), 3.0 + rank)
    site = dict(pyro.get_param_store().named_parameters())["site"]
    site.grad = torch.ones(1)
    adam([site] if rank == 0 else [])
    state: dict[str, Any] = adam.get_state()
    return [round(site.item(), 5), float(state["site"]["state"][0]["step"])]


def test_a_site_that_is_replaced_is_new() -> None:
    assert on_ranks(2, _replaced) == [[2.0, 1.0]] * 2
