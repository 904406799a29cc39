"""Tracking: one contract for every tracker, and what MLflow must show after crashes and retries."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestrator.tracking import (
    DIGEST_TAG,
    KEY_TAG,
    PARENT_TAG,
    SWEEP_TAG,
    Entry,
    MlflowTracker,
    NullTracker,
    SweepRun,
    Tracker,
    tracking_uri,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

SWEEP = SweepRun(name="demo", digest="d" * 64, params={"models": "tiny-sd"})


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables; making them takes seconds, copying them does not."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(autouse=True)
def no_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture
def uri(empty_database: Path, tmp_path: Path) -> str:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def an_entry(key: str = "a", **changes: object) -> Entry:
    fields: dict[str, object] = {
        "key": key * 64,
        "kind": "point",
        "name": f"point {key}",
        "params": {"target": "0.5"},
        "metrics": {"fid": 1.5, "clip": 90.0},
        "files": lambda: {"subnet.json": b"{}"},
    }
    return Entry(**(fields | changes))  # type: ignore[arg-type]


def a_search(steps: int) -> Entry:
    curve = [(step, 1.0 / (step + 1)) for step in range(steps)]
    return an_entry("s", kind="search", metrics={"forwards": 10.0}, curves={"loss": curve})


def runs_of(uri: str) -> list[tuple[str, str]]:
    """Return the first letter of each run's key, and its status."""
    client = MlflowClient(tracking_uri=uri)
    (experiment,) = client.search_experiments(filter_string="name = 'demo'")
    found = client.search_runs([experiment.experiment_id])
    return sorted((run.data.tags[KEY_TAG][0], run.info.status) for run in found)


def test_lost_answer_to_a_create_makes_no_second_run(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = MlflowTracker("demo", uri)
    tracker.start(SWEEP)
    real = tracker._client.create_run

    def lost(*given: object, **options: object) -> None:
        real(*given, **options)
        monkeypatch.undo()
        raise ConnectionError("the answer is lost")

    monkeypatch.setattr(tracker._client, "create_run", lost)
    tracker.log([an_entry("k")])
    assert tracker.down
    tracker.finish("done", entries=[an_entry("k")])
    assert [run for run in runs_of(uri) if run[0] == "k"] == [("k", "FINISHED")]


@pytest.mark.parametrize("when", ["start", "finish"])
def test_run_that_was_created_twice_is_shown_once(uri: str, when: str) -> None:
    """As an HTTP client below does that sends a request again."""
    tracker = track(uri, an_entry("k"))
    client, shown = tracker._client, tracker._runs["k" * 64]
    tags = {KEY_TAG: "k" * 64, SWEEP_TAG: SWEEP.name}
    if when == "start":
        client.create_run(tracker._experiment_id, tags=tags)
        tracker.start(SWEEP)
    else:
        tracker.start(SWEEP)
        client.create_run(tracker._experiment_id, tags=tags)
    tracker.finish("done")
    assert [run for run in runs_of(uri) if run[0] == "k"] == [("k", "FINISHED")]
    assert tracker._runs["k" * 64].run_id == shown.run_id


def track(uri: str, *entries: Entry, sweep: SweepRun = SWEEP, **finish: object) -> MlflowTracker:
    tracker = MlflowTracker("demo", uri)
    tracker.start(sweep)
    tracker.log(entries)
    tracker.finish("done", **finish)  # type: ignore[arg-type]
    return tracker


def runs(uri: str) -> dict[str, object]:
    """All runs of the experiment by task key; fails on a duplicate."""
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("demo")
    found = list(client.search_runs([experiment.experiment_id]))
    by_key = {run.data.tags[KEY_TAG]: run for run in found}
    assert len(by_key) == len(found)
    return by_key


@pytest.fixture(params=["null", "mlflow"])
def make(request: pytest.FixtureRequest) -> Callable[[], Tracker]:
    if request.param == "null":
        return NullTracker
    uri = request.getfixturevalue("uri")
    return lambda: MlflowTracker("demo", uri)


def test_tracker_contract_a_sweep_is_tracked_twice(
    make: Callable[[], Tracker], tmp_path: Path
) -> None:
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "report.html").write_text("<p>")
    for _ in range(2):
        tracker = make()
        tracker.start(SWEEP)
        tracker.log([an_entry()])
        tracker.finish("done", folder=folder, series={"hypervolume": [(1, 0.5)]})


