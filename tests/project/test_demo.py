"""The demo: its gradient, its exact posterior, its resumed fit, and what it prints."""

import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch

from multiopt.cli import main
from multiopt.demo import with_pyro
from multiopt.demo.baseball import AT_BATS, Player, born, latents, negative_elbo, players, sigmoid
from multiopt.demo.fit import Fit, Plan, Record, advance, equal, resume, start
from multiopt.demo.posterior import exact, of_guide

PLAYERS = tuple(players())
PLAN = Plan(PLAYERS, steps=400, seed=0)


def guide(seed: int) -> dict[str, np.ndarray]:
    """A guide of all players, moved at random from where it begins."""
    rng = np.random.default_rng(seed)
    beginning = {name: x for latent in latents(PLAYERS) for name, x in born(latent).items()}
    return {name: np.asarray(x + 0.3 * rng.standard_normal()) for name, x in beginning.items()}


def whole() -> tuple[Fit, list[Record]]:
    """The fit of the plan without an interruption."""
    fit = Fit()
    return fit, advance(fit, PLAN, range(PLAN.steps), np.asarray)


# The data


def test_the_data_are_those_of_the_paper() -> None:
    assert len(PLAYERS) == len({player.name for player in PLAYERS}) == 18
    # The grand mean of Efron and Morris, section 2: .265.
    assert round(sum(player.hits for player in PLAYERS) / (18 * AT_BATS), 3) == 0.265
    # An average in the file is one of a whole number of hits.
    for player in PLAYERS:
        hits = round(player.rest_average * player.rest_at_bats)
        assert round(hits / player.rest_at_bats, 3) == player.rest_average, player


# The gradient


@pytest.mark.parametrize(("batch", "joined"), [(PLAYERS, 18), (PLAYERS[3:6], 11)])
def test_the_gradient_is_that_of_the_loss(batch: tuple[Player, ...], joined: int) -> None:
    values = guide(seed=1)
    noise = np.random.default_rng(2).standard_normal((5, len(latents(batch))))
    _, grads = negative_elbo(values, batch, joined, noise)
    assert len(grads) == 2 * len(latents(batch))
    # Central differences err by h^2/6 times the third derivative, below 1e-7 here, and by
    # rounding: 1e-16 * loss / h, below 1e-8 for a loss below 1000.
    h = 1e-5
    for name, grad in grads.items():
        up, down = (
            negative_elbo({**values, name: values[name] + d}, batch, joined, noise)[0]
            for d in (h, -h)
        )
        assert grad.shape == ()
        assert grad == pytest.approx((up - down) / (2 * h), rel=1e-6, abs=1e-6), name


def test_minibatches_are_unbiased() -> None:
    values = guide(seed=3)
    some = PLAYERS[:5]
    noise = np.random.default_rng(4).standard_normal((6, 7))
    loss, grads = negative_elbo(values, some, 5, noise)
    pairs = list(combinations(range(5), 2))
    results = [
        negative_elbo(values, [some[i], some[j]], 5, noise[:, [0, 1, 2 + i, 2 + j]])
        for i, j in pairs
    ]
    # Both sides add the same numbers in another order: 1e-16 times their count and size.
    assert np.mean([result[0] for result in results]) == pytest.approx(loss, rel=1e-12)
    for name, grad in grads.items():
        mean = sum(result[1].get(name, 0.0) for result in results) / len(pairs)
        assert mean == pytest.approx(float(grad), rel=1e-10, abs=1e-10), name


# The posterior


