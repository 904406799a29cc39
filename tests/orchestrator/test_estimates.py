"""Estimates. Oracle: samples made by a known law, figures worked out by hand."""

from __future__ import annotations

import random

import pytest

from orchestrator.efforts import Effort, Efforts
from orchestrator.estimates import Estimates, Sample, fit
from orchestrator.jobs import Jobs
from orchestrator.plan import build_plan
from orchestrator.planned import PlannedTask
from orchestrator.records import Record
from tests.orchestrator.tiny_sweep import GRAPH, GRAPHS, tiny_facts, tiny_sweep


def effort(images: float = 1, tmacs: float = 0, *, model: str = "m", gpu: bool = False) -> Effort:
    return Effort("images", model, images, tmacs, gpu)


def sample(size: Effort, seconds: float, **more: object) -> Sample:
    return Sample(size, "a device", seconds, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("law", [(0, 0, 2), (0, 3, 0), (4, 0, 0), (4, 0, 2), (5, 1, 2)])
def test_fit_finds_the_law_that_made_the_samples(law: tuple[float, float, float]) -> None:
    draw = random.Random(0)
    sizes = [effort(draw.randint(1, 50), draw.uniform(1, 90)) for _ in range(20)]
    found = fit([sample(e, law[0] + law[1] * e.images + law[2] * e.tmacs) for e in sizes])
    assert (found.constant, found.per_image, found.per_tmac) == pytest.approx(law, abs=1e-6)
    assert found.error == pytest.approx(0, abs=1e-6)


def test_fit_of_equal_tasks_grows_with_the_work() -> None:
    found = fit([sample(effort(10, 5), 20.0)] * 3)
    assert found.seconds(effort(20, 10)) == pytest.approx(40)


def test_fit_is_never_negative() -> None:
    found = fit([sample(effort(n, n), 10.0 - n) for n in range(1, 6)])
    assert min(found.constant, found.per_image, found.per_tmac) >= 0


def test_estimates_take_records_of_the_same_model_before_others() -> None:
    own = [sample(effort(10), 10.0), sample(effort(20), 20.0)]
    other = [sample(effort(10, model="x"), 90.0)]
    estimates = Estimates([*own, *other])
    assert estimates.seconds(effort(30)) == pytest.approx(30)
    assert estimates.seconds(effort(30, model="new")) != pytest.approx(30)
    assert "2 records on a device" in estimates.basis(effort(30))
    assert "of other models" in estimates.basis(effort(30, model="new"))


def test_estimates_without_records_come_from_data_sheets() -> None:
    estimates = Estimates(device="NVIDIA A100-SXM4-80GB")
    work = effort(0, 312 * 0.35, gpu=True)  # 10^12 MACs are 2 TFLOP
    assert estimates.seconds(work) == pytest.approx(1 + 2)
    assert "no record yet" in estimates.basis(work) and "312" in estimates.basis(work)


def test_estimates_know_loading_starting_and_handing_out() -> None:
    def at(finished: float, seconds: float, **more: float) -> Sample:
        return sample(effort(), seconds, worker="w", finished=finished, **more)

    found = Estimates(
        [at(10, 5, load=2, imports=4), at(16, 5.75), at(100, 5), at(106, 5.75)]  # gaps .25, 79, .25
    )
    assert found.load_s("m") == 2 and found.load_s("") == 0
    assert found.load_s("m", apart=True) == 2 + 4 and found.load_s("", apart=True) == 0
    assert found.startup_s == 4
    assert found.dispatch_s == pytest.approx(0.25)


def test_sample_separates_work_from_loading() -> None:
    sweep = tiny_sweep()
    record = Record(
        key="0" * 64,
        kind="race",
        state="done",
        inputs={},
        timings={"seconds": 9.0, "load": 3.0, "imports": 2.0, "finished": 50.0},
        host={"device": "c", "cpu": "c", "hostname": "h", "pid": 7},
    )
    found = Sample.of_record(record, Efforts(sweep, tiny_facts(sweep)))
    assert (found.seconds, found.load, found.imports, found.began) == (6.0, 3.0, 2.0, 41.0)
    assert Sample.from_json(found.to_json()) == found


def inputs(keep: list[str], **more: object) -> dict[str, object]:
    facts = tiny_facts(tiny_sweep())["tiny"]
    sampler = {"scheduler": "ddim", "steps": 2, "guidance_scale": 3.0}
    model = {"weights_sha256": facts.weights_sha256, "dtype": "float32"}
    dense = {"protocol": {"sampler": sampler}, "granularity": "block"}
    return {"model": model, "sampler": sampler, "keep": keep, **dense, **more}


def test_efforts_count_the_macs_of_a_gate_table() -> None:
    efforts = Efforts(tiny_sweep(), tiny_facts(tiny_sweep()))
    reference = Record(
        key="0" * 64, kind="reference", state="done", inputs=inputs([]), outputs={"graphs": GRAPHS}
    )
    efforts.learn(reference)
    found = efforts.of_inputs("images", inputs(["1111", "0010"], start=3, stop=8), gpu=False)
    call, mid = GRAPH.call_macs(), GRAPH.blocks[2].macs
    assert found.images == 5
    assert found.tmacs == pytest.approx(5 * (call + mid) / 1e12)
    dense = efforts.of_inputs("images", inputs(["1111", "1111"], start=0, stop=8), gpu=False)
    assert dense.tmacs == 0  # the dense run has made them


def test_two_samplers_of_one_weights_file_are_both_sized() -> None:
    sweep = tiny_sweep(models=("fast", "slow"))
    facts = dict.fromkeys(("fast", "slow"), tiny_facts(tiny_sweep())["tiny"])
    efforts = Efforts(sweep, facts)
    outputs = {"graphs": GRAPHS}
    efforts.learn(
        Record(key="0" * 64, kind="reference", state="done", inputs=inputs([]), outputs=outputs)
    )
    found = [
        efforts.of_task(
            PlannedTask(
                key=name, kind="images", model=name, label="", needs=(), state="unresolved",
                expect={"images": 2.0},
            ),
            gpu=False,
        )
        for name in facts
    ]  # fmt: skip
    assert found[0] == found[1]
    assert found[0].tmacs == pytest.approx(2 * 10 * GRAPH.call_macs() / 1e12)


def test_jobs_of_placeholders_are_estimated_from_what_they_will_be() -> None:
    sweep = tiny_sweep()
    jobs = Jobs(sweep, tiny_facts(sweep))
    jobs.efforts.learn(
        Record(
            key="0" * 64,
            kind="reference",
            state="done",
            inputs=inputs([]),
            outputs={"graphs": GRAPHS},
        )
    )
    planned = PlannedTask(
        key="k", kind="images", model="tiny", label="", needs=("r",), state="unresolved",
        expect={"images": 16, "compute": 0.5},
    )  # fmt: skip
    assert jobs.effort(planned).tmacs == pytest.approx(16 * 0.5 * 10 * GRAPH.call_macs() / 1e12)
    assert not jobs.job(planned).runnable


def test_latencies_of_a_model_belong_together() -> None:
    """A measuring process imports the libraries and loads the model anew for another one."""
    sweep = tiny_sweep()
    jobs = Jobs(sweep, tiny_facts(sweep))
    plan = build_plan(sweep, {}, facts=tiny_facts(sweep), device="cpu")
    one, other = (
        jobs.job(next(t for t in plan.tasks if t.kind == kind)) for kind in ("latency", "images")
    )
    assert one.affinity and one.affinity == other.affinity
    assert one.load_s == pytest.approx(other.load_s + jobs.estimates.startup_s)
