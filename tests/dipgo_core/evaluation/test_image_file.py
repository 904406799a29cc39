"""Images of a reference. Oracle: Pillow's own decoding of each file, whole and cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dipgo_core.errors import EvaluationError
from dipgo_core.evaluation.image_file import check_image, read_image


def save_noise(path: Path, side: int = 64) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_whole_image_passes(tmp_path: Path, suffix: str) -> None:
    path = save_noise(tmp_path / f"x{suffix}")
    check_image(path)
    with Image.open(path) as image:
        assert np.array_equal(read_image(path), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.9])
def test_cut_image_is_refused_as_soon_as_it_is_looked_at(
    tmp_path: Path, suffix: str, kept: float
) -> None:
    path = save_noise(tmp_path / f"x{suffix}")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    for look in (read_image, check_image):
        with pytest.raises(EvaluationError, match=f"cannot read the reference image .*x{suffix}"):
            look(path)


def test_jpeg_with_something_after_its_end_passes(tmp_path: Path) -> None:
    path = save_noise(tmp_path / "x.jpg")
    path.write_bytes(path.read_bytes() + bytes(9000))
    check_image(path)


def test_image_far_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_noise(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for look in (read_image, check_image):
        with pytest.raises(EvaluationError, match=r"x\.png.*exceeds limit"):
            look(path)


def test_image_that_changed_is_looked_at_again(tmp_path: Path) -> None:
    path = save_noise(tmp_path / "x.png")
    check_image(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(EvaluationError, match="cannot read"):
        check_image(path)
