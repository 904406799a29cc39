"""Commits written into a sweep file. Oracles: a fake hub's commits, and the text as one writes it
by hand; whatever is written must load to the same sweep with commits."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_hub import FakeHub

from dipgo_core.errors import ConfigError, PreflightError, SweepFileError
from dipgo_core.evaluation.scorers import scorer_of
from orchestrator.hub_needs import hub_needs
from orchestrator.pinning import pin_file
from orchestrator.sweep_file import load_sweep

BLOCK = """\
# a sweep
schema_version: 1
name: x   # its name
models:
  - name: one          # the first
    id: owner/tiny     # from the hub
    family: sd
  - {id: owner/tiny, family: sd, name: two, revision: main}
  - tiny-sd

targets:   [0.5]
search:
  calibration:
    prompts: {hub: owner/words, column: text}   # some words
evaluate:
  prompts:
    hub: 'owner/others'
    revision:          # not yet
  scorers: {features: tiny-features, clip: owner/clip}
allow_unpinned: true
"""


@pytest.fixture
def commits(fake_hub: FakeHub) -> dict[str, str]:
    names = {"tiny": "model", "clip": "model", "words": "dataset", "others": "dataset"}
    names["dit"] = "model"
    return {
        name: fake_hub.put(f"owner/{name}", {"x": b""}, kind=kind) for name, kind in names.items()
    }


@pytest.fixture
def file(tmp_path: Path, commits: dict[str, str]) -> Path:
    return tmp_path / "x.yaml"


def test_only_revisions_change(file: Path, commits: dict[str, str]) -> None:
    file.write_text(BLOCK)
    pin_file(file)
    expected = (
        BLOCK.replace("# from the hub\n", f"# from the hub\n    revision: {commits['tiny']}\n")
        .replace("revision: main", f"revision: {commits['tiny']}")
        .replace("hub: owner/words", f"hub: owner/words, revision: {commits['words']}")
        .replace("revision:          # not", f"revision: {commits['others']}          # not")
        .replace("clip: owner/clip", f"clip: owner/clip@{commits['clip']}")
    )
    assert file.read_text() == expected


def test_pinned_file_may_forbid_what_moves_and_is_left_alone(
    file: Path, fake_hub: FakeHub, commits: dict[str, str]
) -> None:
    file.write_text(BLOCK)
    assert pin_file(file).loose
    text, asked = file.read_text(), fake_hub.requests
    fake_hub.put("owner/tiny", {"x": b"moved"})
    again = pin_file(file)
    assert (again.needs, file.read_text(), fake_hub.requests) == ((), text, asked)
    assert all(need.pinned for need in hub_needs(load_sweep(file, ["allow_unpinned=false"])))


def test_file_that_forbids_what_moves_can_be_pinned(file: Path) -> None:
    file.write_text(BLOCK.replace("allow_unpinned: true", "allow_unpinned: false"))
    assert not pin_file(file).loose
    assert load_sweep(file)


SMALL = """\
schema_version: 1
name: x
models: [stabilityai/stable-diffusion-xl-base-1.0]
targets: [0.5]
search: {calibration: {prompts: bundled:calibration}}
evaluate: {metrics: [psnr, clip], prompts: bundled:test}
allow_unpinned: true
"""
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
CLIP = "laion/CLIP-ViT-g-14-laion2B-s34B-b88K"


@pytest.fixture
def known(fake_hub: FakeHub) -> tuple[str, str]:
    return fake_hub.put(SDXL, {"x": b""}), fake_hub.put(CLIP, {"y": b""})


def test_bare_name_becomes_a_mapping_and_default_scorers_are_written(
    file: Path, known: tuple[str, str]
) -> None:
    file.write_text(SMALL)
    pin_file(file)
    model, clip = known
    assert file.read_text() == SMALL.replace(
        f"[{SDXL}]", f"[{{id: {SDXL}, revision: {model}}}]"
    ).replace("{metrics", f"{{scorers: {{clip: {CLIP}@{clip}}}, metrics")


def test_default_scorer_of_one_model_goes_into_its_overrides(
    file: Path, known: tuple[str, str]
) -> None:
    file.write_text(SMALL.replace(f"[{SDXL}]", f"\n- {SDXL} # big\n- tiny-sd"))
    pin_file(file)
    model, clip = known
    overrides = f"overrides: {{evaluate: {{scorers: {{clip: {CLIP}@{clip}}}}}}}"
    assert f"\n- {{id: {SDXL}, revision: {model}, {overrides}}} # big\n" in file.read_text()


def test_sections_that_are_not_there_are_added(file: Path, known: tuple[str, str]) -> None:
    text = SMALL.replace("evaluate: {metrics: [psnr, clip], prompts: bundled:test}\n", "")
    text = text.replace(
        f"[{SDXL}]", f"[{{id: {SDXL}, overrides: {{evaluate: {{prompts: bundled:test}}}}}}]"
    )
    file.write_text(text.removesuffix("\n"))
    pin_file(file)
    assert file.read_text().endswith(
        f"allow_unpinned: true\nevaluate: {{scorers: {{clip: {CLIP}@{known[1]}}}}}\n"
    )


def test_windows_lines_and_byte_order_mark_stay(file: Path, commits: dict[str, str]) -> None:
    data = b"\xef\xbb\xbf" + BLOCK.replace("\n", "\r\n").encode()
    file.write_bytes(data)
    pin_file(file)
    written = file.read_bytes()
    assert written.startswith(b"\xef\xbb\xbf# a sweep\r\n")
    assert written.count(b"\n") == written.count(b"\r\n") == data.count(b"\n") + 1
    assert f"# from the hub\r\n    revision: {commits['tiny']}\r\n".encode() in written


def test_alias_is_pinned_where_its_anchor_stands(file: Path, commits: dict[str, str]) -> None:
    text = BLOCK.replace("revision: main", "revision: &at main")
    file.write_text(text.replace("family: sd\n", "family: sd\n    revision: *at\n", 1))
    with pytest.raises(ConfigError, match="no anchor before it"):
        load_sweep(file)
    text = BLOCK.replace("family: sd\n", "family: sd\n    revision: &at main\n")
    file.write_text(text.replace("revision: main}", "revision: *at}"))
    pin_file(file)
    assert f"revision: &at {commits['tiny']}\n" in file.read_text()
    assert "revision: *at}" in file.read_text()


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("owner/clip}", "owner/clip}\n  # ${NO}", None),
        ("id: owner/tiny ", 'id: "${TINY:-owner/tiny}" ', "models.0.id comes from the environment"),
        ("family: sd\n", "family: sd\n    revision: ${REV:-main}\n", "comes from the environment"),
        ("name: two, revision: main", "name: two, revision: &r main", None),
    ],
)
def test_what_cannot_be_edited_is_left_as_it_is(
    file: Path, old: str, new: str, reason: str | None
) -> None:
    text = BLOCK.replace(old, new, 1)
    file.write_text(text)
    if reason is None:
        assert pin_file(file).needs
        return
    with pytest.raises(ConfigError, match=reason):
        pin_file(file)
    assert file.read_text() == text
    assert [path.name for path in file.parent.glob(".*.tmp")] == []


def test_nothing_is_written_unless_all_can_be_resolved(file: Path, fake_hub: FakeHub) -> None:
    file.write_text(BLOCK)
    del fake_hub.repos["model", "owner/clip"]
    with pytest.raises(PreflightError, match=r"1 problem:\n  one, two, tiny-sd-ddim-10: evaluate"):
        pin_file(file)
    assert file.read_text() == BLOCK


def test_example_of_three_models_is_pinned_whole(
    repository: Path, file: Path, fake_hub: FakeHub
) -> None:
    example = repository / "sweeps" / "sd_family.yaml"
    for need in hub_needs(load_sweep(example)):
        fake_hub.put(need.id, {"x": b""}, kind=need.repository)
    file.write_bytes(example.read_bytes())
    pinned = pin_file(file)
    before, after = example.read_text().splitlines(), file.read_text().splitlines()
    assert pinned.loose
    assert len(pinned.needs) == 6
    assert sum(old not in after for old in before) == 5  # 3 revisions, 2 prompt sets
    assert len(after) == len(before) + 1  # the scorer, which was meant by default


REWARD = """\
schema_version: 1
name: x
models: [tiny-sd]
targets: [0.5]
evaluate: {metrics: [image_reward], scorers: {image_reward: owner/reward}}
allow_unpinned: true
"""


def test_vocabulary_of_image_reward_is_pinned_with_it(file: Path, fake_hub: FakeHub) -> None:
    reward = fake_hub.put("owner/reward", {"ImageReward.pt": b""})
    words = fake_hub.put("google-bert/bert-base-uncased", {"vocab.txt": b""})
    file.write_text(REWARD)
    assert [need.id for need, _ in pin_file(file).needs] == [
        "owner/reward",
        "google-bert/bert-base-uncased",
    ]
    assert file.read_text() == REWARD.replace("owner/reward", f"owner/reward@{reward}+{words}")
    (model,) = load_sweep(file, ["allow_unpinned=false"]).models
    digest = scorer_of("image_reward", str(model.evaluate.scorers.image_reward)).digest
    assert digest == f"hub:owner/reward@{reward}+google-bert/bert-base-uncased@{words}"


def test_vocabulary_without_a_commit_is_let_in_only_if_the_file_says_so(
    file: Path, fake_hub: FakeHub
) -> None:
    words = fake_hub.put("google-bert/bert-base-uncased", {"vocab.txt": b""})
    half = f"owner/reward@{'a' * 40}"
    file.write_text(REWARD.replace("owner/reward", half))
    rule = r"owner/reward@<commit>\+<commit of google-bert/bert-base-uncased>"
    with pytest.raises(SweepFileError, match=rule):
        load_sweep(file, ["allow_unpinned=false"])
    pin_file(file)
    assert f"{half}+{words}" in file.read_text()
