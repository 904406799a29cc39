"""Entries of `models`: one SweepModel per model and sampler, its sections merged."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, get_args

from dipgo_core.config import DType, ModelSettings, SamplerSettings
from dipgo_core.families import FAMILIES, KNOWN_MODELS, calls_of, find_known
from dipgo_core.families.fallback import named_fallback
from dipgo_core.hub import is_hub_id
from dipgo_core.model_base import base_of, elsewhere
from dipgo_core.postprocess import kept_share
from dipgo_core.strategies import READS
from orchestrator.sweep_file.context import Context
from orchestrator.sweep_file.evaluate import read_baselines, read_evaluate, read_targets
from orchestrator.sweep_file.explore import EXPLORABLE, read_explore
from orchestrator.sweep_file.fields import (
    Fields,
    choice,
    reject,
    text,
    whole,
)
from orchestrator.sweep_file.identity import Identity, identify
from orchestrator.sweep_file.overrides import merge
from orchestrator.sweep_file.pins import (
    check_base_pin,
    check_model_pin,
    check_prompt_pin,
    check_scorer_pins,
)
from orchestrator.sweep_file.prompts import check_splits
from orchestrator.sweep_file.sampler import read_samplers
from orchestrator.sweep_file.search import SearchSection, read_search
from orchestrator.sweep_issues import Issues
from orchestrator.sweep_settings import Baseline, EvaluateSettings, Explore, SweepModel
from orchestrator.yaml_source import Node

#: What a model may override.
SECTIONS: Final = ("search", "explore", "targets", "baselines", "evaluate")
MAX_MODELS: Final = 500

_DTYPES: Final[tuple[DType, ...]] = get_args(DType)
_FLOAT32: Final[DType] = "float32"
_BUNDLED: Final = ", ".join(known.id for known in KNOWN_MODELS if known.bundled)
MAX_PIXELS: Final = 8192
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What all entries of a file share; `sections` lie under what each model overrides."""

    folder: Path
    sections: Mapping[str, Node]
    allow_unpinned: bool


def name_rule(name: str) -> str | None:
    """Return the rule that `name` breaks as the name of a sweep or a model, or None."""
    if _NAME.fullmatch(name):
        return None
    return f"must be up to 100 letters, digits, '.', '_' and '-', got {name!r}"


def read_models(node: Node, shared: Shared, issues: Issues) -> tuple[SweepModel, ...]:
    """Read `models`."""
    if not isinstance(node.value, tuple) or not 1 <= len(node.value) <= MAX_MODELS:
        reject(node, issues, f"must be a list of 1 to {MAX_MODELS} models")
        return ()
    models: list[SweepModel] = []
    for entry in node.value:
        found = _read_entry(entry, shared, issues)
        _check_names(entry, found, models, issues)
        models += found
    return tuple(models)


def check_sections(shared: Shared, issues: Issues) -> None:
    """Report what is wrong in the sections of the file whichever model they are for."""
    _read_sections(shared.sections, issues, Context(folder=shared.folder))


def _check_names(
    entry: Node, found: Sequence[SweepModel], earlier: Sequence[SweepModel], issues: Issues
) -> None:
    taken = {model.name for model in earlier}
    for model in found:
        if model.name in taken:
            named = entry.value.get("name") if isinstance(entry.value, Mapping) else None
            rule = f"the name {model.name!r} is already taken; give each model its own `name`"
            issues.add((named or entry).issue(rule))
        taken.add(model.name)


@dataclass(frozen=True, kw_only=True)
class _Sections:
    """The sections of one model, read."""

    search: SearchSection
    explore: Explore | None
    targets: tuple[float, ...]
    baselines: tuple[Baseline, ...]
    evaluate: EvaluateSettings


def _read_sections(nodes: Mapping[str, Node], issues: Issues, context: Context) -> _Sections:
    return _Sections(
        search=read_search(nodes["search"], issues, context),
        explore=read_explore(nodes["explore"], issues),
        targets=read_targets(nodes["targets"], issues),
        baselines=read_baselines(nodes["baselines"], issues),
        evaluate=read_evaluate(nodes["evaluate"], issues, context),
    )


