"""One evaluation, shard by shard: images, scores of each image, then figures with intervals.

A batch is scored while the next one is generated. Any sharding, batch size and worker gives the
same noise; final latents agree within 1e-5 of their largest value in float32.

`evaluate_shards` spends the compute and yields what must be kept; `summarise` is pure, so that
stored shards give the same figures on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Final
from typing import Protocol as Interface

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dipgo_core.config import SamplerSettings
from dipgo_core.errors import EvaluationError
from dipgo_core.evaluation.clip_score import clip_scores, load_clip
from dipgo_core.evaluation.cmmd import load_cmmd
from dipgo_core.evaluation.cmmd_distance import cmmd_figure
from dipgo_core.evaluation.dino import dino_distances, load_dino
from dipgo_core.evaluation.fid import fid_figures, kid_figure, load_extractor
from dipgo_core.evaluation.generate import GeneratedBatch, generate
from dipgo_core.evaluation.image_reward import image_rewards, load_image_reward
from dipgo_core.evaluation.intervals import Figure, bootstrap_mean
from dipgo_core.evaluation.lpips import load_lpips, lpips_distances
from dipgo_core.evaluation.metrics import FEATURE_ROLES, METRICS, PAIRED, PER_IMAGE, Role
from dipgo_core.evaluation.overlap import Handed, OwnStream, hand_over, overlapped
from dipgo_core.evaluation.paired import psnr, ssim
from dipgo_core.evaluation.prompts import item_of_image, items_sha256
from dipgo_core.evaluation.protocol import Protocol, image_seed
from dipgo_core.evaluation.reference import Reference
from dipgo_core.evaluation.scorers import Scorer
from dipgo_core.evaluation.shards import Array, ShardResult, joined
from dipgo_core.gates import GateTable
from dipgo_core.graph import BlockGraph
from dipgo_core.items import Item
from dipgo_core.pipelines import LoadedModel

#: Dense images [start, stop) of the same protocol, uint8.  # (n, 3, H, W)
DenseImages = Callable[[int, int], Tensor]

NUM_SAMPLES = 8


class LoadedScorer(Interface):
    """A network in memory, and what it is."""

    @property
    def scorer(self) -> Scorer: ...


#: The loaded networks that a protocol asks for, by role.
Scorers = Mapping[Role, Any]


@dataclass(frozen=True, eq=False)
class Batch:
    """Images to be scored. images: uint8 (n, 3, H, W); dense: those of the same noise, if known."""

    images: Tensor
    prompts: Sequence[str]
    dense: Tensor | None


#: How the network of a role is loaded, by name and device.
LOADERS: Final[Mapping[Role, Callable[..., LoadedScorer]]] = {
    "features": load_extractor,
    "clip": load_clip,
    "cmmd": load_cmmd,
    "lpips": load_lpips,
    "dino": load_dino,
    "image_reward": load_image_reward,
}

#: Scores of each image, by metric; the loaded network is None where the metric needs none.
SCORES: Final[Mapping[str, Callable[[Batch, Any], Array]]] = {
    "clip": lambda batch, clip: clip_scores(clip, batch.images, batch.prompts),
    "image_reward": lambda batch, net: image_rewards(net, batch.images, batch.prompts),
    "psnr": lambda batch, _: psnr(batch.images, _dense_of(batch)),
    "ssim": lambda batch, _: ssim(batch.images, _dense_of(batch)),
    "lpips": lambda batch, net: lpips_distances(net, batch.images, _dense_of(batch)),
    "dino": lambda batch, net: dino_distances(net, batch.images, _dense_of(batch)),
}


def evaluate_shards(
    model: LoadedModel,
    protocol: Protocol,
    items: Sequence[Item],
    scorers: Scorers,
    *,
    sampler: SamplerSettings,
    gates: GateTable | None = None,
    graph: BlockGraph | None = None,
    dense: DenseImages | None = None,
    shards: Sequence[range] | None = None,
    batch_size: int = 16,
) -> Iterator[ShardResult]:
    """Yield one result a shard: a batch is scored while the next one is generated.

    Neither images nor anything else of a shard stays in memory once it was yielded.

    sampler: of this run; few-step baselines differ from the protocol's. scorers: by role; features
    are made by all of them that make any. dense: needed for paired metrics, except by the dense run
    itself. shards: which images to make (see `cut`), all in one shard by default.

    Raises:
        EvaluationError: items, scorers or dense images are not the protocol's; broken images.
    """
    itself = gates is None and sampler.to_json() == protocol.sampler
    _check_inputs(protocol, items, scorers, dense, itself)
    shards = [range(protocol.images)] if shards is None else shards
    batches = (
        batch
        for shard in shards
        for batch in generate_images(
            model,
            protocol,
            items,
            shard,
            sampler=sampler,
            gates=gates,
            graph=graph,
            batch_size=batch_size,
        )
    )
    return score_shards(batches, shards, protocol, items, scorers, dense, device=model.device)


def generate_images(
    model: LoadedModel,
    protocol: Protocol,
    items: Sequence[Item],
    images: range,
    *,
    sampler: SamplerSettings,
    gates: GateTable | None = None,
    graph: BlockGraph | None = None,
    batch_size: int = 16,
) -> Iterator[GeneratedBatch]:
    """Yield these images of the protocol a batch at a time; `start` counts from its first image.

    Raises:
        EvaluationError: the model makes images of another size, or broken ones.
    """
    batches = generate(
        model,
        [items[item_of_image(i, len(items))] for i in images],
        [image_seed(protocol.seed, protocol.split, i) for i in images],
        sampler,
        gates=gates,
        graph=graph,
        batch_size=batch_size,
    )
    for batch in batches:
        if batch.images.shape[-2:] != (protocol.height, protocol.width):
            raise EvaluationError(
                f"{model.settings.id} makes images of {tuple(batch.images.shape[-2:])}, the "
                f"protocol has ({protocol.height}, {protocol.width})"
            )
        yield replace(batch, start=images.start + batch.start)


def score_shards(
    batches: Iterable[GeneratedBatch],
    shards: Sequence[range],
    protocol: Protocol,
    items: Sequence[Item],
    scorers: Scorers,
    dense: DenseImages | None,
    *,
    device: str | torch.device,
) -> Iterator[ShardResult]:
    """Yield one result a shard of batches in order, whoever makes them.

    Scores are made in a thread (and on a CUDA stream) of their own while the next batch is made.
    """
    stream = OwnStream(torch.device(device))

    def score(handed: tuple[GeneratedBatch, Handed]) -> ShardResult:
        batch, images = handed
        return stream.run(
            images,
            lambda pixels: score_images(
                pixels, batch.start, protocol, items, scorers, dense, batch.forwards
            ),
        )

    scored = overlapped(((batch, hand_over(batch.images)) for batch in batches), score)
    ends = {shard.stop: shard for shard in shards}
    parts: list[ShardResult] = []
    with closing(scored):
        for part in scored:
            parts.append(part)
            if part.stop in ends:
                yield joined(parts, ends[part.stop])
                parts.clear()


def sample_indices(images: int) -> tuple[int, ...]:
    """Return which images are kept to be looked at: the first few, whatever their number."""
    return tuple(range(min(NUM_SAMPLES, images)))


def score_images(
    images: Tensor,
    start: int,
    protocol: Protocol,
    items: Sequence[Item],
    scorers: Scorers,
    dense: DenseImages | None,
    forwards: int = 0,
) -> ShardResult:
    """Return the scores of images from `start` on, whoever generated them.  # (n, 3, H, W)"""
    indices = range(start, start + len(images))
    wanted = [name for name in protocol.metrics if name in PER_IMAGE]
    wanted = [name for name in wanted if dense is not None or name not in PAIRED]
    target = None
    if dense is not None and set(wanted) & set(PAIRED):
        target = dense(indices.start, indices.stop).to(images.device)
    prompts = [items[item_of_image(i, len(items))].prompt for i in indices]
    batch = Batch(images, prompts, target)
    scores = {name: SCORES[name](batch, _network(scorers, name)) for name in wanted}
    features: dict[str, Array] = {
        role: scorers[role](images) for role in FEATURE_ROLES if role in scorers
    }
    shown = [i - start for i in sample_indices(protocol.images) if i in indices]
    samples = images[shown].cpu().numpy()
    return ShardResult(start, indices.stop, scores, features, samples, forwards)


