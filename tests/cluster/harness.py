"""A real Ray cluster of several nodes on loopback, whose nodes can be lost as machines are."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.processes import ROOT, Child, Process, kill_at_once, start, tree, wait_for

RAY = Path(sys.executable).with_name("ray")
UP = "Ray runtime started"
START_S = 90.0
#: Worker ports of a node: a range of its own, below the ports that the kernel hands out.
PORTS, FIRST_PORT = 100, 12_000
OBJECT_STORE_BYTES = 100_000_000


@dataclass(frozen=True)
class Node:
    """A running node. folder: its home, in which everything of its user lies."""

    address: str
    child: Child
    folder: Path

    def workers(self) -> list[Process]:
        """Return the processes that run tasks or wait for them."""
        return [each for each in tree(self.child.pid) if _is_worker(each)]


def _is_worker(process: Process) -> bool:
    return process.title.startswith("ray::") and "Agent" not in process.title


def _is_raylet(process: Process) -> bool:
    return process.title.partition("\0")[0].endswith("/raylet")


def free_port(address: str) -> int:
    with socket.socket() as listener:
        listener.bind((address, 0))
        return int(listener.getsockname()[1])


@dataclass
class Cluster:
    """One head, which runs no tasks, and nodes that come and go.

    octet: addresses are 127.0.<octet>.2 and up, so that two clusters do not meet (Ray replaces
    127.0.0.1 by the machine's address).
    """

    folder: Path
    octet: int = field(default_factory=lambda: 1 + os.getpid() % 250)
    nodes: list[Node] = field(default_factory=list)
    recorded: dict[Process, None] = field(default_factory=dict)
    started: int = 0
    port: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.token = self.folder / "token"
        self.token.write_text(secrets.token_hex(32))
        self.token.chmod(0o600)
        tests = self.folder / "path" / "tests"  # ours, though torch-fidelity installs one too
        tests.mkdir(parents=True)
        (tests / "__init__.py").write_text(f"__path__ = [{str(ROOT / 'tests')!r}]\n")

    @property
    def address(self) -> str:
        return f"{self.head.address}:{self.port}"

    @property
    def head(self) -> Node:
        return self.nodes[0]

    @property
    def workers(self) -> list[Node]:
        return self.nodes[1:]

    def environment(self, home: Path | None = None) -> dict[str, str]:
        """Return what a process of this cluster, or a driver, finds in its environment."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "DIPGO_"))}
        extra = {
            "PATH": f"{RAY.parent}{os.pathsep}{kept.get('PATH', '')}",  # jobs call dipgo-sweep
            "PYTHONPATH": f"{self.folder / 'path'}{os.pathsep}{ROOT}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "NO_COLOR": "1",
        }
        return {**kept, **extra, **({"HOME": str(home)} if home else {})}

    def start_head(self, *, cpus: int = 0, dashboard: bool = False) -> str:
        """Start the head, and return the address of its job server, "" without a dashboard."""
        address = self._next_address()
        self.port = free_port(address)
        client = free_port(address)
        options = ["--head", f"--port={self.port}", f"--ray-client-server-port={client}"]
        options += [f"--temp-dir={self.folder / 'ray'}", f"--num-cpus={cpus}", "--num-gpus=0"]
        if not dashboard:
            self._start(address, [*options, "--include-dashboard=false"])
            return ""
        port, agent = free_port(address), free_port(address)
        options += ["--include-dashboard=true", f"--dashboard-host={address}"]
        options += [f"--dashboard-port={port}", f"--dashboard-agent-listen-port={agent}"]
        self._start(address, [*options, '--resources={"dipgo_node": 1}'])
        return f"http://{address}:{port}"

    def add_node(self, *, cpus: int = 1, gpus: int = 1) -> Node:
        """Start a node with made-up GPUs and wait until it has joined."""
        options = [f"--address={self.address}", f"--num-cpus={cpus}", f"--num-gpus={gpus}"]
        return self._start(self._next_address(), [*options, '--resources={"dipgo_node": 1}'])

    def with_nodes(self, count: int) -> list[Node]:
        """Return `count` nodes: those that live, new ones where some are missing."""
        while len(self.workers) > count:
            self.retire(self.workers[-1])
        while len(self.workers) < count:
            self.add_node()
        return self.workers

    def kill(self, *nodes: Node) -> None:
        """Lose nodes, all at the same moment, with everything that runs on them."""
        self._note()
        self.recorded |= dict.fromkeys(kill_at_once([node.child.pid for node in nodes]))
        for node in nodes:
            node.child.process.wait(timeout=20)
            self.nodes.remove(node)

    def retire(self, node: Node) -> None:
        """End a node that says so to its head."""
        self._note()
        raylets = [each for each in tree(node.child.pid) if _is_raylet(each)]
        for raylet in raylets:
            raylet.send(signal.SIGTERM)
        wait_for("the node leaves", lambda: not any(r.runs for r in raylets), 30, node.child.told)
        self.kill(node)

    def stop(self) -> None:
        """End everything that was started here, by id, and check that it has ended."""
        if self.nodes:
            self.kill(*self.nodes)
        left = [process for process in self.recorded if process.runs]
        if left:  # agents and workers whose node was killed go by themselves, this is faster
            kill_at_once([process.pid for process in left])

    def told(self) -> str:
        return "\n".join(node.child.told() for node in self.nodes)

    def _next_address(self) -> str:
        self.started += 1
        return f"127.0.{self.octet}.{1 + self.started}"

    def _start(self, address: str, options: list[str]) -> Node:
        home = self.folder / f"home-{self.started}"
        home.mkdir()
        first = FIRST_PORT + PORTS * self.started
        command = [str(RAY), "start", "--block", f"--node-ip-address={address}", *options]
        command += [f"--min-worker-port={first}", f"--max-worker-port={first + PORTS - 1}"]
        command += [f"--object-store-memory={OBJECT_STORE_BYTES}"]
        name, logs = f"node-{self.started}", self.folder / "logs"
        child = start(name, command, logs, self.environment(home), self.folder)
        node = Node(address, child, home)
        self.nodes.append(node)
        wait_for(f"{name} at {address} starts", lambda: self._is_up(child), START_S, child.told)
        self._note()
        return node

    def _is_up(self, child: Child) -> bool:
        if child.code is not None:
            raise AssertionError(f"a node ended while it started\n{child.told()}")
        return UP in child.stdout() + child.stderr()

    def _note(self) -> None:
        """Write down which processes there are, while their parents still tell."""
        for node in self.nodes:
            self.recorded |= dict.fromkeys(tree(node.child.pid))
