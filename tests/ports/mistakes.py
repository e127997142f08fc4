"""Mistakes that people made when they wrote a model again, each in a port of one of our models.

The links show where somebody met the mistake; here it is made in a smaller model.
"""

# mypy: allow-untyped-calls

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

from tests.ports.models import (
    FACTORS,
    LINEAR,
    NETWORK,
    SOFTMAX,
    VARIATIONAL,
    Arrays,
    Model,
    divergence,
    in_jax,
    in_torch,
    likelihood,
    misfit,
)

Gradients = Callable[[Arrays, int], Arrays]


@dataclass(frozen=True)
class Mistake:
    """A port that is wrong.

    Attributes:
        what: What is wrong with it.
        link: Where somebody met this.
        model: The prototype.
        port: The port.
        name: The first parameter whose gradient departs.
        cause: What it is recognized as; None if it is not.
        step: The first step at which it departs.
        what_departs: What is found to depart.
        to_port: As for ``compare_training``.
        dtype: Of the prototype.
    """

    what: str
    link: str
    model: Model
    port: Gradients
    name: str
    cause: str | None
    step: int = 1
    departs: str = "gradient"
    to_port: Callable[[Any], Any] = torch.tensor
    dtype: str = "float64"


def changed(model: Model, change: Callable[[Arrays], Arrays]) -> Gradients:
    """A port whose gradients are changed afterwards."""
    right = in_torch(model)
    return lambda params, step: {**(grads := right(params, step)), **change(grads)}


def scaled(model: Model, factor: float) -> Gradients:
    def loss(xp: Any, p: Arrays, d: Arrays) -> Any:
        return factor * model.loss(xp, p, d)

    return in_torch(model, loss)


def steps_off(model: Model, by: int) -> Gradients:
    """A port that takes the batch of another step."""
    right = in_torch(model)
    return lambda params, step: right(params, step + by)


def at_earlier(model: Model, first: bool) -> Gradients:
    """A port that looks at its first parameters, or at those of the step before."""
    right = in_torch(model)
    seen: list[Arrays] = []

    def port(params: Arrays, step: int) -> Arrays:
        seen.append(params)
        return right(seen[0] if first or len(seen) == 1 else seen[-2], step)

    return port


def never_cleared(model: Model) -> Gradients:
    """A port whose ``.grad`` goes on adding."""
    right = in_torch(model)
    total: Arrays = {}

    def port(params: Arrays, step: int) -> Arrays:
        for name, g in right(params, step).items():
            total[name] = total[name] + g if name in total else g
        return dict(total)

    return port


def rounded_to(model: Model, dtype: torch.dtype) -> Gradients:
    """A port that computes in another precision and returns what is asked for."""
    right = in_torch(model)

    def port(params: Arrays, step: int) -> Arrays:
        low = right({name: x.to(dtype) for name, x in params.items()}, step)
        return {name: g.to(params[name].dtype) for name, g in low.items()}

    return port


def to_ten_bits(x: Any) -> Any:
    """As matrix products read float32 numbers in TF32; the gradient does not see it."""
    bits = x.detach().view(torch.int32)
    return x + (((bits + 0x1000) & -0x2000).view(torch.float32) - x).detach()


# Losses with a mistake


def every_pair(xp: Any, p: Arrays, d: Arrays) -> Any:
    return 0.5 * xp.mean((d["x"] @ p["w"] + p["b"] - d["y"][:, None]) ** 2)


def root_of_square(xp: Any, p: Arrays, d: Arrays) -> Any:
    return LINEAR.loss(xp, p, d) + 0.0 * xp.sqrt(xp.sum(p["w"] ** 2))


def other_branch(xp: Any, p: Arrays, d: Arrays) -> Any:
    z = 1e4 * p["w3"]
    return NETWORK.loss(xp, p, d) + 0.0 * xp.sum(xp.where(z > 0, z, xp.exp(z)))


def along_the_batch(xp: Any, p: Arrays, d: Arrays) -> Any:
    z = d["x"] @ p["W"] + p["b"]
    return xp.mean(xp.sum(d["hot"] * (xp.log(xp.sum(xp.exp(z), axis=0)) - z), axis=1))