def summarise(
    whole: ShardResult, protocol: Protocol, references: Mapping[str, Reference]
) -> dict[str, Figure]:
    """Return each metric's figure, in the protocol's order; with FID also `fid_infinity`. Pure.

    whole: all images of the protocol (`merge_shards`). references: by role, what features are
    compared with.

    Metrics that were not measured (psnr and ssim of the dense model itself) are left out.

    Raises:
        EvaluationError: another number of images, another reference or scorer.
    """
    if (whole.start, whole.stop) != (0, protocol.images):
        raise EvaluationError(
            f"the protocol has {protocol.images} images, scored are {whole.start} to "
            f"{whole.stop - 1}"
        )
    groups = groups_of(protocol)
    figures: dict[str, Figure] = {}
    for metric in protocol.metrics:
        role = METRICS[metric].role
        if metric in whole.scores:
            scorer = protocol.scorers[role].id if role else None
            figures[metric] = mean_figure(whole.scores[metric], groups, scorer)
        elif role in FEATURE_ROLES:
            reference = _checked_reference(protocol, role, references)
            rows = whole.features[role]
            figures |= _distribution_figures(metric, rows, reference, groups, protocol)
    return {name: replace(figure, protocol=protocol.hash) for name, figure in figures.items()}


def _distribution_figures(
    metric: str, rows: Array, reference: Reference, groups: Array, protocol: Protocol
) -> dict[str, Figure]:
    if metric == "fid":
        return fid_figures(rows, reference, groups)
    if metric == "cmmd":
        return {"cmmd": cmmd_figure(rows, reference, groups)}
    size = protocol.kid_subset_size
    return {"kid": kid_figure(rows, reference, groups, subset_size=size)}


