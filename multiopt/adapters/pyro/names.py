"""The names of tensors, from Pyro's param store or from modules."""

import sys
from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

import pyro
import torch
from pyro.infer import SVI
from pyro.nn import PyroModule
from pyro.params.param_store import param_with_module_name

__all__ = ["ModuleNames"]


class ModuleNames:
    """Names for parameters that are not in the param store, from the modules that own them.

    They are the names that the param store would use: ``guide.locs.w``, ``net$$$0.weight``.

    >>> import torch
    >>> from multiopt.adapters.pyro.names import ModuleNames
    >>> names, linear = ModuleNames(), torch.nn.Linear(2, 1)
    >>> names.add(linear)
    >>> names.current()[id(linear.bias)]
    'bias'
    """

    def __init__(self) -> None:
        """Start without modules."""
        self._modules: list[ref[torch.nn.Module]] = []
        #: Parameters that only other ranks have in a store or a module, by their names there.
        self.held: dict[str, torch.Tensor] = {}

    def add(self, *modules: Any) -> None:
        """Add modules to search; anything else, such as a function, is ignored."""
        known = [module() for module in self._modules]
        for module in modules:
            if isinstance(module, torch.nn.Module) and not any(module is other for other in known):
                self._modules.append(ref(module))

    def add_callers(self) -> None:
        """Add the model and guide of the ``SVI`` whose step is running.

        ``SVI`` does not pass them to its optimizer, so they are found on the call stack.
        """
        frame = sys._getframe(1)
        while (back := frame.f_back) is not None:
            frame = back
            caller = frame.f_locals.get("self")
            if isinstance(caller, SVI):
                self.add(caller.model, caller.guide)
                return

    def of_tensors(self, search: bool = False) -> Callable[[torch.Tensor], str | None]:
        """Return a function from a tensor to its current name, or to None if it has no name.

        Args:
            search: Whether to look for the modules of a running ``SVI`` if Pyro keeps parameters
                in modules.
        """
        in_store = pyro.get_param_store().param_name
        if search and pyro.settings.get("module_local_params"):
            self.add_callers()
        in_modules = self.current()

        def name(tensor: torch.Tensor) -> str | None:
            found: str | None = in_store(tensor)
            return in_modules.get(id(tensor)) if found is None else found

        return name

    def current(self) -> dict[int, str]:
        """The names of the modules' parameters by identity; every name is unique."""
        names = {id(tensor): name for name, tensor in self.held.items()}
        taken: dict[str, int] = {}
        for module in filter(None, (module() for module in self._modules)):
            prefix = module._pyro_name if isinstance(module, PyroModule) else ""
            for name, parameter in _named(module, prefix):
                if id(parameter) not in names:
                    taken[name] = count = taken.get(name, 0) + 1
                    names[id(parameter)] = name if count == 1 else f"{name} ({count})"
        return names


def _named(module: torch.nn.Module, prefix: str) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters of a module under the names that Pyro gives them."""
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
