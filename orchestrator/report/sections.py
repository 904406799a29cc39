"""What a report says, as plain values: headlines, images, gates, costs, failures, protocols."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, get_args

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load

from dipgo_core.errors import StoreError
from dipgo_core.evaluation.protocol import Protocol
from orchestrator.figures import image_row
from orchestrator.gains import Gain
from orchestrator.headlines import Headline, headlines
from orchestrator.metrics import QUALITIES, label_of
from orchestrator.points import ResolvedPoint
from orchestrator.protocol_text import protocol_rows
from orchestrator.records import Record, TaskKind
from orchestrator.report.wording import plain
from orchestrator.store import Store

Records = Mapping[str, Record]
SAMPLES_FILE = "samples.safetensors"
ROW_IMAGES = 8

CHOICES = {
    "only": "",
    "calibration": "best of {n}, chosen on calibration prompts",
}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One gain as the report words it."""

    metric: str
    verdict: str
    text: str
    baseline: str = ""


@dataclass(frozen=True, kw_only=True)
class HeadlineRow:
    """One model and target: the searched SubNet against its bars, chosen by the metric `label`.

    claims: over the best trivial baseline in each measured metric, that of `label` first.
    """

    label: str
    model: str
    protocol: str
    target: str
    searched: ResolvedPoint
    note: str
    baseline: ResolvedPoint | None
    against_baseline: Claim | None
    against_random: Claim | None
    claims: tuple[Claim, ...]


@dataclass(frozen=True, kw_only=True)
class ProtocolText:
    """One protocol in words, with the models measured under it.

    differences: a line for each field that differs from the first protocol of the report.
    """

    hash: str
    models: tuple[str, ...]
    rows: tuple[tuple[str, str], ...]
    differences: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ImageRows:
    """Same-seed images of one model and target: (role, name, PNG), dense first."""

    model: str
    target: str
    rows: tuple[tuple[str, str, bytes], ...]


@dataclass(frozen=True, kw_only=True)
class GateCard:
    """One distinct SubNet, and the points that are it."""

    model: str
    names: tuple[str, ...]
    points: tuple[ResolvedPoint, ...]
    subnet: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What tasks of one kind took."""

    kind: str
    tasks: int
    seconds: float
    forwards: int


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A task that failed, and the points it leaves open."""

    cause: str
    points: tuple[str, ...]


def headline_rows(points: Sequence[ResolvedPoint], quality: str) -> tuple[HeadlineRow, ...]:
    by_key = {point.key: point for point in points}
    return tuple(_headline_row(line, by_key) for line in headlines(points, quality))


def _headline_row(line: Headline, by_key: Mapping[str, ResolvedPoint]) -> HeadlineRow:
    searched = by_key[line.searched]
    order = sorted(searched.gain, key=lambda m: (m != line.quality, QUALITIES.index(m)))
    claims = (_claim(searched, searched.gain, metric, by_key) for metric in order)
    return HeadlineRow(
        label=label_of(line.quality, line.scorer),
        model=line.model,
        protocol=line.protocol,
        target=f"{line.target:g}",
        searched=searched,
        note=CHOICES[line.chosen_by].format(n=line.candidates),
        baseline=None if line.baseline is None else by_key[line.baseline],
        against_baseline=_claim(searched, searched.gain, line.quality),
        against_random=_claim(searched, searched.gain_random, line.quality),
        claims=tuple(claim for claim in claims if claim is not None),
    )


def _claim(
    point: ResolvedPoint,
    gains: Mapping[str, Gain],
    metric: str,
    by_key: Mapping[str, ResolvedPoint] | None = None,
) -> Claim | None:
    gain = gains.get(metric)
    if gain is None:
        return None
    label = label_of(metric, point.scorer(metric))
    name = by_key[gain.baseline_key].name if by_key else ""
    return Claim(metric=label, verdict=gain.verdict, text=gain.text(metric), baseline=name)


def image_rows(
    rows: Iterable[HeadlineRow], points: Sequence[ResolvedPoint], records: Records, store: Store
) -> tuple[ImageRows, ...]:
    """Return dense, searched and best-trivial images of the same seeds, where they were kept."""
    made = []
    for row in rows:
        where = (row.model, row.protocol)
        dense = [p for p in points if p.method == "dense" and (p.model, p.protocol) == where]
        shown = [("dense", point) for point in dense[:1]] + [("searched", row.searched)]
        shown += [("best trivial baseline", row.baseline)] if row.baseline else []
        images = [(role, p.name, samples(p, records, store)) for role, p in shown]
        kept = tuple((role, name, image_row(i)) for role, name, i in images if i is not None)
        if kept:
            made.append(ImageRows(model=row.model, target=row.target, rows=kept))
    return tuple(made)


