"""A sweep file on disk, and ``-o`` overrides → SweepFile, or one error that lists every issue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final, Literal, get_args

from dipgo_core.config import Convention
from dipgo_core.errors import ConfigError
from dipgo_core.evaluation.intervals import LEAST_FOR_MEDIAN
from orchestrator.sweep_file.evaluate import METRICS
from orchestrator.sweep_file.fields import (
    Fields,
    axis,
    boolean,
    choice,
    number,
    reject,
    text,
    whole,
)
from orchestrator.sweep_file.models import (
    SECTIONS,
    Shared,
    check_sections,
    name_rule,
    read_models,
)
from orchestrator.sweep_file.overrides import apply_overrides
from orchestrator.sweep_file.places import experiment_rule, printable_rule, storage_rule
from orchestrator.sweep_issues import Issues, SweepIssue
from orchestrator.sweep_settings import (
    SCHEMA_VERSION,
    AskedResources,
    Budget,
    KneeRule,
    LatencySettings,
    Metric,
    Objective,
    Resources,
    SweepFile,
    SweepModel,
    Tracking,
)
from orchestrator.yaml_source import Node, parse_yaml

#: Left to the size of the model.
_NOTHING: Final = AskedResources()
MAX_POINTS: Final = 100_000

_CONVENTIONS: Final[tuple[Convention, ...]] = get_args(Convention)
_QUALITIES: Final[tuple[Metric, ...]] = (
    *("clip", "fid", "kid", "ssim", "psnr"),
    *("cmmd", "image_reward", "lpips", "dino"),
)
_SPEEDS: Final[tuple[Literal["latency", "macs"], ...]] = ("latency", "macs")
_KNEES: Final[tuple[KneeRule, ...]] = get_args(KneeRule)


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> SweepFile:
    """Read, check and resolve a sweep file.

    `overrides`: ``key=value`` texts, set before anything is checked. Relative paths in the file
    are looked for in the current folder, then beside the file.

    Raises:
        SweepFileError: the file or an override has errors; `errors` holds a SweepIssue for each.
    """
    file = Path(path)
    issues = Issues()
    text = _text(file, issues)
    root = None if text is None else parse_yaml(text, source=str(path), issues=issues)
    if root is not None and root.value is None:
        rule = "is empty; sweeps/quickstart.yaml is one to start from"
        issues.add(SweepIssue(str(path), 0, 0, "", rule))
    if root is None or root.value is None:
        raise issues.error()
    root = apply_overrides(root, overrides, issues)
    sweep = _read(root, issues, file.parent)
    if not issues:
        _expand(sweep, root, issues)
    if issues:
        raise issues.error()
    return sweep


def _text(file: Path, issues: Issues) -> str | None:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        rule = f"not UTF-8: byte 0x{error.object[error.start]:02x}; save the file as UTF-8"
        issues.add(SweepIssue(str(file), line, column, "", rule))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        issues.add(SweepIssue(str(file), 0, 0, "", f"cannot be read: {reason}"))
    return None


def _read(root: Node, issues: Issues, folder: Path) -> SweepFile:
    with Fields(root, issues) as fields:
        _check_version(fields)
        name = fields.need("name", text(valid=name_rule), "unnamed")
        allow_unpinned = fields.get("allow_unpinned", boolean, False)
        sections = {section: fields.section(section) for section in SECTIONS}
        shared = Shared(folder=folder, sections=sections, allow_unpinned=allow_unpinned)
        check_sections(shared, issues)
        fields.demand("models", hint="such as [tiny-sd]")
        models = _models(fields, shared, issues)
        _check_size(models, fields.place("search"), issues)
        return SweepFile(
            name=name,
            models=models,
            objective=_objective(fields.section("objective"), issues, models),
            resources=_resources(fields.section("resources"), issues),
            latency=_latency(fields.section("latency"), issues),
            tracking=_tracking(fields.section("tracking"), issues, name),
            storage=fields.get("storage", text(valid=storage_rule), "./.dipgo"),
            budget=_budget(fields.section("budget"), issues),
            macs_convention=fields.get("macs_convention", choice(_CONVENTIONS), "all"),
            allow_unpinned=allow_unpinned,
        )


def _check_version(fields: Fields) -> None:
    fields.demand("schema_version", hint=f"write schema_version: {SCHEMA_VERSION}")
    node = fields.child("schema_version")
    if node is not None and node.value != SCHEMA_VERSION:
        reject(node, fields.issues, f"must be {SCHEMA_VERSION}, which this dipgo-sweep reads")


def _models(fields: Fields, shared: Shared, issues: Issues) -> tuple[SweepModel, ...]:
    node = fields.child("models")
    return () if node is None else read_models(node, shared, issues)


def _check_size(models: Sequence[SweepModel], place: Node, issues: Issues) -> None:
    """Report a grid that is too large, from the lengths of its axes alone."""
    points = sum((len(model.grid) + len(model.baselines)) * len(model.targets) for model in models)
    points += sum(model.explore.points for model in models if model.explore is not None)
    if points > MAX_POINTS:
        rule = f"a sweep has at most {MAX_POINTS:,} points, this one has {points:,}"
        issues.add(place.issue(f"{rule}; shorten the longest axis"))


def _expand(sweep: SweepFile, root: Node, issues: Issues) -> None:
    """Report settings that only break a rule together, by building every search."""
    for index, model in enumerate(sweep.models):
        try:
            model.searches()
        except ConfigError as error:
            issues.add(root.issue(f"model {index} ({model.name}): {error}", path="search"))


# --- sections of the whole sweep -----------------------------------------------------------------


def _objective(node: Node, issues: Issues, models: Sequence[SweepModel]) -> Objective:
    """Read `objective`; the default is what every model measures, latency and clip first."""
    measured = set(METRICS).intersection(*(model.evaluate.metrics for model in models))
    qualities = [name for name in _QUALITIES if name in measured]
    with Fields(node, issues) as fields:
        speed = fields.get("speed", choice(_SPEEDS), _SPEEDS[0 if "latency" in measured else 1])
        quality = fields.get("quality", choice(_QUALITIES), (qualities or _QUALITIES)[0])
        knee = fields.get("knee", choice(_KNEES), _KNEES[0])
        for field, value in (("speed", speed), ("quality", quality)):
            if value != "macs" and value not in measured:
                rule = f"{value} is not in evaluate.metrics of every model"
                issues.add(fields.place(field).issue(rule))
    return Objective(speed=speed, quality=quality, knee=knee)


def _resources(node: Node, issues: Issues) -> Resources:
    """Read `resources`; what makes the dense images or times them takes what evaluations take."""
    with Fields(node, issues) as fields:
        evaluate = _asked(fields.section("evaluate"), issues)
        return Resources(
            reference=_asked(fields.section("reference"), issues, evaluate),
            search=_asked(fields.section("search"), issues),
            evaluate=evaluate,
            latency=_asked(fields.section("latency"), issues, evaluate),
            score=_asked(fields.section("score"), issues),
            images_per_shard=fields.get("images_per_shard", whole(1), 500),
        )


def _asked(node: Node, issues: Issues, default: AskedResources = _NOTHING) -> AskedResources:
    """Read what tasks of a kind take, and on which type of GPU they run."""
    with Fields(node, issues) as fields:
        gpus = fields.maybe("gpus", number(0))
        asked = AskedResources(
            cpus=fields.maybe("cpus", number(above=0)),
            gpus=gpus,
            gpu_memory_gb=fields.maybe("gpu_memory_gb", number(above=0)),
            accelerator=fields.maybe("accelerator", text()),
        )
        none = (default.gpus if gpus is None else gpus) == 0
        for name, what in _OF_A_GPU.items():
            if getattr(asked, name) is not None and none:
                rule = f"is {what}, but the tasks take none: give `gpus` of the same kind too"
                issues.add(fields.place(name).issue(rule))
        given = {name: value for name, value in asdict(asked).items() if value is not None}
        return replace(default, **(given | (dict.fromkeys(_OF_A_GPU) if none else {})))


#: What can only be asked of a GPU.
_OF_A_GPU: Final = {"gpu_memory_gb": "memory of a GPU", "accelerator": "a type of GPU"}


def _latency(node: Node, issues: Issues) -> LatencySettings:
    default = LatencySettings()
    with Fields(node, issues) as fields:
        settings = LatencySettings(
            batch_size=fields.get("batch_size", axis(whole(1, 4096)), default.batch_size),
            warmup=fields.get("warmup", whole(0, 10_000), default.warmup),
            max_warmup=fields.get("max_warmup", whole(0, 10_000), default.max_warmup),
            min_runs=fields.get("min_runs", whole(LEAST_FOR_MEDIAN, 100_000), default.min_runs),
            min_seconds=fields.get("min_seconds", number(0), default.min_seconds),
            tries=fields.get("tries", whole(1, 100), default.tries),
            repeat=fields.get("repeat", whole(), default.repeat),
        )
        if settings.warmup > settings.max_warmup:
            rule = f"must be at least warmup ({settings.warmup}), got {settings.max_warmup}"
            issues.add(fields.place("max_warmup").issue(rule))
        return settings


def _tracking(node: Node, issues: Issues, name: str) -> Tracking:
    with Fields(node, issues) as fields:
        uri = fields.maybe("uri", text(valid=printable_rule))
        experiment = fields.get("experiment", text(valid=experiment_rule), name)
        return Tracking(uri=uri, experiment=experiment)


def _budget(node: Node, issues: Issues) -> Budget:
    with Fields(node, issues) as fields:
        budget = Budget(
            gpu_hours=fields.maybe("gpu_hours", number(above=0)),
            wall_hours=fields.maybe("wall_hours", number(above=0)),
            usd=fields.maybe("usd", number(above=0)),
            usd_per_gpu_hour=fields.maybe("usd_per_gpu_hour", number(above=0)),
        )
        if budget.usd is not None and fields.place("usd_per_gpu_hour") is node:
            rule = "needs the price of a GPU hour: give budget.usd_per_gpu_hour too"
            issues.add(fields.place("usd").issue(rule))
        return budget
