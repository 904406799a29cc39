"""The sections `targets`, `baselines`, `evaluate`: which points there are, how one is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final, get_args

from dipgo_core.evaluation.inception_files import INCEPTION
from dipgo_core.evaluation.metrics import METRICS as IMAGE_METRICS
from dipgo_core.evaluation.metrics import MIN_PROMPTS
from dipgo_core.evaluation.scorers import TINY_FEATURES
from dipgo_core.families import Scorers
from orchestrator.sweep_file.context import Context, located
from orchestrator.sweep_file.fields import (
    MAX_SEED,
    Fields,
    axis,
    choice,
    many,
    number,
    reject,
    text,
    whole,
)
from orchestrator.sweep_file.prompts import read_prompts
from orchestrator.sweep_file.scorers import read_scorers
from orchestrator.sweep_issues import Issues
from orchestrator.sweep_settings import (
    Baseline,
    EvaluateSettings,
    Metric,
    Reference,
    Solver,
    Spacing,
)
from orchestrator.yaml_source import Node

BASELINES: Final = (
    *("few_steps", "ays", "uniform", "best_step_mask"),
    *("deepcache", "guidance_off", "random"),
)
METRICS: Final[tuple[Metric, ...]] = get_args(Metric)
DEFAULT_METRICS: Final[tuple[Metric, ...]] = ("fid", "kid", "clip", "psnr", "ssim", "latency")
SOLVERS: Final[tuple[Solver, ...]] = get_args(Solver)
SPACINGS: Final[tuple[Spacing, ...]] = get_args(Spacing)
MIN_IMAGES: Final[Mapping[Metric, int]] = {"fid": 2, "kid": 4, "cmmd": 2}
#: Images a race must see at least, by metric; what is not listed needs two.
MIN_RACED: Final[Mapping[Metric, int]] = {"kid": MIN_PROMPTS, "cmmd": MIN_PROMPTS}

#: Rungs of a race: each decision but the first one gets less of what may be decided wrongly.
MAX_RUNGS: Final = 5
MAX_IMAGES: Final = 10_000_000
DEFAULT_IMAGES: Final = 1000

_DEFAULT_DRAWS: Final = 3
_DEFAULT_SCHEDULES: Final = 2


def read_targets(node: Node, issues: Issues) -> tuple[float, ...]:
    """Read `targets`: different pruned ratios in [0, 1)."""
    if node.value is None:
        issues.add(node.issue("is missing; give pruned ratios, such as [0.3, 0.5, 0.7]"))
        return ()
    return many(number(0, below=1))(node, issues) or ()


def read_baselines(node: Node, issues: Issues) -> tuple[Baseline, ...]:
    """Read `baselines`; absent = all, with their defaults."""
    if node.value is None:
        return tuple(_baseline(name) for name in BASELINES)
    read = many(_one_baseline, at_least=0)(node, issues) or ()
    names = [baseline.name for baseline in read]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        issues.add(node.issue(f"lists {', '.join(repeated)} twice; give each baseline once"))
    return read


def _baseline(name: str) -> Baseline:
    return Baseline(
        name=name,
        draws=_DEFAULT_DRAWS if name == "random" else 0,
        spacing=SPACINGS if name == "few_steps" else (),
        solver=SOLVERS if name in ("few_steps", "ays") else ("own",),
        schedules=_DEFAULT_SCHEDULES if name == "deepcache" else 0,
    )


def _one_baseline(node: Node, issues: Issues) -> Baseline | None:
    """Read a name, or ``{random: {draws: 5}}``, ``{few_steps: {spacing: [trailing]}}``."""
    if isinstance(node.value, str):
        name = choice(BASELINES)(node, issues)
        return None if name is None else _baseline(name)
    if not isinstance(node.value, Mapping) or len(node.value) != 1:
        reject(node, issues, f"must be one of {', '.join(BASELINES)}, or one of them: its settings")
        return None
    with Fields(node, issues) as entry:
        found = {name: entry.child(name) for name in BASELINES}
    for name, settings in found.items():
        if settings is not None:
            return _configured_baseline(name, settings, issues)
    return None


def _configured_baseline(name: str, node: Node, issues: Issues) -> Baseline:
    default = _baseline(name)
    with Fields(node, issues) as section:
        if name == "random":
            draws = section.get("draws", whole(1, 1000), default.draws)
            return replace(default, draws=draws)
        if name == "deepcache":
            schedules = section.get("schedules", whole(1, 100), default.schedules)
            return replace(default, schedules=schedules)
        if name in ("few_steps", "ays"):
            solver = section.get("solver", axis(choice(SOLVERS)), default.solver)
            default = replace(default, solver=solver)
        if name == "few_steps":
            spacing = section.get("spacing", axis(choice(SPACINGS)), default.spacing)
            default = replace(default, spacing=spacing)
    return default


def read_evaluate(node: Node, issues: Issues, context: Context) -> EvaluateSettings:
    """Read `evaluate`; scorers and prompts default to what fits the model."""
    with Fields(node, issues) as section:
        prompts = read_prompts(section, issues, context, "test")
        rungs = _rungs(section)
        scorers = read_scorers(section.section("scorers"), issues, context)
        default = tuple(m for m in DEFAULT_METRICS if m != "clip" or scorers.clip is not None)
        metrics = section.get("metrics", many(choice(METRICS)), default)
        raced = _raced(section, metrics, rungs)
        looked_at = (raced or _raceable(metrics)) if len(rungs) > 1 else ()
        _check_metrics(section, metrics, rungs, looked_at, scorers, context)
        reference = _reference(section.child("reference"), issues, context, scorers)
        _check_cmmd(section, metrics, reference)
        return EvaluateSettings(
            prompts=prompts,
            images=rungs[-1],
            rungs=rungs if len(rungs) > 1 else (),
            race=raced,
            scorers=scorers,
            reference=reference,
            metrics=metrics,
            seed=section.get("seed", whole(0, MAX_SEED), 0),
            batch_size=section.get("batch_size", whole(1, 4096), 16),
            images_per_prompt=section.get(
                "images_per_prompt", whole(1), 1 if prompts.kind in ("file", "hub") else None
            ),
        )


def _rungs(section: Fields) -> tuple[int, ...]:
    """Read `images`, one number or a race's rungs; `rungs` is another name for a list."""
    rungs: tuple[int, ...] = (DEFAULT_IMAGES,)
    rungs = section.get("rungs", _race, rungs)
    images = section.get("images", _images, rungs)
    named = section.child("rungs")
    if named is not None and section.child("images") is not None:
        section.issues.add(named.issue("says the same as images: give one of them", at_key=True))
    return images


