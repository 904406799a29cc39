"""Sweeps as jobs of a Ray cluster: sent, found again, followed and stopped through its job server.

https://docs.ray.io/en/latest/cluster/running-applications/job-submission/sdk.html
"""

from __future__ import annotations

import json
import logging
import shlex
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from ray.job_submission import JobSubmissionClient

from dipgo_core.errors import ConfigError, TaskError
from orchestrator.executors.ray_tune.connect import INSECURE, is_loopback, token_mode

_SWEEP: Final = "dipgo_sweep"  # names of what is kept beside a job
_DIGEST: Final = "dipgo_digest"
_OVERRIDES: Final = "dipgo_overrides"
_ENDED: Final = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
_POLL_S: Final = 1.0
_SMALL_JOB_S: Final = 300.0
_HEAD_START_S: Final = 60.0
_STOP_S: Final = 60.0
_SHOWN_LINES: Final = 20
_OF_RAY: Final = ("INFO job_manager.py:", "Running entrypoint for job ")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A sweep on a cluster. started: seconds since 1970, None while it is pending."""

    id: str
    sweep: str
    digest: str
    status: str
    message: str
    started: float | None
    overrides: tuple[str, ...]
    files: str | None

    @property
    def ended(self) -> bool:
        return self.status in _ENDED


class JobServer:
    """The job server of a cluster's head.

    Raises:
        ConfigError: no http address, or a server that others reach and that asks for no token.
        TaskError: nothing answers there.
    """

    def __init__(self, address: str, *, insecure: bool = False) -> None:
        self.address = address
        check_server(address, insecure=insecure)
        logging.getLogger("ray").setLevel(logging.WARNING)  # it tells of every file it packs
        try:
            self._client = JobSubmissionClient(address)
        except (ConnectionError, RuntimeError) as error:
            raise TaskError(f"no Ray job server answers at {address}: {error}") from error

    def submit(
        self,
        command: Sequence[str],
        *,
        sweep: str,
        digest: str,
        overrides: Sequence[str],
        files: Path,
    ) -> str:
        """Send a folder and the command to run in it; return the job's id.

        The driver asks for no resources: all of them are for the workers it starts.
        """
        earlier = [job for job in self.jobs(sweep) if job.digest == digest]
        name = f"dipgo-{sweep}-{digest[:12]}" + (f"-{len(earlier) + 1}" if earlier else "")
        about = {_SWEEP: sweep, _DIGEST: digest, _OVERRIDES: json.dumps(list(overrides))}
        self._send(command, name, {"working_dir": str(files)}, about)
        return name

    def jobs(self, sweep: str) -> list[Job]:
        """Return the jobs of a sweep, the newest first."""
        found = (_job(each) for each in self._client.list_jobs() if _SWEEP in (each.metadata or {}))
        mine = [job for job in found if job.sweep == sweep]
        return sorted(mine, key=lambda job: job.started or float("inf"), reverse=True)

    def newest(self, sweep: str) -> Job:
        """Return the job of a sweep that was sent last.

        Raises:
            ConfigError: the cluster knows none.
        """
        jobs = self.jobs(sweep)
        if not jobs:
            raise ConfigError(
                f"the cluster at {self.address} has no job of sweep {sweep!r}; send it with "
                "`dipgo-sweep submit`"
            )
        return jobs[0]

    def logs(self, job: Job) -> str:
        """Return what the job's driver has printed so far."""
        return _printed(str(self._client.get_job_logs(job.id)))

    def follow(self, job: Job) -> Iterator[str]:
        """Yield what the job's driver prints, until it ends."""
        shown = 0
        while True:
            ended = str(self._client.get_job_status(job.id)) in _ENDED
            text = self.logs(job)
            if len(text) > shown:
                yield text[shown:]
                shown = len(text)
            if ended:
                return
            time.sleep(_POLL_S)

    def stop(self, job: Job) -> None:
        """End a job at once and wait until it has ended; what is finished is in its store.

        Raises:
            TaskError: it goes on all the same.
        """
        self._client.stop_job(job.id)
        if (status := self._ended(job.id, _STOP_S)) not in _ENDED:
            raise TaskError(
                f"job {job.id} on the cluster at {self.address} is {status} still, {_STOP_S:g} s "
                "after it was told to end; look at it with `dipgo-sweep status --address`"
            )

    def answer(self, command: Sequence[str], files: str | None = None) -> str:
        """Run a short command on the head and return what it prints.

        files: the folder of a job (`Job.files`), to run it in.

        Raises:
            TaskError: it fails, or takes too long.
        """
        name = f"dipgo-ask-{uuid.uuid4().hex[:12]}"
        self._send(command, name, {"working_dir": files} if files else {}, {})
        try:
            status = self._wait(name)
            text = _printed(str(self._client.get_job_logs(name)))
        finally:
            self._forget(name)
        if status != "SUCCEEDED":
            last = "\n".join(text.splitlines()[-_SHOWN_LINES:])
            raise TaskError(
                f"`{shlex.join(command)}` on the cluster at {self.address} ended as {status}; is "
                f"dipgo-sweep installed on its nodes?\n{last}"
            )
        return text

    def versions(self) -> dict[str, str]:
        """Return the versions installed on the head, as `installed_versions` gives them here.

        Raises:
            TaskError: dipgo-sweep is not there, or does not tell.
        """
        text = self.answer(["dipgo-sweep", "doctor", "--json"])
        try:
            found: dict[str, str] = json.loads(text[text.index("{") :])
        except ValueError as error:
            raise TaskError(f"the cluster at {self.address} tells no versions: {text}") from error
        return found

    def _send(
        self, command: Sequence[str], name: str, environment: dict[str, Any], about: dict[str, str]
    ) -> None:
        """Start a job; a head that has only just started is given time.

        Raises:
            TaskError: the job server refuses.
        """
        end = time.monotonic() + _HEAD_START_S
        while True:
            try:
                self._client.submit_job(
                    entrypoint=shlex.join(command),
                    submission_id=name,
                    runtime_env=environment,
                    metadata=about,
                )
                return
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > end:
                    raise TaskError(
                        f"the job server at {self.address} does not take the job: {error}"
                    ) from error
            time.sleep(_POLL_S)

    def _wait(self, name: str) -> str:
        if (status := self._ended(name, _SMALL_JOB_S)) in _ENDED:
            return status
        self._client.stop_job(name)
        return f"still {status} after {_SMALL_JOB_S:g} s"

    def _ended(self, name: str, within_s: float) -> str:
        """Return the status of a job once it has ended, or what it is when the time is over."""
        end = time.monotonic() + within_s
        while (status := str(self._client.get_job_status(name))) not in _ENDED:
            if time.monotonic() > end:
                break
            time.sleep(_POLL_S / 2)
        return status

    def _forget(self, name: str) -> None:
        if str(self._client.get_job_status(name)) in _ENDED:
            self._client.delete_job(name)


