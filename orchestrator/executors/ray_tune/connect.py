"""Connects to a Ray cluster, or starts one on this machine; says which clusters are refused.

Whoever reaches a cluster's ports can run code on it, so one that others can reach must ask for a
token (https://docs.ray.io/en/latest/ray-security/token-auth.html). Nothing here switches that off.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray

from dipgo_core.errors import ConfigError, TaskError
from orchestrator.executors.placement import NODE

logger = logging.getLogger(__name__)

_STORE_MEMORY_BYTES = 128 * 2**20  # tasks and records travel through Ray, images never
_STARTS = 3
_QUIET: Mapping[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
_ENVIRONMENT: Mapping[str, str] = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints a banner even when silenced
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_agent_register_timeout_ms": "60000",  # a busy machine starts Ray's agents slowly
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # files that go along with a job lie in its folder
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # Tune's snapshots of itself are never read
    "TUNE_MAX_PENDING_TRIALS_PG": "10000",  # the roster bounds what is asked for
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000",
}
_QUIET_LOGGERS = ("ray.tune", "ray.train", "ray.air")
INSECURE = "--insecure runs without; then whoever reaches its ports can run code on it"


def connect(address: str, *, insecure: bool) -> None:
    """Connect this process to a running cluster.

    Raises:
        ConfigError: an address of Ray Client, or a cluster that asks nobody for a token.
        TaskError: nothing answers there.
    """
    refuse_client(address)
    if not insecure and not _stays_here(_host_of(address)):
        _require_token(address)
    try:
        _init(address=address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise TaskError(
            f"no Ray cluster answers at {address!r} ({error}); check --address and RAY_ADDRESS, or "
            "leave both out to run on this machine"
        ) from error
    except ray.exceptions.AuthenticationError as error:
        raise ConfigError(f"the cluster at {address!r} refuses this token: {error}") from error
    if not insecure and not _stays_here(ray.get_runtime_context().gcs_address.rsplit(":", 1)[0]):
        _check_head_asks(address)


def start_local(num_cpus: int | None) -> None:
    """Start Ray on this machine; a busy one may need several attempts, as Ray waits only 30 s.

    Raises:
        TaskError: it does not start.
    """
    for attempt_number in range(1, _STARTS + 1):
        try:
            _init(
                address="local",
                num_cpus=num_cpus,
                resources={NODE: 1.0},
                include_dashboard=False,
                object_store_memory=_STORE_MEMORY_BYTES,
            )
            return
        except Exception as error:  # Ray raises bare ones
            ray.shutdown()
            logger.warning("Ray did not start (attempt %d): %s", attempt_number, error)
            cause = error
    raise TaskError(
        f"Ray does not start on this machine: {cause}\nIs it very busy, or /tmp full? "
        "`--executor local` runs the sweep without Ray"
    ) from cause


def _init(**settings: Any) -> None:
    """Call ``ray.init``, which would put a handler of SIGTERM in the place of ours, that drains."""
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(**settings, **_QUIET)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def refuse_client(address: str) -> None:
    """Refuse addresses of Ray Client, which Tune does not work through.

    Raises:
        ConfigError: it is one.
    """
    if address.startswith("ray://"):
        host = address.removeprefix("ray://").rsplit(":", 1)[0]
        raise ConfigError(
            f"{address} is an address of Ray Client, which a sweep cannot be driven through: it "
            "would end whenever that connection does. On a node of the cluster use --address "
            f"{host}:6379; from elsewhere `dipgo-sweep submit FILE --address http://{host}:8265`"
        )


def is_loopback(host: str) -> bool:
    """Say whether only this machine reaches the host."""
    try:
        found = {row[4][0] for row in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(str(each).split("%")[0]).is_loopback for each in found)


def token_mode() -> bool:
    """Say whether Ray in this process sends a token and asks for one."""
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def _host_of(address: str) -> str:
    return address.rsplit(":", 1)[0].strip("[]")


def _stays_here(host: str) -> bool:
    """`auto` and `local` are looked at once it is known where they lead to."""
    return host in ("auto", "local") or is_loopback(host)


def _require_token(address: str) -> None:
    if not token_mode():
        raise ConfigError(
            f"the cluster at {address} can be reached from other machines, and RAY_AUTH_MODE is "
            f"{os.environ.get('RAY_AUTH_MODE', 'not set')}: start all its nodes with "
            "RAY_AUTH_MODE=token, and set it here with the same token (`ray get-auth-token "
            f"--generate`; docs/cluster.md). {INSECURE}"
        )


def _check_head_asks(address: str) -> None:
    """Refuse a cluster that takes anybody, though this process would send a token.

    Raises:
        ConfigError: its nodes were started without token authentication.
    """
    mode = ray.get(ray.remote(token_mode).options(num_cpus=0).remote(), timeout=180)
    if not mode:
        ray.shutdown()
        raise ConfigError(
            f"the cluster at {address} can be reached from other machines and asks nobody for a "
            "token: start its nodes with RAY_AUTH_MODE=token (docs/cluster.md). " + INSECURE
        )


@contextmanager
def quiet_environment() -> Iterator[None]:
    """Set what Ray and Tune read from the environment, and keep Tune's loggers quiet, for a run."""
    before = dict(os.environ)
    loggers = [logging.getLogger(name) for name in _QUIET_LOGGERS]
    levels = [each.level for each in loggers]
    os.environ.update({k: v for k, v in _ENVIRONMENT.items() if k not in before})
    for each in loggers:
        each.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
        for name in set(os.environ) - set(before):
            if not name.startswith("RAY_AUTH_"):  # Ray asks for tokens where nobody said otherwise
                del os.environ[name]
        os.environ.update(before)
