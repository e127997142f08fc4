"""What a rank holds of a parameter: a ``DTensor`` is updated through the tensor that lies here."""

from collections.abc import Mapping
from typing import Any

import torch

from multiopt.distributed.boxes import is_distributed, ranks_of
from multiopt.distributed.ranks import Ranks
from multiopt.entry import chosen_clip
from multiopt.registry import Registry
from multiopt.rules import Rule

__all__ = ["check_parts", "like", "local_gradient", "ranks_for"]


def local_gradient(param: torch.Tensor) -> torch.Tensor | None:
    """The part of a parameter's gradient that belongs to the part of it that lies here."""
    grad = param.grad
    if is_distributed(param) and is_distributed(grad):
        with torch.no_grad():
            if grad.placements != param.placements:
                # A sum that was not made yet, for example.
                grad = grad.redistribute(param.device_mesh, param.placements)
            return grad.to_local()
    return grad


def like(param: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """A slot as its parameter is: distributed, if that is and the slot has its shape."""
    if not is_distributed(param) or slot.shape != param.to_local().shape:
        return slot
    return type(param).from_local(
        slot,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


def ranks_for(process_group: Any, registry: Registry, rule: Rule) -> Ranks | None:
    """The ranks that a step must ask about what lies there; None if it does not depend on them.

    Raises:
        RuntimeError: There is no process group.
        TypeError: ``process_group`` is none.
        ValueError: It is a text, but not ``"world"``; or it does not have this process.
    """
    if isinstance(process_group, str) and process_group != "world":
        raise ValueError(
            f"process_group must be a process group, 'world' or None; got {process_group!r}"
        )
    depends = registry.clip is not None or registry.on_nonfinite != "propagate"
    if process_group is None or not (depends or not rule.elementwise):
        return None
    return Ranks(None if process_group == "world" else process_group)


def check_parts(
    registry: Registry, rule: Rule, parts: Mapping[str, Any], ranks: Ranks | None
) -> None:
    """Refuse parameters of which only a part is here, if a step could not be right.

    Args:
        registry: The registry.
        rule: The rule.
        parts: The parameters by name.
        ranks: The ranks that are asked about the rest; None if none are.

    Raises:
        ValueError: The rule or the clip needs whole parameters, or more ranks than are asked.
    """
    for name, param in parts.items():
        if not (rule.elementwise or rule.norms_only):
            raise ValueError(
                f"parameter {name!r} lies on several ranks, and {type(rule).__name__} needs all of "
                "it; expected it whole on each: leave it out of the sharding, or give it to "
                "another optimizer"
            )
        clip = chosen_clip(registry.clip, name)
        if ranks is not None:
            if outside := ranks_of(param) - ranks.all_ranks:
                raise ValueError(
                    f"parameter {name!r} lies on the ranks {sorted(outside)} too, which are not "
                    "in process_group; expected one with all ranks that it lies on: pass "
                    "process_group='world'"
                )
            continue
        if clip is not None and (clip.norm is not None or clip.global_norm is not None):
            why = repr(clip)
        elif registry.on_nonfinite != "propagate":
            why = f"on_nonfinite={registry.on_nonfinite!r}"
        elif not rule.elementwise:
            why = type(rule).__name__
        else:
            continue
        raise ValueError(
            f"parameter {name!r} lies on several ranks, and {why} needs all of it; expected "
            "process_group='world', or the group of these ranks"
        )
