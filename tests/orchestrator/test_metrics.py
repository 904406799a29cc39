"""How figures are written. Oracle: the rule of the Particle Data Group, worked by hand."""

import pytest

from orchestrator.metrics import (
    FIGURES,
    IMAGE_FIGURES,
    QUALITIES,
    decimals_of,
    figure_text,
    label_of,
    tracking_name,
)


@pytest.mark.parametrize(
    ("half_width", "decimals"),
    [
        (0.827, 1),  # examples of the Review of Particle Physics: 0.827 +- 0.119 is 0.83 +- 0.12,
        (0.119, 2),  # and 0.827 +- 0.367 is 0.8 +- 0.4
        (0.367, 1),
        (0.354, 2),
        (0.3551, 1),
        (0.096, 2),  # rounds up to 0.10, which has two digits
        (1.0, 1),
        (24.0, 0),
        (45.0, -1),
        (1e-12, 6),
    ],
)
def test_decimals_follow_the_half_width(half_width: float, decimals: int) -> None:
    assert decimals_of(half_width) == decimals


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [
        (1.4237, 1.3812, 1.4723, "1.42 [1.38, 1.47]"),
        (82.4567, 80.91, 84.02, "82.5 [80.9, 84.0]"),
        (665.4, 420.0, 910.2, "670 [420, 910]"),  # half of 490 is 245: tens
        (0.99961, 0.99956, 0.99966, "0.99961 [0.99956, 0.99966]"),
        (9.996, 9.946, 10.046, "10.00 [9.95, 10.05]"),  # carries over
        (-0.0004, -0.3, 0.3, "0.00 [-0.30, 0.30]"),
        (3.2, 3.2, 3.2, "3.20"),  # exact: the decimals of its kind
        (5e-9, 1e-9, 9e-9, "0.000000 [0.000000, 0.000000]"),
    ],
)
def test_figure_has_no_more_digits_than_its_interval_supports(
    value: float, low: float, high: float, expected: str
) -> None:
    assert figure_text("clip", value, low, high) == expected


@pytest.mark.parametrize(
    ("value", "n", "expected"),
    [(26.31, 100, "26 (n=100)"), (1.4237, 64, "1.4 (n=64)"), (0.0, 8, "0.0 (n=8)"),
     (664.9, 100, "660 (n=100)"), (-0.0531, 64, "-0.053 (n=64)")],
)  # fmt: skip
def test_figure_without_an_interval_has_two_digits_and_its_n(
    value: float, n: int, expected: str
) -> None:
    assert figure_text("fid", value, n=n) == expected


def test_counted_figures_are_exact() -> None:
    assert figure_text("macs_speedup", 10 / 3) == "3.33"


def test_gain_shows_which_side_of_zero_its_ends_are_on() -> None:
    assert figure_text("clip", 0.42, 0.004, 0.9, signed=True) == "+0.4 [+0.0, +0.9]"
    assert figure_text("clip", 0.42, -0.004, 0.9, signed=True) == "+0.4 [-0.0, +0.9]"
    assert figure_text("clip", 0.0, 0.0, 0.0, signed=True) == "0"


def test_unknown_figure_is_empty() -> None:
    assert figure_text("fid", None) == ""


def test_label_names_the_scorer() -> None:
    assert label_of("clip", "tiny-clip") == "CLIP score (tiny-clip)"
    assert label_of("psnr") == "PSNR to dense, dB"


@pytest.mark.parametrize(
    ("scorer", "name"),
    [
        ("tiny-clip", "clip_low/tiny-clip"),
        ("laion/CLIP-ViT-g-14-laion2B-s34B-b88K", "clip_low/laion/CLIP-ViT-g-14-laion2B-s34B-b88K"),
        ("../up/clip@1,0", "clip_low/up/clip-1-0"),
        (None, "clip_low"),
    ],
)
def test_tracking_name_is_one_that_mlflow_takes(scorer: str | None, name: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    assert tracking_name("clip", scorer, end="_low") == name
    _validate_metric_name(name)


def test_every_quality_is_described() -> None:
    assert set(QUALITIES) < set(IMAGE_FIGURES) < set(FIGURES)
