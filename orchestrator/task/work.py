"""Work: one task being done, its inputs as the method's own values, its model, its files."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Final

import diffusers
import numpy as np
import safetensors.numpy
import transformers
from safetensors import SafetensorError

from dipgo_core.config import ModelSettings, SamplerSettings
from dipgo_core.decoding import Decoding, set_decoding
from dipgo_core.errors import ModelFilesError, StoreError
from dipgo_core.evaluation.metrics import roles_of
from dipgo_core.evaluation.prompts import item_of_image
from dipgo_core.evaluation.protocol import Protocol, image_seed
from dipgo_core.gates import GateTable
from dipgo_core.graph import BlockGraph
from dipgo_core.items import Item
from dipgo_core.pipelines import LoadedModel, load_model
from orchestrator.facts import items_of_blob
from orchestrator.records import HELD_PIPELINES, Record, Task, TaskKind
from orchestrator.store import Store
from orchestrator.task.loading import loading

logger = logging.getLogger(__name__)

#: Tasks on the calibration split, without a gate table of their own.
SEARCHING: Final[tuple[TaskKind, ...]] = ("search", "errors")

OnProgress = Callable[[Mapping[str, Any]], None]
Arrays = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a task leaves in its record; `artifacts` are already in the store."""

    outputs: Mapping[str, Any]
    artifacts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Work:
    """One task being done: its inputs as the method's own values, its model, its files."""

    task: Task
    store: Store
    report: OnProgress

    @property
    def device(self) -> str:
        return "cuda" if self.task.gpus > 0 else "cpu"

    @cached_property
    def sampler(self) -> SamplerSettings:
        return SamplerSettings(**self.task.inputs["sampler"])

    @cached_property
    def protocol(self) -> Protocol:
        """How images are made, and scored; of a shard all images up to its last one."""
        inputs = self.task.inputs
        if self.task.kind in SEARCHING:
            return Protocol.from_json(inputs["calibration"])
        if "stop" not in inputs:
            return Protocol.from_json(inputs["protocol"])
        metrics = tuple(inputs.get("metrics", ()))
        roles = roles_of(metrics)  # features are no business of a shard's metrics
        scorers = {role: one for role, one in inputs.get("scorers", {}).items() if role in roles}
        scored = {"images": inputs["stop"], "metrics": metrics, "scorers": scorers}
        return Protocol.from_json({**inputs["protocol"], **scored})

    @property
    def images(self) -> range:
        """The images of a shard, or of the whole dense run."""
        return range(int(self.task.inputs["start"]), int(self.task.inputs["stop"]))

    @property
    def is_dense(self) -> bool:
        """Whether gates and sampler are those of the dense run, whose images are there."""
        return bool(self.gates.keep.all()) and self.sampler.to_json() == self.protocol.sampler

    @cached_property
    def model(self) -> LoadedModel:
        """The pipeline, kept from task to task.

        Raises:
            ModelFilesError: the weights are not those that were planned with.
        """
        wanted = dict(self.task.inputs["model"])
        planned = wanted.pop("weights_sha256")
        wanted["id"] = self.task.options.get("model_folder", wanted["id"])
        wanted["base"] = self.task.options.get("model_base", wanted["base"])
        model = loaded(json.dumps(wanted, sort_keys=True), self.device)
        if model.weights_sha256 != planned:
            raise ModelFilesError(
                f"the weights of {model.settings.id} are {model.weights_sha256[:16]}, planned with "
                f"{planned[:16]}: they changed, or this worker has others. Run the sweep again"
            )
        set_decoding(model.pipe.vae, self._decoding)
        if self.task.kind in SEARCHING:  # the only ones that need a decoder of their own
            set_decoding(model.decoder, self._decoding)
        return model

    @property
    def _decoding(self) -> Decoding:
        """How images are decoded; tiles are part of the inputs, for they change them."""
        measured = self.task.kind == "latency"
        tile = self.task.inputs.get("tile") if measured else self.protocol.tile
        return Decoding(**self.task.options.get("decoding", {}), tile=tile)

    @cached_property
    def items(self) -> tuple[Item, ...]:
        named: str | None = self.task.options.get("items_sha256")
        return items_of_blob(self.store.get_blob(named or self.protocol.items_sha256))

    @cached_property
    def reference(self) -> Record:
        """The record of the dense run this task builds on."""
        return self.record(self.task.needs[0])

    def record(self, key: str) -> Record:
        """Return a record that this task needs.

        Raises:
            StoreError: it is gone.
        """
        record = self.store.get_record(key)
        if record is None:
            raise StoreError(
                f"the {self.task.kind} task {self.task.key[:12]} needs the record "
                f"{key[:12]}, which is gone from {self.store.url}; run again"
            )
        return record

    @cached_property
    def graph(self) -> BlockGraph:
        """The blocks at the granularity of the task's gates."""
        kind, inputs = self.task.kind, self.task.inputs
        named = inputs[kind] if kind in SEARCHING else inputs
        return BlockGraph.from_json(self.reference.outputs["graphs"][named["granularity"]])

    @cached_property
    def gates(self) -> GateTable:
        inputs = self.task.inputs
        return GateTable.from_strings(inputs["keep"], inputs.get("extrapolation", 0.0))

    @property
    def batch_size(self) -> int:
        return int(self.task.options["batch_size"])

    def put(self, name: str, data: bytes) -> dict[str, str]:
        """Store an artifact; return its name and digest for the record."""
        return {name: self.store.put_artifact(self.task.key, name, data)}

    def has(self, name: str, digest: str) -> bool:
        """Return whether an artifact is there that an interrupted run of this task has put."""
        return self.store.has_artifact(self.task.key, name, digest)