def samples(point: ResolvedPoint, records: Records, store: Store) -> npt.NDArray[np.uint8] | None:
    """Return the first images of a point, (B, 3, H, W), B <= 8; None where none were kept."""
    record = records.get(point.evaluate_key or "")
    if record is None or SAMPLES_FILE not in record.artifacts:
        return None
    images: npt.NDArray[np.uint8] = load(store.get_artifact(record, SAMPLES_FILE))["images"]
    return images[:ROW_IMAGES]


def gate_cards(points: Iterable[ResolvedPoint], records: Records) -> tuple[GateCard, ...]:
    """Return every distinct SubNet that leaves something out, searched ones first."""
    groups: dict[tuple[str, str], list[ResolvedPoint]] = {}
    for point in sorted(points, key=lambda p: (p.model, not p.is_searched, p.target or 0)):
        if point.subnet is not None and point.keep is not None and "0" in "".join(point.keep):
            groups.setdefault((point.model, point.subnet), []).append(point)
    cards = []
    for (model, _), group in groups.items():
        record = records.get(group[0].evaluate_key or "")
        subnet = {} if record is None else record.outputs.get("subnet", {})
        if subnet:
            names = tuple(f"{p.name} at {p.target:g}" for p in group)
            cards.append(GateCard(model=model, names=names, points=tuple(group), subnet=subnet))
    return tuple(cards)


def rested_on(points: Iterable[ResolvedPoint], records: Records, store: Store) -> dict[str, Record]:
    """Return the records of all tasks the points rest on, those that tasks need included: also
    those that one has needed which failed."""
    found: dict[str, Record] = {}
    seen = set[str]()
    wanted = [key for point in points for key in point.task_keys]
    while wanted:
        key = wanted.pop()
        if key in seen:
            continue
        seen.add(key)
        wanted += _needs(key, store)
        if key in records:
            found[key] = records[key]
    return found


def _needs(key: str, store: Store) -> tuple[str, ...]:
    try:
        return store.get_task(key).needs
    except StoreError:  # the record is enough to report on; its specification may be gone
        return ()


#: What others have made: their forwards are those of their shards.
_MERGES: Final[tuple[TaskKind, ...]] = ("reference", "evaluate")


def costs(records: Iterable[Record]) -> tuple[Cost, ...]:
    """Return time and denoiser forwards by kind of task; each task counts once."""
    tasks: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    forwards: Counter[str] = Counter()
    for record in records:
        tasks[record.kind] += 1
        seconds[record.kind] += round(task_seconds(record) * 1000)
        if record.kind not in _MERGES:
            forwards[record.kind] += int(record.outputs.get("forwards") or 0)
    return tuple(
        Cost(kind=kind, tasks=tasks[kind], seconds=seconds[kind] / 1000, forwards=forwards[kind])
        for kind in get_args(TaskKind)
        if tasks[kind]
    )


def task_seconds(record: Record) -> float:
    """Return the wall time of a task."""
    return float(record.timings.get("seconds", 0.0))


def failures(points: Iterable[ResolvedPoint]) -> tuple[Failure, ...]:
    """Return every cause of failure once, with the points it leaves open."""
    causes: dict[str, list[str]] = {}
    for point in points:
        if point.state == "failed":
            causes.setdefault(str(point.error), []).append(title(point))
    return tuple(Failure(cause=cause, points=tuple(names)) for cause, names in causes.items())


def protocols(points: Iterable[ResolvedPoint], records: Records) -> tuple[ProtocolText, ...]:
    """Return every protocol that something was measured under, in words."""
    measured: dict[str, list[tuple[ResolvedPoint, Record]]] = {}
    for point in points:
        record = records.get(point.evaluate_key or "")
        if record is not None:
            measured.setdefault(point.measured_under, []).append((point, record))
    groups = [(digest, group, _protocol_of(group)) for digest, group in measured.items()]
    return tuple(_protocol(digest, group, own, groups[0][2]) for digest, group, own in groups)


def _protocol_of(measured: Sequence[tuple[ResolvedPoint, Record]]) -> Protocol:
    return Protocol.from_json(measured[0][1].inputs["protocol"])


def _protocol(
    digest: str,
    measured: Sequence[tuple[ResolvedPoint, Record]],
    own: Protocol,
    first: Protocol,
) -> ProtocolText:
    versions = dict.fromkeys(plain(r.inputs.get("versions", {})) for _, r in measured)
    batches = {r.outputs["batch_size"] for _, r in measured if r.outputs.get("batch_size")}
    run = [("library versions", "; or ".join(versions))]
    if batches:
        run.append(("batch size of the runs", ", ".join(str(size) for size in sorted(batches))))
    return ProtocolText(
        hash=digest,
        models=tuple(dict.fromkeys(point.model for point, _ in measured)),
        rows=(*protocol_rows(own.to_json()), *run),
        differences=own.differences(first),
    )


def title(point: ResolvedPoint) -> str:
    """Name a point with its model and target."""
    target = "" if point.target is None else f" at {point.target:g}"
    return f"{point.model}: {point.name}{target}"
