"""Random training of names that not every rank sees, on ranks and in one process.

Everything follows from a seed: which rank has which names in which step, with which gradients. One
process takes the same steps with means that are computed here in plain NumPy.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
import torch.distributed as dist

import multiopt as mo
from multiopt.distributed import Replicas

__all__ = ["Training", "digest", "in_one_process", "library_of", "on_this_rank", "rank_order_mean"]

#: By name: library, dtype and shape. The last two are born in the middle of a history.
NAMES: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "a": ("numpy", "float64", (5,)),
    "b": ("torch", "float32", (3, 4)),
    "c": ("torch", "bfloat16", (17,)),
    "d": ("numpy", "float32", ()),
    "e": ("torch", "float64", (0, 3)),
    "f": ("numpy", "complex64", (3,)),
    "g": ("torch", "complex128", (2, 2)),
    "h": ("numpy", "bfloat16", (4,)),
    "late numpy": ("numpy", "float32", (9,)),
    "late torch": ("torch", "float16", (2, 3)),
}
LATE = 4


def library_of(name: str) -> tuple[str, str, tuple[int, ...]]:
    """The library, the dtype and the shape of a name, local ones included."""
    return NAMES.get(name, ("numpy", "float64", (3,)))


@dataclass(frozen=True)
class Training:
    """A history.

    Attributes:
        seed: What everything follows from.
        ranks: The number of ranks.
        steps: The number of steps.
        clips: Whether gradients are clipped, by a global norm too.
        on_nonfinite: As for ``mo.Optimizer``; gradients have NaNs if it is ``"skip"``.
        has_local: Whether each rank has a name of its own.
        masters: Whether there are master copies.
        average: Whether averages are kept.
    """

    seed: int
    ranks: int
    steps: int = 8
    clips: bool = True
    on_nonfinite: Any = "propagate"
    has_local: bool = False
    masters: bool = False
    average: bool = False

    def optimizer(self) -> mo.Optimizer:
        """An optimizer with several rules, a schedule, and a clip that local names do not share."""
        clip = mo.Clip(norm=4.0, global_norm=5.0)
        return mo.Optimizer(
            _rule,
            clip=(lambda name: None if is_local(name) else clip) if self.clips else None,
            on_nonfinite=self.on_nonfinite,
            master_weights=self.masters,
            average=mo.Average() if self.average else None,
        )

    def random(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])

    def seen(self, rank: int, step: int) -> list[str]:
        """The names that a rank passes in a step, in its order."""
        draw = self.random(1, rank, step)
        known = [name for name in NAMES if step >= LATE or not name.startswith("late")]
        names = [name for name in draw.permutation(known).tolist() if draw.random() < 0.5]
        if self.has_local and draw.random() < 0.7:
            names.append(f"local {rank}")
        return names

    def fresh(self, rank: int, name: str) -> Any:
        """The value with which a rank would begin a name: another on each."""
        return self._array(name, self.random(2, rank, _number(name)))

    def grad(self, rank: int, step: int, name: str) -> Any | None:
        """The gradient of a name that a rank passes; sometimes it has none."""
        draw = self.random(3, rank, step, _number(name))
        if draw.random() < 0.15:
            return None
        grad = self._array(name, draw)
        if self.on_nonfinite == "skip" and draw.random() < 0.1 and np.prod(grad.shape):
            grad.reshape(-1)[0] = float("nan")
        return grad

    @staticmethod
    def _array(name: str, draw: np.random.Generator) -> Any:
        library, dtype, shape = library_of(name)
        x = draw.standard_normal(shape) * 10.0 ** draw.integers(-2, 3, shape)
        if dtype.startswith("complex"):
            x = x + 1j * draw.standard_normal(shape)
        if library == "numpy":
            return np.asarray(x, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        return torch.from_numpy(np.asarray(x)).to(getattr(torch, dtype))


def is_local(name: str) -> bool:
    return name.startswith("local")


def _number(name: str) -> int:
    return list(NAMES).index(name) if name in NAMES else 100


def _rule(name: str) -> mo.Rule:
    if name in ("a", "c", "local 0", "local 1", "local 2"):
        return mo.Adam(lr=mo.schedules.Linear(0.1, 0.01, steps=6))
    if name in ("b", "late numpy"):
        return mo.LAMB(lr=0.05)
    if name in ("d", "g"):
        return mo.SGD(lr=mo.schedules.Shared(mo.schedules.Linear(0.1, 0.01, steps=6)), momentum=0.9)
    return mo.AdamW(lr=0.02, amsgrad=True)


def rank_order_mean(arrays: list[np.ndarray]) -> np.ndarray:
    """The sum in the order of the ranks, in the compute dtype, over their number, rounded once."""
    dtype = arrays[0].dtype
    compute = {2: np.float32}.get(dtype.itemsize, dtype)
    if dtype.kind == "c":
        parts = [array[..., None].view(f"f{dtype.itemsize // 2}") for array in arrays]
        return rank_order_mean(parts).view(dtype)[..., 0]
    total = np.zeros(arrays[0].shape, compute)
    for rank, array in enumerate(arrays):
        total = array.astype(compute) if rank == 0 else total + array.astype(compute)
    return (total / np.asarray(len(arrays), compute)).astype(dtype)


def _on_host(array: Any) -> np.ndarray:
    """A copy in NumPy."""
    if isinstance(array, np.ndarray):
        return array.copy()
    if array.dtype == torch.bfloat16:
        return array.detach().float().numpy().astype(ml_dtypes.bfloat16)
    return array.detach().numpy().copy()


def _like(host: np.ndarray, array: Any) -> Any:
    if isinstance(array, np.ndarray):
        return host
    if array.dtype == torch.bfloat16:
        return torch.from_numpy(host.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(host)


def digest(opt: mo.Optimizer, params: dict[str, Any]) -> dict[str, Any]:
    """All that must be equal, by name: values, clocks and slots, as text."""
    found: dict[str, Any] = {name: [tuple(skips)] for name, skips in opt.skips.items()}
    for name in opt:
        step, slots = opt.state(name)
        found.setdefault(name, []).append(_text(params[name]))
        found[name] += [step, {slot: _text(array) for slot, array in slots.items()}]
        if opt._registry.average is not None:
            found[name].append(_text(opt.average(name)))
    return found


def _text(array: Any) -> str:
    host = _on_host(array)
    return f"{type(array).__name__} {host.dtype} {host.shape} {host.tobytes().hex()}"


def on_this_rank(training: Training, reduction: str = "ordered") -> tuple[Any, ...]:
    """Train on this rank, and return what every step had as global norms, and what came out."""
    rank = dist.get_rank()
    replicas = Replicas(training.optimizer(), local=is_local, reduction=reduction)  # type: ignore[arg-type]
    mine: dict[str, Any] = {}
    norms = []
    for step in range(training.steps):
        names = training.seen(rank, step)
        for name in names:
            mine.setdefault(name, training.fresh(rank, name))
        grads = {name: training.grad(rank, step, name) for name in names}
        before = {name: _text(grad) for name, grad in grads.items() if grad is not None}
        result = replicas.step({name: mine[name] for name in names}, grads)
        assert list(result) == names
        assert all(result[name] is mine[name] for name in names)
        assert before == {name: _text(grads[name]) for name in before}
        norms.append(list(replicas.optimizer.last.global_norms.values()))
    params = replicas.params
    assert not any(is_local(name) for name in params)
    assert all(mine[name] is params[name] for name in mine if name in params)
    local = {name: array for name, array in mine.items() if is_local(name)}
    return norms, digest(replicas.optimizer, params | local), replicas.optimizer.steps


def in_one_process(training: Training) -> tuple[list[list[float]], dict[str, Any], int]:
    """The same training in one process, on the means; local names of all ranks are in it."""
    opt, params, norms = training.optimizer(), dict[str, Any](), []
    held: list[dict[str, Any]] = [{} for _ in range(training.ranks)]
    for step in range(training.steps):
        grads: list[dict[str, Any]] = []
        for rank in range(training.ranks):
            names = training.seen(rank, step)
            for name in names:
                held[rank].setdefault(name, training.fresh(rank, name))
            grads.append({name: training.grad(rank, step, name) for name in names})
        stepped: dict[str, Any] = {}
        for name in _with_gradient(grads):
            # The lowest rank that passes it, with a gradient or not.
            first = next(rank for rank in range(training.ranks) if name in grads[rank])
            # A name that was skipped at first sight has not begun.
            if name not in opt:
                params[name] = held[first][name]
                for mine in held:
                    mine.update({name: params[name]} if name in mine else {})
            if is_local(name):
                stepped[name] = grads[first][name]
                continue
            every = [grads[rank].get(name) for rank in range(training.ranks)]
            hosts = [
                np.zeros_like(_on_host(params[name])) if grad is None else _on_host(grad)
                for grad in every
            ]
            stepped[name] = _like(rank_order_mean(hosts), params[name])
        opt.step({name: params[name] for name in stepped}, stepped)
        norms.append(list(opt.last.global_norms.values()))
    return norms, digest(opt, params), opt.steps


def _with_gradient(grads: list[dict[str, Any]]) -> Iterator[str]:
    seen = {name for rank in grads for name, grad in rank.items() if grad is not None}
    yield from dict.fromkeys(name for rank in grads for name in rank if name in seen)
