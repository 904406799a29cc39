"""`plan`: what a run would compute and cost, and how long a cluster would take for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dipgo_core.errors import ConfigError
from orchestrator.budget import spent_gpu_hours
from orchestrator.cli.show import print_json, print_table, say
from orchestrator.cli.tables import print_memory, print_plan
from orchestrator.costs import Costs, costs_of
from orchestrator.driver import Outlook, look_ahead
from orchestrator.facts import refusal
from orchestrator.jobs import Jobs
from orchestrator.memory import local_gpu_memory_gb
from orchestrator.preflight import not_here
from orchestrator.resources import ResourceRow
from orchestrator.simulate import Cluster
from orchestrator.store import Store, open_store
from orchestrator.sweep_file import load_sweep

#: CPUs of a simulated node beside each of its GPUs, unless told otherwise.
_CPUS_PER_GPU = 16
_GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Asked:
    """The cluster to simulate; gpus None: this machine."""

    gpus: int | None = None
    gpus_per_node: int | None = None
    cpus_per_node: int | None = None

    @property
    def simulated(self) -> bool:
        """Whether this is a cluster that is not there."""
        return any(value is not None for value in asdict(self).values())

    def cluster(self) -> Cluster:
        """Return equal nodes that have exactly these GPUs together.

        Raises:
            ConfigError: they do not make whole nodes.
        """
        here = os.cpu_count() or 1
        if self.gpus is None:
            there = 0 if local_gpu_memory_gb() is None else 1
            return Cluster(nodes=1, cpus=self.cpus_per_node or here, gpus=there)
        if self.gpus == 0:
            return Cluster(nodes=1, cpus=self.cpus_per_node or here, gpus=0)
        each = min(self.gpus, self.gpus_per_node or _GPUS_PER_NODE)
        if self.gpus % each:
            near = self.gpus - self.gpus % each
            raise ConfigError(
                f"--gpus {self.gpus} does not make whole nodes of {each} GPUs, and nodes are "
                f"simulated alike; take {near} or {near + each}, or another --gpus-per-node"
            )
        cpus = self.cpus_per_node or _CPUS_PER_GPU * each
        return Cluster(nodes=self.gpus // each, cpus=cpus, gpus=each)


def plan_and_show(
    file: Path, overrides: Sequence[str], *, as_json: bool, simulate: bool, asked: Asked
) -> None:
    """Plan a sweep against its store, and print it with what it is expected to cost.

    simulate: whether this machine is simulated where `asked` names no cluster.

    Raises:
        DipgoError: the file has errors, the store cannot be used, a task fits on no GPU, or the
            cluster is none.
    """
    cluster = asked.cluster()
    sweep = load_sweep(file, overrides)
    store = open_store(sweep.storage)
    outlook = look_ahead(sweep, store)
    costs = costs_on(outlook, store, cluster)
    missing = not_here(sweep)
    if as_json:
        print_json({**outlook.plan.to_json(), "not_here": missing, "costs": costs.to_json()})
    else:
        print_plan(outlook.plan, sweep.name, store.url)
        for line in outlook.plan.left_out:
            say(line)
        print_resources(outlook.plan.resources)
        print_memory(outlook.plan.memory)
        print_costs(costs)
        print_wall(costs, simulated=simulate or asked.simulated)
        if any(t.kind == "explore" and t.state != "cached" for t in outlook.plan.tasks):
            say("an exploration may end before all its points are proposed (docs/explore.md)")
    if missing and not as_json:
        say(f"not on this machine yet (`dipgo-sweep prefetch {file}` tells sizes):", stderr=True)
        say("\n".join(f"  {line}" for line in missing), stderr=True)
    if outlook.plan.too_large:
        raise refusal(sweep, outlook.plan.too_large)


def costs_on(outlook: Outlook, store: Store, cluster: Cluster) -> Costs:
    """Estimate what is left from the records there are, on a cluster of this shape."""
    jobs = Jobs(outlook.sweep, outlook.facts, outlook.device)
    jobs.learn_from(outlook.plan, store.records())
    known = jobs.estimates
    measured = replace(cluster, startup_s=known.startup_s, dispatch_s=known.dispatch_s)
    spent = spent_gpu_hours(store, outlook.sweep.name)
    return costs_of(outlook.plan, jobs, outlook.sweep.budget, measured, spent_gpu_hours=spent)


def print_resources(rows: Sequence[ResourceRow]) -> None:
    """Print what tasks occupy, and how that is known; kinds alike in one line."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        asked = row.resources
        about = (f"{asked.cpus:g}", f"{asked.gpus:g}", asked.accelerator or "any", row.basis)
        kinds.setdefault((row.model, *about), []).append(row.kind)
    lines = [(about[0], ", ".join(names), *about[1:]) for about, names in kinds.items()]
    columns = ("model", "tasks", "CPUs", "GPUs", "accelerator", "known from")
    print_table("What a task occupies", columns, lines, right=columns[2:4])


def print_costs(costs: Costs) -> None:
    """Print the hours of each kind of work, what they come to, and whether the budget holds."""
    if not costs.rows:
        return
    rows = [
        (
            row.model,
            row.kind,
            f"{row.tasks}",
            duration(row.seconds / row.tasks),
            f"{row.gpu_hours:.3g}",
            f"{row.cpu_hours:.3g}",
            row.basis,
        )
        for row in costs.rows
    ]
    columns = ("model", "task", "tasks", "each", "GPU-hours", "CPU-hours", "estimated from")
    print_table("Time, estimated (docs/engine.md)", columns, rows, right=columns[2:6])
    spent = f", {costs.spent_gpu_hours:.3g} spent so far" if costs.spent_gpu_hours else ""
    price = "" if costs.usd is None else f", {costs.usd:.2f} US dollars in all"
    say(f"to do: {costs.gpu_hours:.3g} GPU-hours, {costs.cpu_hours:.3g} CPU-hours{spent}{price}")
    if costs.beyond:
        say(f"the budget does not hold: {', '.join(costs.beyond)}; the run would stop there")
    elif costs.limited:
        say("the budget holds, if the estimates do")


def print_wall(costs: Costs, *, simulated: bool) -> None:
    """Print how long the cluster takes, or that there is none for these tasks."""
    cluster, forecast = costs.cluster, costs.forecast
    if not costs.rows:
        return
    if not cluster.gpus and costs.gpu_hours and not simulated:
        say("no GPU here, so no wall time: give a cluster with --simulate --gpus N")
        return
    nodes = "1 node" if cluster.nodes == 1 else f"{cluster.nodes} nodes"
    where = f"{nodes} of {cluster.gpus:g} GPUs and {cluster.cpus:g} CPUs"
    how = "simulated" if simulated else "as far as this machine goes"
    say(
        f"wall time, {how} ({where}): {duration(forecast.makespan_s)}, utilisation "
        f"{forecast.utilisation:.0%}, {forecast.workers} workers"
    )
    if forecast.unplaced:
        say(f"{forecast.unplaced} tasks fit on no such node, or wait for one that does not")


def duration(seconds: float) -> str:
    """Return a time for people: 0.4 s, 12 s, 3.5 min, 7.2 h."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
