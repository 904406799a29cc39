"""Where workers run on a cluster: what each asks Ray for, which device all latencies share. Pure.

A node is what ``ray.nodes()`` says of it. Every node should declare one `NODE` resource: a worker
for latencies takes all of it and is alone, any other takes a thousandth.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dipgo_core.errors import TaskError, nearest
from orchestrator.records import Pool
from orchestrator.sweep_settings import TaskResources

logger = logging.getLogger(__name__)

NODE = "dipgo_node"
SHARE = 0.001  # of a node's resource that is there once
_TYPE = "accelerator_type:"  # Ray's prefix of the resource that names a GPU's type

Node = Mapping[str, Any]
Bundle = dict[str, float]


def latency_nodes(nodes: Iterable[Node], wanted: TaskResources) -> list[Node]:
    """Return the nodes that latencies may be measured on: all that fit and have one type of GPU.

    The type is the one asked for, else the most common one among the nodes that fit.

    Raises:
        TaskError: no node fits; names what the cluster has.
    """
    alive = [node for node in nodes if node["Alive"]]
    fitting = [node for node in alive if _fits(node, wanted)]
    types = [_type(node) for node in fitting] if wanted.gpus else []
    chosen = wanted.accelerator or (most_common(types) if types else "")
    found = [node for node in fitting if not chosen or _type(node) == chosen]
    if not found:
        known = sorted({_type(node) for node in alive} - {""})
        raise TaskError(
            f"no node of the cluster has {_text(wanted)} for resources.latency; its types of "
            f"GPU are {', '.join(known) or 'none'}.{nearest(wanted.accelerator or '', known)}"
        )
    return found


def most_common(names: Sequence[str]) -> str:
    """Return the name that is there most often, the first by alphabet of several."""
    counts = Counter(names)
    return min(counts, key=lambda name: (-counts[name], name))


def narrowed(nodes: Sequence[Node], devices: Mapping[str, str], device: str) -> Bundle:
    """Return what a latency task must ask for besides, so that it runs on this device only.

    nodes: those of `latency_nodes`. devices: name of each one's device, by node id. Nodes of
    several devices that no type tells apart (processors) leave only one of them.
    """
    types = {_type(node) for node in nodes}
    if set(devices.values()) == {device}:
        named = types - {""}
        return {f"{_TYPE}{next(iter(named))}": SHARE} if len(types) == len(named) == 1 else {}
    same = [node for node in nodes if devices.get(node["NodeID"]) == device]
    address = min(node["NodeManagerAddress"] for node in same)
    return {f"node:{address}": SHARE}


def declares_nodes(nodes: Iterable[Node]) -> bool:
    """Say whether latency tasks can have a node for themselves by `NODE`; warn if not."""
    lacking = undeclared(nodes)
    if lacking:
        logger.warning(
            "nodes without the resource %s (%s): latencies take all CPUs of a node instead; start "
            "every node with --resources='{\"%s\": 1}'",
            NODE,
            ", ".join(lacking),
            NODE,
        )
    return not lacking


def undeclared(nodes: Iterable[Node]) -> list[str]:
    """Return the addresses of nodes that could run workers, and do not declare `NODE`."""
    working = [node for node in nodes if node["Alive"] and node["Resources"].get("CPU")]
    lacking = {node["NodeManagerAddress"] for node in working if NODE not in node["Resources"]}
    return sorted(lacking)


def bundle_of(pool: Pool, nodes: Iterable[Node], extra: Bundle, *, by_node: bool) -> Bundle:
    """Return what a worker of a pool asks Ray for.

    extra: of latency tasks (`narrowed`). by_node: whether all nodes declare `NODE`; if they do not,
    whoever must be alone takes all CPUs of the largest node that fits.
    """
    bundle = {"CPU": float(pool.cpus), "GPU": float(pool.gpus)}
    if pool.accelerator:
        bundle[f"{_TYPE}{pool.accelerator}"] = SHARE
    if pool.exclusive:
        bundle |= extra
    if by_node:
        bundle[NODE] = 1.0 if pool.exclusive else SHARE
    elif pool.exclusive:
        bundle["CPU"] = _largest(nodes, bundle)
    return {name: value for name, value in bundle.items() if value}


def slots(bundle: Bundle, nodes: Iterable[Node], used: Mapping[str, Bundle] | None = None) -> int:
    """Return how many workers that ask for `bundle` the cluster holds.

    used: what is taken already, by node id.
    """
    taken = used or {}
    alive = (node for node in nodes if node["Alive"])
    return sum(
        _slots_on(node["Resources"], taken.get(node["NodeID"], {}), bundle) for node in alive
    )


def _slots_on(total: Mapping[str, float], taken: Bundle, bundle: Bundle) -> int:
    free = {name: total.get(name, 0.0) - taken.get(name, 0.0) for name in bundle}
    return max(0, min(int(free[name] / asked + 1e-6) for name, asked in bundle.items() if asked))


def _largest(nodes: Iterable[Node], bundle: Bundle) -> float:
    fitting = [
        node["Resources"].get("CPU", 0.0)
        for node in nodes
        if node["Alive"] and _slots_on(node["Resources"], {}, bundle)
    ]
    return max(fitting, default=bundle["CPU"]) or bundle["CPU"]


def _fits(node: Node, wanted: TaskResources) -> bool:
    resources = node["Resources"]
    enough = resources.get("CPU", 0.0) >= wanted.cpus
    return bool(enough and resources.get("GPU", 0.0) >= wanted.gpus)


def _type(node: Node) -> str:
    """Return the node's type of GPU, "" where Ray knows none."""
    named = sorted(name for name in node["Resources"] if name.startswith(_TYPE))
    return named[0].removeprefix(_TYPE) if named else ""


def _text(wanted: TaskResources) -> str:
    gpus = f" and {wanted.gpus:g} GPUs" if wanted.gpus else ""
    return f"{wanted.cpus:g} CPUs{gpus}{f' of {wanted.accelerator}' if wanted.accelerator else ''}"
