"""Tracker: the sweep as seen in MLflow; a view of the records, written by the driver alone.

The only import of mlflow. Tracking never stops a sweep: a server that fails is left alone for a
while; what it lacks is sent by `finish`, else by `dipgo-sweep sync` or the next run of the sweep.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol
from urllib.parse import quote

from dipgo_core.errors import DipgoError, TrackingError
from orchestrator.records import content_key
from orchestrator.secrets import redact, remember

logger = logging.getLogger(__name__)

DEFAULT_URI = "sqlite:///mlflow.db"
KEY_TAG = "dipgo.task_key"
KIND_TAG = "dipgo.kind"
SWEEP_TAG = "dipgo.sweep"
DIGEST_TAG = "dipgo.digest"
PARENT_TAG = "mlflow.parentRunId"
RETRY_S = 10.0  # before a server that failed is tried again; twice as long after each failure
LONGEST_RETRY_S = 300.0
_BATCH = 900  # a batch holds at most 1,000 metrics, parameters and tags together
_PAGE = 1000

RunState = Literal["done", "failed", "interrupted"]
_STATUS: Mapping[RunState, str] = {"done": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
Series = Mapping[str, Sequence[tuple[int, float]]]  # metric -> (step, value), steps ascending


NO_SERIES: Series = MappingProxyType({})


def _no_files() -> Mapping[str, bytes]:
    return {}


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """The parent run: one sweep at one state of its file."""

    name: str
    digest: str
    params: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return content_key({"sweep": self.name, "digest": self.digest})


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One child run: a search with its curves, or a point with its final figures.

    files: makes the run's files (name -> bytes); only called when the run has to be written.
    """

    key: str
    kind: Literal["search", "point"]
    name: str
    state: Literal["done", "failed"] = "done"
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    curves: Series = field(default_factory=dict)
    files: Callable[[], Mapping[str, bytes]] = _no_files

    @property
    def digest(self) -> str:
        """SHA-256 of what the run shows; a run that already shows it is left alone."""
        parts = (self.name, self.state, self.params, self.metrics, self.tags, self.curves)
        return content_key([dict(part) if isinstance(part, Mapping) else part for part in parts])


class Tracker(Protocol):
    """Where the driver shows a sweep. No method raises for a failing server."""

    def start(self, sweep: SweepRun) -> None:
        """Open the parent run of this sweep, or take it up again."""
        ...

    def log(self, entries: Iterable[Entry]) -> None:
        """Write child runs; those already shown as they are stay untouched."""
        ...

    def finish(
        self,
        state: RunState,
        *,
        entries: Iterable[Entry] = (),
        folder: Path | None = None,
        series: Series = NO_SERIES,
    ) -> None:
        """Write child runs as `log` does, the report's files and series; close every run."""
        ...


class NullTracker:
    """Tracks nothing."""

    def start(self, sweep: SweepRun) -> None:
        pass

    def log(self, entries: Iterable[Entry]) -> None:
        pass

    def finish(
        self,
        state: RunState,
        *,
        entries: Iterable[Entry] = (),
        folder: Path | None = None,
        series: Series = NO_SERIES,
    ) -> None:
        pass


def _files_of(entry: Entry) -> Mapping[str, bytes] | None:
    """Return an entry's files; None where the store gives one not: the figures are shown without,
    and the files sent when it does."""
    try:
        return entry.files()
    except DipgoError as error:
        logger.warning("tracking: %s is shown without files: %s", entry.name, error)
        return None