def _images(node: Node, issues: Issues) -> tuple[int, ...] | None:
    if isinstance(node.value, tuple):
        return _race(node, issues)
    images = whole(1, MAX_IMAGES)(node, issues)
    return None if images is None else (images,)


def _race(node: Node, issues: Issues) -> tuple[int, ...] | None:
    rungs = many(whole(1, MAX_IMAGES), at_least=2)(node, issues)
    if rungs is None or len(rungs) < 2:
        return None
    if len(rungs) > MAX_RUNGS or list(rungs) != sorted(rungs):
        reject(node, issues, f"must list 2 to {MAX_RUNGS} rising numbers of images")
        return None
    return rungs


def _check_metrics(
    section: Fields,
    metrics: tuple[Metric, ...],
    rungs: tuple[int, ...],
    raced: tuple[Metric, ...],
    scorers: Scorers,
    context: Context,
) -> None:
    place = section.child("rungs") or section.place("images")
    for metric in metrics:
        images = rungs[-1] if metric == "fid" else rungs[0]
        least = MIN_RACED.get(metric, 2) if metric in raced else MIN_IMAGES.get(metric, 1)
        if images < least:
            section.issues.add(place.issue(f"must be at least {least} for {metric}, got {images}"))
    if len(rungs) > 1 and "fid" in metrics and "kid" not in metrics:
        rule = "a race judges fid by kid: add kid to evaluate.metrics, or give one number of images"
        section.issues.add(place.issue(rule))
    for metric in metrics:
        role = IMAGE_METRICS[metric].role if metric in IMAGE_METRICS else None
        if role is not None and getattr(scorers, role) is None:
            rule = f"{metric} means nothing for {context.name}"
            move = f"give evaluate.scorers.{role}, or leave {metric} out"
            section.issues.add(section.place("metrics").issue(f"{rule}: {move}"))


