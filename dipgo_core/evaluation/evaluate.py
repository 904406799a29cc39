"""One evaluation, shard by shard: images, scores of each image, then figures with intervals.

`evaluate_shards` spends the compute and yields what must be kept; `summarise` is pure, so that
stored shards give the same figures on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final
from typing import Protocol as Interface

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dipgo_core.config import SamplerSettings
from dipgo_core.errors import EvaluationError
from dipgo_core.evaluation.clip_score import clip_scores, load_clip
from dipgo_core.evaluation.fid import fid_figures, kid_figure, load_extractor
from dipgo_core.evaluation.generate import generate
from dipgo_core.evaluation.intervals import Figure, bootstrap_mean
from dipgo_core.evaluation.metrics import METRICS, PAIRED, PER_IMAGE, Role, roles_of
from dipgo_core.evaluation.paired import psnr, ssim
from dipgo_core.evaluation.prompts import item_of_image, items_sha256
from dipgo_core.evaluation.protocol import Protocol, image_seed
from dipgo_core.evaluation.reference import Reference
from dipgo_core.evaluation.scorers import Scorer
from dipgo_core.gates import GateTable
from dipgo_core.graph import BlockGraph
from dipgo_core.items import Item
from dipgo_core.pipelines import LoadedModel

Array = npt.NDArray[Any]
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
}

#: Scores of each image, by metric; the loaded network is None where the metric needs none.
SCORES: Final[Mapping[str, Callable[[Batch, Any], Array]]] = {
    "clip": lambda batch, clip: clip_scores(clip, batch.images, batch.prompts),
    "psnr": lambda batch, _: psnr(batch.images, _dense_of(batch)),
    "ssim": lambda batch, _: ssim(batch.images, _dense_of(batch)),
}

#: Roles whose network turns images into features that are compared as a set.
FEATURE_ROLES: Final[tuple[Role, ...]] = ("features", "cmmd")


@dataclass(frozen=True, eq=False)
class ShardResult:
    """What images [start, stop) came to.

    scores: of the per-image metrics that the protocol measures, each (n,) float64.
    features: by role, each (n, d) float32. samples: those of `sample_indices`
    that fall into this shard, uint8 (k, 3, H, W). forwards: denoiser forwards spent.
    """

    start: int
    stop: int
    scores: Mapping[str, Array]
    features: Mapping[str, Array]
    samples: Array
    forwards: int
    images: Array | None = field(default=None, repr=False)

    def to_tensors(self) -> dict[str, Array]:
        """Return the shard as named arrays, ready for safetensors; images are left out."""
        facts = np.array([self.start, self.stop, self.forwards], dtype=np.int64)
        features = {f"features.{role}": rows for role, rows in self.features.items()}
        return {"facts": facts, "samples": self.samples, **features, **self.scores}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Array]) -> ShardResult:
        """Return the shard that `to_tensors` wrote.

        Raises:
            EvaluationError: arrays are missing.
        """
        try:
            start, stop, forwards = (int(value) for value in tensors["facts"])
            scores = {name: tensors[name] for name in PER_IMAGE if name in tensors}
            features = {
                name.removeprefix("features."): rows
                for name, rows in tensors.items()
                if name.startswith("features.")
            }
            samples = tensors["samples"]
        except (KeyError, ValueError) as error:
            raise EvaluationError(f"not a shard of an evaluation: {error!r}") from error
        return cls(start, stop, scores, features, samples, forwards)


def load_scorers(
    protocol: Protocol,
    names: Mapping[Role, str],
    *,
    device: str | torch.device = "cpu",
) -> Scorers:
    """Load the scorers that the protocol's metrics need, by the names they were planned with.

    names: role -> bundled name, hub id or path.

    Raises:
        ModelFilesError: weights that are missing or broken.
        EvaluationError: a scorer is not the one in the protocol.
    """
    needed = roles_of(protocol.metrics)
    scorers = {role: LOADERS[role](names[role], device=device) for role in needed if role in names}
    _check_scorers(protocol, scorers)
    return scorers


def shards_of(protocol: Protocol, shard_size: int, first: int = 0) -> tuple[range, ...]:
    """Return the image indices of each shard, in order, from image `first` on."""
    return tuple(
        range(start, min(start + shard_size, protocol.images))
        for start in range(first, protocol.images, shard_size)
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
    first: int = 0,
    done: Collection[int] = (),
    keep_images: bool = False,
) -> Iterator[ShardResult]:
    """Yield one result a shard, so that the caller stores it and memory stays that of one shard.

    sampler: of this run; few-step baselines differ from the protocol's. dense: needed for psnr and
    ssim, except by the dense run itself. first: image to begin with, if those before it are known.
    done: first indices of shards that are stored already and not computed again. keep_images: also
    return the images, as the dense reference needs them.

    Raises:
        EvaluationError: items, scorers or dense images are not the protocol's; broken images.
    """
    itself = gates is None and sampler.to_json() == protocol.sampler
    _check_inputs(protocol, items, scorers, dense, itself)
    for shard in shards_of(protocol, shard_size, first):
        if shard.start not in done:
            images, forwards = _images_of(
                model, protocol, items, shard, sampler, gates, graph, batch_size
            )
            yield score_images(
                images, shard, protocol, items, scorers, dense, forwards, keep_images=keep_images
            )


def sample_indices(images: int) -> tuple[int, ...]:
    """Return which images are kept to be looked at: the first few, whatever their number."""
    return tuple(range(min(NUM_SAMPLES, images)))


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
    wanted = [name for name in protocol.metrics if name in PER_IMAGE]
    wanted = [name for name in wanted if dense is not None or name not in PAIRED]
    target = None
    if dense is not None and set(wanted) & set(PAIRED):
        target = dense(shard.start, shard.stop).to(images.device)
    prompts = [items[item_of_image(i, len(items))].prompt for i in shard]
    batch = Batch(images, prompts, target)
    scores = {name: SCORES[name](batch, _network(scorers, name)) for name in wanted}
    features: dict[str, Array] = {
        role: scorers[role](images) for role in FEATURE_ROLES if role in scorers
    }
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
    names, roles = ordered[0].scores.keys(), ordered[0].features.keys()
    return ShardResult(
        start=0,
        stop=expected,
        scores={name: np.concatenate([s.scores[name] for s in ordered]) for name in names},
        features={role: np.concatenate([s.features[role] for s in ordered]) for role in roles},
        samples=np.concatenate([s.samples for s in ordered]),
        forwards=sum(s.forwards for s in ordered),
    )


def summarise(
    shards: Sequence[ShardResult], protocol: Protocol, references: Mapping[str, Reference]
) -> dict[str, Figure]:
    """Return each metric's figure, in the protocol's order; with FID also `fid_infinity`. Pure.

    references: by role, what features are compared with.

    Metrics that were not measured (psnr and ssim of the dense model itself) are left out.

    Raises:
        EvaluationError: shards that do not cover the protocol, or another reference or scorer.
    """
    whole = merge_shards(shards, protocol)
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
    paired = set(PAIRED) & set(protocol.metrics)
    if dense is None and not itself and paired:
        raise EvaluationError(f"{' and '.join(sorted(paired))} need the dense images: give `dense`")
    _check_scorers(protocol, scorers)


def _check_scorers(protocol: Protocol, scorers: Scorers) -> None:
    for role, wanted in protocol.scorers.items():
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
