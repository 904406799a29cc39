"""Host memory of an evaluation at 512 x 512: it grows with features and scores, not with images."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MIB = 2**20
DIM = 2048

#: Prints the peak memory of the process after each number of images.
SCRIPT = f"""
import resource, sys, torch
from pathlib import Path
sys.path += [{str(ROOT)!r}, {str(ROOT / "tests" / "support")!r}]
from simulated import run_simulated

torch.set_num_threads(1)
for images in map(int, sys.argv[2:]):
    folder = Path(sys.argv[1]) / str(images)
    list(run_simulated(folder, images, ("kid", "psnr"), images_per_shard=48))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_peak_grows_with_features_and_not_with_images(tmp_path: Path) -> None:
    n = 192  # after fewer the allocator has not yet what it keeps
    arguments = [sys.executable, "-c", SCRIPT, str(tmp_path), str(n), str(3 * n)]
    given_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB)}  # what is freed, at once
    run = subprocess.run(arguments, check=True, capture_output=True, text=True, env=given_back)
    first, last = map(int, run.stdout.split())
    features, images = 2 * n * DIM * 4, 2 * n * 3 * 512 * 512
    # ours, the dense ones, their bytes; three pieces of a shard, which may meet at once or not
    assert last - first <= 4 * features + 3 * 32 * MIB
    assert images > 200 * MIB  # what there would be if they piled up
