"""Leases: one holder at a time, by `put_if_absent` alone and without a clock that hosts share.

``<prefix>/<n>.json`` tells who holds epoch n and is written only if absent; the holder rewrites
``<prefix>/<n>.beat`` as long as it lives. Whoever wants the lease writes n + 1 once n was released,
its holder was a process of this machine that is gone, or its beat did not change for `LEASE_S` of
the observer's own clock. A holder that finds a later epoch (it slept) has lost the lease.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Lock, Thread

from dipgo_core.errors import StoreError
from orchestrator.store.backend import Backend

logger = logging.getLogger(__name__)

#: Seconds between the signs of life of a holder.
HEARTBEAT_S = 10.0
#: Seconds without one after which a holder counts as dead.
LEASE_S = 60.0
#: Seconds of silence, told by clocks of different machines, after which a holder is dead.
SURELY_DEAD_S = 3600.0

_RELEASED = b"released"
#: Tokens of the leases that this process holds, or is about to.
_HELD_HERE: set[str] = set()
_FIRST_LOOK_S, _SLOWEST_LOOK_S = 0.05, 2.0


class LeaseLost(StoreError):
    """Another process holds the lease now: this one slept, or could not reach the storage."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lease. started: of the process, in ticks since boot; token: of this epoch."""

    host: str
    boot: str
    namespace: str
    pid: int
    started: str
    since: float
    token: str

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host} since {since}"

    @property
    def gone(self) -> bool:
        """Return whether this machine knows that the process has ended, or let go of the lease."""
        if not self.boot or (_boot(), _namespace()) != (self.boot, self.namespace):
            return False
        if not self.started or _started(self.pid) != self.started:
            return True
        return self.pid == os.getpid() and self.token not in _HELD_HERE


