"""The tensors that an optimizer of the drop-in knows, by identity as in Pyro, and their names.

Pyro keeps a torch optimizer for every tensor it ever met. Here a tensor is forgotten when nobody
else holds it any more. Weak references would tell at once, but ``torch.utils.swap_tensors``, and
with it the conversion of modules, refuses tensors that have any. So each tensor is held, and every
call looks whether anybody else still holds a few of them:

>>> import torch
>>> from multiopt.adapters.pyro.tracking import Tracked, TrackedTensors
>>> known, loc = TrackedTensors(), torch.zeros(2)
>>> known.add(Tracked(loc, "loc", "loc"))
>>> known.abandoned()
[]
>>> del loc
>>> [tracked.key for tracked in known.abandoned()]
['loc']
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from pyro.infer import SVI
from pyro.nn import PyroModule
from pyro.params.param_store import param_with_module_name

__all__ = ["ModuleNames", "Tracked", "TrackedTensors"]


@dataclass(slots=True, eq=False)
class Tracked:
    """What is known of a tensor.

    Attributes:
        tensor: The tensor; None once it is forgotten.
        key: Its name in the core: the label, made unique.
        label: Its name in the param store or in a module, at first sight; None if it had none.
        clip_args: The caller's settings for its clip, which may change.
        given: Those of its settings that are the caller's tensors, arrays or lists, which may
            change.
        extra: What its parameter group holds beside the settings: keys of schedulers and of users.
        view: What ``optim_objs`` shows, once somebody has asked.
        scheduler: Its scheduler of torch, if there is one.
        flight: The tensors whose schedulers move as its own does, if there are any.
    """

    tensor: torch.Tensor | None
    key: str
    label: str | None
    clip_args: Mapping[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    view: Any = None
    scheduler: Any = None
    flight: dict["Tracked", None] | None = None

    @property
    def alive(self) -> torch.Tensor:
        """The tensor.

        Raises:
            ReferenceError: It is forgotten.
        """
        if self.tensor is None:
            raise ReferenceError(
                f"the tensor {self.key!r} is gone: nobody held it, or it was deleted from "
                "optim_objs"
            )
        return self.tensor


def _references(tracked: Tracked) -> int:
    return sys.getrefcount(tracked.tensor)


#: What Python counts for a tensor that only its ``Tracked`` holds.
ALONE = _references(Tracked(torch.empty(0), "", None))


def _is_abandoned(tracked: Tracked) -> bool:
    # What autograd holds of a tensor in C++, Python does not count.
    tensor = tracked.tensor
    held_elsewhere = tensor is None or tensor._use_count() > 1  # type: ignore[attr-defined]
    del tensor
    return not held_elsewhere and _references(tracked) <= ALONE


class TrackedTensors:
    """Tensors by identity, in the order of their first sight."""

    def __init__(self) -> None:
        """Know no tensor."""
        self._by_id: dict[int, Tracked] = {}
        self._keys: dict[int, str] = {}
        self._unasked: list[Tracked] = []

    def get(self, tensor: torch.Tensor) -> Tracked | None:
        """What is known of a tensor; None for nothing."""
        return self._by_id.get(id(tensor))

    def add(self, tracked: Tracked) -> None:
        """Hold a tensor."""
        self._by_id[id(tracked.alive)] = tracked
        self._keys[id(tracked.alive)] = tracked.key

    def keys(self, ids: Iterable[int]) -> list[str | None]:
        """The keys of tensors by their identities; None for those that are not known."""
        return list(map(self._keys.get, ids))

    def remove(self, tracked: Tracked) -> None:
        """Let go of a tensor."""
        del self._by_id[id(tracked.alive)], self._keys[id(tracked.alive)]
        tracked.tensor = tracked.view = tracked.scheduler = None

    def __iter__(self) -> Iterator[Tracked]:
        """What is known of each."""
        return iter(list(self._by_id.values()))

    def __len__(self) -> int:
        """The number of tensors."""
        return len(self._by_id)

    def abandoned(self, asked: int | None = None) -> list[Tracked]:
        """Those that nobody else holds.

        Args:
            asked: How many to ask, in turn; all by default. A caller that asks about twice as many
                as it adds never has more that are abandoned than others.
        """
        if asked is None:
            return [tracked for tracked in self if _is_abandoned(tracked)]
        if not self._unasked:
            self._unasked = list(self._by_id.values())
        some = self._unasked[-asked:]
        del self._unasked[-asked:]
        return [tracked for tracked in some if _is_abandoned(tracked)]


class ModuleNames:
    """Names of parameters that no param store knows, from the modules that have them.

    They are those that Pyro's param store would have: ``guide.locs.w``, ``net$$$0.weight``.

    >>> import torch
    >>> from multiopt.adapters.pyro.tracking import ModuleNames
    >>> names, linear = ModuleNames(), torch.nn.Linear(2, 1)
    >>> names.add(linear)
    >>> names.current()[id(linear.bias)]
    'bias'
    """

    def __init__(self) -> None:
        """Know no module."""
        self._modules: list[ref[torch.nn.Module]] = []

    def add(self, *modules: Any) -> None:
        """Look in some modules too; what is no module, such as a function, has no names."""
        known = [module() for module in self._modules]
        for module in modules:
            if isinstance(module, torch.nn.Module) and not any(module is one for one in known):
                self._modules.append(ref(module))

    def add_callers(self) -> None:
        """Look in model and guide of the ``SVI`` whose step is on its way.

        ``SVI`` does not tell its optimizer about them.
        """
        frame = sys._getframe(1)
        while (back := frame.f_back) is not None:
            frame = back
            caller = frame.f_locals.get("self")
            if isinstance(caller, SVI):
                self.add(caller.model, caller.guide)
                return

    def current(self) -> dict[int, str]:
        """The names by the identities of parameters, each name once."""
        names: dict[int, str] = {}
        taken: dict[str, int] = {}
        for module in filter(None, (module() for module in self._modules)):
            prefix = module._pyro_name if isinstance(module, PyroModule) else ""
            for name, parameter in _named(module, prefix):
                if id(parameter) not in names:
                    taken[name] = count = taken.get(name, 0) + 1
                    names[id(parameter)] = name if count == 1 else f"{name} ({count})"
        return names


def _named(module: torch.nn.Module, prefix: str) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters of a module with the names that Pyro gives them."""
    if not isinstance(module, PyroModule):
        for path, parameter in module.named_parameters():
            yield param_with_module_name(prefix, path) if prefix else path, parameter
        return
    start = f"{prefix}." if prefix else ""
    for name, own in module._parameters.items():
        if own is not None:
            constrained = name.removesuffix("_unconstrained")
            yield start + (constrained if constrained in module._pyro_params else name), own
    for name, child in module._modules.items():
        if child is not None:
            yield from _named(child, start + name)
