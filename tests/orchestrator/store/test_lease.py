"""Leases: one holder at a time, whoever dies or sleeps. Oracle: processes of this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from dipgo_core.errors import StoreError
from orchestrator.records import Record, Task
from orchestrator.store import Lease, LeaseLost, Store, holder, lease, open_store

TASK = Task(kind="search", inputs={"seed": 1})
PREFIX = "sweeps/tiny/lease"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(lease, "LEASE_S", 1.0)
    monkeypatch.setattr(lease, "_SLOWEST_LOOK_S", 0.05)


HOLD = """
import sys, time
from orchestrator.store import open_store
store = open_store(sys.argv[1])
with store.{what}:
    print("held", flush=True)
    time.sleep({seconds})
    store.backend.put("over", b"")
"""


def holding(store: Store, repository: Path, what: str, seconds: float) -> subprocess.Popen[str]:
    code = HOLD.format(what=what, seconds=seconds)
    process = subprocess.Popen(
        [sys.executable, "-c", code, store.url], stdout=subprocess.PIPE, text=True, cwd=repository
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def check_until_lost(held: Lease) -> None:
    while True:
        held.check()
        time.sleep(0.01)


def of_another_machine(store: Store, epoch: int = 1) -> None:
    """Write a lease as a machine would that this one cannot look into."""
    far = {**asdict(holder.myself()), "boot": "another", "host": "far", "pid": 7}
    store.backend.put(f"{PREFIX}/{epoch:08d}.json", json.dumps(far).encode())


def test_lease_refuses_a_second_driver_and_is_free_when_the_first_is_killed(
    store: Store, repository: Path
) -> None:
    with holding(store, repository, 'lease("tiny")', 60) as driver:
        refusal = f"sweep 'tiny' in .* process {driver.pid} on .* since .*--wait"
        with pytest.raises(StoreError, match=refusal), store.lease("tiny"):
            pass
        with store.lease("another"):
            pass
        assert store.runner("tiny") is not None
        driver.send_signal(signal.SIGKILL)
    assert store.runner("tiny") is None
    with store.lease("tiny"):
        pass


def test_lease_is_free_after_use_and_leaves_one_epoch(store: Store) -> None:
    for _ in range(3):
        with store.lease("tiny") as held:
            held.check()
    assert store.runner("tiny") is None
    assert [*store.backend.list(PREFIX)] == [f"{PREFIX}/00000003.beat", f"{PREFIX}/00000003.json"]


def test_lease_waits_for_the_holder(store: Store, repository: Path) -> None:
    with holding(store, repository, 'lease("tiny")', 1), store.lease("tiny", wait_s=60):
        assert store.backend.exists("over")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("wait_s", [0, 60])
def test_lease_of_a_silent_machine_expires_by_the_observers_clock(
    store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, wait_s: float
) -> None:
    monkeypatch.setattr(lease, "_SILENT_S", 0.1)
    of_another_machine(store)
    began = time.monotonic()
    with store.lease("tiny", wait_s=wait_s):
        assert time.monotonic() - began > 1.0  # what the observer has to see itself
    assert "sweep 'tiny' is" in caplog.text
    assert "by process 7 on far" in caplog.text


@pytest.mark.usefixtures("quick")
def test_lease_of_another_machine_that_lives_is_refused_at_its_next_beat(store: Store) -> None:
    of_another_machine(store)
    beat = threading.Timer(0.3, store.backend.put, (f"{PREFIX}/00000001.beat", b"2"))
    beat.start()
    with pytest.raises(StoreError, match="process 7 on far.*run --wait"), store.lease("tiny"):
        pass
    beat.join()


def test_lease_of_a_machine_silent_for_an_hour_is_free_at_once(store: Store) -> None:
    of_another_machine(store)
    make_silent(store, 2 * 3600)
    with store.lease("tiny") as held:
        held.check()


def test_lease_of_a_process_that_the_machine_hides_is_not_taken_at_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_another_user(pid: int, signal_number: int) -> None:
        raise PermissionError

    with store.lease("tiny") as held:
        monkeypatch.setattr(holder, "_started", lambda pid: None)  # hidepid=2
        monkeypatch.setattr("os.kill", of_another_user)
        assert "process" in str(store.runner("tiny"))
        held.check()


@pytest.mark.usefixtures("quick")
def test_who_waits_is_told_for_whom_and_stands_a_short_loss_of_the_storage(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_another_machine(store)
    monkeypatch.setattr(store.backend, "list", failing_once(store.backend.list))
    told: list[object] = []
    kept = lease.held_lease(store.backend, PREFIX, what="x", on_wait=told.append)
    with kept as held:
        held.check()
    assert "process 7 on far" in str(told[0])


def failing_once(real: Callable[[str], object]) -> Callable[[str], object]:
    """Fail at the second call."""
    calls: list[str] = []

    def call(prefix: str) -> object:
        calls.append(prefix)
        if len(calls) == 2:
            raise StoreError("SlowDown")
        return real(prefix)

    return call


def make_silent(store: Store, seconds: float) -> None:
    file = Path(store.sweep_file_place("tiny", "lease/00000001.json"))
    os.utime(file, (time.time() - seconds,) * 2)


@pytest.mark.usefixtures("quick")
def test_lease_is_kept_alive_against_observers_elsewhere(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store.lease("tiny") as held:
        monkeypatch.setattr(holder, "_boot", lambda: "another")
        with pytest.raises(StoreError, match="being run"), store.lease("tiny", wait_s=2.5):
            pass
        held.check()


@pytest.mark.usefixtures("quick")
def test_holder_that_slept_finds_that_it_lost(store: Store) -> None:
    with store.lease("tiny") as held:
        of_another_machine(store, epoch=2)
        with pytest.raises(LeaseLost, match="process 7 on far since .* holds it now"):
            check_until_lost(held)
    assert store.backend.get(f"{PREFIX}/00000002.beat") is None  # not released by the loser


@pytest.mark.usefixtures("quick")
def test_holder_whose_lease_was_deleted_has_lost_it(store: Store) -> None:
    with store.lease("tiny") as held:
        store.backend.delete(f"{PREFIX}/00000001.json")
        with pytest.raises(LeaseLost, match="another process holds it"):
            check_until_lost(held)


def test_runner_on_another_machine_is_dead_after_an_hour_of_silence(store: Store) -> None:
    of_another_machine(store)
    assert "process 7 on far" in str(store.runner("tiny"))
    make_silent(store, 2 * 3600)
    assert store.runner("tiny") is None


@pytest.mark.usefixtures("quick")
def test_holder_that_cannot_reach_the_storage_loses_the_lease(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise StoreError("no route")

    with store.lease("tiny") as held:
        monkeypatch.setattr(store.backend, "put", refuse)
        held.check()  # a short loss is none
        with pytest.raises(LeaseLost, match="out of reach"):
            check_until_lost(held)


def test_observer_that_slept_does_not_take_an_epoch_of_the_past(store: Store) -> None:
    for _ in range(3):
        with store.lease("tiny"):
            pass
    assert lease._won(store.backend, PREFIX, 2) is None  # held, released and swept away long ago
    assert [*store.backend.list(PREFIX)] == [f"{PREFIX}/00000003.beat", f"{PREFIX}/00000003.json"]


@pytest.mark.usefixtures("quick")
def test_lease_survives_a_damaged_file(store: Store) -> None:
    store.backend.put(f"{PREFIX}/00000001.json", b"{torn")
    began = time.monotonic()
    with store.lease("tiny"):
        assert time.monotonic() - began > 1.0


def test_one_of_many_threads_holds_the_lease_at_a_time(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_SLOWEST_LOOK_S", 0.05)
    inside, most = [], []

    def work() -> None:
        with store.claim(TASK.key):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8


AT_ONCE = """
import sys, time
from pathlib import Path
from dipgo_core.errors import StoreError
from orchestrator.store import open_store
store, go = open_store(sys.argv[1]), Path(sys.argv[2])
print("ready", flush=True)
while not go.exists():
    pass