def test_the_exact_posterior_is_that_of_a_long_run() -> None:
    """Against Metropolis sampling, which shares nothing with quadrature but the model."""
    rng = np.random.default_rng(5)
    hits = np.array([player.hits for player in PLAYERS])
    chains, warm_up, kept = 400, 500, 2000

    def log_likelihood(mu: np.ndarray, log_sigma: np.ndarray, z: np.ndarray) -> Any:
        theta = mu + np.exp(log_sigma) * z
        return hits * theta - AT_BATS * np.logaddexp(0.0, theta)

    def log_prior(mu: np.ndarray, log_sigma: np.ndarray) -> Any:
        return -0.5 * (mu + 1.0) ** 2 - 0.5 * np.exp(2.0 * log_sigma) + log_sigma

    mu = rng.normal(-1.0, 0.1, (chains, 1))
    log_sigma = rng.normal(-2.0, 0.5, (chains, 1))
    z = rng.standard_normal((chains, 18))
    sums = np.zeros((chains, 22))
    for iteration in range(warm_up + kept):
        # Each z by itself: given mu and sigma they are independent.
        proposal = z + 1.5 * rng.standard_normal(z.shape)
        gain = log_likelihood(mu, log_sigma, proposal) - log_likelihood(mu, log_sigma, z)
        gain += 0.5 * (z**2 - proposal**2)
        z = np.where(np.log(rng.random(z.shape)) < gain, proposal, z)
        new_mu = mu + 0.1 * rng.standard_normal(mu.shape)
        new_log_sigma = log_sigma + 0.7 * rng.standard_normal(mu.shape)
        gain = log_prior(new_mu, new_log_sigma) - log_prior(mu, log_sigma)
        change = log_likelihood(new_mu, new_log_sigma, z) - log_likelihood(mu, log_sigma, z)
        accepted = np.log(rng.random(mu.shape)) < gain + change.sum(axis=1, keepdims=True)
        mu = np.where(accepted, new_mu, mu)
        log_sigma = np.where(accepted, new_log_sigma, log_sigma)
        if iteration >= warm_up:
            sigma = np.exp(log_sigma)
            sums += np.hstack([sigmoid(mu + sigma * z), mu, mu**2, sigma, sigma**2])
    means = sums / kept
    truth, _ = exact(PLAYERS)
    expected = [*truth.averages]
    for mean, deviation in (truth.mu, truth.sigma):
        expected += [mean, mean**2 + deviation**2]
    error = means.std(axis=0, ddof=1) / np.sqrt(chains)
    # The averages are known to 2e-4, sigma to 1.5e-3: a wrong model or prior shows.
    assert error[:18].max() < 2e-4
    assert error[20] < 1.5e-3
    # Of 22 normal errors one exceeds 4 deviations once in 700 seeds.
    assert (np.abs(means.mean(axis=0) - expected) < 4 * error).all()


def test_the_guide_is_summarized_by_its_moments() -> None:
    values = guide(seed=6)
    got = of_guide(values, PLAYERS)
    mu, spread = float(values["mu.loc"]), np.exp(values["mu.log_scale"])
    loc, scale = values["log_sigma.loc"], np.exp(values["log_sigma.log_scale"])
    mean = np.exp(loc + scale**2 / 2)  # of a lognormal
    # 100 000 draws: relative errors of a few times 1/sqrt(100 000) = 0.003.
    assert got.mu == pytest.approx((mu, spread), rel=0.01)
    assert got.sigma == pytest.approx((mean, mean * np.sqrt(np.expm1(scale**2))), rel=0.03)


def test_the_fit_comes_close_to_the_exact_posterior() -> None:
    plan = Plan(PLAYERS, steps=2000, seed=0)
    fit = Fit()
    advance(fit, plan, range(plan.steps), np.asarray)
    truth, log_evidence = exact(PLAYERS)
    rest = np.array([player.rest_average for player in PLAYERS])
    first = np.array([player.hits / AT_BATS for player in PLAYERS])

    def rms(x: np.ndarray) -> Any:
        return np.sqrt(np.mean(x**2))

    averages = of_guide(fit.params, PLAYERS).averages
    # At its optimum the guide is 0.004 away; noise adds up to 0.004 in so short a fit.
    assert rms(averages - truth.averages) < 0.008
    assert rms(averages - rest) < 0.6 * rms(first - rest)
    noise = np.random.default_rng(7).standard_normal((10_000, 20))
    loss, _ = negative_elbo(fit.params, PLAYERS, 18, noise)
    # The ELBO's error is 0.01; the optimum is 0.65 below the log evidence.
    assert log_evidence - 1.0 < -loss < log_evidence - 0.5


# The stream and the resumed fit


def test_names_are_born_with_their_players_and_have_clocks_of_their_own() -> None:
    fit, history = whole()
    assert [record.joined for record in history[:: PLAN.every]][:18] == list(range(1, 19))
    assert history[0].names == 6
    assert history[-1].names == len(fit.params) == 40
    first, last = (f"z.{PLAYERS[i].name}.loc" for i in (0, -1))
    steps = [fit.optimizer.state(name).step for name in ("mu.loc", first, last)]
    assert steps[0] == PLAN.steps > steps[1] > steps[2] > 0


