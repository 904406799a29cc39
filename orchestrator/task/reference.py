"""The dense run put together from its shards: blocks, images, latents. No image is made."""

from __future__ import annotations

import numpy as np
import safetensors.numpy

from orchestrator.task.dense import LATENTS_FILE
from orchestrator.task.work import Outcome, Work, packed, shard_records

#: What the first shard says of the model.
_DESCRIBED = ("graphs", "timesteps", "subnet_model", "subnet_sampler")


def run_reference(work: Work) -> Outcome:
    """Name the shards that have the images; on the calibration split put their latents together.

    The last shard may have more images than are asked for.
    """
    keys, wanted = work.task.options["shards"], len(work.images)
    records = list(shard_records(work.store, keys))
    artifacts: dict[str, str] = {}
    if work.protocol.split == "calibration":
        files = (work.store.get_artifact(record, LATENTS_FILE) for record in records)
        latents = np.concatenate([safetensors.numpy.load(data)["latents"] for data in files])
        artifacts = work.put(LATENTS_FILE, packed({"latents": latents[:wanted]}))
    outputs = {
        **{name: records[0].outputs[name] for name in _DESCRIBED},
        "shards": list(keys),
        "n_images": wanted,
        "batch_size": min(int(record.outputs["batch_size"]) for record in records),
        "forwards": sum(int(record.outputs["forwards"]) for record in records),
    }
    return Outcome(outputs, artifacts)
