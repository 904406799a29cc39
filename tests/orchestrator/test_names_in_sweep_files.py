"""Names in sweep files: whatever they are, nothing leaves its folder and nobody sees a traceback.

Oracle: paths resolved by the file system; places counted by hand (each name has a line of its own).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dipgo_core.errors import SweepFileError
from orchestrator.store import open_store
from orchestrator.sweep_file import SweepFile, load_sweep
from orchestrator.tracking import _artifact_location

#: Each field with the line it has below.
FIELDS = {
    "name": 2,
    "models.0.id": 4,
    "models.0.name": 5,
    "tracking.experiment": 8,
    "tracking.uri": 9,
    "storage": 10,
    "evaluate.prompts.file": 13,
    "evaluate.reference.folder": 14,
}
TEXT = """schema_version: 1
name: {name}
models:
  - id: {models.0.id}
    name: {models.0.name}
targets: [0.5]
tracking:
  experiment: {tracking.experiment}
  uri: {tracking.uri}
storage: {storage}
evaluate:
  prompts:
    file: {evaluate.prompts.file}
  reference: {evaluate.reference.folder}
"""
GOOD = {
    "name": "good",
    "models.0.id": "tiny-sd",
    "models.0.name": "small",
    "tracking.experiment": "runs of mine",
    "tracking.uri": "sqlite:///mlflow.db",
    "storage": "./results",
    "evaluate.prompts.file": "prompts.txt",
    "evaluate.reference.folder": "dense",
}
NASTY = (
    *("..", ".", "../x", "a/../../b", "/etc", "/", "//x", "~root/x", "C:\\x", "a\\..\\b"),
    *("\0", "a\0b", "a\nb", "a\rb", "\x1b[31m", "\u202ex", "\ud800", "e\u0301", "\uff0e\uff0e/x"),
    *("x" * 300, "x/" * 3000, "é" * 200, "-rf", "--help", " ", "a b", "%2e%2e/x", "${HOME}", "{}"),
    *("s3://me:secret@bucket", "http://x", "file://", "s3://", "s3://../x", "ftp://x", "a://b://c"),
)
names = st.one_of(
    st.sampled_from(NASTY),
    st.text(max_size=40),
    st.lists(st.sampled_from(["..", ".", "/", "a", "\0", "~", "é", "\\", ":"]), max_size=8).map(
        "".join
    ),
)


def quoted(value: str) -> str:
    """Write a text so that YAML reads exactly it, whatever is in it."""
    return '"' + "".join(f"\\U{ord(sign):08x}" for sign in value) + '"'


def load(folder: Path, **given: str) -> SweepFile:
    text = TEXT
    for field, value in (GOOD | given).items():
        text = text.replace(f"{{{field}}}", quoted(value))
    (folder / "prompts.txt").write_text("a\nb\n", encoding="utf-8")
    path = folder / "s.yaml"
    path.write_text(text, encoding="utf-8")
    return load_sweep(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("names")


def test_good_names_load(folder: Path) -> None:
    assert load(folder).name == "good"


@pytest.mark.parametrize("field", list(FIELDS))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(value=names)
def test_any_name_is_read_or_refused_at_its_place(field: str, folder: Path, value: str) -> None:
    try:
        load(folder, **{field: value})
    except SweepFileError as error:
        assert error.errors
        for issue in error.errors:
            assert issue.line == FIELDS[field] and issue.file.endswith("s.yaml")
            stem = field.rsplit(".", 1)[0] if field.startswith("evaluate") else field
            assert issue.field.startswith(stem)


@settings(max_examples=100, deadline=None)
@given(value=names)
def test_name_of_a_sweep_stays_in_the_storage(folder: Path, value: str) -> None:
    try:
        sweep = load(folder, name=value)
    except SweepFileError:
        return
    with tempfile.TemporaryDirectory() as root:
        store = open_store(root)
        store.put_sweep_file(sweep.name, "sweep.json", b"{}")
        (written,) = (path for path in Path(root).rglob("sweep.json"))
        assert written.resolve().is_relative_to(Path(root).resolve() / "sweeps")


@settings(max_examples=100, deadline=None)
@given(value=names)
def test_name_of_an_experiment_stays_beside_the_database(folder: Path, value: str) -> None:
    try:
        sweep = load(folder, **{"tracking.experiment": value})
    except SweepFileError:
        return
    place = _artifact_location("sqlite:////data/mlflow.db", sweep.tracking.experiment)
    assert place is not None
    path = Path(unquote(urlparse(place).path)).resolve()
    assert path.parent == Path("/data/mlartifacts").resolve()


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("name", "../x", "up to 100 letters, digits"),
        ("storage", "s3://me:secret@bucket", "must hold no user, password or token, got s3://***@"),
        ("storage", "ftp://x", "must be a folder, or a URL of file or s3, got ftp://"),
        ("storage", "a\0b", "no control or invisible characters, got 'a\\x00b'"),
        ("storage", "x" * 300, "255 between two '/'"),
        ("tracking.experiment", "a/../b", "must have no part '.' or '..'"),
        ("tracking.uri", "sqlite:///a\nb", "no control or invisible characters"),
    ],
)
def test_bad_name_is_told_what_it_breaks(field: str, value: str, rule: str, folder: Path) -> None:
    with pytest.raises(SweepFileError) as caught:
        load(folder, **{field: value})
    assert rule in str(caught.value)
    assert "secret" not in str(caught.value)