class Lease:
    """A lease that is held; a thread of its own keeps it alive until `release`."""

    def __init__(self, backend: Backend, prefix: str, epoch: int, token: str) -> None:
        self._token = token
        self._backend = backend
        self._prefix = prefix
        self._epoch = epoch
        self._beats = 0
        self._lost: str | None = None
        self._confirmed = _now()
        self._over = Event()
        self._lock = Lock()  # of the beat's file
        self._thread = Thread(target=self._keep_alive, name=f"lease {prefix}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """See that the lease is still held; cheap, unless the heartbeat is late.

        Raises:
            LeaseLost: it is not, or nobody can tell since the storage is out of reach.
        """
        if self._lost is None and _now() - self._confirmed > LEASE_S / 2:
            self._confirm()
        if self._lost is None and _now() - self._confirmed > LEASE_S:
            self._lost = f"it could not be renewed for {LEASE_S:g} s, the storage is out of reach"
        if self._lost is not None:
            raise LeaseLost(
                f"the lease {self._prefix} in {self._backend.url} is lost: {self._lost}; nothing "
                "finished is lost, run again to go on"
            )

    def release(self) -> None:
        """Let others have it at once."""
        self._over.set()
        if self._lock.acquire(timeout=HEARTBEAT_S):  # else the storage hangs, and it expires
            try:
                self._put_released()
            finally:
                self._lock.release()
            self._thread.join()
        _HELD_HERE.discard(self._token)

    def _put_released(self) -> None:
        if self._lost is None:
            try:
                self._backend.put(_beat(self._prefix, self._epoch), _RELEASED)
            except StoreError as error:
                logger.warning("%s is not released, it expires: %s", self._prefix, error)

    def _keep_alive(self) -> None:
        while not self._over.wait(HEARTBEAT_S) and self._lost is None:
            self._confirm()

    def _confirm(self) -> None:
        """Beat, then look for a later epoch (in this order: a write renews what NFS caches)."""
        with self._lock:
            if self._over.is_set():
                return
            began = _now()
            try:
                self._beats += 1
                beat = str(self._beats).encode()
                self._backend.put(_beat(self._prefix, self._epoch), beat)
                latest = _latest(self._backend, self._prefix)
            except StoreError as error:
                logger.warning("no heartbeat of %s: %s", self._prefix, error)
                return
            if latest != self._epoch:  # a later one; or somebody deleted all of them
                holder = _holder(self._backend, self._prefix, latest)
                self._lost = f"{holder or 'another process'} holds it now"
            else:
                self._confirmed = began


@contextmanager
def held_lease(
    backend: Backend, prefix: str, *, what: str, wait_s: float = 0.0, durable: bool = True
) -> Iterator[Lease]:
    """Hold the lease under a prefix; `what` names it in the refusal.

    durable: whether it has to outlive the holder's machine, so that others can tell who held it.

    Raises:
        StoreError: another process holds it, and still does after `wait_s`.
    """
    lease = _acquire(backend, prefix, what, wait_s, durable)
    try:
        yield lease
    finally:
        lease.release()


def living_holder(backend: Backend, prefix: str) -> Holder | None:
    """Return who holds a lease, as far as one look can tell; None if nobody does.

    A holder on another machine counts as dead once it has been silent for `SURELY_DEAD_S`, so long
    that clocks which differ do not matter.
    """
    epoch = _latest(backend, prefix)
    if not epoch or backend.get(_beat(prefix, epoch)) == _RELEASED:
        return None
    last = max((entry.modified for entry in backend.entries(prefix)), default=0.0)
    holder = _holder(backend, prefix, epoch)
    silent = time.time() - last > SURELY_DEAD_S
    return None if holder is None or holder.gone or silent else holder


@dataclass
class _Watched:
    """What an observer has seen of a holder: its epoch, its beat, and when that changed."""

    epoch: int = -1
    beat: bytes | None = None
    changed: float = 0.0

    def look(self, epoch: int, beat: bytes | None) -> float:
        """Return for how many seconds nothing has changed."""
        if (epoch, beat) != (self.epoch, self.beat):
            self.epoch, self.beat, self.changed = epoch, beat, _now()
        return _now() - self.changed


def _acquire(backend: Backend, prefix: str, what: str, wait_s: float, durable: bool) -> Lease:
    began, pause, watched = _now(), _FIRST_LOOK_S, _Watched()
    while True:
        epoch = _latest(backend, prefix)
        holder = _holder(backend, prefix, epoch) if epoch else None
        if _is_free(backend, prefix, epoch, holder, watched):
            token = _won(backend, prefix, epoch + 1, durable=durable)
            if token is not None:
                return Lease(backend, prefix, epoch + 1, token)
            continue  # somebody was faster
        if _now() - began >= wait_s:
            raise StoreError(
                f"{what} in {backend.url} is being run by {holder or 'another process'}; wait for "
                f"it (--wait), or stop that process and run again (nothing finished is lost). If "
                f"its machine died, its lease expires: --wait takes it over after {LEASE_S:g} s"
            )
        time.sleep(pause)
        pause = min(2 * pause, _SLOWEST_LOOK_S)


def _is_free(
    backend: Backend, prefix: str, epoch: int, holder: Holder | None, watched: _Watched
) -> bool:
    if not epoch:
        return True
    beat = backend.get(_beat(prefix, epoch))
    if beat == _RELEASED or (holder is not None and holder.gone):
        return True
    return watched.look(epoch, beat) > LEASE_S


def _won(backend: Backend, prefix: str, epoch: int, *, durable: bool = True) -> str | None:
    """Try to become the holder of an epoch; return the token of it, None if another one was faster.

    A storage that fails half-way may have written the epoch all the same: then its token is not
    among those held here, by which this process knows that it does not hold it.
    """
    me = _myself()
    _HELD_HERE.add(me.token)
    try:
        won = _write_epoch(backend, prefix, epoch, me, durable)
    except BaseException:
        _HELD_HERE.discard(me.token)
        raise
    if not won:
        _HELD_HERE.discard(me.token)
    return me.token if won else None


def _write_epoch(backend: Backend, prefix: str, epoch: int, me: Holder, durable: bool) -> bool:
    """Write an epoch if it is new, and sweep away those before it; return whether it is ours.

    An observer that slept may write an epoch that was held, released and swept away long ago: then
    there is a later one, since the latest is never swept away.
    """
    name = _who(prefix, epoch)
    data = json.dumps(asdict(me), indent=1).encode()
    if not backend.put_if_absent(name, data, durable=durable):
        return False
    if _latest(backend, prefix) > epoch:
        backend.delete(name)
        return False
    for old in [each for each in _epochs(backend, prefix) if each < epoch]:
        backend.delete(_who(prefix, old))
        backend.delete(_beat(prefix, old))
    return True


def _epochs(backend: Backend, prefix: str) -> list[int]:
    names = (name.removeprefix(f"{prefix}/") for name in backend.list(prefix))
    stems = (name.removesuffix(".json") for name in names if name.endswith(".json"))
    return [int(stem) for stem in stems if stem.isdecimal()]


def _latest(backend: Backend, prefix: str) -> int:
    return max(_epochs(backend, prefix), default=0)


def _who(prefix: str, epoch: int) -> str:
    return f"{prefix}/{epoch:08d}.json"


def _beat(prefix: str, epoch: int) -> str:
    return f"{prefix}/{epoch:08d}.beat"


def _holder(backend: Backend, prefix: str, epoch: int) -> Holder | None:
    try:
        return Holder(**json.loads(backend.get(_who(prefix, epoch)) or b"null"))
    except (TypeError, ValueError):  # swept away meanwhile, or damaged
        return None


def _myself() -> Holder:
    return Holder(
        host=socket.gethostname(),
        boot=_boot(),
        namespace=_namespace(),
        pid=os.getpid(),
        started=_started(os.getpid()),
        since=time.time(),
        token=uuid.uuid4().hex,
    )


def _boot() -> str:
    """Return what tells this start of this machine from any other, "" where that is unknown."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text(encoding="ascii").strip() if file.exists() else ""


def _namespace() -> str:
    """Return the name of the space that process ids count in: containers have their own."""
    link = Path("/proc/self/ns/pid")
    return str(link.readlink()) if link.is_symlink() else ""


def _started(pid: int) -> str:
    """Return when a process started, in ticks since boot; "" if it does not run."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()  # the name in parentheses may hold anything
    return "" if fields[0] in "ZX" else fields[19]


def _now() -> float:
    """Return seconds of this machine's clock, those that it slept included."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
