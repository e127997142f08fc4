"""The examples of docs/several_machines.md, as ``torchrun`` runs one and on waiting processes."""

import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from tests.ranks.processes import on_ranks

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "svi_ranks.py"


def _main(name: str, *arguments: Any) -> dict[str, Any]:
    spec = spec_from_file_location(name, EXAMPLE.with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, Any] = module.main(*arguments)
    return found


def test_the_ranks_of_the_example_agree() -> None:
    first, second = on_ranks(2, _main, "svi_ranks", 60)
    assert first == second
    names = ["common", *(f"group {k}" for k in range(5))]
    assert sorted(first) == sorted(f"{name} {what}" for name in names for what in ("loc", "scale"))
    # Group k has a mean of 3 + k, and was born the later, the larger k.
    assert 2.0 < first["group 0 loc"] < 4.0
    assert first["group 0 loc"] < first["group 1 loc"]


def test_a_model_in_parts_resumes_on_each_rank(tmp_path: Path) -> None:
    first, second = on_ranks(2, _main, "fsdp_ranks", str(tmp_path))
    for found in (first, second):
        trained, resumed = found["losses"]
        assert trained == resumed < found["first"]
        assert found["norms"][0] == found["norms"][1] == first["norms"][0]


def test_the_example_runs_under_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    # To a file for each rank: what both print to one pipe may be mixed within a line.
    command += ["--redirects", "1", "--log-dir", str(tmp_path)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "backends")])
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", str(EXAMPLE)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed = "".join(file.read_text() for file in sorted(tmp_path.rglob("stdout.log")))
    ranks = [
        sorted(line.partition(": ")[2] for line in printed.splitlines() if line.startswith(rank))
        for rank in ("rank 0: ", "rank 1: ")
    ]
    assert len(ranks[0]) == 12
    assert ranks[0] == ranks[1]