def _read_entry(node: Node, shared: Shared, issues: Issues) -> list[SweepModel]:
    """Read one entry: a bare id, or a mapping; a list of samplers makes one model each."""
    if isinstance(node.value, str):
        node = replace(node, value={"id": node})
    generic = Context(folder=shared.folder)
    with Fields(node, issues) as fields:
        name = fields.maybe("name", text(valid=name_rule))
        identity = _identity(fields, issues, generic)
        revision = fields.maybe("revision", text())
        dtype = fields.get("dtype", choice(_DTYPES), _FLOAT32)
        samplers = read_samplers(fields, identity, issues)
        resolution = _resolution(fields, identity)
        nodes = _merged(fields.section("overrides"), shared.sections, issues)
        if identity is not None:
            _check_revision(fields, identity, revision, shared.allow_unpinned)
    context = generic if identity is None else _context(identity, name, shared.folder)
    read = _read_sections(nodes, issues, context)
    if identity is None:
        return []
    calibration = read.search.calibration.prompts
    check_splits(nodes["evaluate"], calibration, read.evaluate.prompts, issues)
    if not shared.allow_unpinned:
        check_prompt_pin(nodes["evaluate"], read.evaluate.prompts, issues)
        check_prompt_pin(_calibration(nodes["search"]), calibration, issues)
        check_scorer_pins(nodes["evaluate"], read.evaluate, issues)
    _check_granularity(nodes["search"], read.search.grid.axes["granularity"], identity, issues)
    if read.explore is not None:
        _check_explore(nodes, read, identity, samplers, issues)
    for sampler in samplers:
        _check_targets(nodes["targets"], read.targets, sampler, issues)
    several = isinstance(fields.place("sampler").value, tuple)
    names = _names(None if several else name, name or _stem(identity.id), samplers)
    settings = ModelSettings(
        id=identity.id,
        revision=revision,
        dtype=dtype,
        resolution=resolution,
        base=identity.base,
    )
    return [
        SweepModel(
            name=model_name,
            family=identity.family.name,
            settings=settings,
            sampler=sampler,
            targets=read.targets,
            baselines=read.baselines,
            grid=read.search.grid,
            calibration=read.search.calibration,
            evaluate=read.evaluate,
            postprocess=read.search.postprocess,
            explore=read.explore,
        )
        for model_name, sampler in zip(names, samplers, strict=True)
    ]


def _calibration(search: Node) -> Node:
    return search.value.get("calibration", search) if isinstance(search.value, Mapping) else search


def _context(identity: Identity, name: str | None, folder: Path) -> Context:
    return Context(
        folder=folder,
        name=name or identity.id,
        takes=identity.family.conditioning,
        bundled=identity.bundled,
        scorers=identity.scorers,
    )


def _identity(fields: Fields, issues: Issues, context: Context) -> Identity | None:
    hint = f"a bundled model ({_BUNDLED}), a hub id or a folder"
    name = fields.need("id", text(), "", hint=hint)
    base = fields.maybe("base", text())
    given = fields.child("family")
    family = None if given is None else _family(given, issues)
    unclear = not name or (given is not None and family is None)
    if unclear:
        return None
    where = None if base is None else fields.place("base")
    return identify(fields.place("id"), family, issues, context, where)


def _family(node: Node, issues: Issues) -> str | None:
    """Read the name of a family, also of one made from the classes of a pipeline in none."""
    if isinstance(node.value, str) and named_fallback(node.value) is not None:
        return node.value
    return choice(tuple(FAMILIES))(node, issues)


def _check_explore(
    nodes: Mapping[str, Node],
    read: _Sections,
    identity: Identity,
    samplers: Sequence[SamplerSettings],
    issues: Issues,
) -> None:
    """Report what an exploration and the rest of its model cannot have together."""
    assert read.explore is not None
    node, over = nodes["explore"], read.explore.over
    if len(read.search.grid) > 1:
        rule = "has a list; an exploration proposes searches: name what it varies in explore.over"
        issues.add(nodes["search"].issue(rule))
    _check_read(node, over, read.search.grid.axes["strategy"][0], issues)
    if "granularity" in over:
        _check_granularity(node, over["granularity"].choices, identity, issues)
    if "target" in over:
        target = over["target"]
        for sampler in samplers:
            _check_targets(node, target.choices or (target.high,), sampler, issues)


def _check_read(node: Node, over: Collection[str], strategy: str, issues: Issues) -> None:
    """Report what an exploration would vary to no effect: its searches would all be the same."""
    read = ("target", "granularity", *READS[strategy])
    for name in over:
        if name.partition(".")[0] not in read:
            known = [one for one in EXPLORABLE if one.partition(".")[0] in read]
            rule = f"over.{name} changes no search of {strategy}, which reads {', '.join(known)}"
            issues.add(node.issue(rule))


