"""``-o`` sets typed values by path, and a model's overrides merge. Oracle: files spelled out."""

from __future__ import annotations

from pathlib import Path

import pytest

from dipgo_core.errors import SweepFileError
from orchestrator.sweep_file import load_sweep

FILE = """\
schema_version: 1
name: small
models:
  - tiny-sd
  - {id: tiny-dit, sampler: [{steps: 10}, {steps: 20}]}
targets: [0.5]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(FILE)
    return path


def test_override_equals_the_file_spelled_out(file: Path) -> None:
    spelled = file.with_name("spelled.yaml")
    spelled.write_text(FILE.replace("[0.5]", "[0.3, 0.5]") + "evaluate: {images: 64, seed: 3}\n")
    overrides = ["targets=[0.3, 0.5]", "evaluate.images=64", "evaluate.seed=3"]
    assert load_sweep(file, overrides).digest == load_sweep(spelled).digest


def test_override_reaches_into_lists_and_bare_models(file: Path) -> None:
    sweep = load_sweep(file, ["models.0.sampler.steps=12", "models.1.sampler.1.steps=30"])
    assert [model.sampler.steps for model in sweep.models] == [12, 10, 30]


def test_last_override_of_a_key_wins(file: Path) -> None:
    assert load_sweep(file, ["evaluate.seed=1", "evaluate.seed=2"]).models[0].evaluate.seed == 2


def test_override_mends_a_broken_value(file: Path) -> None:
    file.write_text(FILE.replace("[0.5]", "nonsense"))
    assert load_sweep(file, ["targets=[0.5]"]).models[0].targets == (0.5,)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evalute.images=5", "-o evalute.images=5: evalute: unknown key; valid are "),
        ("evaluate.image=5", "evaluate.image: unknown key; valid are "),
        (
            "evaluate.images='5'",
            "evaluate.images: must be a whole number, at least 1, got the text",
        ),
        ("evaluate.images=true", "evaluate.images: must be a whole number, at least 1, got true"),
        ("evaluate.images=", "evaluate.images: must be a whole number, at least 1, got nothing"),
        (
            "models.3.name=x",
            "models.3.name: models is a list of 2, its entries are 0 to 1, got '3'",
        ),
        ("models.x=3", "models.x: models is a list of 2, its entries are 0 to 1, got 'x'"),
        ("name.x=3", "name.x: name is one value, it has no 'x'; set name itself"),
        ("targets=[0.5", "targets: not YAML: "),
        ("images", "-o images: must be key=value"),
        ("a..b=1", "-o a..b=1: must be key=value"),
        (".".join("a" * 40) + "=1", "keys nest at most 16 deep"),
    ],
)
def test_wrong_override_says_so(file: Path, override: str, message: str) -> None:
    with pytest.raises(SweepFileError) as caught:
        load_sweep(file, [override])
    assert [issue.line for issue in caught.value.errors] == [0]
    assert caught.value.errors[0].file == f"-o {override}"
    assert message in str(caught.value)


def test_unknown_override_names_the_nearest_key(file: Path) -> None:
    with pytest.raises(SweepFileError, match="Did you mean 'evaluate'"):
        load_sweep(file, ["evalute.images=5"])


def test_model_overrides_merge_and_one_of_mappings_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    path = tmp_path / "sweep.yaml"
    path.write_text(
        FILE.replace("- tiny-sd", "- {id: tiny-sd, overrides: {evaluate: {prompts: {hub: a/b}},")
        .replace("a/b}},", "a/b}}, search: {loss: {alpha: 3}}, targets: [0.1]}}")
        .replace("targets: [0.5]", "targets: [0.5]\nsearch: {loss: {alpha: 2, tau: 0.1}, steps: 7}")
        + "evaluate: {prompts: {file: prompts.txt}, images: 64}\nallow_unpinned: true\n"
    )
    sd, dit, _ = load_sweep(path).models
    (search,) = sd.searches()
    assert (search.loss.alpha, search.loss.tau, search.steps) == (3, 0.1, 7)
    assert (sd.targets, sd.evaluate.images, sd.evaluate.prompts.kind) == ((0.1,), 64, "hub")
    assert (dit.targets, dit.searches()[0].loss.alpha, dit.evaluate.prompts.kind) == (
        (0.5,),
        2,
        "file",
    )