def test_tracker_contract_finish_without_entries(make: Callable[[], Tracker]) -> None:
    tracker = make()
    tracker.start(SWEEP)
    tracker.finish("interrupted")


def test_mlflow_parent_holds_children_report_and_series(uri: str, tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "pareto.png").write_bytes(b"png")
    track(uri, an_entry(), folder=tmp_path / "report", series={"hv": [(10, 0.5), (20, 0.7)]})
    parent, child = runs(uri)[SWEEP.key], runs(uri)["a" * 64]
    client = MlflowClient(tracking_uri=uri)
    assert child.data.tags[PARENT_TAG] == parent.info.run_id
    assert [f.path for f in client.list_artifacts(parent.info.run_id, "report")] == [
        "report/pareto.png"
    ]
    history = client.get_metric_history(parent.info.run_id, "hv")
    assert [(m.step, m.value) for m in history] == [(10, 0.5), (20, 0.7)]
    assert parent.info.status == "FINISHED"
    assert parent.data.params == {"models": "tiny-sd"}


def test_mlflow_point_holds_params_figures_and_files(uri: str) -> None:
    track(uri, an_entry())
    run = runs(uri)["a" * 64]
    assert run.data.params == {"target": "0.5"}
    assert run.data.metrics == {"fid": 1.5, "clip": 90.0}
    files = MlflowClient(tracking_uri=uri).list_artifacts(run.info.run_id)
    assert [file.path for file in files] == ["subnet.json"]
    assert run.info.status == "FINISHED"


def test_mlflow_artifacts_lie_beside_the_database(uri: str, tmp_path: Path) -> None:
    track(uri, an_entry())
    assert list((tmp_path / "mlartifacts" / "demo").glob("*/artifacts/subnet.json"))


def test_mlflow_long_curve_is_whole(uri: str) -> None:
    track(uri, a_search(2100))
    run = runs(uri)["s" * 64]
    history = MlflowClient(tracking_uri=uri).get_metric_history(run.info.run_id, "loss")
    assert sorted(m.step for m in history) == list(range(2100))


def test_mlflow_repeated_sweep_changes_nothing(uri: str) -> None:
    track(uri, an_entry(), a_search(5))
    before = {key: run.to_dictionary() for key, run in runs(uri).items()}

    def refuse() -> dict[str, bytes]:
        raise AssertionError("files of a run that is already shown were made again")

    track(uri, an_entry(files=refuse), a_search(5))
    assert {key: run.to_dictionary() for key, run in runs(uri).items()} == before


def test_mlflow_killed_driver_is_taken_up_and_closed(uri: str) -> None:
    tracker = MlflowTracker("demo", uri)
    tracker.start(SWEEP)
    client = MlflowClient(tracking_uri=uri)
    parent = runs(uri)[SWEEP.key]
    tags = {PARENT_TAG: parent.info.run_id, SWEEP_TAG: "demo"}
    for key in "ab":  # created by the killed driver, which wrote nothing into them
        client.create_run(parent.info.experiment_id, tags={**tags, KEY_TAG: key * 64})
    track(uri, an_entry("a"))
    found = runs(uri)
    assert found["a" * 64].info.status == "FINISHED"
    assert found["a" * 64].data.metrics["fid"] == 1.5
    assert {run.info.status for run in found.values()} == {"FINISHED", "KILLED"}