def tracking_uri(uri: str | None) -> str:
    """Return the sweep file's URI, else MLFLOW_TRACKING_URI, else a sqlite file right here."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """What the server is known to show of a run. digest: of the entry it shows whole."""

    run_id: str
    status: str
    digest: str | None = None
    parent: str | None = None
    params: bool = False


class MlflowTracker:
    """One experiment: a parent run per resolved sweep file, a child run per search and point.

    A run is found again by the tag `dipgo.task_key`, which is set when the run is created, so a
    driver that was killed at any moment leaves nothing that the next one does not take up. After a
    failure all runs are looked up again, for a run may have been created though its answer was
    lost; should a request have been sent twice below us, all but one run of a key are deleted.
    missing: keys of entries that could not be written so far.
    """

    def __init__(self, experiment: str, uri: str | None = None) -> None:
        self.experiment = experiment
        self.uri = tracking_uri(uri)
        remember(self.uri)
        self.missing: set[str] = set()
        self._sweep: SweepRun | None = None
        self._experiment_id: str | None = None
        self._parent: str | None = None
        self._runs: dict[str, _Shown] = {}  # by task key
        self._retry_at: float | None = None  # on the monotonic clock; None: nothing failed
        self._pause_s = RETRY_S
        self._client: Any = None

    @property
    def down(self) -> bool:
        """Whether the last attempt to reach the server failed."""
        return self._retry_at is not None

    def start(self, sweep: SweepRun) -> None:
        self._sweep = sweep
        self._parent = None
        self._reach()

    def log(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            if self._reach() and self._attempt(f"log {entry.name}", partial(self._put, entry)):
                self.missing.discard(entry.key)
            else:
                self.missing.add(entry.key)

    def finish(
        self,
        state: RunState,
        *,
        entries: Iterable[Entry] = (),
        folder: Path | None = None,
        series: Series = NO_SERIES,
    ) -> None:
        self._retry_at = None  # one more attempt, however short ago the last one was
        if self._reach():
            self.log(entries)
        else:
            self.missing.update(entry.key for entry in entries)
        if not self.down:
            self._attempt("close the runs", lambda: self._close(state, folder, series))
        if self.missing:
            logger.warning(
                "tracking: %d runs could not be sent to %s; `dipgo-sweep sync` sends them "
                "(nothing is computed anew)",
                len(self.missing),
                redact(self.uri),
            )

    def _reach(self) -> bool:
        """Return whether the parent run is open, after an attempt where one is due."""
        if self._retry_at is not None and time.monotonic() < self._retry_at:
            return False
        return self._parent is not None or self._attempt("open the parent run", self._open)

    def _attempt(self, what: str, action: Callable[[], None]) -> bool:
        """Run `action`; a failure is logged, and leaves the server alone for a while."""
        try:
            action()
        except Exception as error:  # a view must not stop the sweep, whatever its server raises
            self._parent = None  # what the server has is looked up before the next attempt
            self._retry_at = time.monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_RETRY_S)
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            where = redact(self.uri)
            logger.warning("tracking: could not %s at %s: %s", what, where, redact(reason))
            return False
        self._retry_at, self._pause_s = None, RETRY_S
        return True

    def _open(self) -> None:
        assert self._sweep is not None
        self._client = self._client or _client(self.uri)
        self._experiment_id = _experiment(self._client, self.experiment, self.uri)
        self._runs = {
            run.data.tags[KEY_TAG]: _shown(run)
            for run in _single_runs(self._client, self._experiment_id, self._sweep.name)
        }
        name = f"{self._sweep.name} {self._sweep.digest[:12]}"
        parent = self._take_up(self._sweep.key, "sweep", name, {})
        if not parent.params:
            _log_batches(self._client, parent.run_id, params=self._sweep.params)
        self._parent = parent.run_id

    def _take_up(self, key: str, kind: str, name: str, tags: Mapping[str, str]) -> _Shown:
        """Return the run with this key; create it, with the key among its first tags, if absent."""
        if key not in self._runs:
            assert self._sweep is not None
            own = {KEY_TAG: key, KIND_TAG: kind, SWEEP_TAG: self._sweep.name}
            created = self._client.create_run(
                self._experiment_id, tags={**own, **tags}, run_name=name
            )
            self._runs[key] = _shown(created)
        return self._runs[key]

    def _put(self, entry: Entry) -> None:
        assert self._parent is not None
        run = self._take_up(entry.key, entry.kind, entry.name, {PARENT_TAG: self._parent})
        written = run.digest == entry.digest
        if not written:
            self._reopen_parent()
            self._write(run, entry)
        if run.parent != self._parent:
            self._client.set_tag(run.run_id, PARENT_TAG, self._parent)
        status = _STATUS[entry.state]
        if not written or run.status != status:
            self._client.set_terminated(run.run_id, status)
        self._runs[entry.key] = _Shown(
            run_id=run.run_id,
            status=status,
            digest=entry.digest,
            parent=self._parent,
            params=True,
        )

    def _reopen_parent(self) -> None:
        """Show the sweep as running again, now that something new comes in."""
        assert self._sweep is not None
        parent = self._runs[self._sweep.key]
        if parent.status != "RUNNING":
            self._client.update_run(self._parent, status="RUNNING")
            self._runs[self._sweep.key] = replace(parent, status="RUNNING")

    def _write(self, run: _Shown, entry: Entry) -> None:
        """Write files and curves first and the digest last, with the figures, in one batch."""
        run_id = run.run_id
        files = _files_of(entry)
        _log_files(self._client, run_id, files or {})
        self._log_series(run_id, entry.curves)
        there = self._client.get_run(run_id).data.params if run.params else {}
        params = {k: v for k, v in entry.params.items() if k not in there}
        shown = {} if files is None else {DIGEST_TAG: entry.digest}
        tags = {**entry.tags, **shown}
        _log_batches(self._client, run_id, metrics=_once(entry.metrics), params=params, tags=tags)

    def _log_series(self, run_id: str, series: Series) -> None:
        """Append what is newer than the last step the server has, so nothing is logged twice."""
        rows = []
        for name, values in series.items():
            history = self._client.get_metric_history(run_id, name)
            last = max((metric.step for metric in history), default=-1)
            rows += [(name, value, step) for step, value in values if step > last]
        _log_batches(self._client, run_id, metrics=rows)

    def _close(self, state: RunState, folder: Path | None, series: Series) -> None:
        assert self._parent is not None
        if folder is not None:
            self._client.log_artifacts(self._parent, str(folder), "report")
        self._log_series(self._parent, series)
        assert self._experiment_id is not None and self._sweep is not None
        kept = {run.run_id for run in self._runs.values()}
        for run in _single_runs(self._client, self._experiment_id, self._sweep.name, kept):
            own = run.info.run_id == self._parent
            if own and run.info.status != _STATUS[state]:
                self._client.set_terminated(run.info.run_id, _STATUS[state])
            elif not own and run.info.status == "RUNNING":
                self._client.set_terminated(run.info.run_id, "KILLED")


# --- mlflow ------------------------------------------------------------------------------------


def _client(uri: str) -> Any:
    """Open the tracking server; a sqlite file is created, with its tables, on first use."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a sweep must work offline
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # it would create a run twice
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from mlflow import MlflowClient

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def _shown(run: Any) -> _Shown:
    tags = run.data.tags
    return _Shown(
        run_id=run.info.run_id,
        status=run.info.status,
        digest=tags.get(DIGEST_TAG),
        parent=tags.get(PARENT_TAG),
        params=bool(run.data.params),
    )


