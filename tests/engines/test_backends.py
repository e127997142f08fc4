"""One rule, equal results, to the last bit, on every library and however the names are grouped."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import multiopt as mo
from tests.cases import CASES, WHOLE, Case
from tests.histories import History, assert_same_run, fill, histories
from tests.libraries import JAX, NUMPY, STRICT, TORCH, Library, assert_equal, engine


@given(history=histories())
def test_every_library_equals_numpy(library: Library, history: History) -> None:
    assert_same_run(history.run(library), history.run(NUMPY), library)


# A kernel of 16 bits is another one in how it reads and writes, whatever the switches.
@given(history=histories(dtypes=("float16", "bfloat16"), choices=False))
def test_sixteen_bits_equal_numpy(library: Library, history: History) -> None:
    if "float16" not in library.dtypes:
        pytest.skip(f"{library.id} has no 16-bit dtypes")
    assert_same_run(history.run(library), history.run(NUMPY), library)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", [*CASES, *WHOLE], ids=lambda case: case.id)
def test_every_rule_over_fifty_steps(library: Library, case: Case, dtype: str) -> None:
    rng = np.random.default_rng(0)
    start = fill(rng, (3, 67), dtype, "moderate")
    grads = [fill(rng, (3, 67), dtype, "moderate") for _ in range(50)]

    def run(lib: Library) -> tuple[mo.Optimizer, dict[str, np.ndarray]]:
        opt, params = mo.Optimizer(case.rule), {"w": lib.param(start)}
        with engine(lib.engine):
            for grad in grads:
                params = opt.step(params, {"w": lib.grad(grad)})
        return opt, {"w": lib.numpy(params["w"])}

    assert_same_run(run(library), run(NUMPY), library)


@given(history=histories(("float16", "bfloat16", "float32", "float64"), choices=False))
def test_a_batch_equals_each_parameter_alone(history: History) -> None:
    # A global norm is the one thing that names share; without it each life is its own.
    for life in history.lives.values():
        if life.clip is not None:
            life.clip = mo.Clip(life.clip.norm, None, life.clip.value, life.clip.eps)
    together = history.run(NUMPY)
    for name, life in history.lives.items():
        # Alone, with an optimizer of its own that sees only the steps with a gradient.
        alone, params = mo.Optimizer(life.rule, life.clip), {name: NUMPY.param(life.start)}
        for grad in life.grads:
            if grad is not None:
                params = alone.step(params, {name: grad})
        assert_equal(together[1][name], params[name], name)
        assert (name in together[0]) == (name in alone)
        if name in alone:
            assert together[0].state(name).step == alone.state(name).step
            for slot, array in alone.state(name).slots.items():
                assert_equal(together[0].state(name).slots[slot], array, slot)


@given(history=histories(), data=st.data())
def test_the_order_of_the_mapping_changes_nothing(history: History, data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(list(history.lives)))
    assert_same_run(
        history.run(NUMPY, order=lambda names: sorted(names, key=shuffled.index)),
        history.run(NUMPY),
        NUMPY,
    )


def test_a_late_parameter_equals_one_that_started_alone(library: Library) -> None:
    late = mo.Optimizer(mo.Adam(lr=0.1))
    params = {"old": library.param(np.ones(3, np.float32))}
    for _ in range(3):
        params = late.step(params, {"old": library.grad(np.ones(3, np.float32))})
    params["late"] = library.param(np.ones(3, np.float32))
    grads = {name: library.grad(np.full(3, 2.0, np.float32)) for name in params}
    params = late.step(params, grads)

    alone = mo.Optimizer(mo.Adam(lr=0.1))
    one = {"late": library.param(np.ones(3, np.float32))}
    one = alone.step(one, {"late": library.grad(np.full(3, 2.0, np.float32))})
    assert_equal(library.numpy(params["late"]), library.numpy(one["late"]))
    assert late.state("late").step == 1
    assert late.state("old").step == 4


@given(history=histories())
def test_libraries_mix_in_one_step(history: History) -> None:
    libraries = [NUMPY, TORCH, JAX, STRICT]
    of = {name: libraries[i % 4] for i, name in enumerate(history.lives)}
    opt = history.optimizer()
    params = {name: of[name].param(life.start) for name, life in history.lives.items()}
    for step in range(history.steps):
        grads = {
            name: of[name].grad(grad)
            for name, life in history.lives.items()
            if (grad := life.grads[step]) is not None
        }
        params = opt.step(params, grads)
    reference, expected = history.run(NUMPY)
    for name in expected:
        assert_equal(of[name].numpy(params[name]), expected[name], name)
        if name in opt:
            for slot, array in reference.state(name).slots.items():
                assert_equal(of[name].numpy(opt.state(name).slots[slot]), array, slot)


@given(history=histories(), data=st.data())
def test_a_name_may_move_between_libraries(history: History, data: st.DataObject) -> None:
    libraries = data.draw(
        st.lists(
            st.sampled_from([NUMPY, TORCH, JAX, STRICT]),
            min_size=history.steps,
            max_size=history.steps,
        )
    )
    opt, now = history.optimizer(), {name: life.start for name, life in history.lives.items()}
    for step, library in enumerate(libraries):
        params = {name: library.param(np.asarray(array)) for name, array in now.items()}
        params = opt.step(params, history.grads(library, step))
        now = {name: library.numpy(param) for name, param in params.items()}
    reference, expected = history.run(NUMPY)
    for name in expected:
        assert_equal(now[name], expected[name], name)
    assert {name: opt.state(name).step for name in opt} == {
        name: reference.state(name).step for name in reference
    }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_keep_float32_slots(library: Library, dtype: str) -> None:
    if dtype not in library.dtypes:
        pytest.skip(f"{library.id} has no {dtype}")
    array = np.ones(3, np.float16 if dtype == "float16" else ml_dtypes.bfloat16)
    opt = mo.Optimizer(mo.Adam(lr=0.01))
    params = opt.step({"w": library.param(array)}, {"w": library.grad(array * 0)})
    # A zero gradient is NaN in torch's float16, whose eps of 1e-8 is 0 there.
    assert_equal(library.numpy(params["w"]), array)
    slots = opt.state("w").slots
    assert {library.numpy(slot).dtype.name for slot in slots.values()} == {"float32"}
    assert library.numpy(params["w"]).dtype == array.dtype


@pytest.mark.parametrize("case", [*CASES, *WHOLE], ids=lambda case: case.id)
def test_torch_off_the_cpu_runs_the_rule_as_it_stands(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The code for CUDA, taken on the CPU, where torch's roots are close, not equal.
    from multiopt_torch import backend

    monkeypatch.setattr(backend, "_on_cpu", lambda layout: False)
    rng = np.random.default_rng(0)
    start, grads = rng.standard_normal((3, 5000)), rng.standard_normal((5, 3, 5000))
    clip = mo.Clip(norm=10.0, global_norm=5.0, value=0.1)
    opts = [mo.Optimizer(case.rule, clip, on_nonfinite="raise") for _ in range(2)]
    theirs, numpys = {"w": TORCH.param(start)}, {"w": start.copy()}
    for grad in grads:
        opts[0].step(theirs, {"w": TORCH.grad(grad)})
        opts[1].step(numpys, {"w": grad})
        assert opts[0].last.norms == opts[1].last.norms
        assert opts[0].last.clipped == opts[1].last.clipped == ("w",)
    np.testing.assert_allclose(TORCH.numpy(theirs["w"]), numpys["w"], rtol=1e-12, atol=1e-15)
    with pytest.raises(ValueError, match="gradient of 'w' has infinities"):
        opts[0].step(theirs, {"w": TORCH.grad(grad * np.inf)})


def test_jax_off_the_cpu_runs_the_rule_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    # There is no other device here: the path is taken on the CPU, where XLA is close, not equal.
    from multiopt_jax import backend

    monkeypatch.setattr(backend, "_on_cpu", lambda layout: False)
    rng = np.random.default_rng(0)
    start, grad = rng.standard_normal((2, 5000))
    clip = mo.Clip(norm=1.0, global_norm=0.5, value=0.1)
    opts = [mo.Optimizer(mo.Adam(lr=0.1, amsgrad=True), clip) for _ in range(2)]
    ours, numpys = {"w": JAX.param(start)}, {"w": start.copy()}
    for _ in range(5):
        ours = opts[0].step(ours, {"w": JAX.grad(grad)})
        numpys = opts[1].step(numpys, {"w": grad})
    np.testing.assert_allclose(ours["w"], numpys["w"], rtol=1e-12)
