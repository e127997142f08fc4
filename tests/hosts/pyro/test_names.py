"""Every name of ``pyro.optim``: as a rule of multiopt, or wrapped."""

import copy
import functools
import inspect
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyro.optim
import pytest
import torch

import multiopt.adapters.pyro as optim
from multiopt import rules
from multiopt.adapters.pyro.constructors import CONSTRUCTORS, RULES
from multiopt.adapters.pyro.joint import JointOptim
from tests.hosts.pyro.tensors import BOTH, PYRO, SETTINGS, give, param


class Signs(torch.optim.Optimizer):
    """An optimizer of a user's."""

    def __init__(self, params: Any, lr: float = 0.5) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for tensor in group["params"]:
                with torch.no_grad():
                    tensor.sub_(group["lr"] * tensor.grad.sign())


def test_every_name_of_pyro_is_here() -> None:
    modules = {"horovod", "optim", "pyro", "pytorch_optimizers", "pytorch_optims"}
    names = {name for name in dir(pyro.optim) if not name.startswith("_")}
    names |= set(pyro.optim.__all__)
    assert names - modules <= set(optim.__all__)
    assert all(hasattr(optim, name) for name in optim.__all__)


@pytest.mark.parametrize("name", sorted(set(pyro.optim.__all__) - {"HorovodOptimizer"}))
def test_arguments_are_pyros(name: str) -> None:
    ours, theirs = getattr(optim, name), getattr(pyro.optim, name)
    if isinstance(theirs, type):
        assert issubclass(ours, theirs)
        ours, theirs = ours.__init__, theirs.__init__  # type: ignore[misc]  # of classes
    assert ours.__name__ == theirs.__name__
    assert ours.__doc__
    pairs = [
        [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
        for function in (ours, theirs)
    ]
    more = ("on_nonfinite", "max_consecutive_skips", "average")
    assert [one for one in pairs[0] if one[0] not in more] == pairs[1]
    assert all(kind is inspect.Parameter.KEYWORD_ONLY for name, kind, _ in pairs[0] if name in more)
    assert {name for name, _, _ in pairs[0]} >= set(more)


def test_every_rule_of_a_name_of_pyro_is_used() -> None:
    for name, constructor in CONSTRUCTORS.items():
        assert RULES.get(constructor) is getattr(rules, name, None)


@pytest.mark.parametrize("name", CONSTRUCTORS)
@pytest.mark.filterwarnings("ignore:multiopt has no rule")
def test_a_step_of_every_optimizer(name: str) -> None:
    results = []
    for module in (optim, pyro.optim):
        pyro.clear_param_store()
        loc, opt = param("loc", 1.0, (2, 3)), getattr(module, name)(SETTINGS[name])
        assert isinstance(opt, optim.PyroOptim) == (module is optim)
        assert isinstance(opt, PYRO.PyroOptim)
        assert opt.pt_optim_constructor.__name__ == name
        for value in (1.0, 3.0):
            give(loc, *[value] * 6)
            if name == "SparseAdam":
                assert loc.grad is not None
                loc.grad = loc.grad.to_sparse()
            opt({loc})
        results.append(loc.detach().numpy())
    # torch's Muon orthogonalizes in bfloat16.
    ours, theirs = results
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-2 if name == "Muon" else 1e-6)


# What multiopt has no rule for


@BOTH
def test_a_wrapped_optimizer_is_stepped_clipped_and_saved(module: Any, tmp_path: Any) -> None:
    note = "multiopt has no rule for Signs: Pyro steps its parameters one by one, by torch"
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        opts = [module.PyroOptim(Signs, {"lr": 0.25}, {"clip_value": 0.5}) for _ in range(2)]
    assert [str(one.message) for one in noted] == ([note] if module is optim else [])
    assert all(isinstance(opt, module.PyroOptim) for opt in opts)
    loc = give(param("loc"), 2.0, -3.0)
    opts[0]([loc])
    assert loc.tolist() == [-0.25, 0.25]
    assert loc.grad is not None
    assert loc.grad.tolist() == [0.5, -0.5]
    assert type(opts[0].optim_objs[loc]) is Signs
    opts[0].optim_objs[loc].param_groups[0]["lr"] = 1.0
    opts[0].save(str(tmp_path / "opt"))
    opts[1].load(str(tmp_path / "opt"))
    opts[1]([loc])
    assert loc.tolist() == [-1.25, 1.25]


