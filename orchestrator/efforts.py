"""What a task has to do, in numbers that its time grows with. Pure, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dipgo_core.config import SamplerSettings
from dipgo_core.families import find_known
from dipgo_core.families.schedulers import calls_of, guided_share
from dipgo_core.graph import BlockGraph
from dipgo_core.strategies import PROBED_ITEMS, TABLE_STRATEGIES, mask_forwards
from orchestrator.facts import ModelFacts
from orchestrator.methods import STEP_MASKS
from orchestrator.planned import PlannedTask
from orchestrator.records import Record, TaskKind
from orchestrator.sweep_settings import SweepFile, SweepModel

#: Forward and backward of one call, in forwards: the loss is differentiated through all of them.
_WITH_BACKWARD = 3
#: MACs a call for each parameter of a model that nobody knows: about the tokens of its latents.
_UNKNOWN_TOKENS = 1024
#: Blocks of a model whose graph is not known yet.
_BLOCKS = 10


@dataclass(frozen=True, slots=True)
class Effort:
    """The size of a task.

    group: kind of work whose time follows one law. model: weights and precision, "" for work that
    is of no model. images: made, scored, or looked at in all steps of a search. tmacs: 10^12 MACs
    of the denoiser. gpu: whether it is done on one.
    """

    group: str
    model: str
    images: float
    tmacs: float
    gpu: bool

    def to_json(self) -> list[Any]:
        return [self.group, self.model, self.images, self.tmacs, self.gpu]


@dataclass(frozen=True)
class ModelCosts:
    """MACs of one denoiser call, whole and by block for each granularity that is known."""

    call_macs: float
    blocks: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)

    def kept(self, rows: Sequence[str], granularity: str) -> float:
        """Return the MACs of the calls of a gate table."""
        costs = self.blocks.get(granularity)
        gates = np.frombuffer("".join(rows).encode(), dtype=np.uint8) == ord("1")
        if costs is None or gates.size != len(rows) * costs.size:
            return float(gates.mean()) * len(rows) * self.call_macs
        return float((gates.reshape(len(rows), -1) @ costs).sum())


class Efforts:
    """Sizes the tasks of a sweep; models are known by their block graphs where those are found."""

    def __init__(self, sweep: SweepFile, facts: Mapping[str, ModelFacts]) -> None:
        self._models = {model.name: model for model in sweep.models}
        self._keys = {  # one weights file with several samplers is several models of one key
            m.name: model_key(facts[m.name].weights_sha256, m.settings.dtype) for m in sweep.models
        }
        self._names = {key: name for name, key in self._keys.items()}
        self._sizes = {
            name: _costs_by_facts(model, facts[name]) for name, model in self._models.items()
        }
        self._sweep = sweep

    def learn(self, reference: Record) -> None:
        """Take the block graphs of a model from the record of its dense run."""
        key = model_of(reference.inputs)
        graphs = reference.outputs.get("graphs")
        if key not in self._names or not graphs:
            return
        known = {each: BlockGraph.from_json(graph) for each, graph in graphs.items()}
        blocks = {each: graph.costs().astype(float) for each, graph in known.items()}
        call = max(graph.call_macs() for graph in known.values())
        costs = ModelCosts(float(call), blocks)
        self._sizes |= {name: costs for name, own in self._keys.items() if own == key}

    def of_task(self, planned: PlannedTask, *, gpu: bool) -> Effort:
        """Size a planned task; a placeholder by what it is expected to become."""
        if planned.task is None:
            return self._expected(planned, gpu)
        return self.of_inputs(planned.kind, planned.task.inputs, gpu=gpu)

    def of_record(self, record: Record) -> Effort:
        """Size a task that is done, of this sweep or another."""
        host = record.host
        return self.of_inputs(record.kind, record.inputs, gpu=host.get("device") != host.get("cpu"))

    def of_inputs(self, kind: TaskKind, inputs: Mapping[str, Any], *, gpu: bool) -> Effort:
        model = model_of(inputs)
        costs = self._sizes.get(self._names.get(model, ""), _NO_COSTS)
        images = _images(kind, inputs)
        macs = _macs(kind, inputs, images, costs)
        return Effort(_group(kind, inputs), model, images, macs / 1e12, gpu)

    def _expected(self, planned: PlannedTask, gpu: bool) -> Effort:
        model, costs = self._models[planned.model], self._sizes[planned.model]
        calls = calls_of(model.sampler) * costs.call_macs
        images = planned.expect.get("images", 0.0)
        kept = planned.expect.get("compute", 1.0)
        macs, group = 0.0, str(planned.kind)
        if planned.kind == "images":
            macs = images * kept * calls
        elif planned.kind == "search":  # still to be proposed
            strategy = model.grid.expand()[0].strategy
            macs = images * calls * (1 if strategy in TABLE_STRATEGIES else _WITH_BACKWARD)
            group = f"search, {strategy}"
        elif planned.kind == "latency":
            images = float(self._sweep.latency.batch_size[0])
            macs = _runs(self._sweep.latency.min_runs, images) * (1 + kept) * calls
        return Effort(group, self._keys[planned.model], images, macs / 1e12, gpu)


_NO_COSTS = ModelCosts(0.0)


def model_key(weights_sha256: str, dtype: str) -> str:
    """Return the name under which a loaded pipeline is known: weights and precision."""
    return f"{weights_sha256}/{dtype}"


def model_of(inputs: Mapping[str, Any]) -> str:
    """Return the model of a task's inputs, "" for work on stored features."""
    model = inputs.get("model")
    return "" if model is None else model_key(model["weights_sha256"], model["dtype"])


