"""torch-fidelity's own program, in a process of its own, on folders of PNGs: an oracle."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch
import torch_fidelity
from PIL import Image
from torch import Tensor

_MODULE = "torch_fidelity.feature_extractor_inceptionv3"
#: The program with the bundled extractor known to it.
_PROGRAM = "import dipgo_core.evaluation.fid; from torch_fidelity.fidelity import main; main()"


def save_images(images: Tensor, folder: Path) -> Path:
    """Write uint8 images (n, 3, H, W) as PNGs."""
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:05d}.png")
    return folder


def untrained_inception(path: Path) -> Path:
    """Write the archive of a seeded, untrained Inception: right shapes without a download."""
    torch.manual_seed(0)
    with (
        mock.patch(f"{_MODULE}.load_state_dict_from_url", lambda *_, **__: {}),
        mock.patch(f"{_MODULE}.FeatureExtractorInceptionV3.load_state_dict", lambda *_: None),
    ):
        network = torch_fidelity.FeatureExtractorInceptionV3("x", ["2048"])
    torch.save(network.state_dict(), path)
    return path


def by_program(ours: Path, real: Path, subset: int, *options: str) -> tuple[float, float]:
    """Return FID and KID of two folders as the program prints them."""
    arguments = ["--input1", str(ours), "--input2", str(real), "--kid-subset-size", str(subset)]
    arguments += ["--fid", "--kid", "--cpu", "--no-cache", "--json", "--silent", *options]
    command = [sys.executable, "-c", _PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    return found["frechet_inception_distance"], found["kernel_inception_distance_mean"]