def groups_of(protocol: Protocol) -> npt.NDArray[np.int64]:
    """Return the item of each image; images of one item are resampled together.  # (n,)"""
    return np.arange(protocol.images, dtype=np.int64) % protocol.num_items


def mean_figure(values: Array, groups: Array, scorer: str | None) -> Figure:
    """Return the mean of per-image scores with its interval by prompt."""
    interval = bootstrap_mean(values, groups)
    if interval is None:
        return Figure(float(values.mean()), None, None, len(values), scorer)
    return Figure(interval.value, interval.low, interval.high, len(values), scorer)


def _check_inputs(
    protocol: Protocol,
    items: Sequence[Item],
    scorers: Scorers,
    dense: DenseImages | None,
    itself: bool,
) -> None:
    if len(items) != protocol.num_items or items_sha256(items) != protocol.items_sha256:
        raise EvaluationError(
            f"these {len(items)} items are not the {protocol.num_items} of the protocol "
            f"({protocol.items_sha256[:12]}): the prompt set changed, plan the sweep again"
        )
    paired = set(PAIRED) & set(protocol.metrics)
    if dense is None and not itself and paired:
        raise EvaluationError(f"{' and '.join(sorted(paired))} need the dense images: give `dense`")
    check_scorers(protocol.scorers, scorers)


def check_scorers(planned: Mapping[Role, Scorer], scorers: Scorers) -> None:
    """Check that the networks in memory are those that were planned with.

    Raises:
        EvaluationError: one of them is another, or missing.
    """
    for role, wanted in planned.items():
        loaded = scorers[role].scorer if role in scorers else None
        if loaded != wanted:
            raise EvaluationError(f"the protocol's {role} are by {wanted}, loaded is {loaded}")


def _checked_reference(
    protocol: Protocol, role: Role, references: Mapping[str, Reference]
) -> Reference:
    wanted = protocol.scorers[role]
    reference = references.get(role)
    if reference is None:
        raise EvaluationError(f"{role} by {wanted.id} need a reference: give the dense images'")
    if reference.id != protocol.reference or reference.scorer != wanted:
        raise EvaluationError(
            f"the protocol compares with {protocol.reference} by {wanted}, the reference is "
            f"{reference.id} by {reference.scorer}"
        )
    return reference


def _network(scorers: Scorers, metric: str) -> Any:
    role = METRICS[metric].role
    return None if role is None else scorers[role]


def _dense_of(batch: Batch) -> Tensor:
    assert batch.dense is not None  # asked for only where dense images are given
    return batch.dense