def test_mlflow_finds_runs_beyond_the_first_page(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.tracking._PAGE", 2)
    entries = [an_entry(key) for key in "abcde"]
    track(uri, *entries)
    track(uri, *entries)
    assert len(runs(uri)) == 6


def test_mlflow_continued_curve_has_each_step_once(uri: str) -> None:
    track(uri, a_search(3))
    track(uri, a_search(6))
    run = runs(uri)["s" * 64]
    history = MlflowClient(tracking_uri=uri).get_metric_history(run.info.run_id, "loss")
    assert sorted(m.step for m in history) == list(range(6))


def test_mlflow_retried_point_becomes_finished(uri: str) -> None:
    track(uri, an_entry(state="failed", metrics={}, tags={"error": "no memory"}))
    assert runs(uri)["a" * 64].info.status == "FAILED"
    track(uri, an_entry())
    assert runs(uri)["a" * 64].info.status == "FINISHED"


def test_mlflow_changed_sweep_file_moves_known_points_to_its_parent(uri: str) -> None:
    track(uri, an_entry())
    changed = SweepRun(name="demo", digest="e" * 64)
    track(uri, an_entry(), an_entry("b"), sweep=changed)
    found = runs(uri)
    parent = found[changed.key].info.run_id
    assert {found[key * 64].data.tags[PARENT_TAG] for key in "ab"} == {parent}
    assert len(found) == 4


def test_mlflow_outage_is_logged_and_sent_at_finish(
    uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = MlflowTracker("demo", "http://127.0.0.1:1")
    tracker.start(SWEEP)
    tracker.log([an_entry()])
    assert "could not open the parent run" in caplog.text
    assert tracker.missing == {an_entry().key} and tracker.down
    tracker.uri, tracker._client = uri, None  # the server is back
    tracker.finish("done", entries=[an_entry()])
    assert not tracker.missing and not tracker.down
    assert runs(uri)["a" * 64].data.tags[DIGEST_TAG] == an_entry().digest


def test_mlflow_outage_ends_while_the_sweep_goes_on(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.tracking.RETRY_S", 0.0)
    tracker = MlflowTracker("demo", "http://127.0.0.1:1")
    tracker.start(SWEEP)
    tracker.uri, tracker._client = uri, None  # the server is back
    tracker.log([an_entry()])
    assert runs(uri)["a" * 64].info.status == "FINISHED"


def test_mlflow_failed_server_is_left_alone_for_a_while(uri: str) -> None:
    tracker = MlflowTracker("demo", "http://127.0.0.1:1")
    tracker.start(SWEEP)
    tracker.uri, tracker._client = uri, None
    tracker.log([an_entry(key) for key in "abc"])  # without an attempt
    assert len(tracker.missing) == 3


def test_mlflow_warnings_hide_the_password(caplog: pytest.LogCaptureFixture) -> None:
    track("http://me:canary-word@127.0.0.1:1", an_entry())
    assert "could not open the parent run at http://***@127.0.0.1:1" in caplog.text
    assert "canary-word" not in caplog.text


def test_mlflow_lasting_outage_does_not_raise(caplog: pytest.LogCaptureFixture) -> None:
    tracker = MlflowTracker("demo", "http://127.0.0.1:1")
    tracker.start(SWEEP)
    tracker.log([an_entry()])
    tracker.finish("done")
    assert caplog.text.count("could not open the parent run") == 2


def test_mlflow_deleted_experiment_is_named(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    track(uri)
    client = MlflowClient(tracking_uri=uri)
    client.delete_experiment(client.get_experiment_by_name("demo").experiment_id)
    track(uri, an_entry())
    assert "experiment 'demo' was deleted" in caplog.text


def test_tracking_uri_prefers_the_file_then_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from-environment")
    assert tracking_uri("http://from-file") == "http://from-file"
    assert tracking_uri(None) == "http://from-environment"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking_uri(None) == "sqlite:///mlflow.db"