def _experiment(client: Any, name: str, uri: str) -> str:
    """Return the id of the experiment, created with artifacts beside a sqlite database.

    Raises:
        TrackingError: the experiment was deleted on the server.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        return str(client.create_experiment(name, artifact_location=_artifact_location(uri, name)))
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"experiment {name!r} was deleted on {redact(uri)}: restore it there, or set "
            "tracking.experiment to another name"
        )
    return str(found.experiment_id)


def _artifact_location(uri: str, experiment: str) -> str | None:
    """Return a folder beside a sqlite database; None leaves the choice to the server."""
    prefix = "sqlite:///"
    if not uri.startswith(prefix):
        return None
    folder = Path(uri.removeprefix(prefix)).absolute().parent / "mlartifacts"
    return (folder / quote(experiment, safe=" ")).as_uri()


def _search(client: Any, experiment_id: str, sweep: str) -> Iterator[Any]:
    """Yield every run of this sweep, page by page."""
    token = None
    quoted = sweep.replace("'", "")
    while True:
        page = client.search_runs(
            [experiment_id],
            filter_string=f"tags.`{SWEEP_TAG}` = '{quoted}'",
            max_results=_PAGE,
            page_token=token,
        )
        yield from page
        token = page.token
        if not token:
            return


def _single_runs(
    client: Any, experiment_id: str, sweep: str, kept: Collection[str] = ()
) -> Iterator[Any]:
    """Yield a run of each key of this sweep, and delete the others of the key.

    kept: ids of runs that stay; else the one that shows its entry whole, else the oldest.
    """
    by_key: dict[str, list[Any]] = {}
    for run in _search(client, experiment_id, sweep):
        if KEY_TAG in run.data.tags:
            by_key.setdefault(run.data.tags[KEY_TAG], []).append(run)
    for runs in by_key.values():
        first, *others = sorted(
            runs,
            key=lambda run: (
                run.info.run_id not in kept,
                DIGEST_TAG not in run.data.tags,
                run.info.start_time,
            ),
        )
        for run in others:
            logger.info("tracking: run %s is there twice and deleted", run.info.run_name)
            client.delete_run(run.info.run_id)
        yield first


def _once(metrics: Mapping[str, float]) -> list[tuple[str, float, int]]:
    return [(name, value, 0) for name, value in metrics.items()]


def _log_batches(
    client: Any,
    run_id: str,
    *,
    metrics: Sequence[tuple[str, float, int]] = (),
    params: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Send metrics (name, value, step), parameters and tags; one batch unless there are many."""
    from mlflow.entities import Metric, Param, RunTag

    now = int(time.time() * 1000)
    rows = [Metric(name, float(value), now, step) for name, value, step in metrics]
    while len(rows) > _BATCH:
        client.log_batch(run_id, metrics=rows[:_BATCH])
        rows = rows[_BATCH:]
    sent_params = [Param(name, str(value)[:6000]) for name, value in (params or {}).items()]
    sent_tags = [RunTag(name, str(value)[:8000]) for name, value in (tags or {}).items()]
    if rows or sent_params or sent_tags:
        client.log_batch(run_id, metrics=rows, params=sent_params, tags=sent_tags)


def _log_files(client: Any, run_id: str, files: Mapping[str, bytes]) -> None:
    if not files:
        return
    with tempfile.TemporaryDirectory(prefix="dipgo-track-") as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        client.log_artifacts(run_id, folder)