@pytest.mark.filterwarnings("ignore:multiopt has no rule for LBFGS")
@pytest.mark.parametrize("is_scheduled", [False, True])
def test_an_optimizer_that_needs_a_closure_says_so(is_scheduled: bool) -> None:
    if is_scheduled:
        settings = {"optimizer": torch.optim.LBFGS, "optim_args": {"lr": 0.5}, "gamma": 0.5}
        opt = optim.ExponentialLR(settings)
    else:
        opt = optim.PyroOptim(torch.optim.LBFGS, {"lr": 0.5}, {"clip_norm": 10.0})
    loc = give(param("loc"))
    for nothing in ((), (None,)):
        with pytest.raises(
            TypeError, match=r"^LBFGS .* needs a closure .*; expected optimizer\(par"
        ):
            opt([loc], *nothing)
    assert loc.tolist() == [0.0, 0.0]

    def closure() -> torch.Tensor:
        loc.grad = None
        loss = (loc - 1).square().sum()
        loss.backward()
        return loss

    opt([loc], closure)
    assert (loc > 0.5).all()


def test_settings_of_a_wrapped_one_by_name() -> None:
    a, b = give(param("a")), give(param("b"))
    with pytest.warns(UserWarning, match="no rule for Signs"):
        optim.PyroOptim(Signs, lambda name: {"lr": 1.0 if name == "a" else 2.0})([a, b])
    assert (a.tolist(), b.tolist()) == ([-1.0, -1.0], [-2.0, -2.0])


@pytest.mark.parametrize("keywords", [False, True])
def test_a_constructor_that_has_a_rule_is_no_wrapped_one(keywords: bool) -> None:
    values: Any = (torch.optim.Adam, {"lr": 0.5}, {"clip_norm": 1.0})
    if keywords:
        names = ("optim_constructor", "optim_args", "clip_args")
        opt = optim.PyroOptim(**dict(zip(names, values, strict=True)))
    else:
        opt = optim.PyroOptim(*values)
    assert isinstance(opt, JointOptim)
    loc = give(param("loc"))
    opt([loc])
    np.testing.assert_allclose(loc.detach(), -0.5, rtol=1e-6)


@BOTH
def test_pyro_optim_needs_its_arguments(module: Any) -> None:
    for arguments in ((), (torch.optim.Adam,)):
        with pytest.raises(TypeError, match="missing"):
            module.PyroOptim(*arguments)


@BOTH
@pytest.mark.filterwarnings("ignore:multiopt has no rule")
def test_a_constructor_may_be_any_callable(module: Any) -> None:
    opt, loc = module.PyroOptim(functools.partial(torch.optim.SGD, lr=0.5), {}), param("loc")
    opt([give(loc)])
    assert loc.tolist() == [-0.5, -0.5]


@BOTH
def test_a_class_of_a_users(module: Any) -> None:
    class Halved(module.PyroOptim):
        def __init__(self, lr: float) -> None:
            super().__init__(torch.optim.SGD, {"lr": lr})

        def _get_optim_args(self, param: Any) -> dict[str, Any]:
            return {"lr": super()._get_optim_args(param)["lr"] / 2}

    opt, loc = Halved(0.5), param("loc")
    opt([give(loc)])
    assert loc.tolist() == [-0.25, -0.25]


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.filterwarnings("ignore:multiopt has no rule")
def test_copies_of_wrapped_and_of_joint_ones(copy_of: Any) -> None:
    for constructor in (Signs, torch.optim.SGD):
        opt = copy_of(optim.PyroOptim(constructor, {"lr": 0.5}))
        loc = give(torch.zeros(2, requires_grad=True))
        opt([loc])
        assert loc.tolist() == [-0.5, -0.5]


def test_the_note_may_be_an_error() -> None:
    for _ in range(2):
        with pytest.raises(UserWarning, match="no rule for Signs"):
            optim.PyroOptim(Signs, {})


def test_a_factory_says_what_it_is() -> None:
    for name, constructor in CONSTRUCTORS.items():
        wanted = f"the rule ``multiopt.{name}``" if constructor in RULES else "wrapped as Pyro does"
        assert wanted in getattr(optim, name).__doc__


def test_the_document_lists_the_rules() -> None:
    text = (Path(__file__).parents[3] / "docs" / "pyro.md").read_text()
    rows = {
        line.split(" | ")[1]: set(re.findall(r"`(\w+)`", line.split(" | ")[0]))
        for line in text.splitlines()
        if line.startswith("| `")
    }
    ruled = {name for name, constructor in CONSTRUCTORS.items() if constructor in RULES}
    assert rows["multiopt's rule of that name |"] & CONSTRUCTORS.keys() == ruled
    wrapped = rows["wrapped as Pyro does: a torch optimizer for each parameter |"]
    assert wrapped == CONSTRUCTORS.keys() - ruled
