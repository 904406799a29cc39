"""Holder: which process holds a lease, and what this machine can see of it."""

from __future__ import annotations

import os
import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

#: Tokens of the leases that this process holds, or is about to.
HELD_HERE: set[str] = set()


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
        if not self._is_of_here:
            return False
        if not _may_run(self.pid, self.started):
            return True
        return self.pid == os.getpid() and self.token not in HELD_HERE

    @property
    def is_seen(self) -> bool:
        """Return whether this machine sees the process run, and hold the lease."""
        return self._is_of_here and not self.gone and _started(self.pid) == self.started

    @property
    def _is_of_here(self) -> bool:
        here = (_boot(), _namespace())
        return bool(self.boot and self.started) and here == (self.boot, self.namespace)


def myself() -> Holder:
    """Return this process as the holder of a new epoch."""
    return Holder(
        host=socket.gethostname(),
        boot=_boot(),
        namespace=_namespace(),
        pid=os.getpid(),
        started=_started(os.getpid()) or "",
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


def _may_run(pid: int, started: str) -> bool:
    """Return whether a process runs; of other users' that /proc hides (hidepid) nobody knows."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _started(pid) in (started, None)


def _started(pid: int) -> str | None:
    """Return when a process started, in ticks since boot; "" if it has ended, None if hidden."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name in parentheses may hold anything
    return "" if fields[0] in "ZX" else fields[19]
