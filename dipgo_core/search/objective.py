"""The true objective: how far a SubNet's runs end from the dense model's, on calibration items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dipgo_core.config import Objective
from dipgo_core.errors import SearchError
from dipgo_core.gates import GateTable
from dipgo_core.pipelines import LoadedModel
from dipgo_core.runtime import gated_calls
from dipgo_core.sampling import Batch, decode, rollout
from dipgo_core.search.progress import SearchProblem
from dipgo_core.strategies import MOST_AT_ONCE

#: Numbers that an image's error is kept in; sketches keep inner products, whatever the image size.
SKETCH: int = 1024
#: A SHA-256.
DIGEST_BYTES: int = 32
Vector = npt.NDArray[np.float32]

#: Below this, a mean square is rounding.
SMALLEST: float = 1e-12


@dataclass(frozen=True, eq=False)
class Measured:
    """How far the runs of one gate table end from the dense ones.

    mse: (B,), mean square over the elements of what the objective looks at. vectors: (B, d), the
    errors themselves, or sketches of them, scaled so that a row's squares sum up to its `mse`.
    """

    mse: npt.NDArray[np.float64]
    vectors: npt.NDArray[np.float32]

    @property
    def logs(self) -> npt.NDArray[np.float64]:
        """Log mean squares: 10 dB of PSNR are one factor of ten, on every image.  # (B,)"""
        return np.log(np.maximum(self.mse, SMALLEST))

    @property
    def score(self) -> float:
        """What a search minimises: the mean of the logs."""
        return float(self.logs.mean())


@dataclass(eq=False)
class Space:
    """Where errors are taken: final latents, or decoded pixels in [0, 1]."""

    model: LoadedModel
    objective: Objective

    def of(self, latents: Tensor) -> Tensor:
        """Return the values that are compared, in float32.  # (B, C, h, w) -> (B, n)"""
        values = latents if self.objective == "latent" else decode(self.model, latents)
        return values.detach().float().flatten(1).cpu()


def sketched(errors: Tensor) -> npt.NDArray[np.float32]:
    """Return errors as vectors of at most SKETCH numbers, mean squares kept.  # (B, n) -> (B, d)

    Elements are added up in buckets under random signs (count sketch, Charikar et al. 2002): inner
    products keep their value but for noise of about 1 / sqrt(SKETCH).
    """
    width = errors.shape[1]
    scaled = errors / math.sqrt(width)
    if width <= SKETCH:
        return np.asarray(scaled.numpy(), dtype=np.float32)
    drawn = torch.Generator().manual_seed(0)
    buckets = torch.randint(SKETCH, (width,), generator=drawn)
    signs = torch.randint(2, (width,), generator=drawn) * 2.0 - 1.0
    found = scaled.new_zeros(len(errors), SKETCH).index_add_(1, buckets, scaled * signs)
    return np.asarray(found.numpy(), dtype=np.float32)


@dataclass(eq=False)
class TrueObjective:
    """Runs gate tables on calibration items; remembers what was run, and what it cost.

    dense: (n, C, h, w), final latents of the dense model for all items of the problem.
    """

    problem: SearchProblem
    dense: Tensor
    forwards: int = 0
    sample_forwards: float = 0.0
    _space: Space = field(init=False)
    _known: dict[tuple[str, int], tuple[float, Vector]] = field(default_factory=dict)
    _batches: dict[tuple[int, ...], Batch] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._space = Space(self.problem.model, self.problem.settings.objective)

    def measure(self, gates: GateTable, items: Sequence[int]) -> Measured:
        """Return the errors of a gate table on calibration items; none is run twice.

        Raises:
            SearchError: latents that are not finite.
        """
        digest = gates.digest
        missing = [item for item in items if (digest, item) not in self._known]
        at_once = min(self.problem.settings.samples, MOST_AT_ONCE)
        for start in range(0, len(missing), at_once):
            self._run(gates, digest, missing[start : start + at_once])
        found = [self._known[digest, item] for item in items]
        return Measured(
            mse=np.array([mse for mse, _ in found]),
            vectors=np.stack([vector for _, vector in found]),
        )

    @torch.no_grad()
    def _run(self, gates: GateTable, digest: str, items: Sequence[int]) -> None:
        problem = self.problem
        batch = self._batch(tuple(items))
        with gated_calls(problem.model, problem.graph, gates) as policy:
            final = rollout(problem.model, batch, problem.sampler, on_call=policy.start_call)
        self.count(gates, len(items))
        of = self._space.of
        errors = of(final) - of(self.dense[list(items)].to(final.device))
        if not bool(errors.isfinite().all()):
            raise SearchError(
                f"the latents of a SubNet are not finite; set the model's dtype to float32 (it is "
                f"{problem.model.settings.dtype})"
            )
        mse = errors.double().square().mean(1).tolist()
        for item, one, vector in zip(items, mse, sketched(errors), strict=True):
            self._known[digest, item] = (one, vector)

    def count(self, gates: GateTable, images: int) -> None:
        """Add what a run of a gate table costs."""
        graph = self.problem.graph
        self.forwards += int(gates.keep.any(axis=1).sum())
        self.sample_forwards += images * graph.macs(gates) / graph.call_macs()

    def to_tensors(self) -> dict[str, Tensor]:
        """Return every run that was made, and the cost of all; fit for safetensors."""
        digests = b"".join(bytes.fromhex(digest) for digest, _ in self._known)
        found = list(self._known.values())
        vectors = np.stack([v for _, v in found]) if found else np.zeros((0, 1), np.float32)
        return {
            "digests": torch.frombuffer(bytearray(digests or b"-"), dtype=torch.uint8),
            "items": torch.tensor([item for _, item in self._known], dtype=torch.int64),
            "mse": torch.tensor([mse for mse, _ in found], dtype=torch.float64),
            "vectors": torch.from_numpy(vectors),
            "spent": torch.tensor([self.forwards, self.sample_forwards], dtype=torch.float64),
        }

    def load(self, state: Mapping[str, Tensor]) -> float:
        """Take over the runs of a search that was interrupted; return the seconds it had taken.

        Raises:
            SearchError: the state of another search.
        """
        try:
            digests = state["digests"].numpy().tobytes()
            items, mse = state["items"].tolist(), state["mse"].tolist()
            vectors = state["vectors"].numpy()
            forwards, self.sample_forwards = state["spent"].tolist()
            seconds = float(state["seconds"])
        except KeyError as error:
            raise SearchError(
                f"the saved state belongs to another search ({error}); delete it and start anew"
            ) from error
        self.forwards = int(forwards)
        for i, (item, one) in enumerate(zip(items, mse, strict=True)):
            digest = digests[DIGEST_BYTES * i : DIGEST_BYTES * (i + 1)].hex()
            self._known[digest, int(item)] = (one, vectors[i])
        return seconds

    def _batch(self, items: tuple[int, ...]) -> Batch:
        if items not in self._batches:
            problem = self.problem
            self._batches[items] = Batch(
                tuple(problem.items[i] for i in items), tuple(problem.seeds[i] for i in items)
            )
        return self._batches[items]
