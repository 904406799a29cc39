"""One evaluation, shard by shard: images, scores of each image, then figures with intervals.

`evaluate_shards` spends the compute and yields what must be kept; `summarise` is pure, so that
stored shards give the same figures on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dipgo_core.config import SamplerSettings
from dipgo_core.errors import EvaluationError
from dipgo_core.evaluation.clip_score import ClipScorer, clip_scores, load_clip
from dipgo_core.evaluation.fid import FeatureExtractor, fid_figure, kid_figure, load_extractor
from dipgo_core.evaluation.generate import generate
from dipgo_core.evaluation.intervals import Figure, bootstrap_mean
from dipgo_core.evaluation.paired import psnr, ssim
from dipgo_core.evaluation.prompts import item_of_image, items_sha256
from dipgo_core.evaluation.protocol import Protocol, image_seed
from dipgo_core.evaluation.reference import Reference
from dipgo_core.gates import GateTable
from dipgo_core.graph import BlockGraph
from dipgo_core.items import Item
from dipgo_core.pipelines import LoadedModel

Array = npt.NDArray[Any]
#: Dense images [start, stop) of the same protocol, uint8.  # (n, 3, H, W)
DenseImages = Callable[[int, int], Tensor]

NUM_SAMPLES = 8
PER_IMAGE = ("clip", "psnr", "ssim")


@dataclass(frozen=True, eq=False)
class Scorers:
    """The loaded networks that a protocol asks for; None where it asks for none."""

    features: FeatureExtractor | None
    clip: ClipScorer | None


@dataclass(frozen=True, eq=False)
class ShardResult:
    """What images [start, stop) came to.

    scores: clip, psnr, ssim, those that the protocol measures, each (n,) float64.
    features: (n, d) float32, (n, 0) where none are measured. samples: those of `sample_indices`
    that fall into this shard, uint8 (k, 3, H, W). forwards: denoiser forwards spent.
    """

    start: int
    stop: int
    scores: Mapping[str, Array]
    features: Array
    samples: Array
    forwards: int
    images: Array | None = field(default=None, repr=False)

    def to_tensors(self) -> dict[str, Array]:
        """Return the shard as named arrays, ready for safetensors; images are left out."""
        facts = np.array([self.start, self.stop, self.forwards], dtype=np.int64)
        named = {"facts": facts, "features": self.features, "samples": self.samples}
        return {**named, **self.scores}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Array]) -> ShardResult:
        """Return the shard that `to_tensors` wrote.

        Raises:
            EvaluationError: arrays are missing.
        """
        try:
            start, stop, forwards = (int(value) for value in tensors["facts"])
            scores = {name: tensors[name] for name in PER_IMAGE if name in tensors}
            features, samples = tensors["features"], tensors["samples"]
        except (KeyError, ValueError) as error:
            raise EvaluationError(f"not a shard of an evaluation: {error!r}") from error
        return cls(start, stop, scores, features, samples, forwards)


def load_scorers(
    protocol: Protocol,
    *,
    features: str | None,
    clip: str | None,
    device: str | torch.device = "cpu",
) -> Scorers:
    """Load the scorers that the protocol's metrics need, by the names they were planned with.

    Raises:
        ModelFilesError: weights that are missing or broken.
        EvaluationError: a scorer is not the one in the protocol.
    """
    extractor = scorer = None
    if {"fid", "kid"} & set(protocol.metrics) and features is not None:
        extractor = load_extractor(features, device=device)
    if "clip" in protocol.metrics and clip is not None:
        scorer = load_clip(clip, device=device)
    scorers = Scorers(extractor, scorer)
    _check_scorers(protocol, scorers)
    return scorers


def shards_of(protocol: Protocol, shard_size: int) -> tuple[range, ...]:
    """Return the image indices of each shard, in order."""
    return tuple(
        range(start, min(start + shard_size, protocol.images))
        for start in range(0, protocol.images, shard_size)
    )


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
    shard_size: int = 500,
    batch_size: int = 16,
    done: Collection[int] = (),
    keep_images: bool = False,
) -> Iterator[ShardResult]:
    """Yield one result a shard, so that the caller stores it and memory stays that of one shard.

    sampler: of this run; few-step baselines differ from the protocol's. dense: needed for psnr and
    ssim, except by the dense run itself. done: first indices of shards that are stored already and
    not computed again. keep_images: also return the images, as the dense reference needs them.

    Raises:
        EvaluationError: items, scorers or dense images are not the protocol's; broken images.
    """
    itself = gates is None and sampler.to_json() == protocol.sampler
    _check_inputs(protocol, items, scorers, dense, itself)
    for shard in shards_of(protocol, shard_size):
        if shard.start not in done:
            images, forwards = _images_of(
                model, protocol, items, shard, sampler, gates, graph, batch_size
            )
            yield score_images(
                images, shard, protocol, items, scorers, dense, forwards, keep_images=keep_images
            )


def sample_indices(images: int) -> tuple[int, ...]:
    """Return which images are kept to be looked at: a few, spread evenly over the prompts."""
    count = min(NUM_SAMPLES, images)
    return tuple(i * images // count for i in range(count))


def score_images(
    images: Tensor,
    shard: range,
    protocol: Protocol,
    items: Sequence[Item],
    scorers: Scorers,
    dense: DenseImages | None,
    forwards: int = 0,
    *,
    keep_images: bool = False,
) -> ShardResult:
    """Return the scores of the images of one shard, whoever generated them.  # (n, 3, H, W)"""
    scores: dict[str, Array] = {}
    if "clip" in protocol.metrics and scorers.clip is not None:
        prompts = [items[item_of_image(i, len(items))].prompt for i in shard]
        scores["clip"] = clip_scores(scorers.clip, images, prompts)
    if dense is not None and {"psnr", "ssim"} & set(protocol.metrics):
        target = dense(shard.start, shard.stop).to(images.device)
        paired = {"psnr": psnr, "ssim": ssim}
        scores |= {
            name: paired[name](images, target) for name in paired if name in protocol.metrics
        }
    features = np.zeros((len(images), 0), dtype=np.float32)
    if scorers.features is not None:
        features = scorers.features(images)
    pixels = images.cpu().numpy()
    samples = pixels[[i - shard.start for i in sample_indices(protocol.images) if i in shard]]
    kept = pixels if keep_images else None
    return ShardResult(shard.start, shard.stop, scores, features, samples, forwards, kept)