def _costs_by_facts(model: SweepModel, facts: ModelFacts) -> ModelCosts:
    """Return what is known of a model before anything ran: published facts, else its size."""
    sizes = facts.sizes
    known = find_known(model.settings.id) or (find_known(sizes.like) if sizes else None)
    if known is not None:
        return ModelCosts(float(known.macs))
    return ModelCosts(float(sizes.denoiser * _UNKNOWN_TOKENS) if sizes else 0.0)


def _group(kind: TaskKind, inputs: Mapping[str, Any]) -> str:
    if kind == "search":
        return f"search, {inputs['search']['strategy']}"
    return "images, dense" if kind == "images" and "keep" not in inputs else kind


def _images(kind: TaskKind, inputs: Mapping[str, Any]) -> float:
    if "stop" in inputs:
        return float(inputs["stop"] - inputs["start"])
    if kind == "errors":
        return float(PROBED_ITEMS)
    if kind == "search":
        return _looked_at(inputs["search"])
    if kind == "latency":
        return float(inputs["batch_size"])
    return float(inputs.get("protocol", {}).get("images", 0))


def _macs(kind: TaskKind, inputs: Mapping[str, Any], images: float, costs: ModelCosts) -> float:
    if kind not in ("images", "errors", "search", "latency"):
        return 0.0
    sampler = SamplerSettings(**inputs["sampler"])
    calls = calls_of(sampler)
    dense = calls * costs.call_macs
    if kind == "errors":
        return images * costs.call_macs * _probes(inputs["errors"], calls, costs)
    if kind == "search":
        return images * costs.call_macs * _calls_an_image(inputs, calls)
    if "keep" not in inputs:
        return images * dense
    kept = guided_share(sampler) * costs.kept(inputs["keep"], inputs["granularity"])
    if kind == "images" and _is_dense(inputs):
        return 0.0  # the dense run has made them
    return images * kept if kind == "images" else _runs(inputs["min_runs"], images) * (kept + dense)


def _looked_at(search: Mapping[str, Any]) -> float:
    """Return how many images a search looks at, those of every step counted; of candidates, as
    many as the dense model would make at their cost."""
    if search["strategy"] in TABLE_STRATEGIES:
        return float(search.get("effort", 1))
    steps = search.get("steps", 1) * search.get("accumulation", 1)
    return float(steps * search["batch_size"])


def _calls_an_image(inputs: Mapping[str, Any], calls: int) -> float:
    """Return the forwards for each image that a search looks at, a backward pass as two."""
    if inputs["search"]["strategy"] == STEP_MASKS:
        return mask_forwards(calls)
    if "target" in inputs:
        return float(calls)
    dense = inputs["search"]["strategy"] == "dipgo_stepwise"  # beside the gated calls
    return float(calls * (_WITH_BACKWARD + dense))


def _probes(errors: Mapping[str, Any], calls: int, costs: ModelCosts) -> float:
    """Return the forwards for each image that reuses are measured on: a dense run, every block
    reused at every age, which computes half of the others, and one run from each call on."""
    known = costs.blocks.get(errors["granularity"])
    others = (_BLOCKS if known is None else len(known)) - 1
    ages = min(errors["staleness"], calls - 1)
    return float(calls * (1 + ages * others / 2 + calls / 2))


def _is_dense(inputs: Mapping[str, Any]) -> bool:
    whole = all("0" not in row for row in inputs["keep"])
    return whole and inputs["sampler"] == inputs["protocol"].get("sampler")


def _runs(min_runs: int, batch_size: float) -> float:
    return min_runs * batch_size