def without_divergence(xp: Any, p: Arrays, d: Arrays) -> Any:
    return likelihood(xp, p, d)


def negative_divergence(xp: Any, p: Arrays, d: Arrays) -> Any:
    return likelihood(xp, p, d) - divergence(xp, p)


def without_entropy(xp: Any, p: Arrays, d: Arrays) -> Any:
    return VARIATIONAL.loss(xp, p, d) + xp.sum(p["log_scale"])


def negative_entropy(xp: Any, p: Arrays, d: Arrays) -> Any:
    return VARIATIONAL.loss(xp, p, d) + 2 * xp.sum(p["log_scale"])


def of_the_batch_only(xp: Any, p: Arrays, d: Arrays) -> Any:
    return len(d["y"]) / 100 * likelihood(xp, p, d) + divergence(xp, p)


def with_decay(xp: Any, p: Arrays, d: Arrays) -> Any:
    return NETWORK.loss(xp, p, d) + 0.005 * sum(xp.sum(x**2) for x in p.values())


def float32_constant(xp: Any, p: Arrays, d: Arrays) -> Any:
    fifth = float(np.float32(0.2))
    return 5 * fifth * FACTORS.loss(xp, p, d)


def in_tf32(xp: Any, p: Arrays, d: Arrays) -> Any:
    p = {**p, "W1": to_ten_bits(p["W1"]), "W2": to_ten_bits(p["W2"])}
    return NETWORK.loss(xp, p, d | {"x": to_ten_bits(d["x"])})


def bfloat16_logits(xp: Any, p: Arrays, d: Arrays) -> Any:
    z = (d["x"] @ p["W"] + p["b"]).to(torch.bfloat16)
    rest = torch.log_softmax(z, 1) * d["hot"].to(torch.bfloat16)
    return -rest.sum(1).mean().float()


def detached_layer(xp: Any, p: Arrays, d: Arrays) -> Any:
    return NETWORK.loss(xp, {**p, "W1": p["W1"].detach()}, d)


def padding_counts(xp: Any, p: Arrays, d: Arrays) -> Any:
    seen = d["seen"].clone()
    seen[0] = True
    return FACTORS.loss(xp, p, d | {"seen": seen})


def gives_back(params: Arrays, step: int) -> Arrays:
    """A port that gives back what the prototype has just computed."""
    return {name: torch.from_numpy(g) for name, g in last.items()}


#: What the prototype of ``gives_back`` has computed.
last: Arrays = {}


def remembered(params: Arrays, step: int) -> Arrays:
    last.update(FACTORS.prototype(params, step))
    return last


def mistake(what: str, link: str, *rest: Any, **more: Any) -> Mistake:
    """A mistake, with the part of its link that is not always the same."""
    return Mistake(what, f"https://github.com/{link}", *rest, **more)


