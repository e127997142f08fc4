"""What the figures were measured on."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["cores", "described", "engine", "last_level_cache"]

LIBRARIES = (
    *("multiopt", "numpy", "numba", "torch", "pyro-ppl", "jax", "optax"),
    *("scikit-learn", "array-api-compat"),
)


def cores() -> int:
    """How many cores this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def last_level_cache() -> int:
    """The size of the largest cache in bytes; where the system does not say, 64 MiB."""
    sizes = [
        # As in "32768K".
        int(file.read_text().strip().removesuffix("K")) * 1024
        for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(sizes, default=2**26)


def engine() -> str:
    """What runs the rules on a CPU: kernels ``"compiled"``, ``"blocks"`` in NumPy, or else."""
    wanted = os.environ.get("MULTIOPT_ENGINE", "compiled")
    return "blocks" if wanted == "compiled" and not find_spec("numba") else wanted


def described() -> dict[str, Any]:
    """Processor, cores, cache in bytes, system, and versions of the libraries installed."""
    return {
        "cpu": _processor(),
        "cores": cores(),
        "last_level_cache": last_level_cache(),
        "system": platform.platform(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return versions
