"""Simulation. Oracle: makespans worked out by hand; bounds that hold for any list schedule."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.costs import Costs, beyond, costs_of
from orchestrator.jobs import Jobs
from orchestrator.plan import build_plan
from orchestrator.planned import Plan
from orchestrator.records import Pool
from orchestrator.replay import Recorded, predict, recorded_jobs
from orchestrator.scheduler import Job
from orchestrator.simulate import Cluster, simulate
from orchestrator.sweep_settings import AskedResources, Budget, Resources
from tests.orchestrator.test_scheduler import ALONE, CPU, GPU, job, random_jobs
from tests.orchestrator.tiny_sweep import tiny_facts, tiny_sweep

ONE = Cluster(nodes=1, cpus=1, gpus=0)
TWO = Cluster(nodes=1, cpus=2, gpus=0)
RECORDED = [Path(__file__).parent / "data" / f"two_sweeps_{how}.json" for how in ("local", "ray")]


def test_one_worker_takes_the_sum() -> None:
    found = simulate([job("a", seconds=3), job("b", "a", seconds=4)], ONE)
    assert (found.makespan_s, found.tasks, found.workers, found.utilisation) == (7, 2, 1, 1)
    assert found.cpu_hours == pytest.approx(7 / 3600)


def test_two_workers_take_the_longest_path_first() -> None:
    jobs = [job("a", seconds=2), job("b", "a", seconds=6), job("c", seconds=4), job("d", seconds=3)]
    found = simulate(jobs, TWO)
    assert found.makespan_s == 8
    assert found.utilisation == pytest.approx(15 / 16)


def test_starting_loading_and_handing_out_take_time() -> None:
    cluster = replace(ONE, startup_s=10, dispatch_s=0.5)
    jobs = [job(n, seconds=1, affinity="sd", load_s=5) for n in "ab"]
    assert simulate(jobs, cluster).makespan_s == 10 + 0.5 + 5 + 1 + 0.5 + 1


def test_worker_keeps_two_pipelines() -> None:
    jobs = [job("a", affinity="x", load_s=5)]
    for before, (name, model) in zip("abcd", zip("bcde", "yxyz", strict=True), strict=True):
        jobs.append(job(name, before, affinity=model, load_s=5))
    assert simulate(jobs, ONE).makespan_s == 5 + 3 * 5  # x, y and z are loaded once


def test_whoever_must_be_alone_gets_an_idle_node() -> None:
    jobs = [job("a", seconds=4), job("b", seconds=6), job("latency", seconds=1, pool=ALONE)]
    assert simulate(jobs, TWO).makespan_s == 7  # after both
    assert simulate(jobs, replace(TWO, nodes=2)).makespan_s == 6


def test_gpu_tasks_need_gpus() -> None:
    jobs = [job(str(n), seconds=10, pool=GPU) for n in range(4)]
    found = simulate(jobs, Cluster(nodes=2, cpus=8, gpus=1))
    assert (found.makespan_s, found.utilisation) == (20, 1)
    assert found.gpu_hours == pytest.approx(40 / 3600)
    assert simulate(jobs, TWO).unplaced == 4


def test_idle_workers_give_way_to_another_pool() -> None:
    jobs = [job("a"), job("big", "a", pool=Pool(2, 0)), job("b", "big")]
    found = simulate(jobs, TWO)
    assert (found.makespan_s, found.unplaced) == (3, 0)


@pytest.mark.parametrize("seed", range(5))
def test_makespan_is_within_the_bounds_of_list_scheduling(seed: int) -> None:
    jobs = random_jobs(60, seed)
    total = sum(each.seconds for each in jobs)
    path = simulate(jobs, replace(ONE, cpus=1000)).makespan_s
    found = simulate(jobs, replace(ONE, cpus=4)).makespan_s
    assert max(total / 4, path) <= found <= total / 4 + path  # Graham 1969


def test_more_gpus_are_never_more_busy() -> None:
    jobs = [job(str(n), seconds=1 + n % 3, pool=GPU) for n in range(40)]
    shares = [simulate(jobs, Cluster(nodes=n, cpus=8, gpus=1)).utilisation for n in (1, 4, 16)]
    assert shares == sorted(shares, reverse=True)


def tiny_costs(budget: Budget, cluster: Cluster) -> tuple[Plan, Jobs, Costs]:
    gpu = AskedResources(cpus=1, gpus=1)
    sweep = replace(tiny_sweep(targets=(0.5,)), resources=Resources(search=gpu), budget=budget)
    facts = tiny_facts(sweep)
    plan = build_plan(sweep, {}, facts=facts, device="cpu")
    jobs = Jobs(sweep, facts)
    return plan, jobs, costs_of(plan, jobs, budget, cluster, spent_gpu_hours=2.0)


def test_costs_count_every_task_that_is_left() -> None:
    plan, jobs, costs = tiny_costs(Budget(usd_per_gpu_hour=3.0), Cluster(nodes=1, cpus=4, gpus=1))
    assert sum(row.tasks for row in costs.rows) == len(plan.tasks) == costs.forecast.tasks
    assert 0 < costs.gpu_hours <= costs.forecast.gpu_hours  # which loads pipelines, too
    assert costs.usd == pytest.approx(3.0 * (2.0 + costs.gpu_hours))
    assert costs.beyond == ()
    assert json.loads(json.dumps(costs.to_json()))["spent_gpu_hours"] == 2.0


def test_costs_name_the_limits_that_do_not_hold() -> None:
    assert tiny_costs(Budget(gpu_hours=2.0), ONE)[2].beyond[0].endswith("of 2 GPU-hours")
    budget = Budget(gpu_hours=9, wall_hours=1, usd=5, usd_per_gpu_hour=1)
    assert beyond(budget, 8.0, 8.0, 0.5) == ("8 of 5 US dollars",)


def test_recorded_jobs_keep_the_graph() -> None:
    plan, jobs, _ = tiny_costs(Budget(), ONE)
    kept = recorded_jobs(plan, jobs)
    assert len(kept) == len(plan.tasks)
    assert sum(len(each["needs"]) for each in kept) == sum(len(t.needs) for t in plan.tasks)
    assert Job(key="x", needs=(), seconds=1, pool=Pool(**kept[0]["pool"])).pool == CPU


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_prediction_of_a_recorded_sweep_is_within_15_percent(path: Path) -> None:
    """Records of one real sweep calibrate, another one that ran beside it is predicted."""
    recorded: Recorded = json.loads(path.read_text(encoding="utf-8"))
    assert len(recorded["jobs"]) > 50
    assert abs(predict(recorded).deviation) <= 0.15