def merge_shards(shards: Sequence[ShardResult], protocol: Protocol) -> ShardResult:
    """Return all shards as one, in order of image.

    Raises:
        EvaluationError: images are missing or there twice.
    """
    ordered = sorted(shards, key=lambda shard: shard.start)
    expected = 0
    for shard in ordered:
        if shard.start != expected:
            raise EvaluationError(
                f"images {min(expected, shard.start)} to {max(expected, shard.start) - 1} are "
                f"{'missing' if shard.start > expected else 'there twice'}: run the sweep again"
            )
        expected = shard.stop
    if expected != protocol.images:
        raise EvaluationError(f"{expected} images are there, the protocol has {protocol.images}")
    names = ordered[0].scores.keys()
    return ShardResult(
        start=0,
        stop=expected,
        scores={name: np.concatenate([s.scores[name] for s in ordered]) for name in names},
        features=np.concatenate([s.features for s in ordered]),
        samples=np.concatenate([s.samples for s in ordered]),
        forwards=sum(s.forwards for s in ordered),
    )


def summarise(
    shards: Sequence[ShardResult], protocol: Protocol, reference: Reference | None
) -> dict[str, Figure]:
    """Return each metric's figure, in the protocol's order; pure.

    Metrics that were not measured (psnr and ssim of the dense model itself) are left out.

    Raises:
        EvaluationError: shards that do not cover the protocol, or another reference or scorer.
    """
    whole = merge_shards(shards, protocol)
    groups = groups_of(protocol)
    figures: dict[str, Figure] = {}
    for metric in protocol.metrics:
        if metric in whole.scores:
            scorer = protocol.clip.id if metric == "clip" and protocol.clip else None
            figures[metric] = mean_figure(whole.scores[metric], groups, scorer)
        elif metric in ("fid", "kid"):
            known = _checked_reference(protocol, reference)
            figures[metric] = (
                fid_figure(whole.features, known, groups)
                if metric == "fid"
                else kid_figure(whole.features, known, groups, subset_size=protocol.kid_subset_size)
            )
    return figures


def groups_of(protocol: Protocol) -> npt.NDArray[np.int64]:
    """Return the item of each image; images of one item are resampled together.  # (n,)"""
    return np.arange(protocol.images, dtype=np.int64) % protocol.num_items


def mean_figure(values: Array, groups: Array, scorer: str | None) -> Figure:
    """Return the mean of per-image scores with its interval by prompt."""
    interval = bootstrap_mean(values, groups)
    if interval is None:
        return Figure(float(values.mean()), None, None, len(values), scorer)
    return Figure(interval.value, interval.low, interval.high, len(values), scorer)


def _images_of(
    model: LoadedModel,
    protocol: Protocol,
    items: Sequence[Item],
    shard: range,
    sampler: SamplerSettings,
    gates: GateTable | None,
    graph: BlockGraph | None,
    batch_size: int,
) -> tuple[Tensor, int]:
    batches = generate(
        model,
        [items[item_of_image(i, len(items))] for i in shard],
        [image_seed(protocol.seed, protocol.split, i) for i in shard],
        sampler,
        gates=gates,
        graph=graph,
        batch_size=batch_size,
    )
    parts, forwards = [], 0
    for batch in batches:
        parts.append(batch.images)
        forwards += batch.forwards
    images = torch.cat(parts)
    if images.shape[-2:] != (protocol.height, protocol.width):
        raise EvaluationError(
            f"{model.settings.id} makes images of {tuple(images.shape[-2:])}, the protocol has "
            f"({protocol.height}, {protocol.width})"
        )
    return images, forwards


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
    paired = {"psnr", "ssim"} & set(protocol.metrics)
    if dense is None and not itself and paired:
        raise EvaluationError(f"{' and '.join(sorted(paired))} need the dense images: give `dense`")
    _check_scorers(protocol, scorers)


def _check_scorers(protocol: Protocol, scorers: Scorers) -> None:
    features = scorers.features.scorer if scorers.features is not None else None
    clip = scorers.clip.scorer if scorers.clip is not None else None
    if {"fid", "kid"} & set(protocol.metrics) and features != protocol.features:
        raise EvaluationError(
            f"the protocol measures features with {protocol.features}, loaded is {features}"
        )
    if "clip" in protocol.metrics and clip != protocol.clip:
        raise EvaluationError(f"the protocol scores with {protocol.clip}, loaded is {clip}")


def _checked_reference(protocol: Protocol, reference: Reference | None) -> Reference:
    if reference is None:
        raise EvaluationError("fid and kid need a reference: give the dense images' features")
    if reference.id != protocol.reference or reference.scorer != protocol.features:
        raise EvaluationError(
            f"the protocol compares with {protocol.reference} by {protocol.features}, the "
            f"reference is {reference.id} by {reference.scorer}"
        )
    return reference
