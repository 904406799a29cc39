"""Lanes as Tune trials: one Tuner in a thread of its own starts, watches and ends them.

Tune keeps no state that matters: tasks, progress and results live in the store, so its own files go
to a temporary folder of the driver, and a trial's config is the lane's name and what it asks for. A
trial that ends in an error is not restarted by Tune: as long as there is work, another lane opens.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from dipgo_core.errors import TaskError
from orchestrator.executors.base import RunTask
from orchestrator.executors.placement import Bundle
from orchestrator.executors.ray_tune.lane import drain
from orchestrator.secrets import redact_logs
from orchestrator.store import Store

logger = logging.getLogger(__name__)

_END_S = 30.0  # for Tune to end; its thread is a daemon's, so more is not waited for
_LEAVE_S = 5.0  # the same after an error: the cluster may be lost, or a user waits


@dataclass(frozen=True)
class Ended:
    """A lane is over. error: None if it went home as it was told."""

    lane: str
    error: BaseException | None = None


@dataclass(frozen=True, eq=False)
class Hall:
    """What the driver's thread and Tune's tell each other; deques are safe across threads."""

    to_open: deque[tuple[str, Bundle]] = field(default_factory=deque)
    ended: deque[Ended] = field(default_factory=deque)
    in_vain: set[str] = field(default_factory=set)
    closing: threading.Event = field(default_factory=threading.Event)


class Lanes:
    """All lanes of a run, inside a `with` block that ends them.

    desk: an actor (`open_desk`). probe: what lanes read from the store before they work.
    """

    def __init__(self, desk: Any, run_task: RunTask, store: Store, probe: str) -> None:
        self._hall = Hall()
        self._work = _trainable(desk, run_task, store, probe)
        self._crash: BaseException | None = None
        self._thread = threading.Thread(target=self._fit, name="ray-tune", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hall.closing.set()
        self._thread.join(_END_S if error is None else _LEAVE_S)
        if self._thread.is_alive() and error is None:
            logger.warning("Ray Tune has not ended within %g s and is left behind", _END_S)

    def open(self, lane: str, bundle: Bundle) -> None:
        self._hall.to_open.append((lane, bundle))

    def take_back(self, lane: str) -> None:
        """End a lane that has not started yet."""
        self._hall.in_vain.add(lane)

    def ended(self) -> list[Ended]:
        """Return the lanes that ended since the last call.

        Raises:
            TaskError: Tune itself ended, so that no lane can start any more.
        """
        if not self._thread.is_alive() and not self._hall.closing.is_set():
            raise TaskError(
                f"Ray Tune stopped by itself ({self._crash}); finished tasks are in the store, run "
                "the sweep again to go on"
            ) from self._crash
        return [self._hall.ended.popleft() for _ in range(len(self._hall.ended))]

    def _fit(self) -> None:
        try:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                _tuner(self._hall, self._work, folder).fit()
        except BaseException as error:  # told by `ended`, in the thread that can act on it
            self._crash = error


def _trainable(desk: Any, run_task: RunTask, store: Store, probe: str) -> Any:
    """Return what Tune runs in a worker's process; Ray sends it by value."""

    def lane(config: dict[str, Any]) -> dict[str, Any]:
        redact_logs()
        drain(config["lane"], desk, run_task, store, probe)
        return {"retired": True}

    return lane


def _tuner(hall: Hall, work: Any, folder: str) -> tune.Tuner:
    def asks_for(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        return tune.PlacementGroupFactory([config["bundle"]])

    return tune.Tuner(
        tune.with_resources(work, asks_for),
        tune_config=tune.TuneConfig(
            search_alg=_Openings(hall),
            scheduler=_TakesBack(hall),
            num_samples=-1,
            reuse_actors=False,  # a lane that went home has to leave its place to others
        ),
        run_config=tune.RunConfig(
            name="lanes",
            storage_path=folder,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=0),
            callbacks=[_Endings(hall)],
            stop=_Closing(hall),
        ),
    )


class _Openings(Searcher):  # type: ignore[misc]  # Tune calls only what derives from Searcher
    """Suggests a lane whenever the driver wants one."""

    def __init__(self, hall: Hall) -> None:
        super().__init__(metric="retired", mode="max")
        self._hall = hall

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self._hall.closing.is_set():
            return str(Searcher.FINISHED)
        if not self._hall.to_open:
            return None
        lane, bundle = self._hall.to_open.popleft()
        return {"lane": lane, "bundle": bundle}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Learn nothing: `_Endings` tells the driver, with the reason."""

    def save(self, checkpoint_path: str) -> None:
        """Keep nothing: the state is in the store."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing: to go on is to plan again."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _TakesBack(FIFOScheduler):  # type: ignore[misc]  # asked at every step of Tune's loop
    """Stops lanes that nobody waits for any more, before they take what others could use."""

    def __init__(self, hall: Hall) -> None:
        super().__init__()
        self._hall = hall

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        for trial in list(tune_controller.get_live_trials()) if self._hall.in_vain else ():
            if trial.config["lane"] in self._hall.in_vain:
                self._hall.in_vain.discard(trial.config["lane"])
                tune_controller.stop_trial(trial)
        return None  # lanes start in the order in which they were asked for

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Closing(tune.Stopper):  # type: ignore[misc]
    """Ends everything, pending lanes too, once the driver is through."""

    def __init__(self, hall: Hall) -> None:
        self._hall = hall

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._hall.closing.is_set()

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Endings(TrialProgressCallback):  # type: ignore[misc]
    """Tells the driver which lanes ended, and why; takes the place of Tune's own, which prints."""

    def __init__(self, hall: Hall) -> None:
        super().__init__()
        self._hall = hall

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Print nothing."""

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._hall.ended.append(Ended(trial.config["lane"]))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        error = trial.get_error() or TaskError("the worker was lost")
        self._hall.ended.append(Ended(trial.config["lane"], error))

    def __getstate__(self) -> dict[str, Any]:
        return {}
