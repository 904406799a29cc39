"""Run sweeps/tiny_full.yaml; leave its report and the machine it ran on in benchmarks/tiny_full.

python benchmarks/tiny_full.py [folder for storage and tracking, default benchmarks/.tiny_full]
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from dipgo_core.evaluation.device import cpu_name

HERE = Path(__file__).resolve().parent
SWEEP = HERE.parent / "sweeps" / "tiny_full.yaml"
REPORT = HERE / "tiny_full"
PROGRAM = Path(sys.executable).with_name("dipgo-sweep")


def main() -> None:
    """Run, report, describe the machine; a finished run is not computed again."""
    place = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else HERE / ".tiny_full"
    place.mkdir(parents=True, exist_ok=True)
    for command in (["run", str(SWEEP)], ["report", str(SWEEP), "--output", str(REPORT)]):
        subprocess.run([PROGRAM, *command], cwd=place, check=True)
    machine = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "ray", "torch-fidelity")},
    }
    (REPORT / "machine.json").write_text(json.dumps(machine, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
