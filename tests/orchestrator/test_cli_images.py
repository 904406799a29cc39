"""`generate` and `export` without weights: which class, which sampler, which point, which file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from PIL import Image

from dipgo_core.errors import ConfigError, TargetError
from dipgo_core.families import FAMILIES
from orchestrator.cli.exporting import choose_point
from orchestrator.cli.images import condition, save_image, side_by_side
from orchestrator.cli.sweeps import Results

DIT, SD = FAMILIES["dit"], FAMILIES["sd"]


def test_condition_of_a_text_model_is_the_prompt() -> None:
    assert condition(SD, None, "7") == {"prompt": "7"}


def test_condition_of_a_class_model_is_a_number_or_a_name() -> None:
    pipe = SimpleNamespace(labels={"bag": 8, "boot": 9})
    assert condition(DIT, pipe, "3") == {"class_labels": [3]}
    assert condition(DIT, pipe, "boot") == {"class_labels": [9]}


def test_condition_of_an_unknown_class_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="bag, boot"):
        condition(DIT, SimpleNamespace(labels={"bag": 8, "boot": 9}), "hat")


def test_side_by_side_keeps_the_dense_image_left() -> None:
    joined = side_by_side(Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue"))
    assert joined.size == (8, 4)
    assert (joined.getpixel((0, 0)), joined.getpixel((7, 0))) == ((255, 0, 0), (0, 0, 255))


def test_save_image_makes_its_folder_and_leaves_no_temporary(tmp_path: Path) -> None:
    save_image(Image.new("RGB", (2, 2)), tmp_path / "new" / "image.png")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["image.png"]


def test_save_image_refuses_what_is_no_image_format(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="image.png"):
        save_image(Image.new("RGB", (2, 2)), tmp_path / "image.txt2")


def results(**fields: Any) -> Results:
    points = tuple(
        SimpleNamespace(key=key, model=model) for key, model in (("aa1", "m"), ("aa2", "m"))
    )
    front = SimpleNamespace(model="m", knee="aa2")
    line = SimpleNamespace(model="m", target=0.5, searched="aa1")
    known = {"points": points, "headline_fronts": (front,), "headlines": (line,)}
    return cast(Results, SimpleNamespace(**{**known, **fields}))


@pytest.mark.parametrize(
    ("asked", "key"),
    [
        ({"point": "aa2", "model": None, "target": None}, "aa2"),
        ({"point": None, "model": None, "target": None}, "aa2"),  # the knee
        ({"point": None, "model": "m", "target": 0.5}, "aa1"),
    ],
)
def test_choose_point_by_key_knee_or_target(asked: dict[str, Any], key: str) -> None:
    assert choose_point(results(), **asked).key == key


def test_choose_point_without_a_knee_names_the_baseline_and_the_way_on() -> None:
    front = SimpleNamespace(
        model="m", knee=None, instead="aa1", objectives=("speedup", "clip"), scorer=None
    )
    named = SimpleNamespace(key="aa1", model="m", name="uniform", target=0.5)
    with pytest.raises(ConfigError, match=r"take the baseline uniform at 0.5 .*knee: any.*KEY"):
        choose_point(
            results(headline_fronts=(front,), points=(named,)), point=None, model=None, target=None
        )


def test_choose_point_refuses_an_ambiguous_key() -> None:
    with pytest.raises(ConfigError, match="fits 2 points"):
        choose_point(results(), point="aa", model=None, target=None)


def test_choose_point_lists_the_targets_there_are() -> None:
    with pytest.raises(TargetError, match="there are: 0.5"):
        choose_point(results(), point=None, model="m", target=0.7)
