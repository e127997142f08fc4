"""``Distributed``: the same SVI script on several ranks of ``torch.distributed``.

It stands in the place of Pyro's ``HorovodOptimizer``. Names are those of the param store, and what
ranks exchange is what ``multiopt.distributed.Replicas`` does.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

import pyro
import pyro.optim
import torch

from multiopt import rules
from multiopt.adapters.pyro.files import read_file, write_file
from multiopt.adapters.pyro.joint import JointOptim
from multiopt.adapters.pyro.lr_scheduler import JointLRScheduler
from multiopt.adapters.pyro.settings import make_clip, settings_of
from multiopt.distributed.shared import Shared
from multiopt.distributed.state import on_this_rank, undoing
from multiopt.errors import brief
from multiopt.state.file_objects import Source, Target
from multiopt.step.clip import Clip

if TYPE_CHECKING:
    from multiopt.adapters.pyro.tensor import TensorOptimizer

__all__ = ["Distributed"]


class Distributed(pyro.optim.PyroOptim):
    """Steps an optimizer of the drop-in on every rank, with the mean of the ranks' gradients.

    Wrap the optimizer, and run the script under ``torchrun``; each rank takes its own minibatches,
    and plates may be subsampled differently. Sites may be born late, or on some ranks only. All
    sites that have a gradient on some rank take a step on all, a gradient that a rank does not have
    counts as zero, and the mean is over the ranks. So parameters and state are equal on all ranks,
    with the bits of one process on the averaged gradients.

    A site that has a gradient for the first time gets its value and its state from the lowest rank
    that passes it. If its site is not born on a rank, that rank holds the unconstrained parameter
    nevertheless (``params``), and when it is born there, it takes over the value: its first
    gradient there is still one at its own initial value.

    ``.grad`` of a parameter is the mean when the call returns, clipped if it is.

    Everything else is the wrapped optimizer's: ``optim_objs``, ``last``, ``step`` of a scheduler
    and so on. Who sets something there, or replaces a parameter in the store, must do so on all
    ranks between the same steps.

    Args:
        optimizer: An optimizer of ``multiopt.adapters.pyro`` that has a rule of multiopt, one with
            a scheduler included.
        local: A callable ``name -> bool`` that says which parameters of the store are this rank's
            own, such as those of its own part of the data: they are not exchanged. None for none.
        reduction: ``"ordered"`` or ``"fast"``, as for ``multiopt.distributed.Replicas``.

    Raises:
        RuntimeError: There is no process group.
        TypeError: ``optimizer`` is another one, or ``local`` neither a callable nor None.
        ValueError: ``reduction`` is neither of the two.

    >>> import pyro, torch
    >>> import torch.distributed as dist
    >>> import multiopt.adapters.pyro as optim
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> pyro.clear_param_store()
    >>> adam = optim.Distributed(optim.Adam({"lr": 0.5}))
    >>> loc = pyro.param("loc", torch.zeros(2)).unconstrained()
    >>> loc.grad = torch.ones(2)
    >>> adam([loc])
    >>> loc.tolist()
    [-0.5, -0.5]
    >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        optimizer: Any,
        *,
        local: Callable[[str], bool] | None = None,
        reduction: Literal["ordered", "fast"] = "ordered",
    ) -> None:
        """Check the arguments; nothing is sent before the first call."""
        if not isinstance(optimizer, JointOptim):
            raise TypeError(
                "optimizer must be one of multiopt.adapters.pyro that multiopt has a rule for; got "
                f"{brief(optimizer)}: import multiopt.adapters.pyro as optim"
            )
        self._host = _Drop(optimizer)
        self._shared = Shared(self._host, None, local, reduction)

    @property
    def params(self) -> dict[str, torch.Tensor]:
        """The unconstrained parameters that all ranks hold, by name, sites born or not."""
        return dict(self._host.arrays)

    def __getattr__(self, name: str) -> Any:
        """What the wrapped optimizer has."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._host.optimizer, name)

    def __repr__(self) -> str:
        """The wrapped optimizer."""
        return f"<Distributed({self._host.optimizer!r})>"

    def __call__(self, params: Iterable[torch.Tensor]) -> None:
        """Update parameters in place on all ranks, which wait for each other.

        Args:
            params: The tensors of this rank, such as the set that ``SVI`` passes.

        Raises:
            RuntimeError: The ranks are not at the same step, an earlier one was broken off, or
                something failed on another rank.
            TypeError: As for the wrapped optimizer, here or on another rank.
            ValueError: Likewise; or a tensor has no name, or another shape on another rank.
        """
        self._shared.step(lambda: self._host.begin(params))

    def get_state(self) -> dict[str, Any]:
        """The state by name, as the wrapped optimizer has it; on any rank that of all sites."""
        return self._host.optimizer.get_state()

    def set_state(self, state_dict: Mapping[str, Any]) -> None:
        """Load state into the wrapped optimizer; what the lowest rank has of a site counts."""
        self._host.optimizer.set_state(state_dict)

    def save(self, filename: Target) -> None:
        """Write the state to a file; on any rank that of all sites."""
        self._host.optimizer.save(filename)

    def load(self, filename: Source, map_location: Any = None) -> None:
        """Load a file into the wrapped optimizer; what the lowest rank has of a site counts."""
        self._host.optimizer.load(filename, map_location)


class _Drop:
    """An optimizer of the drop-in as a host: ``multiopt.distributed.shared.Host``."""

    def __init__(self, optimizer: JointOptim) -> None:
        self.optimizer, self.registry = optimizer, optimizer._registry
        self.arrays: dict[str, torch.Tensor] = {}
        #: The names in the param store, as far as they were passed; and those of this call.
        self._in_store: set[str] = set()
        self._called: set[str] = set()

    def begin(
        self, params: Iterable[torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor | None]]:
        """The tensors of a call by name, and their gradients."""
        self.optimizer._guard.check("a call")
        name, store = self.optimizer._names.of_tensors(search=True), _store()
        named: dict[str, torch.Tensor] = {}
        for tensor in params:
            label = name(tensor)
            if label is None:
                raise ValueError(
                    f"a tensor of shape {tuple(tensor.shape)} has no name by which other ranks "
                    "would know it; expected one in the param store: use pyro.param, or "
                    "name_by(module)"
                )
            named[label] = tensor
        self._called = set(named)
        self._in_store.update(label for label in named if label in store)
        return named, {label: tensor.grad for label, tensor in named.items()}

    def unknown(self) -> list[str]:
        tensors, store, held = self.optimizer._tensors, _store(), self.optimizer._names.held
        return [
            name
            for name, tensor in self.arrays.items()
            if tensors.get(tensor) is None
            or (name in self._in_store and name not in held and store.get(name) is not tensor)
        ]

    def find(self, name: str) -> torch.Tensor | None:
        found = _store().get(name)
        if found is not None:
            self._in_store.add(name)
        return found

    def clip_of(self, name: str, array: torch.Tensor | None) -> Clip | None:
        joint, tensor = self.optimizer, torch.empty(0) if array is None else array
        settings = settings_of("clip_args", joint.pt_clip_args, tensor, name)
        return make_clip(settings or {}, joint._usual_rule() or joint._rule_class())

    def state_of(self, arrays: Mapping[str, torch.Tensor]) -> bytes:
        waiting = self.optimizer._state_waiting_to_be_consumed
        states = {name: waiting[name] for name in arrays if name in waiting}
        for name, tensor in arrays.items():
            tracked = self.optimizer._tensors.get(tensor)
            if tracked is not None and name not in waiting:
                states[name] = tracked.plain_state()
        if not states:
            return b""
        file = BytesIO()
        write_file(file, states, self.registry.steps)
        return file.getvalue()

    @contextmanager
    def with_state(
        self,
        names: Sequence[str],
        arrays: Mapping[str, torch.Tensor],
        states: Sequence[bytes],
        steps: int,
    ) -> Iterator[None]:
        joint, registry = self.optimizer, self.registry
        tensors, held = joint._tensors, joint._names.held
        received = self._received(states)
        before = joint._state_waiting_to_be_consumed, registry.steps, dict(held)
        known = {name: tensors.get(tensor) for name, tensor in arrays.items()}
        moved: list[tuple[TensorOptimizer, torch.Tensor]] = []
        entries = {
            tracked.key: on_this_rank(registry, tracked.key)
            for name in names
            if (tracked := known[name]) is not None
        }

        def undo() -> None:
            new = [tensors.get(x) for name, x in arrays.items() if known[name] is None]
            for tracked, tensor in moved:
                tensors.move(tracked, tensor)
            of_others = {tracked for tracked, _ in moved}
            joint._forget([x for x in new if x is not None and x not in of_others])
            registry.put(entries)
            joint._state_waiting_to_be_consumed, registry.steps, joint._names.held = before
            joint._ids = b""

        with undoing(registry, undo):
            for name, tensor in arrays.items():
                old = self.arrays.get(name, tensor)
                if known[name] is None and (tracked := tensors.get(old)) is not None:
                    # The state of a name stays when its site is born here.
                    moved.append((tracked, old))
                    tensors.move(tracked, tensor)
                    held.pop(name, None)
                elif known[name] is None and joint._names.of_tensors()(tensor) is None:
                    self._check_mark(name)
                    held[name] = tensor
            waiting = {k: v for k, v in before[0].items() if k not in names}
            joint._state_waiting_to_be_consumed = waiting | received
            registry.put({k: x._replace(step=0, slots={}) for k, x in entries.items()})
            registry.steps = steps
            if names or moved:
                joint._ids = b""
            yield

    def _received(self, states: Sequence[bytes]) -> dict[str, dict[str, Any]]:
        """The states that have come from other ranks, by name."""
        joint = self.optimizer
        received: dict[str, dict[str, Any]] = {}
        for state in states:
            found, _ = read_file(BytesIO(state), averages=joint._more.get("average") is not None)
            received |= found
        for name, one in received.items() if isinstance(joint, JointLRScheduler) else ():
            own = joint._state_waiting_to_be_consumed.get(name, {})
            if one["step"] and "scheduler" not in own:
                raise ValueError(
                    f"parameter {name!r} comes from another rank with the state of a scheduler, "
                    "which does not travel; expected it on all ranks: load the same file on each"
                )
            one.update({"scheduler": own["scheduler"]} if "scheduler" in own else {})
        return received

    def _check_mark(self, name: str) -> None:
        if self.optimizer._rule_class is rules.DCTAdam:
            raise ValueError(
                f"parameter {name!r} is on another rank only, and DCTAdam reads the time dimension "
                "from the tensor; expected its site on all ranks before its first step"
            )

    def step(
        self, params: dict[str, torch.Tensor], grads: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        before = {name: tensor.grad for name, tensor in params.items()}

        def undo() -> None:
            for name, grad in before.items():
                params[name].grad = grad

        with undoing(self.registry, undo):
            for name, tensor in params.items():
                tensor.grad = grads.get(name)
            self.optimizer(params.values())
        for name in params.keys() - self._called:
            params[name].grad = before[name]
        return params


def _store() -> Mapping[str, torch.Tensor]:
    """The unconstrained parameters in the param store, by name."""
    store: Mapping[str, torch.Tensor] = pyro.get_param_store()._params
    return store
