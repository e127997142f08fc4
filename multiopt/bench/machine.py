"""What the figures were measured on."""

import os
import platform
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["ENGINE", "LIBRARIES", "cores", "described", "engine", "load", "threads"]

#: The environment variable that chooses the engine.
ENGINE = "MULTIOPT_ENGINE"

LIBRARIES = ("multiopt", "numpy", "numba", "torch", "pyro-ppl", "jax", "optax")


def cores() -> int:
    """How many cores this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads() -> int:
    """How many threads a step may use: torch's number if it is loaded, else that of the cores."""
    torch = sys.modules.get("torch")
    count = torch.get_num_threads() if torch else cores()
    return min(count, int(os.environ.get("MULTIOPT_NUM_THREADS", count)))


def load() -> float:
    """How many cores were at work in the last minute; 0 where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def engine() -> str:
    """What runs the rules on a CPU: ``"compiled"`` kernels, ``"blocks"`` in NumPy, or else."""
    wanted = os.environ.get(ENGINE, "compiled")
    return "blocks" if wanted == "compiled" and not find_spec("numba") else wanted


def described(libraries: Iterable[str] = LIBRARIES) -> dict[str, Any]:
    """Processor, cores, system, and versions of Python and of those libraries that are installed.

    Args:
        libraries: The libraries, by the names of their distributions.
    """
    versions = {"python": platform.python_version()}
    for library in libraries:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return {
        "cpu": _processor(),
        "cores": cores(),
        "system": platform.platform(),
        "versions": versions,
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