def test_a_resumed_fit_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    uninterrupted, history = whole()
    first = start(PLAN, tmp_path, np.asarray)
    fit, second = resume(PLAN, tmp_path, np.asarray)
    assert equal(fit, uninterrupted)
    assert [record.elbo for record in first + second] == [record.elbo for record in history]
    # mu, log_sigma and six players settle in the first step; the others wait for theirs.
    pending = [record.pending for record in second]
    assert pending[0] == 40 - 2 * (2 + PLAN.batch)
    assert pending[-1] == 0


def test_a_fit_on_torch_equals_one_on_numpy(tmp_path: Path) -> None:
    in_numpy, _ = whole()
    start(PLAN, tmp_path, torch.from_numpy)
    in_torch, _ = resume(PLAN, tmp_path, torch.from_numpy)
    for name, param in in_torch.params.items():
        slots = in_torch.optimizer.state(name).slots.values()
        assert all(isinstance(x, torch.Tensor) for x in (param, *slots))
        assert param.dtype == torch.float64
    assert equal(in_numpy, in_torch)


@pytest.mark.parametrize("change", ["value", "slot", "clock", "name"])
def test_fits_that_differ_are_not_equal(change: str, tmp_path: Path) -> None:
    fit, _ = whole()
    start(PLAN, tmp_path, np.asarray)
    other, _ = resume(PLAN, tmp_path, np.asarray)
    name = "mu.loc"
    state = other.optimizer.state_dict()
    if change == "value":
        other.params[name] = np.nextafter(other.params[name], 0.0)
    elif change == "slot":
        slots = state["entries"][name]["slots"]
        slots["exp_avg_sq"] = np.asarray(np.nextafter(slots["exp_avg_sq"], 0.0))
    elif change == "clock":
        state["entries"][name]["step"] += 1
    else:
        other.optimizer.forget(name)
        del state["entries"][name]
    other.optimizer.load_state_dict(state)
    assert not equal(fit, other)
    assert not equal(other, fit)


def test_pyro_fits_the_same_model_and_leaves_no_trace() -> None:
    pyro.get_param_store().clear()
    pyro.param("theirs", torch.tensor(1.0))
    before = torch.get_rng_state()
    averages = of_guide(with_pyro.fit(PLAYERS, steps=500, seed=0), PLAYERS).averages
    assert np.sqrt(np.mean((averages - exact(PLAYERS)[0].averages) ** 2)) < 0.008
    assert list(pyro.get_param_store().keys()) == ["theirs"]
    assert torch.equal(torch.get_rng_state(), before)
    pyro.get_param_store().clear()


# The command


def test_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--steps", "200", "--seed", "1"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert max(map(len, lines)) < 80
    assert lines[-4].endswith("40 parameters and 80 slots, equal to the last bit: True")
    # What to try next.
    for what in ("README.md", "multiopt.adapters.pyro", "`multiopt bench`", "`multiopt show FILE`"):
        assert what in f"{lines[-2]} {lines[-1]}"
    assert "40 after loading, 24 after one step" in out
    assert "Averages, RMS difference from exact: Pyro ." in out
    assert all(player.name in out for player in PLAYERS)
    assert err == ""


def test_a_difference_shows_in_the_exit_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multiopt.demo.show.equal", lambda fit, other: False)
    assert main(["demo", "--steps", "200"]) == 1
    assert capsys.readouterr().out.endswith("equal to the last bit: False\n")


def test_numpy_alone_is_enough() -> None:
    code = (
        "import sys\n"
        "frameworks = {'torch', 'pyro', 'jax', 'numba'}\n"
        "sys.modules.update(dict.fromkeys(frameworks))\n"  # None: as if not installed
        "from multiopt.cli import main\n"
        "status = main(['demo', '--steps', '200'])\n"
        "assert not any(sys.modules[name] for name in frameworks)\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Pyro is not installed" in done.stdout
    assert "\ntorch is not installed: the same fit with torch is left out.\n" in done.stdout


def test_importing_the_library_does_not_import_the_demo() -> None:
    code = "import sys, multiopt; sys.exit('multiopt.demo' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["demo", "--steps", "199"], "--steps must be at least 200"),
        (["demo", "--seed", "-1"], "--seed must be at least 0"),
    ],
)
def test_wrong_arguments_are_explained(
    arguments: list[str], remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert remedy in capsys.readouterr().err


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "multiopt", "--help"], capture_output=True, text=True, check=True
    )
    assert "demo" in done.stdout