MISTAKES = [
    mistake(
        "a sum for a mean",
        *("jax-ml/jax/pull/3113", SOFTMAX, scaled(SOFTMAX, 20.0), "W", "scaled"),
    ),
    mistake(
        "a mean that is divided once more",
        *("d2l-ai/d2l-en/pull/1000", LINEAR, scaled(LINEAR, 1 / 16), "w", "scaled"),
    ),
    mistake(
        "a sum over two ranks that are averaged",
        *("pytorch/pytorch/pull/42471", NETWORK, scaled(NETWORK, 0.5), "W1", "scaled"),
    ),
    mistake(
        "accumulated batches that are not divided",
        *("ApolloResearch/e2e_sae/pull/70", FACTORS, scaled(FACTORS, 4.0), "U", "scaled"),
    ),
    mistake(
        "a mean over outcomes for a sum",
        *("HikariTJU/LD/issues/74", VARIATIONAL, scaled(VARIATIONAL, 1 / 17), "loc", "scaled"),
    ),
    mistake(
        "the likelihood of a batch for that of the data",
        *("tachukao/mgplvm-pytorch/pull/19", VARIATIONAL, in_torch(VARIATIONAL, of_the_batch_only)),
        *("loc", "scaled"),
    ),
    mistake(
        "a log likelihood that is minimized",
        *("kmkurn/pytorch-crf/issues/27", SOFTMAX, scaled(SOFTMAX, -1.0), "W", "sign"),
    ),
    mistake(
        "a divergence with the other sign",
        *("google-deepmind/open_spiel/issues/962", VARIATIONAL),
        *(in_torch(VARIATIONAL, negative_divergence), "loc", "term"),
    ),
    mistake(
        "an entropy with the other sign",
        *("FluxML/model-zoo/pull/147", VARIATIONAL, in_torch(VARIATIONAL, negative_entropy)),
        *("log_scale", "term"),
    ),
    mistake(
        "no derivative of the transform",
        *("PyAutoLabs/PyAutoFit/issues/932", VARIATIONAL, in_torch(VARIATIONAL, without_entropy)),
        *("log_scale", "term"),
    ),
    mistake(
        "no prior",
        *("pyro-ppl/pyro/pull/205", VARIATIONAL, in_torch(VARIATIONAL, without_divergence)),
        *("loc", "term"),
    ),
    mistake(
        "a penalty that is left out",
        *("hunglc007/tensorflow-yolov4-tflite/issues/369", FACTORS, in_torch(FACTORS, misfit)),
        *("U", "term"),
    ),
    mistake(
        "a decay that is a penalty too",
        *("anhquan0412/basic_model_scratch/issues/2", NETWORK, in_torch(NETWORK, with_decay)),
        *("W1", "term"),
    ),
    mistake(
        "axes of a kernel in another order",
        *("tgyg-jegli/tf_texture_net/issues/1", NETWORK),
        *(changed(NETWORK, lambda g: {"W2": g["W2"].T}), "W2", "transposed"),
    ),
    mistake(
        "a weight in the layout of the other library",
        *("huggingface/transformers/issues/47031", NETWORK),
        *(changed(NETWORK, lambda g: {"W1": g["W1"].T}), "W1", "transposed"),
        departs="shape",
    ),
    mistake(
        "flattened in the other order",
        *("keras-team/keras/issues/13830", FACTORS),
        *(changed(FACTORS, lambda g: {"U": g["U"].T.reshape(12, 3)}), "U", "transposed"),
    ),
    mistake(
        "a reshape in the place of a transpose",
        *("PKU-YuanGroup/Open-Sora-Plan/issues/171", FACTORS),
        *(changed(FACTORS, lambda g: {"V": g["V"].T.reshape(10, 3)}), "V", "transposed"),
    ),
    mistake(
        "gates in another order",
        *("keras-team/keras/issues/8720", SOFTMAX),
        *(changed(SOFTMAX, lambda g: {"W": g["W"][:, [1, 0, 2]]}), "W", "order"),
    ),
    mistake(
        "a kernel that is flipped",
        *("keras-team/keras/issues/3015", NETWORK),
        *(changed(NETWORK, lambda g: {"W2": g["W2"].flip(0, 1)}), "W2", "order"),
    ),
    mistake(
        "labels that are shifted once too often",
        *("huggingface/transformers/pull/37830", SOFTMAX, steps_off(SOFTMAX, 1), "W", "early"),
    ),
    mistake(
        "a gradient of the step before",
        *("microsoft/FQF/issues/3", LINEAR, steps_off(LINEAR, -1), "w", "late"),
    ),
    mistake(
        "a forward pass before the last update",
        *("soumith/dcgan.torch/issues/21", NETWORK, at_earlier(NETWORK, False), "W1", "late"),
        step=2,
    ),
    mistake(
        "weights that were saved and not copied",
        *("pytorch/tutorials/pull/188", VARIATIONAL, at_earlier(VARIATIONAL, True), "loc", "late"),
        step=2,
    ),
    mistake(
        "no zero_grad() in a loop",
        *("ajbrock/BigGAN-PyTorch/issues/25", NETWORK, never_cleared(NETWORK)),
        *("W1", "accumulated"),
        step=2,
    ),
    mistake(
        "no zero_grad() at all",
        *("opendp/smartnoise-sdk/issues/280", LINEAR, never_cleared(LINEAR), "w", "accumulated"),
        step=2,
    ),
    mistake(
        "a column minus a row",
        *("pytorch/pytorch/issues/16045", LINEAR, in_torch(LINEAR, every_pair), "w", None),
    ),
    mistake(
        "one coefficient for all samples",
        *("google-deepmind/acme/issues/277", FACTORS),
        changed(FACTORS, lambda g: {"U": g["U"].mean(0, keepdim=True).expand(12, 3)}),
        *("U", "broadcast"),
    ),
    mistake(
        "an axis that is kept",
        *("RITCHIEHuang/DeepRL_Algorithms/issues/13", SOFTMAX),
        *(changed(SOFTMAX, lambda g: {"b": g["b"][None]}), "b", "broadcast"),
        departs="shape",
    ),
    mistake(
        "float32 by default",
        *("jax-ml/jax/issues/1333", NETWORK, in_jax(NETWORK), "W1", "precision"),
        departs="dtype",
        to_port=lambda x: jnp.asarray(x, jnp.float32),
    ),
    mistake(
        "float32 in the middle",
        *("jax-ml/jax/issues/1333", SOFTMAX, rounded_to(SOFTMAX, torch.float32)),
        *("W", "precision"),
    ),
    mistake(
        "a constant of float32",
        *("tensorflow/tensorflow/issues/35938", FACTORS, in_torch(FACTORS, float32_constant)),
        *("U", "precision"),
    ),
    mistake(
        "matrix products in TF32",
        *("pytorch/pytorch/issues/68020", NETWORK, in_torch(NETWORK, in_tf32), "W1", "precision"),
        dtype="float32",
    ),
    mistake(
        "a loss in bfloat16",
        *("Modalities/modalities/pull/464", SOFTMAX, in_torch(SOFTMAX, bfloat16_logits)),
        *("W", "precision"),
        dtype="float32",
    ),
    mistake(
        "a loss that is detached",
        *("guopengf/FL-MRCM/issues/10", NETWORK, in_torch(NETWORK, detached_layer)),
        *("W1", "no gradient"),
        departs="missing",
    ),
    mistake(
        "an activation that is set to zero in place",
        *("pytorch/pytorch/issues/6990", NETWORK),
        *(changed(NETWORK, lambda g: {"W1": 0 * g["W1"]}), "W1", "no gradient"),
    ),
    mistake(
        "the other branch of where() overflows",
        *("pytorch/pytorch/issues/68425", NETWORK, in_torch(NETWORK, other_branch)),
        *("w3", "not finite"),
    ),
    mistake(
        "a norm of zero",
        *("jax-ml/jax/issues/4177", LINEAR, in_jax(LINEAR, root_of_square), "w", "not finite"),
        to_port=jnp.asarray,
    ),
    mistake(
        "a softmax along the batch",
        *("ctallec/world-models/issues/10", SOFTMAX, in_torch(SOFTMAX, along_the_batch), "W", None),
    ),
    mistake(
        "padding that counts",
        *("mlfoundations/open_clip/pull/316", FACTORS, in_torch(FACTORS, padding_counts)),
        *("U", "partly"),
    ),
    mistake(
        "clipped before it is unscaled",
        *("milesial/Pytorch-UNet/issues/468", NETWORK),
        *(changed(NETWORK, lambda g: {k: x.clip(-0.02, 0.02) for k, x in g.items()}), "W1"),
        "clipped",
    ),
    mistake(
        "the derivative by a logarithm",
        *("scikit-learn/scikit-learn/issues/14206", VARIATIONAL),
        lambda params, step: {
            **(g := in_torch(VARIATIONAL)(params, step)),
            "log_scale": g["log_scale"] / params["log_scale"].exp(),
        },
        *("log_scale", "chain rule"),
    ),
    mistake(
        "memory of the prototype",
        *("jax-ml/jax/issues/37830", FACTORS, gives_back, "U", "shared memory"),
        departs="memory",
    ),
]
