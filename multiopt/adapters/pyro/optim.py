"""``PyroOptim``: chooses whether multiopt or Pyro itself steps the parameters."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from inspect import Parameter, signature
from typing import Any, ClassVar, Literal

import pyro.optim

from multiopt.adapters.pyro.constructors import RULES, Settings, has_rule
from multiopt.rules.average import Average

__all__ = ["PyroOptim", "warn_not_joint"]


class PyroOptim(pyro.optim.PyroOptim):
    """``pyro.optim.PyroOptim``: parameters that may appear at any time, each with its settings.

    If multiopt has a rule for the torch optimizer, the result is a ``JointOptim``. Otherwise it
    works as in Pyro, with a torch optimizer for each parameter, and does not take the arguments
    that only multiopt has.

    Args:
        optim_constructor: The class of a torch optimizer.
        optim_args: Its arguments, or a callable that returns them for a parameter name (dotted, as
            in ``nn.Module.named_parameters``).
        clip_args: ``clip_norm`` and ``clip_value``, or a callable that returns them for a parameter
            name. With a rule of multiopt, ``clip_global_norm`` bounds all parameters of a call
            together.
        on_nonfinite: What to do about gradients that are not finite, as for
            ``multiopt.Optimizer``; only with a rule of multiopt.
        max_consecutive_skips: In how many steps in a row a name may be skipped, as for
            ``multiopt.Optimizer``; only with a rule of multiopt.
        average: The average to keep of each parameter, or a callable that returns it for a
            parameter name (dotted); only with a rule of multiopt.
    """

    #: The class that is used instead of this one if multiopt has a rule.
    joint: ClassVar[type["PyroOptim"] | None] = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Choose the class that will step the parameters."""
        chosen: Any = cls
        if vars(cls).get("joint") is not None and (args or kwargs):
            bound = signature(cls.__init__).bind(None, *args, **kwargs).arguments
            if has_rule(*cls._ruled_by(bound)):
                chosen = cls.joint
        return super().__new__(chosen)

    @classmethod
    def _ruled_by(cls, given: Mapping[str, Any]) -> tuple[Any, Any]:
        """The class of the torch optimizer, and the arguments that it will get."""
        return given["optim_constructor"], given["optim_args"]

    def __init__(
        self,
        optim_constructor: Any,
        optim_args: Settings,
        clip_args: Settings | None = None,
        *,
        on_nonfinite: Literal["propagate", "raise", "skip"] = "propagate",
        max_consecutive_skips: int | None = None,
        average: Average | Callable[[str], Average | None] | None = None,
    ) -> None:
        """Take Pyro's arguments and more; warn if multiopt has no rule, since that is slow.

        Raises:
            TypeError: An argument is of the wrong kind, a dict has an unknown key, or there is an
                argument that needs a rule of multiopt and multiopt has none.
            ValueError: A setting is out of range.
        """
        options = {"max_consecutive_skips": max_consecutive_skips, "average": average}
        more: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        if on_nonfinite != "propagate":
            more["on_nonfinite"] = on_nonfinite
        self._begin(optim_constructor, optim_args, clip_args, more)

    def _begin(
        self, constructor: Any, optim_args: Settings, clip_args: Settings | None, more: Any
    ) -> None:
        """Process the arguments; ``more`` holds those that Pyro does not have."""
        name = getattr(constructor, "__name__", repr(constructor))
        if more:
            raise TypeError(
                f"multiopt has no rule for {name}, which Pyro steps by torch; expected no "
                f"{', '.join(more)}"
            )
        if not has_rule(constructor, optim_args):
            _warn_wrapped(f"{name} with subsample_aware" if constructor in RULES else name)
        pyro.optim.PyroOptim.__init__(self, constructor, optim_args, clip_args)

    def __call__(self, params: Iterable[Any], *args: Any, **kwargs: Any) -> None:
        """Step as Pyro does, with a clear error if the torch optimizer lacks a closure.

        Raises:
            TypeError: The torch optimizer needs a closure, and none was passed.
        """
        constructor: Any = self.pt_optim_constructor
        if _needs_closure(constructor) and not any(map(callable, (*args, *kwargs.values()))):
            raise TypeError(
                f"{constructor.__name__} evaluates the loss several times in a step, and needs a "
                "closure that does; expected optimizer(params, closure): SVI passes none, so give "
                "it another optimizer, such as Adam"
            )
        each: Any = params
        super().__call__(each, *args, **kwargs)


@cache
def _needs_closure(constructor: Any) -> bool:
    step = getattr(constructor, "step", None)
    closure = None if step is None else signature(step).parameters.get("closure")
    return closure is not None and closure.default is Parameter.empty


@cache
def _warn_wrapped(what: str) -> None:
    warnings.warn(
        f"multiopt has no rule for {what}: Pyro steps its parameters one by one, by torch",
        stacklevel=3,
    )


@cache
def warn_not_joint(name: str) -> None:
    """Warn once that Horovod bypasses multiopt for a class that multiopt has a rule for."""
    warnings.warn(
        f"HorovodOptimizer makes an optimizer of torch's {name} for each parameter: they are "
        "stepped one by one, by torch and not by multiopt",
        stacklevel=4,
    )