def _check_granularity(
    node: Node, names: Sequence[str], identity: Identity, issues: Issues
) -> None:
    for name in names:
        if name not in identity.family.granularities:
            rule = (
                f"{identity.family.pipeline} is in no family, so nothing is known of its layers: "
                f"take {', '.join(identity.family.granularities)}, got {name}"
            )
            place = node.value.get("granularity", node) if isinstance(node.value, Mapping) else node
            issues.add(place.issue(rule))


def _check_revision(
    fields: Fields, identity: Identity, revision: str | None, allow_unpinned: bool
) -> None:
    place = fields.place("revision")
    if not identity.hub and revision is not None:
        fields.issues.add(place.issue(f"only models on the hub have one, {identity.id} is local"))
    if identity.hub and not allow_unpinned:
        check_model_pin(place, fields.node.path, revision, fields.issues)
    base = base_of(ModelSettings(id=identity.id, base=identity.base))
    if base is not None and not allow_unpinned and is_hub_id(base.id):
        check_base_pin(fields.place("base"), fields.node.path, base, fields.issues)


def _resolution(fields: Fields, identity: Identity | None) -> int | None:
    """Read `resolution`: a side of images that the model's pipeline can make."""
    side = fields.maybe("resolution", whole(1, MAX_PIXELS))
    if side is None or identity is None:
        return side
    multiple = identity.family.size_multiple
    if multiple is None:
        rule = f"{identity.family.pipeline} makes images of the model's own size; leave it out"
    elif side % multiple:
        lower = side // multiple * multiple
        near = f"{lower} or {lower + multiple}" if lower else str(multiple)
        rule = f"must be a multiple of {multiple} pixels, such as {near}, got {side}"
    elif (most := _largest(identity)) is not None and side > most:
        rule = f"must be at most {most} pixels, {identity.id} knows no more positions, got {side}"
    else:
        return side
    fields.issues.add(fields.place("resolution").issue(rule))
    return None


def _largest(identity: Identity) -> int | None:
    """Return the side of the largest images, where the denoiser's config is known."""
    settings = ModelSettings(id=identity.id, base=identity.base)
    base = base_of(settings)
    own = base is None or elsewhere(settings) == "denoiser"
    known = find_known(identity.id if own or base is None else base.id)
    return None if known is None else identity.family.largest(known.config)


def _check_targets(
    node: Node, targets: Sequence[float], sampler: SamplerSettings, issues: Issues
) -> None:
    """Report targets that leave less than the first call, which is computed whole."""
    calls = calls_of(sampler)
    places = node.value if isinstance(node.value, tuple) else ()
    for target in targets:
        if kept_share(target) * calls < 1:
            place = next((item for item in places if item.value == target), node)
            run = f"{calls} calls ({sampler.scheduler}, {sampler.steps} steps)"
            rule = f"must be at most {1 - 1 / calls:.4g}: the first of {run} is computed whole"
            issues.add(place.issue(f"{rule}, got {target:g}"))


# --- names and overrides -------------------------------------------------------------------------


def _names(name: str | None, stem: str, samplers: Sequence[SamplerSettings]) -> list[str]:
    """Return the given name, or ``stem-scheduler-steps`` and what else tells samplers apart."""
    if name is not None:
        return [name] * len(samplers)
    guided = len({sampler.guidance_scale for sampler in samplers}) > 1
    names = [f"{stem}-{_sampler_name(sampler, guided)}" for sampler in samplers]
    return [_numbered(name, names[:place]) for place, name in enumerate(names)]


def _numbered(name: str, earlier: Sequence[str]) -> str:
    """Tell schedules of one's own apart that are alike in all that a name says."""
    same = earlier.count(name)
    return f"{name}-{same + 1}" if same else name


def _sampler_name(sampler: SamplerSettings, guided: bool) -> str:
    parts = [sampler.scheduler, str(sampler.steps)]
    parts += [sampler.spacing] if sampler.spacing is not None else list(sampler.custom)
    if guided:
        parts.append(f"g{sampler.guidance_scale:g}")
    return _slug("-".join(parts))


def _stem(model_id: str) -> str:
    return _slug(Path(model_id).resolve().name if Path(model_id).is_dir() else Path(model_id).name)


def _slug(words: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", words).strip("-._").lower() or "model"


def _merged(node: Node, sections: Mapping[str, Node], issues: Issues) -> dict[str, Node]:
    with Fields(node, issues) as fields:
        given = {name: fields.child(name) for name in SECTIONS}
    return {name: merge(sections[name], given[name]) for name in SECTIONS}