def _printed(log: str) -> str:
    """Return a job's log without the lines that Ray itself puts before it."""
    lines = log.splitlines(keepends=True)
    return "".join(line for line in lines if not any(sign in line for sign in _OF_RAY))


def check_server(address: str, *, insecure: bool) -> None:
    """Refuse addresses that are none of a job server, and servers that anybody may use.

    Raises:
        ConfigError: with what to do instead.
        TaskError: nothing answers there.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"{address} is no address of a job server: give the head's dashboard, such as "
            "http://HEAD:8265 (`run --address HEAD:6379` drives a sweep from a node instead)"
        )
    if insecure or is_loopback(parts.hostname):
        return
    if not token_mode():
        raise ConfigError(
            f"the job server at {address} can be reached from other machines, and RAY_AUTH_MODE is "
            f"not `token` here: see docs/cluster.md. {INSECURE}"
        )
    if _answers_anybody(address):
        raise ConfigError(
            f"the job server at {address} takes jobs from anybody: start the cluster's nodes with "
            f"RAY_AUTH_MODE=token (docs/cluster.md). {INSECURE}"
        )


def _answers_anybody(address: str) -> bool:
    """Ask for the list of jobs without a token.

    Raises:
        TaskError: nothing answers there.
    """
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/api/jobs/", timeout=30):  # noqa: S310
            return True
    except urllib.error.HTTPError as error:
        return error.code not in (401, 403)
    except OSError as error:
        raise TaskError(f"no Ray job server answers at {address}: {error}") from error


def _job(details: Any) -> Job:
    about: Mapping[str, str] = details.metadata
    started = details.start_time
    return Job(
        id=details.submission_id,
        sweep=about[_SWEEP],
        digest=about.get(_DIGEST, ""),
        status=str(getattr(details.status, "value", details.status)),
        message=details.message or "",
        started=None if started is None else started / 1000,
        overrides=tuple(json.loads(about.get(_OVERRIDES, "[]"))),
        files=(details.runtime_env or {}).get("working_dir"),
    )
