"""The measuring process on tiny-sd: what it measures, how long it lives, how it dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dipgo_core.config import ModelSettings, SamplerSettings
from dipgo_core.errors import ModelFilesError, TaskError
from dipgo_core.evaluation.device import device_name
from dipgo_core.gates import GateTable
from dipgo_core.pipelines import block_graph, load_model
from orchestrator.facts import ItemSet
from orchestrator.records import Record, Task
from orchestrator.store import Store, open_store
from orchestrator.task import latency_process
from orchestrator.task.latency_process import MeasuringProcess, measured_apart, stop_measuring
from tests.orchestrator.tiny_sweep import item_set

CALLS = 6
SAMPLER = SamplerSettings(scheduler="ddim", steps=CALLS, guidance_scale=3.0).to_json()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with the dense run of tiny-sd (its block graph alone) and two prompts."""
    store = open_store(tmp_path_factory.mktemp("store"))
    store.put_blob(prompts().blob())
    reference = Task(kind="reference", inputs={"model": "tiny-sd"})
    graph = block_graph(load_model(ModelSettings(id="tiny-sd"))).to_json()
    store.put_record(
        Record(
            key=reference.key,
            kind="reference",
            state="done",
            inputs=reference.inputs,
            outputs={"graphs": {"block": graph}},
        )
    )
    return store


def prompts() -> ItemSet:
    return item_set("a red boot", "a blue shirt")


def latency_task(store: Store, **changes: Any) -> Task:
    """Every second call of tiny-sd is skipped."""
    reference = next(iter(store.records().values()))
    model = load_model(ModelSettings(id="tiny-sd"))
    blocks = len(reference.outputs["graphs"]["block"]["blocks"])
    gates = GateTable.all_keep(CALLS, blocks).keep.copy()
    gates[1::2] = False
    inputs = {
        "model": {**model.settings.to_json(), "weights_sha256": model.weights_sha256},
        "granularity": "block",
        "sampler": SAMPLER,
        "dense_sampler": SAMPLER,
        "keep": list(GateTable(gates).to_strings()),
        "device": device_name(),
        "threads": 1,
        "batch_size": 2,
        "warmup": 0,
        "max_warmup": 0,
        "min_runs": 4,
        "min_seconds": 0,
        "shown_sha256": prompts().sha256,
        **changes,
    }
    return Task(
        kind="latency",
        inputs=inputs,
        needs=(reference.key,),
        options={"tries": 1, "items_sha256": prompts().sha256},
        affinity="tiny-sd/float32",
        exclusive=True,
    )


@pytest.fixture(scope="module")
def measured(store: Store) -> Iterator[tuple[dict[str, Any], int]]:
    """The outputs of one task, and the process that measured it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DIFFUSERS_ATTN_BACKEND", "_native_math")  # the worker's, not the measure's
        outputs = measured_apart(latency_task(store), store.url)
    assert latency_process._current is not None
    yield dict(outputs), latency_process._current.pid
    stop_measuring()


@pytest.fixture(autouse=True)
def serving(measured: Any) -> Any:
    return measured


def test_skipped_calls_are_measured_as_faster(measured: Any) -> None:
    outputs, _ = measured
    assert outputs["speedup"]["value"] > 1.2
    assert outputs["speedup"]["n"] == 4
    assert outputs["dense_latency_ms"]["value"] > outputs["latency_ms"]["value"]


def test_loop_lies_inside_the_whole_and_gains_more(measured: Any) -> None:
    outputs, _ = measured
    assert outputs["loop_ms"]["value"] < outputs["latency_ms"]["value"]
    assert outputs["dense_loop_ms"]["value"] < outputs["dense_latency_ms"]["value"]
    assert outputs["loop_speedup"]["value"] > outputs["speedup"]["value"]  # decoding stays


def test_outputs_say_how_it_was_measured(measured: Any) -> None:
    outputs, _ = measured
    assert outputs["attention"].startswith("AttnProcessor2_0 (native; ")
    assert (outputs["compile"], outputs["threads"], outputs["batch_size"]) == ("none", 1, 2)
    assert {"torch", "diffusers", "transformers", "python"} <= set(outputs["versions"])
    assert set(outputs["clock_mhz"]) == {"before", "after"}
    assert outputs["energy"] == {"unread": "no GPU is used"}
    assert isinstance(outputs["usable"], bool)


def test_peak_memory_is_that_of_the_whole_process(measured: Any) -> None:
    outputs, _ = measured
    for peak in outputs["memory"].values():
        assert peak["allocated"] is None
        assert peak["resident"] is None or peak["resident"] > 100 * 2**20  # torch alone takes more


def test_next_task_of_the_model_is_measured_by_the_same_process(
    measured: Any, store: Store
) -> None:
    measured_apart(latency_task(store, batch_size=1, min_runs=2), store.url)
    assert latency_process._current is not None
    assert latency_process._current.pid == measured[1]


def test_errors_come_back_as_they_were_raised(store: Store) -> None:
    task = latency_task(store)
    other = {**task.inputs["model"], "weights_sha256": "0" * 64}
    with pytest.raises(ModelFilesError, match="they changed"):
        measured_apart(replace(task, inputs={**task.inputs, "model": other}), store.url)
    with pytest.raises(TaskError, match="KeyError: 'threads'"):
        measured_apart(replace(task, inputs={"device": device_name()}), store.url)


def test_busy_machine_makes_a_measurement_unusable(store: Store) -> None:
    loop = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    busy = [subprocess.Popen(loop, stdout=subprocess.PIPE) for _ in os.sched_getaffinity(0)]
    try:
        for process in busy:
            assert process.stdout is not None
            process.stdout.readline()  # it runs
        outputs = measured_apart(latency_task(store, batch_size=1, min_runs=2), store.url)
    finally:
        for process in busy:
            process.kill()
            process.communicate()
    assert outputs["usable"] is False
    assert "before the measurement, other processes used" in outputs["disturbed"]
    assert outputs["speedup"]["value"] > 0  # figures are kept, marked as they are


def test_process_that_dies_is_a_clear_error(store: Store) -> None:
    process = MeasuringProcess("a test")
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(TaskError, match="ended by signal 9 .*It said:\nit said nothing"):
        process.ask({"task": latency_task(store).to_json(), "store": store.url, "parent": 0})
    assert not process.alive


def test_process_shows_its_last_words(store: Store) -> None:
    process = MeasuringProcess("a test")
    with pytest.raises(TaskError, match="exit code 1(.|\n)*KeyError: 'task'"):
        process.ask({})


def test_process_ends_when_whoever_started_it_is_gone(tmp_path: Path) -> None:
    code = (
        "from orchestrator.task.latency_process import MeasuringProcess\nimport os\n"
        "print(MeasuringProcess('a test').pid, flush=True)\nos._exit(0)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    pid = int(answer.stdout)
    while is_running(pid):  # the test's own limit ends this
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not (state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z")


def test_another_model_gets_another_process(store: Store, measured: Any) -> None:
    other = latency_process._serving(replace(latency_task(store), affinity="tiny-sd/other"))
    assert other.pid != measured[1]
    assert not is_running(measured[1])


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, orchestrator.task.latency_process; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
