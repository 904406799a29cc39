"""What a plan must know of the world: digests, prompts, scorers. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dipgo_core.errors import (
    DipgoError,
    EvaluationError,
    PreflightError,
    StoreError,
)
from dipgo_core.evaluation.lpips_files import check_side
from dipgo_core.evaluation.metrics import DISTRIBUTION, Role, roles_of
from dipgo_core.evaluation.prompts import (
    check_disjoint,
    distinct,
    in_order,
    item_of_image,
    items_sha256,
    label_items,
    read_items,
    with_labels,
)
from dipgo_core.evaluation.protocol import largest_kid_subset
from dipgo_core.evaluation.reference import check_folder, check_statistics
from dipgo_core.evaluation.scorers import Scorer, scorer_of
from dipgo_core.families import find_family
from dipgo_core.families.sizes import ModelSizes
from dipgo_core.items import Item
from dipgo_core.model_files import weights_digest
from dipgo_core.model_sizes import scorer_bytes, sizes_of
from dipgo_core.zoo import ZOO_MODELS, reference_statistics_path
from orchestrator.model_places import (
    KnownItems,
    class_names,
    image_size,
    local_base,
    local_folder,
    on_hub,
    size_key,
    sized_folder,
)
from orchestrator.records import content_key
from orchestrator.sweep_settings import (
    Calibration,
    EvaluateSettings,
    PromptSource,
    SweepFile,
    SweepModel,
)

T = TypeVar("T")

BUNDLED = "bundled"


@dataclass(frozen=True, kw_only=True)
class ItemSet:
    """Prompts or labels of one split. `items` is None where they could not be read (planning
    without network); then `sha256` is provisional, and running the sweep reads them. repeated: how
    many were left out because an item before says the same."""

    sha256: str
    count: int
    items: tuple[Item, ...] | None = None
    repeated: int = 0

    def blob(self) -> bytes:
        """Return the items as bytes whose SHA-256 is `sha256`."""
        rows = [[item.prompt, item.label] for item in self.items or ()]
        return json.dumps(rows, separators=(",", ":")).encode()

    def shown_sha256(self, images: int) -> str:
        """Return the digest of what the first images show; provisional where `items` is None."""
        if self.items is None:
            return self.sha256
        return items_sha256([self.items[item_of_image(i, self.count)] for i in range(images)])


def items_of_blob(data: bytes) -> tuple[Item, ...]:
    """Return the items that `ItemSet.blob` wrote."""
    return tuple(Item(prompt, label) for prompt, label in json.loads(data))


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Facts of one model. reference: as in a protocol; reference_value: where it lies.

    folder: the local folder or file that the sweep file names as the model, from the root, None for
    others; base_folder: the same of its base.
    Where it lies decides no result and is in no key: its weights are. sizes: of its networks, None
    where nobody tells; scorer_bytes: of the networks that judge images, by name.
    """

    weights_sha256: str
    height: int
    width: int
    test: ItemSet
    calibration: ItemSet
    scorers: Mapping[Role, Scorer] = field(default_factory=dict)
    reference: str = "dense"
    reference_value: str = ""
    folder: str | None = None
    base_folder: str | None = None
    sizes: ModelSizes | None = None
    scorer_bytes: Mapping[str, int | None] = field(default_factory=dict)


def gather_facts(
    sweep: SweepFile, *, offline: bool = False, known: KnownItems | None = None
) -> dict[str, ModelFacts]:
    """Return the facts of every model, by its name in the sweep, as `find_facts` does.

    Raises:
        PreflightError: prompts, weights, scorers or statistics are missing, or do not fit; lists
            all of it.
    """
    facts, problems = find_facts(sweep, offline=offline, known=known)
    if problems:
        raise refusal(sweep, problems)
    return facts


def find_facts(
    sweep: SweepFile, *, offline: bool = False, known: KnownItems | None = None
) -> tuple[dict[str, ModelFacts], list[str]]:
    """Look up the facts of every model; return those that are whole, and a line for each problem.

    offline: let what needs the network pass as unread; what is `known` stays as it was when the
    sweep ran.
    """
    unread = None if not offline else (known or {})
    problems: list[str] = []
    found = {model.name: _facts(model, unread, problems) for model in sweep.models}
    return {name: facts for name, facts in found.items() if facts is not None}, problems


