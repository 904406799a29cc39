"""Leases: one holder at a time, by `put_if_absent` alone and without a clock that hosts share.

``<prefix>/<n>.json`` tells who holds epoch n and is written only if absent; the holder rewrites
``<prefix>/<n>.beat`` as long as it lives. Whoever wants the lease writes n + 1 once n was released,
its holder was a process of this machine that is gone, or its beat did not change for `LEASE_S` of
the observer's own clock: even who does not want to wait looks on until one or the other is plain.
A holder that finds a later epoch (it slept) has lost the lease.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from threading import Event, Lock, Thread

from dipgo_core.errors import StoreError
from orchestrator.store.backend import Backend
from orchestrator.store.holder import HELD_HERE, Holder, myself

logger = logging.getLogger(__name__)

#: Seconds between the signs of life of a holder.
HEARTBEAT_S = 10.0
#: Seconds without one after which a holder counts as dead.
LEASE_S = 60.0
#: Seconds of silence, told by clocks of different machines, after which a holder is dead.
SURELY_DEAD_S = 3600.0

_RELEASED = b"released"
_FIRST_LOOK_S, _SLOWEST_LOOK_S = 0.05, 2.0
#: Seconds of waiting that are not worth a word.
_SILENT_S = 1.0


class LeaseLost(StoreError):
    """Another process holds the lease now: this one slept, or could not reach the storage."""


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
        HELD_HERE.discard(self._token)

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


#: Called now and then by whoever waits for a lease, with the holder that is waited for.
OnWait = Callable[[Holder | None], None]


@contextmanager
def held_lease(
    backend: Backend,
    prefix: str,
    *,
    what: str,
    wait_s: float = 0.0,
    durable: bool = True,
    on_wait: OnWait = lambda holder: None,
) -> Iterator[Lease]:
    """Hold the lease under a prefix; `what` names it in the log and in the refusal.

    wait_s: how long to wait for a holder that lives; for signs of life of one that this machine
    cannot see it waits in any case, at most `LEASE_S`.
    durable: whether it has to outlive the holder's machine, so that others can tell who held it.

    Raises:
        StoreError: another process holds it, and still does after `wait_s`.
    """
    lease = _acquire(backend, prefix, what, wait_s, durable, on_wait)
    try:
        yield lease
    finally:
        lease.release()


def living_holder(backend: Backend, prefix: str) -> Holder | None:
    """Return who holds a lease, as far as one look can tell; None if nobody does.

    A holder that this machine cannot see counts as dead once it has been silent for
    `SURELY_DEAD_S`.
    """
    epoch = _latest(backend, prefix)
    if not epoch or backend.get(_beat(prefix, epoch)) == _RELEASED:
        return None
    holder = _holder(backend, prefix, epoch)
    dead = holder is None or holder.gone or _surely_dead(backend, prefix)
    return None if dead else holder


def _surely_dead(backend: Backend, prefix: str) -> bool:
    """Return whether nobody wrote there for so long that clocks which differ do not matter."""
    last = max((entry.modified for entry in backend.entries(prefix)), default=0.0)
    return time.time() - last > SURELY_DEAD_S


@dataclass
class _Watched:
    """What an observer has seen of a lease: epoch, holder and beat, and when those changed."""

    epoch: int = 0
    holder: Holder | None = None
    beat: bytes | None = None
    changed: float = 0.0
    changes: int = 0
    looked: float = -math.inf

    def look(self, epoch: int, beat: bytes | None, holder: Holder | None) -> float:
        """Return for how many seconds nothing has changed."""
        self.looked = _now()
        if (epoch, beat) != (self.epoch, self.beat):
            self.changes += self.epoch > 0  # the first look shows no change
            self.epoch, self.beat, self.changed = epoch, beat, self.looked
        self.holder = holder
        return self.looked - self.changed

    @property
    def lives(self) -> bool:
        """Whether somebody who lives has the lease, as far as can be told by now."""
        return self.changes > 0 or (self.holder is not None and self.holder.is_seen)


def _acquire(
    backend: Backend, prefix: str, what: str, wait_s: float, durable: bool, on_wait: OnWait
) -> Lease:
    """Look until the lease is free, or is known to be held by somebody who lives.

    Whoever waits already stays calm if the storage is out of reach for less than `LEASE_S`.
    """
    began, pause, watched, told = _now(), _FIRST_LOOK_S, _Watched(), False
    while True:
        try:
            lease = _take_if_free(backend, prefix, watched, durable=durable)
        except StoreError as error:
            if _now() - watched.looked > LEASE_S:
                raise
            logger.warning("%s is waited for, and cannot be looked at: %s", what, error)
            lease = None
        if lease is not None:
            return lease
        if watched.lives and _now() - began >= wait_s:
            raise StoreError(_refusal(backend, what, watched.holder))
        if not told and _now() - began > _SILENT_S:
            told = True
            _tell(what, watched, wait_s)
        on_wait(watched.holder)
        time.sleep(pause)
        pause = min(2 * pause, _SLOWEST_LOOK_S)


def _refusal(backend: Backend, what: str, holder: Holder | None) -> str:
    return (
        f"{what} in {backend.url} is being run by {holder or 'another process'}; wait for it "
        "(`run --wait` does), or stop that process and run again (nothing finished is lost). If "
        f"its machine dies, its lease expires after {LEASE_S:g} s"
    )


def _tell(what: str, watched: _Watched, wait_s: float) -> None:
    who = watched.holder or "another process"
    if watched.lives or wait_s > LEASE_S:
        logger.warning("%s is being run by %s: waiting for it", what, who)
    else:
        patience = "%s is held by %s: waiting for a sign of life, for %g s at most"
        logger.warning(patience, what, who, LEASE_S)


def _take_if_free(
    backend: Backend, prefix: str, watched: _Watched, *, durable: bool
) -> Lease | None:
    """Look once, and take the lease unless somebody has it, or is faster."""
    epoch = _latest(backend, prefix)
    if epoch and not _is_over(backend, prefix, epoch, watched):
        return None
    token = _won(backend, prefix, epoch + 1, durable=durable)
    return None if token is None else Lease(backend, prefix, epoch + 1, token)


def _is_over(backend: Backend, prefix: str, epoch: int, watched: _Watched) -> bool:
    """Return whether the holder of an epoch let go of it, or is dead."""
    beat, holder = backend.get(_beat(prefix, epoch)), _holder(backend, prefix, epoch)
    silent_s = watched.look(epoch, beat, holder)
    if beat == _RELEASED or (holder is not None and holder.gone):
        return True
    seen = holder is not None and holder.is_seen
    return silent_s > LEASE_S or (not seen and _surely_dead(backend, prefix))


def _won(backend: Backend, prefix: str, epoch: int, *, durable: bool = True) -> str | None:
    """Try to become the holder of an epoch; return the token of it, None if another one was faster.

    A storage that fails half-way may have written the epoch all the same: then its token is not
    among those held here, by which this process knows that it does not hold it.
    """
    me = myself()
    HELD_HERE.add(me.token)
    try:
        won = _write_epoch(backend, prefix, epoch, me, durable)
    except BaseException:
        HELD_HERE.discard(me.token)
        raise
    if not won:
        HELD_HERE.discard(me.token)
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


def _now() -> float:
    """Return seconds of this machine's clock, those that it slept included."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