try:
    with store.lease("tiny"):
        print("held", flush=True)
        sys.stdin.readline()
except StoreError as error:
    print("refused" if "being run by process" in str(error) else error, flush=True)
"""


def test_of_many_drivers_at_the_same_instant_one_works(
    store: Store, tmp_path: Path, repository: Path
) -> None:
    command = [sys.executable, "-c", AT_ONCE, store.url, str(tmp_path / "go")]
    pipe = subprocess.PIPE
    drivers = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=repository)
        for _ in range(4)
    ]
    for driver in drivers:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    answers = [driver.stdout.readline().strip() for driver in drivers if driver.stdout]
    for driver in drivers:
        driver.communicate("", timeout=60)
    assert sorted(answers) == ["held", "refused", "refused", "refused"]


def test_claim_keeps_others_out_until_released(store: Store, repository: Path) -> None:
    with holding(store, repository, f'claim("{TASK.key}")', 1), store.claim(TASK.key):
        assert store.backend.exists("over")


def test_claim_of_a_finished_task_leaves_nothing(store: Store) -> None:
    with store.claim(TASK.key):
        done = Record(key=TASK.key, kind=TASK.kind, state="done", inputs=TASK.inputs)
        store.put_record(done)
    assert [*store.backend.list("claims")] == []


def test_stop_is_asked_for_seen_and_forgotten(store: Store) -> None:
    assert not store.stop_requested("tiny")
    store.request_stop("tiny")
    assert store.stop_requested("tiny")
    store.clear_stop("tiny")
    assert not store.stop_requested("tiny")
