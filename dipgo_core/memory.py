"""Peak GPU memory of tasks, estimated before anything runs, and how to make them fit. No torch.

What is added up, and where each figure comes from, is in docs/memory.md. An estimate is of what
the device holds for one process: tensors and caches by `MARGIN`, and `OVERHEAD`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from dipgo_core.config import DType, Granularity
from dipgo_core.decoding import Decoding
from dipgo_core.families.sizes import CallSizes, DecodeSizes, ModelSizes

#: Gaps between blocks of the allocator, workspaces of convolutions, what is not traced.
MARGIN: Final = 1.15
#: Context of the driver and kernels of the libraries, in bytes.
OVERHEAD: Final = 1_000_000_000

#: A search whose rollout has fewer MACs keeps activations instead of computing them again.
CHECKPOINT_ABOVE_MACS: Final = 100_000_000_000

_ITEM: Final[Mapping[DType, int]] = {"float32": 4, "float16": 2, "bfloat16": 2}
_CALLS: Final = 2  # bytes a number in `CallSizes`
_DECODE: Final = 4  # and in `DecodeSizes`


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes that a task needs, by what takes them.

    unknown: what is not in `parts` because nobody told; then `total` is a lower bound.
    """

    parts: Mapping[str, int]
    unknown: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        return round(sum(self.parts.values()) * MARGIN) + OVERHEAD

    def fits(self, limit: int | None) -> bool | None:
        """Whether it fits into so many bytes; None where that is not known."""
        if limit is None:
            return None
        if self.total > limit:
            return False
        return None if self.unknown else True


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a GPU is loaded with whatever the task does.

    sizes: None where nothing is known of the model. side: of the images, in pixels. guided: whether
    guidance is on. pipeline_upcasts: whether the stock pipeline decodes in float32 what asks for
    it (SDXL's do). scorers: bytes of the networks that judge images, by name; None: not known.
    """

    sizes: ModelSizes | None
    dtype: DType
    side: int
    guided: bool
    pipeline_upcasts: bool = False
    scorers: Mapping[str, int | None] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows of the denoiser's batch that one image takes."""
        return self.sizes.guided_rows if self.guided and self.sizes else 1

    @property
    def area(self) -> float:
        """How many times more pixels the images have than those the sizes were traced for."""
        return (self.side / self.sizes.side) ** 2 if self.sizes else 1.0

    def calls(self, granularity: Granularity) -> CallSizes | None:
        return self.sizes.calls.get(granularity) if self.sizes else None

    @property
    def decode(self) -> DecodeSizes | None:
        return self.sizes.decode if self.sizes else None


@dataclass(frozen=True, kw_only=True)
class Run:
    """One way to run a task. images: at a time. checkpoint_calls: of a search, whether denoiser
    calls are computed again in the backward pass; None: as the search itself decides."""

    images: int
    checkpoint_calls: bool | None = None
    decoding: Decoding = Decoding()


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The way a task is run, and what it needs then. limit: bytes of the GPU; None: not known."""

    run: Run
    need: Need
    limit: int | None

    @property
    def fits(self) -> bool | None:
        return self.need.fits(self.limit)


@dataclass(frozen=True, kw_only=True)
class Search:
    """What of a search decides its memory.

    calls: that gradients go through at once. gates: searched ones of a call; query_dim: of the
    pruner; checkpoints: whether it computes calls again if nobody decides; through_decoder: whether
    gradients go through decoding as well.
    """

    images: int
    calls: int
    granularity: Granularity
    gates: int
    query_dim: int
    checkpoints: bool = True
    through_decoder: bool = True


# making images -----------------------------------------------------------------------------------


def generation_need(
    load: Load,
    run: Run,
    gated: Granularity | None = None,
    *,
    decodes: bool = True,
    caches: int = 1,
) -> Need:
    """Return what it takes to make images, or latents alone where nothing is decoded.

    gated: at which granularity a SubNet keeps caches. caches: of how many calls.
    """
    item = _ITEM[load.dtype]
    upcast = load.pipeline_upcasts and _upcasts(load)
    parts = _weights(load, decoder_item=4 if upcast else item)
    call, decode, sizes = load.calls(gated or "block"), load.decode, load.sizes
    if sizes is None or call is None or decode is None:
        return _lacking(load, parts)
    rows = run.images * load.rows * load.area * item / _CALLS
    images = 1 if run.decoding.slicing else run.images
    one = decode.tiled if run.decoding.tile else decode.forward
    decoded = images * one * load.area * (4 if upcast else item) / _DECODE if decodes else 0
    parts["activations"] = round(max(rows * call.forward, decoded))
    if decodes:
        parts["images"] = 2 * 4 * 3 * load.side**2 * run.images  # in floating point, and rounded
    if gated:
        parts["caches"] = round(caches * rows * call.cache)
    return _with_scorers(load, parts)


def fit_generation(
    load: Load,
    images: int,
    limit: int | None,
    *,
    gated: Granularity | None = None,
    fixed: bool = False,
    decodes: bool = True,
    caches: int = 1,
    tile: int | None = None,
) -> Fit:
    """Return the fastest way to make images that fits, at most so many at a time.

    fixed: neither their number nor how they are decoded may change (they decide the result).
    decodes: False for latents alone. caches: as of `generation_need`. tile: as in `Decoding`, where
    images are decoded in tiles.
    """
    asked = Run(images=images, decoding=Decoding(tile=tile))
    ways = [asked] if fixed else [asked, *_smaller(asked)]
    needs = (
        (way, generation_need(load, way, gated, decodes=decodes, caches=caches)) for way in ways
    )
    return _first_that_fits(needs, limit)


def _smaller(asked: Run) -> Iterator[Run]:
    """Slices first, which cost next to nothing; then fewer images at a time."""
    if asked.images > 1:
        sliced = replace(asked, decoding=replace(asked.decoding, slicing=True))
        yield from (replace(sliced, images=n) for n in range(asked.images, 0, -1))


# searching with gradients ------------------------------------------------------------------------


def checkpoints(call_macs: int, forwards: int) -> bool:
    """Return whether a search computes calls again if nobody decides.

    forwards: calls of a rollout, each image of its batch counted.
    """
    return call_macs * forwards > CHECKPOINT_ABOVE_MACS


def search_need(load: Load, search: Search, run: Run) -> Need:
    """Return what a search takes that differentiates through denoiser calls."""
    item = _ITEM[load.dtype]
    copied = load.dtype == "float16" and _upcasts(load)  # the decoder is there in both precisions
    parts = _weights(load, decoder_item=item + 4 if copied else item)
    parts["pruner"] = _pruner_bytes(search)
    call, decode = load.calls(search.granularity), load.decode
    if call is None or decode is None:
        return _lacking(replace(load, scorers={}), parts)
    rows = run.images * load.rows * load.area * item / _CALLS
    through = search.through_decoder
    one = _decode_with_gradients(decode, run.decoding) if through else decode.forward
    decoded = run.images * one * load.area
    decoded *= (4 if copied else item) / _DECODE
    again = search.checkpoints if run.checkpoint_calls is None else run.checkpoint_calls
    if again:
        parts["caches between calls"] = round(search.calls * rows * call.cache)
        parts["activations"] = round(max(rows * call.backward, decoded))
    else:
        differentiated = search.calls - 1  # the first call has no gates, and so no gradients
        parts["activations of all calls"] = round(differentiated * rows * call.saved)
        parts["activations"] = round(max(rows * (call.backward - call.saved), decoded))
    return Need(parts=parts)


def fit_search(load: Load, search: Search, limit: int | None, tile: int | None = None) -> Fit:
    """Return the fastest way to run a search that fits; its batch is split, never changed.

    Where nobody knows what calls hold, nothing is chosen: the search's own rule decides.
    """
    plain = Decoding(checkpointing=tile is not None, tile=tile)
    asked = Run(images=search.images, decoding=plain)
    ways = [asked]
    known = load.calls(search.granularity) is not None and load.decode is not None
    if limit is not None and known:
        again = replace(asked, checkpoint_calls=True)
        both = replace(again, decoding=replace(plain, checkpointing=True))
        kept = replace(asked, checkpoint_calls=False)
        ways = [kept, again, both, *(replace(both, images=n) for n in _parts_of(search.images))]
    return _first_that_fits(((way, search_need(load, search, way)) for way in ways), limit)


def _parts_of(images: int) -> Iterator[int]:
    """Sizes of equal parts of a batch, falling: their mean gradients average to that of all."""
    return (n for n in range(images - 1, 0, -1) if images % n == 0)


def _decode_with_gradients(decode: DecodeSizes, decoding: Decoding) -> int:
    if decoding.tile is not None:
        return decode.tiled_backward
    return decode.checkpointed if decoding.checkpointing else decode.backward


def _pruner_bytes(search: Search) -> int:
    """Weights, gradients and an update of `PrunerNet`, and activations of its encoder."""
    width, gates = search.query_dim, (search.calls - 1) * search.gates
    hidden = max(8, width // 16)
    parameters = gates * (width + width * hidden + 3 * hidden + 2) + 8 * width**2
    return 4 * (3 * parameters + 16 * gates * width)


# parts -------------------------------------------------------------------------------------------


def _upcasts(load: Load) -> bool:
    return load.sizes is not None and load.sizes.upcast and load.dtype == "float16"


def _weights(load: Load, *, decoder_item: int) -> dict[str, int]:
    """Return the bytes of the pipeline's networks, all of them on the GPU."""
    if load.sizes is None:
        return {}
    item, sizes = _ITEM[load.dtype], load.sizes
    parts = {
        "denoiser": sizes.denoiser * item,
        "text encoders": sizes.text * item,
        "autoencoder": sizes.decoder * decoder_item,
    }
    return {name: size for name, size in parts.items() if size}


def _lacking(load: Load, parts: dict[str, int]) -> Need:
    """Return a lower bound: the weights that are known, and no activations."""
    need = _with_scorers(load, parts)
    lacking = "activations" if load.sizes else "the model"
    return replace(need, unknown=(lacking, *need.unknown))


def _with_scorers(load: Load, parts: Mapping[str, int]) -> Need:
    known = sum(size for size in load.scorers.values() if size is not None)
    return Need(
        parts={**parts, **({"scorers": known} if known else {})},
        unknown=tuple(name for name, size in load.scorers.items() if size is None),
    )


def _first_that_fits(ways: Iterator[tuple[Run, Need]], limit: int | None) -> Fit:
    """Return the first way that fits, or may fit where not all is known; else the last."""
    tried: list[Fit] = []
    for run, need in ways:
        tried.append(Fit(run=run, need=need, limit=limit))
        if tried[-1].fits is not False:
            break
    return tried[-1]