def refusal(sweep: SweepFile, problems: Iterable[str], done: str = "run") -> PreflightError:
    """Return one error that lists every problem of a sweep once."""
    lines = list(dict.fromkeys(problems))
    noun = "problem" if len(lines) == 1 else "problems"
    text = "\n".join(f"  {line}" for line in lines)
    return PreflightError(f"{sweep.name} cannot be {done}, {len(lines)} {noun}:\n{text}")


def with_kept_items(
    facts: Mapping[str, ModelFacts], read: Callable[[str], bytes]
) -> dict[str, ModelFacts]:
    """Return the facts with those items that the network had to tell and a run has kept.

    read: gives the bytes of `ItemSet.blob` by their digest.
    """
    return {
        name: replace(
            known, test=_kept(known.test, read), calibration=_kept(known.calibration, read)
        )
        for name, known in facts.items()
    }


def _kept(items: ItemSet, read: Callable[[str], bytes]) -> ItemSet:
    if items.items is not None:
        return items
    try:
        return replace(items, items=items_of_blob(read(items.sha256)))
    except StoreError:
        return items  # never run: the digest is provisional


def known_items(sweep: SweepFile, facts: Mapping[str, ModelFacts]) -> dict[str, list[Any]]:
    """Return what `gather_facts` needs to plan this sweep again without network."""
    known: dict[str, list[Any]] = {}
    for model in sweep.models:
        found = facts[model.name]
        if on_hub(model):
            known[size_key(model)] = [found.height]
        for source, items in (
            (model.evaluate.prompts, found.test),
            (model.calibration.prompts, found.calibration),
        ):
            if _needs_hub(model, source):
                known[items_key(model, source)] = [items.sha256, items.count]
    return known


def items_key(model: SweepModel, source: PromptSource) -> str:
    """Return what tells one set of items from another; labels are those of a model."""
    labelled = find_family(model.family).conditioning == "label"
    return content_key([asdict(source), asdict(model.settings) if labelled else None])


def _needs_hub(model: SweepModel, source: PromptSource) -> bool:
    """Return whether items are told by a data set on the hub, or by a model that is there."""
    labelled = find_family(model.family).conditioning == "label"
    return source.kind == "hub" or (labelled and on_hub(model))


def _facts(model: SweepModel, unread: KnownItems | None, problems: list[str]) -> ModelFacts | None:
    before = len(problems)

    def look(field: str, find: Callable[[], T]) -> T | None:
        try:
            return find()
        except DipgoError as error:
            problems.append(f"{model.name}: {field}: {error}")
            return None

    test = look("evaluate.prompts", lambda: _item_set(model, model.evaluate, unread))
    calibration = look(
        "search.calibration.prompts", lambda: _item_set(model, model.calibration, unread)
    )
    if test and calibration and find_family(model.family).conditioning == "prompt":
        look(
            "search.calibration.prompts",
            lambda: check_disjoint(calibration.items or (), test.items or ()),
        )
    weights = look("id", lambda: weights_digest(model.settings))
    size = look("id", lambda: image_size(model, unread)) if weights else None
    reference = look("evaluate.reference", lambda: _reference_of(model))
    scorers = {
        role: look(f"evaluate.scorers.{role}", partial(scorer_of, role, name))
        for role, name in scorer_names(model).items()
    }
    if size and "lpips" in scorers:
        look("evaluate.metrics", lambda: check_side(scorer_names(model)["lpips"], size))
    if len(problems) > before or not (test and calibration and weights and size and reference):
        return None
    return ModelFacts(
        weights_sha256=weights,
        height=size,
        width=size,
        test=test,
        calibration=calibration,
        scorers={role: scorer for role, scorer in scorers.items() if scorer is not None},
        reference=reference[0],
        reference_value=reference[1],
        folder=local_folder(model),
        base_folder=local_base(model),
        sizes=sizes_of(model.settings.id, sized_folder(model), find_family(model.family)),
        scorer_bytes={name: scorer_bytes(name) for name in scorer_names(model).values()},
    )


