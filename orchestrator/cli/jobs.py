"""A sweep on a cluster, from elsewhere: `submit`, and `status`, `logs`, `stop` with --address."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from dipgo_core.errors import ConfigError
from orchestrator.cargo import SWEEP_FILE, Cargo, pack
from orchestrator.cli.show import print_json, say
from orchestrator.executors.ray_tune.jobs import Job, JobServer
from orchestrator.secrets import has_credentials, redact, spelled_out
from orchestrator.sweep_file import load_sweep
from orchestrator.versions import differences, installed_versions


def submit_and_show(
    file: Path, overrides: Sequence[str], address: str, *, insecure: bool = False
) -> None:
    """Send a sweep to a cluster, unless that very sweep is there and has not ended.

    Raises:
        ConfigError: the sweep cannot be sent, or the cluster has other versions installed.
        TaskError: the cluster does not answer.
    """
    sweep = load_sweep(file, overrides)
    _check_tracking(sweep.tracking.uri, file, overrides)
    server = JobServer(address, insecure=insecure)
    with tempfile.TemporaryDirectory() as folder:
        tracking = tracking_override(sweep.tracking.uri)
        cargo = pack(file, [*overrides, *tracking], Path(folder))
        running = next((job for job in server.jobs(sweep.name) if not job.ended), None)
        if running is not None:
            _tell_running(running, cargo, file, address)
            return
        _check_versions(server)
        command = _on_cluster("run", cargo.overrides)
        job = server.submit(
            [*command, "--insecure"] if insecure else command,
            sweep=sweep.name,
            digest=cargo.digest,
            overrides=cargo.overrides,
            files=cargo.folder,
        )
    say(f"sent as job {job}")
    if remark := tracking_remark(sweep.tracking.uri, tracking):
        say(remark, stderr=True)
    for verb in ("status", "logs -f", "stop"):
        name, *flags = verb.split()
        say(f"  {' '.join(['dipgo-sweep', name, str(file), *flags, '--address', address])}")


def status_of_job(
    file: Path, overrides: Sequence[str], address: str, insecure: bool, *, as_json: bool
) -> None:
    """Show how a sweep's job is, and what the store says of its tasks."""
    server, job = _job_of(file, overrides, address, insecure)
    command = _on_cluster("status", job.overrides)
    if as_json:
        text = server.answer([*command, "--json"], job.files)
        about = {"id": job.id, "status": job.status, "message": job.message}
        print_json({"job": about, **json.loads(text[text.index("{") :])})
        return
    since = "" if job.started is None else time.strftime("%F %T", time.localtime(job.started))
    say(f"job {job.id}: {job.status.lower()}{f', started {since}' if since else ''}")
    if job.message:
        say(job.message)
    say(server.answer(command, job.files).rstrip())


def logs_of_job(
    file: Path, overrides: Sequence[str], address: str, insecure: bool, *, follow: bool
) -> None:
    """Print what a sweep's driver prints; follow: until it ends."""
    server, job = _job_of(file, overrides, address, insecure)
    for text in server.follow(job) if follow else [server.logs(job)]:
        say(text.rstrip("\n"))


def stop_job(
    file: Path, overrides: Sequence[str], address: str, insecure: bool, *, now: bool
) -> None:
    """Let the running tasks of a sweep's job end and start no more; now: end it at once."""
    server, job = _job_of(file, overrides, address, insecure)
    if job.ended:
        say(f"job {job.id} has ended already: {job.status.lower()}")
    elif now:
        server.stop(job)
        say(f"job {job.id} is ended; what is finished is kept, `submit` goes on with the rest")
    else:
        say(server.answer(_on_cluster("stop", job.overrides), job.files).rstrip())


def _job_of(
    file: Path, overrides: Sequence[str], address: str, insecure: bool
) -> tuple[JobServer, Job]:
    server = JobServer(address, insecure=insecure)
    return server, server.newest(load_sweep(file, overrides).name)


def _on_cluster(verb: str, overrides: Sequence[str]) -> list[str]:
    """Return a command about the sweep as it was sent."""
    told = [word for override in overrides for word in ("-o", override)]
    return ["dipgo-sweep", verb, SWEEP_FILE, *told]


def _check_tracking(uri: str | None, file: Path, overrides: Sequence[str]) -> None:
    """Refuse to send a password: a job's command and files are shown to who sees the cluster.

    Raises:
        ConfigError: the sweep file or an override spells it out.
    """
    written = "\n".join([file.read_text(encoding="utf-8-sig"), *overrides])
    if uri is not None and spelled_out(uri, written):
        raise ConfigError(
            f"tracking.uri is {redact(uri)}: a password must not travel with a job. Leave it out "
            "and set MLFLOW_TRACKING_URI on the cluster's nodes, or write uri: ${NAME} and set "
            "NAME there"
        )


def tracking_override(uri: str | None) -> list[str]:
    """Return the override that names the tracking server of this machine, if the file names none.

    An address with a password stays here: what a job is started with is shown to who sees the
    cluster.
    """
    known = os.environ.get("MLFLOW_TRACKING_URI", "")
    sent = uri is None and known.startswith(("http://", "https://")) and not has_credentials(known)
    return [f"tracking.uri={known}"] if sent else []


def tracking_remark(uri: str | None, sent: Sequence[str]) -> str | None:
    """Return what to know of tracking that is left to the cluster; None: a server is named."""
    if sent or (uri is not None and uri.startswith(("http://", "https://"))):
        return None
    return (
        "no MLflow server is named: unless the cluster sets MLFLOW_TRACKING_URI, runs are tracked "
        "in the job's folder, which Ray deletes. Results and reports are in the storage all the "
        "same; to track, too: -o tracking.uri=http://HOST:5000, or `dipgo-sweep sync` here later"
    )


def _tell_running(job: Job, cargo: Cargo, file: Path, address: str) -> None:
    """Say that a sweep is there already.

    Raises:
        ConfigError: it is there with other settings.
    """
    if job.digest != cargo.digest:
        raise ConfigError(
            f"job {job.id} runs this sweep with other settings or files; let it end, or stop it "
            f"first: dipgo-sweep stop {file} --address {address}"
        )
    say(f"job {job.id} is {job.status.lower()} already; nothing was sent")


def _check_versions(server: JobServer) -> None:
    """Compare what is installed here and there.

    Raises:
        ConfigError: something differs; every difference is listed.
    """
    lines = differences(installed_versions(), server.versions())
    if lines:
        told = "\n".join(f"  {line}" for line in lines)
        raise ConfigError(
            f"the cluster at {server.address} has other versions installed:\n{told}\nInstall the "
            "same on both sides: keys of results, and so what counts as done, depend on them"
        )
