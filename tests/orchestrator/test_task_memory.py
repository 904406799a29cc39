"""Freed memory goes back to the system. Oracle: the resident set that Linux reports."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: Frees every other one of many blocks, as batches and features come and go.
SCRIPT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
import numpy as np
from orchestrator.task.memory import return_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

assert return_freed_memory()
np.ones(2**25, dtype=np.uint8)  # freeing it would raise the threshold to 32 MiB
before = resident()
blocks = [np.ones(2**24, dtype=np.uint8) for _ in range(16)]
full = resident()
del blocks[::2]
print(full - before, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_freed_blocks_leave_the_process() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True)
    full, rest = map(int, run.stdout.split())

    assert full > 16 * 2**24 * 0.9
    assert rest < full * 0.6
