"""The data, the model and the gradient of its ELBO.

The model, with one latent skill ``z`` per player::

    hits ~ Binomial(45, sigmoid(mu + sigma * z)),   z ~ Normal(0, 1)
    mu ~ Normal(-1, 1),   sigma ~ HalfNormal(1)

``sigmoid(-1)`` is 0.27, an ordinary batting average. The parameterization is not centred on ``mu``:
with a centred one, ``sigma`` collapses under a guide of independent normals.

The guide is an independent normal for ``mu``, ``log_sigma`` and each ``z.<player>``; its parameters
are called ``<latent>.loc`` and ``<latent>.log_scale``.
"""

import csv
from collections.abc import Mapping, Sequence
from importlib.resources import files
from math import comb, e, log, pi
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["AT_BATS", "Floats", "Player", "born", "latents", "negative_elbo", "players", "sigmoid"]

Floats: TypeAlias = NDArray[np.float64]

#: How many at bats of each player the model sees.
AT_BATS = 45


class Player(NamedTuple):
    """A player's season.

    Attributes:
        name: The player's name.
        hits: Hits in the first 45 at bats.
        rest_at_bats: At bats in the rest of the season.
        rest_average: Batting average over the rest of the season.
    """

    name: str
    hits: int
    rest_at_bats: int
    rest_average: float


def players() -> list[Player]:
    """The players, with the best start to the season first.

    >>> players()[0]
    Player(name='Roberto Clemente', hits=18, rest_at_bats=367, rest_average=0.346)
    """
    text = files("multiopt.demo").joinpath("baseball.csv").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return [
        Player(
            row["player"], int(row["hits"]), int(row["rest_at_bats"]), float(row["rest_average"])
        )
        for row in csv.DictReader(lines)
    ]


def latents(batch: Sequence[Player]) -> list[str]:
    """The names of the latent variables that these players depend on."""
    return ["mu", "log_sigma", *(f"z.{player.name}" for player in batch)]


def born(latent: str) -> dict[str, Floats]:
    """The initial guide of a latent variable, as 0-d arrays.

    >>> born("mu")
    {'mu.loc': array(-1.), 'mu.log_scale': array(-1.)}
    """
    loc, log_scale = (-1.0, -1.0) if latent in ("mu", "log_sigma") else (0.0, 0.0)
    return {f"{latent}.loc": np.array(loc), f"{latent}.log_scale": np.array(log_scale)}


def sigmoid(x: Floats) -> Floats:
    """The batting average for a skill in log odds."""
    return 1.0 / (1.0 + np.exp(-x))


def negative_elbo(
    values: Mapping[str, Floats], batch: Sequence[Player], joined: int, noise: Floats
) -> tuple[float, dict[str, Floats]]:
    """An unbiased estimate of the negative ELBO and its gradient, by reparameterization.

    Source: Kingma & Welling, "Auto-Encoding Variational Bayes" (ICLR 2014, arXiv:1312.6114),
    section 2.3, with the entropy of the guide in closed form; minibatches as in its section 2.2.

    Args:
        values: The guide's parameters, 0-d arrays by name; those of other players are ignored.
        batch: Players drawn from those who have joined, to stand for all of them.
        joined: How many players have joined.
        noise: Standard normal draws, of shape (samples, 2 + players in the batch).

    Returns:
        The loss in nats, and its gradient: 0-d arrays by name, of the names the batch depends on.
    """
    names = latents(batch)
    loc = np.array([values[f"{name}.loc"] for name in names])
    log_scale = np.array([values[f"{name}.log_scale"] for name in names])
    hits = np.array([player.hits for player in batch])
    stands_for = joined / len(batch)
    weight = np.array([1.0, 1.0] + [stands_for] * len(batch))

    latent = loc + np.exp(log_scale) * noise
    mu, log_sigma, z = latent[:, :1], latent[:, 1:2], latent[:, 2:]
    sigma = np.exp(log_sigma)
    theta = mu + sigma * z

    # The density of log_sigma is that of sigma times the Jacobian sigma.
    log_prior = np.concatenate(
        [
            -0.5 * (mu + 1.0) ** 2 - 0.5 * log(2 * pi),
            -0.5 * sigma**2 + 0.5 * log(2 / pi) + log_sigma,
            -0.5 * z**2 - 0.5 * log(2 * pi),
        ],
        axis=1,
    )
    log_choices = np.array([log(comb(AT_BATS, player.hits)) for player in batch])
    log_likelihood = log_choices + hits * theta - AT_BATS * np.logaddexp(0.0, theta)
    entropy = log_scale + 0.5 * log(2 * pi * e)
    elbo = (log_prior.mean(axis=0) + entropy) @ weight
    elbo += stands_for * log_likelihood.mean(axis=0).sum()

    by_theta = hits - AT_BATS * sigmoid(theta)
    by_latent = np.concatenate(
        [
            -(mu + 1.0) + stands_for * by_theta.sum(axis=1, keepdims=True),
            1.0 - sigma**2 + stands_for * (by_theta * sigma * z).sum(axis=1, keepdims=True),
            stands_for * (by_theta * sigma - z),
        ],
        axis=1,
    )
    by_loc = by_latent.mean(axis=0)
    by_log_scale = (by_latent * noise).mean(axis=0) * np.exp(log_scale) + weight
    grads = {}
    for i, name in enumerate(names):
        grads[f"{name}.loc"] = np.asarray(-by_loc[i])
        grads[f"{name}.log_scale"] = np.asarray(-by_log_scale[i])
    return -float(elbo), grads
