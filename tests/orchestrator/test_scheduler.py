"""Scheduler: order and bookkeeping. Oracle: ranks worked out by hand, and a naive scheduler."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from orchestrator.executors.base import Lane
from orchestrator.records import Pool
from orchestrator.scheduler import Job, Scheduler

CPU, GPU, ALONE = Pool(1, 0), Pool(1, 1), Pool(1, 0, None, True)


def job(key: str, *needs: str, seconds: float = 1.0, pool: Pool = CPU, **more: object) -> Job:
    return Job(key=key, needs=needs, seconds=seconds, pool=pool, **more)  # type: ignore[arg-type]


def scheduler_of(*jobs: Job) -> Scheduler:
    scheduler = Scheduler()
    scheduler.update(jobs, lambda key: False)
    return scheduler


def drained(scheduler: Scheduler) -> list[str]:
    """Take and finish until nothing is left."""
    order = []
    while (key := scheduler.take(None, 0.0)) is not None:
        scheduler.finish(key)
        order.append(key)
    return order


def test_rank_is_the_longest_path_to_the_end() -> None:
    jobs = (job("a", seconds=1), job("b", "a", seconds=5), job("c", "a", seconds=2), job("d", "c"))
    scheduler = scheduler_of(*jobs)
    assert [scheduler.rank(key) for key in "abcd"] == [6, 5, 3, 1]


def test_take_prefers_the_longest_path_over_the_longest_job() -> None:
    scheduler = scheduler_of(job("long", seconds=4), job("first"), job("last", "first", seconds=9))
    assert drained(scheduler) == ["first", "last", "long"]


def test_placeholders_count_in_ranks_and_are_never_handed_out() -> None:
    scheduler = scheduler_of(
        job("search"), job("point", "search", seconds=9, runnable=False), job("other", seconds=5)
    )
    assert scheduler.take(None, 0) == "search"
    assert scheduler.finish("search")  # the point waits for nothing any more
    assert drained(scheduler) == ["other"]
    assert scheduler.idle and len(scheduler) == 1


def test_update_replaces_placeholders_by_what_they_became() -> None:
    scheduler = scheduler_of(job("search"), job("point", "search", runnable=False))
    assert scheduler.take(None, 0) == "search"
    scheduler.finish("search")
    assert not scheduler.update([job("real", "search")], lambda key: key == "search")
    assert drained(scheduler) == ["real"]
    assert len(scheduler) == 0


def test_update_keeps_what_runs_though_it_is_listed_no_more() -> None:
    scheduler = scheduler_of(job("a"), job("b"))
    assert scheduler.take(None, 0) == "a"
    scheduler.update([job("b")], lambda key: False)
    assert scheduler.running == 1
    scheduler.finish("a")
    assert drained(scheduler) == ["b"]


def test_update_with_another_time_changes_the_order() -> None:
    scheduler = scheduler_of(job("a", seconds=2), job("b", seconds=1))
    scheduler.update([job("a", seconds=2), job("b", seconds=3)], lambda key: False)
    assert drained(scheduler) == ["b", "a"]


def test_lane_takes_only_its_pool() -> None:
    scheduler = scheduler_of(job("gpu", pool=GPU), job("cpu"))
    assert scheduler.take(Lane(CPU), 0) == "cpu"
    assert scheduler.take(Lane(CPU), 0) is None
    assert scheduler.demand(0) == {GPU: 1}


@pytest.mark.parametrize(("behind", "taken"), [(3.0, "held"), (8.0, "other")])
def test_lane_prefers_the_pipeline_it_holds_up_to_the_time_of_loading(
    behind: float, taken: str
) -> None:
    scheduler = scheduler_of(
        job("held", seconds=10, affinity="sd", load_s=5),
        job("other", seconds=10 + behind, affinity="dit", load_s=5),
    )
    assert scheduler.take(Lane(CPU, ("sd",)), 0) == taken


def test_whoever_must_be_alone_waits_until_nothing_else_is_ready() -> None:
    scheduler = scheduler_of(job("latency", pool=ALONE, seconds=99), job("a"), job("b", "a"))
    assert scheduler.demand(0) == {CPU: 1}
    assert scheduler.take(Lane(ALONE), 0) is None
    assert scheduler.take(Lane(CPU), 0) == "a"
    assert scheduler.take(Lane(ALONE), 0) == "latency"  # though a runs, which unlocks b


def test_whoever_must_be_alone_does_not_wait_for_what_fits_nowhere() -> None:
    alone, large = Pool(exclusive=True), Pool(gpus=9)
    scheduler = scheduler_of(job("alone", pool=alone), job("large", pool=large))
    scheduler.set_aside = {large}
    assert scheduler.demand(0.0) == {alone: 1, large: 1}
    assert scheduler.take(Lane(alone), 0.0) == "alone"
    scheduler.set_aside = set()
    assert scheduler.demand(0.0) == {large: 1}


def test_job_that_is_put_back_comes_when_its_time_has_come() -> None:
    scheduler = scheduler_of(job("a"))
    assert scheduler.take(None, 0) == "a"
    scheduler.put_back("a", job("a", seconds=2), at=5.0)
    assert scheduler.take(None, 4.9) is None and not scheduler.idle
    assert scheduler.demand(5.0) == {CPU: 1}
    assert scheduler.take(None, 5.0) == "a"


def test_dependents_of_what_is_given_up_are_never_ready() -> None:
    scheduler = scheduler_of(job("a"), job("b", "a"), job("c"))
    assert scheduler.take(None, 0) == "a"
    scheduler.give_up("a")
    assert drained(scheduler) == ["c"]
    assert scheduler.idle


def random_jobs(count: int, seed: int) -> list[Job]:
    draw = random.Random(seed)
    return [
        job(
            str(n),
            *{str(draw.randrange(n)) for _ in range(draw.randrange(3)) if n},
            seconds=draw.randint(1, 9),
        )
        for n in range(count)
    ]


def naive_order(jobs: Sequence[Job]) -> list[str]:
    """Take what is ready with the longest path, worked out anew each time."""
    left, order = {each.key: each for each in jobs}, list[str]()

    def rank(each: Job) -> float:
        after = (rank(other) for other in left.values() if each.key in other.needs)
        return each.seconds + max(after, default=0.0)

    while left:
        ready = [each for each in left.values() if not set(each.needs) & left.keys()]
        best = max(ready, key=lambda each: (rank(each), -int(each.key)))
        order.append(best.key)
        del left[best.key]
    return order


@pytest.mark.parametrize("seed", range(5))
def test_order_is_that_of_a_naive_scheduler(seed: int) -> None:
    jobs = random_jobs(25, seed)
    assert drained(scheduler_of(*jobs)) == naive_order(jobs)


@pytest.mark.parametrize("seed", range(3))
def test_ranks_after_updates_are_those_of_a_new_scheduler(seed: int) -> None:
    draw, jobs = random.Random(seed), random_jobs(40, seed)
    scheduler = scheduler_of(*jobs[:20])
    for _ in range(5):
        chosen = [each for each in jobs if draw.random() < 0.7]
        scheduler.update(chosen, lambda key: False)
        fresh = scheduler_of(*chosen)
        assert [scheduler.rank(j.key) for j in chosen] == [fresh.rank(j.key) for j in chosen]