def _raced(
    section: Fields, metrics: tuple[Metric, ...], rungs: tuple[int, ...]
) -> tuple[Metric, ...]:
    """Read `race`: the metrics whose fronts a race must keep."""
    every: tuple[Metric, ...] = ()
    raced = section.get("race", many(choice(METRICS)), every)
    wrong = [name for name in raced if name not in _raceable(metrics)]
    place = section.place("race")
    if wrong:
        valid = ", ".join(_raceable(metrics))
        rule = f"a race can look at {valid} of evaluate.metrics, not at {', '.join(wrong)}"
        section.issues.add(place.issue(rule))
    elif raced and len(rungs) < 2:
        section.issues.add(place.issue("is for races: give evaluate.images as a list", at_key=True))
    return raced


def _raceable(metrics: tuple[Metric, ...]) -> tuple[Metric, ...]:
    return tuple(name for name in metrics if name not in ("fid", "latency"))


def _reference(node: Node | None, issues: Issues, context: Context, scorers: Scorers) -> Reference:
    """Read ``dense``, ``{folder: PATH}`` or ``{statistics: PATH or bundled}``; a .npz
    also says its ``extractor`` and ``resize``."""
    if node is None or node.value == "dense":
        return Reference()
    keys = node.value if isinstance(node.value, Mapping) else {}
    given = [kind for kind in ("folder", "statistics") if kind in keys]
    if len(given) != 1:
        reject(node, issues, "must be dense, {folder: PATH} or {statistics: PATH or bundled}")
        return Reference()
    with Fields(node, issues) as section:
        if given == ["folder"]:
            value = section.get("folder", located(context, "folder"), "")
            return Reference(kind="folder", value=value)
        child = section.section("statistics")
        if child.value == "bundled":
            _check_bundled_statistics(child, issues, scorers)
            return Reference(kind="statistics", value="bundled")
        value = located(context, "file")(child, issues) or ""
        if not value.endswith(".npz"):
            return Reference(kind="statistics", value=value)
        return _moments_file(value, section, scorers)


def _moments_file(value: str, section: Fields, scorers: Scorers) -> Reference:
    """Read what made a .npz: it holds nothing but mean and covariance."""
    extractor = section.maybe("extractor", choice((TINY_FEATURES, INCEPTION)))
    resize = section.maybe("resize", text())
    if extractor is None or resize is None:
        used = str(scorers.features).partition(":")[0]
        rule = "of a .npz need extractor and resize, for it does not tell what made it"
        move = f"such as extractor: {used} (docs/sweep-file.md tells the resize of each tool)"
        section.issues.add(section.place("statistics").issue(f"{rule}; {move}"))
    return Reference(kind="statistics", value=value, extractor=extractor or "", resize=resize or "")


def _check_cmmd(section: Fields, metrics: tuple[Metric, ...], reference: Reference) -> None:
    if "cmmd" in metrics and reference.kind == "statistics":
        rule = "statistics hold no CLIP embeddings, which cmmd compares"
        move = "use dense or a folder of images, or leave cmmd out of evaluate.metrics"
        section.issues.add(section.place("reference").issue(f"{rule}: {move}"))


def _check_bundled_statistics(node: Node, issues: Issues, scorers: Scorers) -> None:
    if scorers.features != TINY_FEATURES:
        rule = f"the bundled statistics are of {TINY_FEATURES}, this model is scored by"
        issues.add(
            node.issue(f"{rule} {scorers.features}; use dense, a folder or a statistics file")
        )
