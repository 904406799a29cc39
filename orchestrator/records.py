"""Task and Record: the values that travel between driver, workers and store. Pure, no torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

TaskKind = Literal[
    "reference", "images", "statistics", "errors", "search", "evaluate", "latency", "race",
    "explore",
]  # fmt: skip
RecordState = Literal["done", "failed"]

SCHEMA_VERSION = 1

#: Pipelines that a worker keeps loaded from task to task, those it used last.
HELD_PIPELINES = 2


def canonical(value: Any) -> Any:
    """Return `value` with types coerced: tuples to lists, whole floats to ints (7.0 is 7), no NaN.

    Raises:
        ValueError: a number that is not finite, or a type JSON does not have.
    """
    if isinstance(value, Mapping):
        return {str(key): canonical(item) for key, item in sorted(value.items())}
    if isinstance(value, (list, tuple)):
        return [canonical(item) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} cannot be part of a content key")
        return int(value) if value.is_integer() else value
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise ValueError(f"{value!r} of type {type(value).__name__} cannot be part of a content key")


def content_key(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`."""
    return digest_of(canonical_text(value))


def canonical_text(value: Any) -> str:
    """Return the canonical JSON of `value`: keys sorted, no spaces, ASCII."""
    return json.dumps(canonical(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest_of(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Pool:
    """What a worker occupies. Tasks of one pool can be done by one worker, one after another."""

    cpus: float = 1.0
    gpus: float = 0.0
    accelerator: str | None = None
    exclusive: bool = False


def held_after(held: tuple[str, ...], affinity: str, pool: Pool) -> tuple[str, ...]:
    """Return whose pipelines a worker holds after a task, the last one first; "" needs none.

    The process that measures latencies holds one alone.
    """
    if not affinity:
        return held
    others = [each for each in held if each != affinity]
    return (affinity, *others)[: 1 if pool.exclusive else HELD_PIPELINES]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One unit of work. `inputs` holds everything that decides the result, and nothing else.

    needs: keys of the tasks whose records must be done first.
    options: how it is run, never what comes out (batch size, where a scorer's files lie).
    label: for people (progress, logs). affinity: tasks that share a loaded pipeline share this.
    """

    kind: TaskKind
    inputs: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    affinity: str = ""
    cpus: float = 1.0
    gpus: float = 0.0
    accelerator: str | None = None  # Ray's name of the GPU type
    exclusive: bool = False  # alone on its node (latency)

    @property
    def pool(self) -> Pool:
        return Pool(self.cpus, self.gpus, self.accelerator, self.exclusive)

    @cached_property
    def key(self) -> str:
        return content_key({"kind": self.kind, "inputs": self.inputs})

    @classmethod
    def of_key(cls, key: str, **fields: Any) -> Task:
        """Return a task whose key was worked out before."""
        task = cls(**fields)
        vars(task)["key"] = key  # where `cached_property` keeps it
        return task

    def fed_by(self, keys: Sequence[str]) -> Task:
        """Return the task that merges these shards, in their order; its key stays the same."""
        needs, options = (*self.needs, *keys), {**self.options, "shards": list(keys)}
        fields = {name: value for name, value in vars(self).items() if name != "key"}
        return Task.of_key(self.key, **{**fields, "needs": needs, "options": options})

    def to_json(self) -> dict[str, Any]:
        return {"key": self.key, **asdict(self), "needs": list(self.needs)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Task:
        fields = {name: value for name, value in data.items() if name != "key"}
        return cls(**{**fields, "needs": tuple(fields["needs"])})


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a task left behind. Only done records count as done; failures are kept beside them.

    attempts: earlier ones that failed, as `failures.attempt_json` words them.
    """

    key: str
    kind: TaskKind
    state: RecordState
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any] = field(default_factory=dict)
    artifacts: Mapping[str, str] = field(default_factory=dict)  # file name -> sha256
    timings: Mapping[str, float] = field(default_factory=dict)  # seconds; finished: epoch
    host: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None
    attempts: tuple[Mapping[str, Any], ...] = ()
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        return cls(**{**data, "attempts": tuple(data.get("attempts", ()))})
