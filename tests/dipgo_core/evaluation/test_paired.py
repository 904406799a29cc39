"""PSNR and SSIM of each image, against the formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dipgo_core.errors import EvaluationError
from dipgo_core.evaluation.paired import psnr, ssim


def noise(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def test_psnr_is_the_formula_for_each_image() -> None:
    a, b = noise(0, 3, 3, 16, 16), noise(1, 3, 3, 16, 16)

    values = psnr(a, b)

    errors = ((a.numpy().astype(float) - b.numpy()) ** 2).mean(axis=(1, 2, 3))
    assert values == pytest.approx(10 * np.log10(255**2 / errors))


def test_identical_images_have_the_largest_figures() -> None:
    a = noise(0, 2, 3, 16, 16)

    assert psnr(a, a).tolist() == [100.0, 100.0]
    assert ssim(a, a) == pytest.approx([1.0, 1.0])


def test_ssim_of_flat_images_is_the_luminance_term() -> None:
    # oracle: without variance SSIM is (2ab + c1) / (a^2 + b^2 + c1), c1 = 0.01^2
    a, b = torch.full((1, 3, 32, 32), 51), torch.full((1, 3, 32, 32), 102)

    value = ssim(a.to(torch.uint8), b.to(torch.uint8))

    assert value == pytest.approx([(2 * 0.2 * 0.4 + 1e-4) / (0.2**2 + 0.4**2 + 1e-4)], rel=1e-3)


@pytest.mark.parametrize("batch", [1, 2])
def test_figures_of_an_image_do_not_depend_on_the_batch(batch: int) -> None:
    a, b = noise(0, 2, 3, 16, 16), noise(1, 2, 3, 16, 16)

    assert ssim(a[:batch], b[:batch]) == pytest.approx(ssim(a, b)[:batch], rel=1e-6)
    assert psnr(a[:batch], b[:batch]) == pytest.approx(psnr(a, b)[:batch])


@pytest.mark.parametrize("figure", [psnr, ssim])
def test_other_shapes_and_types_are_refused(figure) -> None:
    a = noise(0, 2, 3, 16, 16)

    with pytest.raises(EvaluationError, match="one shape"):
        figure(a, a[:1])
    with pytest.raises(EvaluationError, match="uint8"):
        figure(a.float(), a.float())


def test_ssim_refuses_images_smaller_than_its_window() -> None:
    with pytest.raises(EvaluationError, match="6 x 6"):
        ssim(noise(0, 1, 3, 4, 4), noise(1, 1, 3, 4, 4))