def _reference_of(model: SweepModel) -> tuple[str, str]:
    """Return a protocol's name of what distributions are compared with, and where it lies."""
    metrics = model.evaluate.metrics
    if not set(DISTRIBUTION) & set(metrics):
        return "dense", ""
    reference = model.evaluate.reference
    if reference.kind == "dense":
        return "dense", ""
    value = reference.value
    if reference.kind == "folder" or value != BUNDLED:
        value = str(Path(value).expanduser().absolute())
    subset = largest_kid_subset(model.evaluate.images) if "kid" in metrics else 0
    if reference.kind == "folder":
        return check_folder(Path(value), kid_subset_size=subset), value
    identity = check_statistics(
        reference_path(value),
        scorer_of("features", model.evaluate.scorers.features),
        extractor=reference.extractor,
        resize=reference.resize,
        kid_subset_size=subset,
    )
    return identity, value


def scorer_names(model: SweepModel) -> dict[Role, str]:
    """Return the network of each role that the model's metrics need."""
    named = {
        role: getattr(model.evaluate.scorers, role) for role in roles_of(_image_metrics(model))
    }
    return {role: name for role, name in named.items() if name is not None}


#: Roles whose networks have names; only ``NAME:FILE`` is a path.
_NAMED: tuple[Role, ...] = ("features", "lpips")


def scorer_places(model: SweepModel) -> dict[Role, str]:
    """Return `scorer_names` with paths that open from any working folder: a worker has its own."""
    return {role: _from_anywhere(role, name) for role, name in scorer_names(model).items()}


def _from_anywhere(role: Role, name: str) -> str:
    """Return a scorer's name with its path made absolute; without a FILE some are names alone."""
    kind, colon, file = name.partition(":")
    path = Path(file if colon else name).expanduser()
    if name in ZOO_MODELS or (role in _NAMED and not colon) or not path.exists():
        return name
    return f"{kind}:{path.absolute()}" if colon else str(path.absolute())


def _image_metrics(model: SweepModel) -> tuple[str, ...]:
    return tuple(metric for metric in model.evaluate.metrics if metric != "latency")


def _item_set(
    model: SweepModel, split: EvaluateSettings | Calibration, unread: KnownItems | None
) -> ItemSet:
    """Read a split's items; hub prompts not, if `unread` says what is known of them instead."""
    source = split.prompts
    if unread is not None and _needs_hub(model, source):
        key = items_key(model, source)
        if key in unread or source.kind == "hub":
            if source.rows is not None:
                check_enough(source.rows, split)
            sha256, count = unread.get(key, (key, source.rows or 1))
            return ItemSet(sha256=sha256, count=count)
    read = _read(model, source)
    items = in_order(distinct(read))
    check_enough(len(items), split)
    return ItemSet(
        sha256=items_sha256(items),
        count=len(items),
        items=items,
        repeated=len(read) - len(items),
    )


def _read(model: SweepModel, source: PromptSource) -> tuple[Item, ...]:
    labelled = find_family(model.family).conditioning == "label"
    if source.kind == "labels":
        return label_items(class_names(model), source.rows, chosen=source.labels)
    items = read_items(source.source)
    return with_labels(items, class_names(model)) if labelled else items


def check_enough(count: int, split: EvaluateSettings | Calibration) -> None:
    """Check that no prompt has to be shown more often than the sweep file allows.

    Raises:
        EvaluationError: the prompt set is shorter than the number of images.
    """
    each = split.images_per_prompt if isinstance(split, EvaluateSettings) else None
    if each is not None and split.images > each * count:
        wanted = -(-split.images // count)
        raise EvaluationError(
            f"evaluate.images is {split.images}, but the prompt set has {count} "
            f"prompts for {each} image{'s' if each > 1 else ''} each: lower images, give more "
            f"prompts, or set evaluate.images_per_prompt: {wanted}"
        )


def reference_path(value: str) -> Path:
    """Return where the images or statistics lie that a task's options name."""
    return reference_statistics_path() if value == BUNDLED else Path(value)
