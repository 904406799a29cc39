"""Tasks that no node of the cluster could ever hold: who is told, and when a run ends. Pure."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from dipgo_core.errors import TaskError
from orchestrator.executors.placement import Bundle, Node, slots
from orchestrator.records import Pool

logger = logging.getLogger(__name__)

#: A pool that fits nowhere is warned about after this long: nodes may be on their way.
WARN_S = 30.0
#: A run with nothing else to do ends after this long, unless an autoscaler may add nodes.
END_S = 180.0

#: As `TaskSource.pools` returns: what tasks occupy, and the settings that say so.
Named = Mapping[Pool, Sequence[str]]


@dataclass
class Nowhere:
    """The pools with ready tasks that no node holds, however idle.

    bundle_of: what a worker asks for. scales: whether an autoscaler may add nodes.
    since: when each was first seen. stuck_since: when nothing else was left to do.
    """

    bundle_of: Callable[[Pool], Bundle]
    scales: Callable[[], bool]
    since: dict[Pool, float] = field(default_factory=dict)
    warned: set[Pool] = field(default_factory=set)
    stuck_since: float | None = None

    def look(self, demand: Collection[Pool], nodes: Sequence[Node], now: float) -> frozenset[Pool]:
        """Return which pools with ready tasks fit on no node."""
        lost = unplaceable(demand, self.bundle_of, nodes)
        self.since = {pool: self.since.get(pool, now) for pool in lost}
        return frozenset(lost)

    def tell(
        self, named: Callable[[], Named], nodes: Sequence[Node], now: float, *, stuck: bool
    ) -> None:
        """Warn of each pool once, after `WARN_S`; end a run that is stuck for `END_S`.

        stuck: whether nothing runs, and nothing is ready that fits somewhere.

        Raises:
            TaskError: nothing more can happen; names what waits, and what the cluster has.
        """
        late = {pool for pool, since in self.since.items() if now - since >= WARN_S}
        for pool in late - self.warned:
            logger.warning("%s", described(pool, self.bundle_of, named(), nodes))
        self.warned |= late
        self.stuck_since = (self.stuck_since or now) if stuck else None
        if self.stuck_since and now - self.stuck_since >= END_S and not self.scales():
            texts = [described(pool, self.bundle_of, named(), nodes) for pool in self.since]
            raise TaskError("nothing else can be done:\n" + "\n".join(texts))


def refuse_unplaceable(
    named: Named, bundle_of: Callable[[Pool], Bundle], nodes: Sequence[Node]
) -> None:
    """See that every pool fits on a cluster that no node will join.

    Raises:
        TaskError: one does not; names it, and what there is.
    """
    lost = unplaceable(named, bundle_of, nodes)
    if lost:
        raise TaskError("\n".join(described(pool, bundle_of, named, nodes) for pool in lost))


def unplaceable(
    pools: Collection[Pool], bundle_of: Callable[[Pool], Bundle], nodes: Sequence[Node]
) -> list[Pool]:
    """Return the pools that no node holds, however idle."""
    return [pool for pool in pools if nodes and not slots(bundle_of(pool), nodes)]


def described(
    pool: Pool, bundle_of: Callable[[Pool], Bundle], named: Named, nodes: Sequence[Node]
) -> str:
    """Say which tasks fit nowhere, what they ask for, what there is, and the way out."""
    settings = named.get(pool) or ["resources"]
    asked = _words(bundle_of(pool))
    return (
        f"no node can hold tasks of {', '.join(settings)}: each asks for {asked}; "
        f"the cluster has {_there(nodes)}. Ask for less in the sweep file ({settings[0]}: cpus, "
        "gpus, accelerator), or add a node that has it"
    )


def _there(nodes: Sequence[Node]) -> str:
    """Say what the nodes have in all, nodes that are alike counted."""
    alike = Counter(_words(_shown(node["Resources"])) or "nothing" for node in nodes)
    return "; ".join(f"{count} x ({text})" for text, count in sorted(alike.items()))


def _shown(resources: Mapping[str, float]) -> Bundle:
    hidden = ("node:", "memory", "object_store_memory")
    return {name: value for name, value in resources.items() if not name.startswith(hidden)}


def _words(bundle: Mapping[str, float]) -> str:
    return ", ".join(f"{value:g} {name}" for name, value in sorted(bundle.items()))
