"""``Replicas``: data-parallel steps of named parameters that not every rank sees."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

from multiopt.arrays import Array
from multiopt.distributed.shared import Shared
from multiopt.distributed.state import packed, with_state
from multiopt.entry import chosen_clip
from multiopt.errors import brief
from multiopt.optimizer import Optimizer
from multiopt.step.checks import as_dict, gradients_of
from multiopt.step.clip import Clip

__all__ = ["Replicas"]


class Replicas:
    """Steps an optimizer on every rank, with the mean of the ranks' gradients.

    Each rank has an optimizer of its own, made alike, and passes the parameters that its minibatch
    touched, whichever they are. All names that have a gradient on some rank take a step on every
    rank: the gradients are averaged over all ranks, and a rank without one counts as zero. So each
    name has one clock, and parameters, state, norms and skips are equal on all ranks, with the bits
    that one process would get from the averaged gradients.

    A name that has a gradient for the first time gets its value and its state from the lowest rank
    that passes it. The other ranks' arrays of that name are overwritten, now or when they are first
    passed, and ranks that do not have the name hold an array of it from then on: ``params`` has all
    of them. So look there before you make a parameter:

        array = replicas.params.get(name)
        params[name] = fresh(name) if array is None else array

    An array that was passed is updated in every later step of its name, passed again or not. Who
    replaces one, writes into one, forgets or renames a name, or changes a setting of the optimizer,
    must do so on all ranks between the same steps.

    Args:
        optimizer: The optimizer of this rank. It is stepped only by ``step`` from here on.
        group: The process group of ``torch.distributed``; None for the default one. Every rank of
            it takes part in every step, with or without names.
        local: A callable ``name -> bool`` that says which names are this rank's own: they are
            stepped with their own gradients and not exchanged. None for no such names.
        reduction: ``"ordered"`` adds the gradients in the order of the ranks, in the compute dtype,
            divides by the number of ranks and rounds once, so that the mean is a function of the
            gradients alone. ``"fast"`` has the process group add them, in whatever order it does.

    Raises:
        RuntimeError: There is no process group.
        TypeError: ``optimizer`` is not a ``multiopt.Optimizer``, ``group`` not a process group, or
            ``local`` neither a callable nor None.
        ValueError: The optimizer has ``in_place=False``, ``reduction`` is neither of the two, or
            the group does not have this process.

    >>> import numpy as np, multiopt as mo
    >>> import torch.distributed as dist
    >>> from multiopt.distributed import Replicas
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> replicas = Replicas(mo.Optimizer(mo.SGD(lr=0.5)))
    >>> replicas.step({"loc": np.zeros(2)}, {"loc": np.ones(2)})
    {'loc': array([-0.5, -0.5])}
    >>> replicas.optimizer.state("loc").step
    1
    >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        group: Any = None,
        local: Callable[[str], bool] | None = None,
        reduction: Literal["ordered", "fast"] = "ordered",
    ) -> None:
        """Check the arguments; nothing is sent before the first step."""
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer must be a multiopt.Optimizer; got {brief(optimizer)}: for one of "
                "multiopt.adapters.pyro there is multiopt.adapters.pyro.Distributed"
            )
        if not optimizer._registry.in_place:
            raise ValueError(
                "optimizer has in_place=False; expected one that updates arrays in place, for a "
                "name may take a step while only another rank has it at hand"
            )
        self._host = _Core(optimizer)
        self._shared = Shared(self._host, group, local, reduction)

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of this rank."""
        return self._host.optimizer

    @property
    def params(self) -> dict[str, Array]:
        """All parameters that are not local, by name, as far as they have taken a step anywhere.

        They are the arrays themselves: those that were passed on this rank, and arrays of NumPy or
        PyTorch for names that only other ranks have. With them, ``optimizer.save(path,
        params=replicas.params)`` on one rank saves all.
        """
        return dict(self._host.arrays)

    def __repr__(self) -> str:
        """The optimizer, and how many names are held."""
        return f"<Replicas({self.optimizer!r}): {len(self._host.arrays)} names>"

    def step(
        self, params: Mapping[str, Array], grads: Mapping[str, Array | None]
    ) -> dict[str, Array]:
        """Take a step on all ranks, which wait for each other.

        Everything is exchanged and checked before any rank writes, and an error on one rank is
        raised on all; then nothing has changed. Waiting can be interrupted by Ctrl-C; the ranks
        then cannot go on together, and say so.

        Args:
            params: Arrays by name, those that are not local of NumPy or PyTorch. An empty dict if
                this rank has none in this step.
            grads: Gradients by name, as for ``multiopt.Optimizer.step``. They are never written. A
                name without one (missing or None) counts as having a gradient of zero if another
                rank has one.

        Returns:
            The up-to-date parameters of ``params``, in its order. Arrays of NumPy and PyTorch are
            the same objects.

        Raises:
            KeyError: A gradient has no parameter.
            RuntimeError: The ranks are not at the same step, an earlier one was broken off, or
                something failed on another rank.
            TypeError: As for ``multiopt.Optimizer.step``, here or on another rank; or a name has
                another dtype, library or type of device there.
            ValueError: As for ``multiopt.Optimizer.step``, here or on another rank; or a name has
                another shape there, ranks have other reductions, ``local`` differs between ranks,
                or local names share a global norm with others.
        """

        def begin() -> tuple[dict[str, Array], dict[str, Array | None]]:
            self.optimizer._guard.check("step")
            arrays, gradients = as_dict("params", params), as_dict("grads", grads)
            gradients_of(arrays, gradients)
            return arrays, gradients

        return self._shared.step(begin)


class _Core:
    """A ``multiopt.Optimizer`` as a host."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.registry = optimizer, optimizer._registry
        self.arrays: dict[str, Array] = {}

    def unknown(self) -> Collection[str]:
        return self.arrays.keys() - self.registry.names

    def find(self, name: str) -> Array | None:
        return None

    def clip_of(self, name: str, array: Array | None) -> Clip | None:
        return chosen_clip(self.registry.clip, name)

    def state_of(self, arrays: Mapping[str, Array]) -> bytes:
        return packed(self.registry, list(arrays))

    def with_state(
        self, names: Sequence[str], arrays: Mapping[str, Array], states: Sequence[bytes], steps: int
    ) -> AbstractContextManager[None]:
        return with_state(self.registry, names, states, steps)

    def step(self, params: dict[str, Array], grads: dict[str, Array]) -> dict[str, Array]:
        return self.optimizer.step(params, grads)
