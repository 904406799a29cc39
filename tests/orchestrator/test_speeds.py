"""What a point takes from latency records; the expected figures are those written into them."""

from __future__ import annotations

from typing import Any

from orchestrator.records import Record
from orchestrator.speeds import speed_of


def figure(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 1, "high": value + 1, "p95": value + 2, "n": 10}


def record(batch_size: int = 1, **outputs: Any) -> Record:
    figures = {
        "latency_ms": figure(40),
        "speedup": figure(2),
        "loop_ms": figure(30),
        "loop_speedup": figure(3),
        "images_per_second": figure(25 * batch_size),
        "dense_images_per_second": figure(12),
    }
    return Record(
        key=str(batch_size),
        kind="latency",
        state="done",
        inputs={"device": "a fast GPU", "batch_size": batch_size},
        outputs={**figures, "usable": True, "disturbed": None, "unchecked": [], **outputs},
    )


def test_speed_of_has_both_spans_with_intervals() -> None:
    fields = speed_of(record())

    assert (fields["latency_ms"], fields["latency_ms_p95"]) == (40, 42)
    assert (fields["loop_speedup_low"], fields["loop_speedup"], fields["loop_speedup_high"]) == (
        2, 3, 4,
    )  # fmt: skip
    assert (fields["device"], fields["latency_usable"]) == ("a fast GPU", True)
    assert fields["latency_note"] is None


def test_speed_of_has_throughput_of_every_batch_size() -> None:
    fields = speed_of(record(1), [record(8)])

    assert fields["throughput"] == {
        "1": {"value": 25, "low": 24, "high": 26},
        "8": {"value": 200, "low": 199, "high": 201},
    }
    assert fields["dense_throughput"]["8"]["value"] == 12
    assert fields["latency_ms"] == 40


def test_disturbed_measurement_gives_a_reason_and_no_figure() -> None:
    fields = speed_of(record(usable=False, disturbed="others used 2.0 of 2 cores"))

    assert fields["latency_usable"] is False
    assert fields["latency_note"] == "batch 1: others used 2.0 of 2 cores"
    assert "speedup" not in fields
    assert fields["throughput"] == {}


def test_disturbed_larger_batch_only_costs_its_throughput() -> None:
    fields = speed_of(record(1), [record(8, usable=False, disturbed="a busy GPU")])

    assert fields["speedup"] == 2
    assert list(fields["throughput"]) == ["1"]
    assert fields["latency_note"] == "batch 8: a busy GPU"


def test_note_says_what_could_not_be_checked() -> None:
    fields = speed_of(record(unchecked=["load of the GPU: not supported"]))

    assert fields["latency_usable"] is True
    assert fields["latency_note"] == "batch 1: load of the GPU: not supported"


def test_memory_and_energy_are_those_of_the_pruned_run() -> None:
    memory = {"dense": {"allocated": 9 * 2**20}, "pruned": {"allocated": 4 * 2**20}}
    fields = speed_of(record(memory=memory, energy={"dense_j": 90.0, "pruned_j": 40.0}))

    assert (fields["peak_memory_mb"], fields["energy_j"]) == (4, 40)


def test_note_says_that_times_had_not_settled() -> None:
    fields = speed_of(record(warmup={"pairs": 20, "stable": False}))

    assert fields["speedup"] == 2
    assert fields["latency_note"] == "batch 1: times had not settled after 20 pairs of warm-up"
    for stable in (True, None):
        assert speed_of(record(warmup={"pairs": 7, "stable": stable}))["latency_note"] is None