@lru_cache(maxsize=HELD_PIPELINES)
def loaded(settings_json: str, device: str) -> LoadedModel:
    """Load a pipeline once a worker; those used last stay in memory."""
    diffusers.utils.logging.disable_progress_bar()  # the run has a display of its own
    transformers.utils.logging.disable_progress_bar()
    with loading():
        return load_model(ModelSettings(**json.loads(settings_json)), device=device)


def items_and_seeds(work: Work) -> tuple[tuple[Item, ...], tuple[int, ...]]:
    """Return the item and the noise seed of each image of the protocol."""
    protocol, items = work.protocol, work.items
    return (
        tuple(items[item_of_image(i, len(items))] for i in range(protocol.images)),
        tuple(image_seed(protocol.seed, protocol.split, i) for i in range(protocol.images)),
    )


def shard_records(store: Store, keys: Sequence[str]) -> Iterator[Record]:
    """Yield the records of shards, in order.

    Raises:
        StoreError: one of them is gone.
    """
    for key in keys:
        record = store.get_record(key)
        if record is None:
            raise StoreError(
                f"the shard {key[:12]} of a run is gone from {store.url}: run the sweep again"
            )
        yield record


def put_piece(work: Work, start: int, arrays: Arrays) -> None:
    """Keep a finished piece of a shard, so that an interrupted task goes on after it."""
    work.store.put_progress(work.task.key, _piece_name(start), packed(arrays))


#: Names of numpy's types in safetensors' header.
_DTYPES = {"float32": "F32", "float64": "F64", "int64": "I64", "uint8": "U8"}


def packed(arrays: Mapping[str, Any]) -> bytes:
    """Return numpy arrays as safetensors (https://huggingface.co/docs/safetensors, "Format").

    The library's own function holds three copies of the arrays at once, this one two: features of
    30,000 images are 245 MB.
    """
    rows = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    header, end = {}, 0
    for name, values in sorted(rows.items(), key=lambda row: (-row[1].itemsize, row[0])):
        start, end = end, end + values.nbytes
        header[name] = {
            "dtype": _DTYPES[values.dtype.name],
            "shape": list(values.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # arrays start at a multiple of their item's size
    parts = (rows[name].reshape(-1).view(np.uint8).data for name in header)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def stored_piece(work: Work, piece: range) -> Arrays | None:
    """Return what an interrupted run of this task has kept of a piece; None if nothing."""
    data = work.store.get_progress(work.task.key, _piece_name(piece.start))
    if data is None:
        return None
    try:
        arrays: Arrays = safetensors.numpy.load(data)
    except SafetensorError as error:
        logger.warning("piece %d of %s is damaged: %s", piece.start, work.task.key[:12], error)
        return None
    return arrays if int(arrays["facts"][1]) == piece.stop else None  # else of other batches


def _piece_name(start: int) -> str:
    return f"piece-{start:06d}.safetensors"
