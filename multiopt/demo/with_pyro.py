"""The same model in Pyro, fitted by its SVI with the drop-in. Needs ``pyro-ppl``."""

# mypy: allow-untyped-calls
# Most of Pyro is not annotated.

from collections.abc import Sequence
from math import exp

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

import multiopt.adapters.pyro as optim
from multiopt.demo.baseball import AT_BATS, Floats, Player
from multiopt.demo.fit import progress

__all__ = ["fit"]


def fit(players: Sequence[Player], steps: int, seed: int, title: str = "") -> dict[str, Floats]:
    """Fit the guide to all players at once.

    Args:
        players: The players.
        steps: How many steps to take.
        seed: The seed of Pyro's random numbers.
        title: The text before the progress bar; if empty, there is no bar.

    Returns:
        The guide's parameters under the names used in ``baseball``.
    """
    hits = torch.tensor([float(player.hits) for player in players])

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(-1.0, 1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("players", len(players)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("hits", dist.Binomial(AT_BATS, logits=mu + sigma * z), obs=hits)

    # In a scope of its own, so that the caller's parameters are not touched.
    with pyro.get_param_store().scope(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # The same start as in ``baseball.born``.
        beginning = {"mu": -1.0, "sigma": exp(-1.0), "z": 0.0}
        guide = AutoNormal(
            model,
            init_loc_fn=lambda site: torch.full(site["fn"].shape(), beginning[site["name"]]),
            init_scale=0.5,
        )
        # The rate decays from 0.05 to a hundredth of that. Pyro's clip_norm bounds each element.
        optimizer = optim.ClippedAdam({"lr": 0.05, "lrd": 0.01 ** (1 / steps), "clip_norm": 30.0})
        loss = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
        svi = SVI(model, guide, optimizer, loss)
        smooth = 0.0
        with progress(range(steps), title) as bar:
            for step in bar:
                smooth += (-svi.step() - smooth) / min(step + 1, 200)
                bar.set_postfix_str(f"ELBO {smooth:.2f}", refresh=False)
        return _renamed(guide, players)


def _renamed(guide: AutoNormal, players: Sequence[Player]) -> dict[str, Floats]:
    """AutoNormal's parameters under our names; its guide of sigma is a normal of log sigma."""
    values = {}
    for ours, site in (("mu", "mu"), ("log_sigma", "sigma")):
        values[f"{ours}.loc"] = getattr(guide.locs, site).detach().double().numpy()
        values[f"{ours}.log_scale"] = np.log(getattr(guide.scales, site).detach().double().numpy())
    for i, player in enumerate(players):
        values[f"z.{player.name}.loc"] = guide.locs.z[i].detach().double().numpy()
        values[f"z.{player.name}.log_scale"] = np.log(guide.scales.z[i].detach().double().numpy())
    return values
