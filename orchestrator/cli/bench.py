"""`bench`: a SubNet against its dense model on this machine, without a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dipgo_core.config import DType, ModelSettings
from dipgo_core.errors import DeviceError
from dipgo_core.subnet import SubNet
from orchestrator.cli.quiet import silence_loading
from orchestrator.cli.show import megabytes, print_table, print_wrapped, say

if TYPE_CHECKING:
    from dipgo_core.evaluation.bench import Bench
    from dipgo_core.items import Item
    from dipgo_core.pipelines import LoadedModel


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is measured, as the command line says it."""

    subnet: str
    model: str | None = None
    base: str | None = None
    device: str = "cpu"
    dtype: DType = "float32"
    batch_size: int = 1
    resolution: int | None = None
    prompt: str | None = None
    min_runs: int = 10
    min_seconds: float = 5.0
    max_warmup: int = 20
    threads: int | None = None
    compile: bool = False
    fuse: bool = False


def run_bench(asked: Asked) -> Bench:
    """Load model and SubNet, and measure.

    Raises:
        DipgoError: the SubNet does not fit the model, the model cannot be loaded, or there is no
            such device.
    """
    import torch

    from dipgo_core.evaluation.bench import bench
    from dipgo_core.evaluation.side_by_side import Effort
    from dipgo_core.pipelines import load_model

    silence_loading()
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    subnet = SubNet.from_pretrained(asked.subnet)
    _check_device(asked.device)
    model = load_model(settings_of(subnet, asked), device=asked.device)
    effort = Effort(
        batch_size=asked.batch_size,
        warmup=min(2, asked.max_warmup),
        max_warmup=asked.max_warmup,
        min_runs=asked.min_runs,
        min_seconds=asked.min_seconds,
    )
    say(
        f"measuring dense and SubNet in turn: {effort.min_runs} pairs or more, after up to "
        f"{effort.max_warmup} until times settle; again if other processes disturb",
        stderr=True,
    )
    return bench(
        model,
        subnet,
        effort=effort,
        item=_item(model, asked.prompt),
        compile={} if asked.compile else None,
        fuse=asked.fuse,
    )


def settings_of(subnet: SubNet, asked: Asked) -> ModelSettings:
    """Return which weights are loaded: those the SubNet names, unless others are asked for."""
    named = subnet.model_settings(asked.dtype)
    resolution = asked.resolution or named.resolution
    if asked.model is None:
        return replace(named, base=asked.base or named.base, resolution=resolution)
    return replace(named, id=asked.model, revision=None, base=asked.base, resolution=resolution)


def _check_device(device: str) -> None:
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise DeviceError(f"--device {device}: PyTorch {torch.__version__} sees no GPU here")


def _item(model: LoadedModel, prompt: str | None) -> Item:
    from dipgo_core.evaluation.bench import DEFAULT_ITEM
    from dipgo_core.items import Item
    from orchestrator.cli.images import condition

    if prompt is None:
        return DEFAULT_ITEM
    labels = condition(model.family, model.pipe, prompt).get("class_labels", [None])
    return Item(prompt, labels[0])


def bench_json(asked: Asked, found: Bench) -> dict[str, Any]:
    """Return everything that was measured and what of."""
    return {"subnet": asked.subnet, "model": asked.model, **found.to_json()}


# for people ---------------------------------------------------------------------------------------


def print_bench(asked: Asked, found: Bench) -> None:
    """Print times of both sides, speed-ups beside that of MACs, and what they were measured on."""
    record = found.to_json()
    rows = [
        _times("end to end, ms", record, ("dense_latency_ms", "latency_ms", "speedup")),
        *(
            [_times("denoising loop, ms", record, ("dense_loop_ms", "loop_ms", "loop_speedup"))]
            if record["loop_ms"] is not None
            else []
        ),
        (
            "images per second",
            _figure(record["dense_images_per_second"]),
            _figure(record["images_per_second"]),
            "",
        ),
        _memory(record["memory"]),
        *((f"MACs ({name})", "", "", f"{gain:.3f}") for name, gain in found.macs_speedup.items()),
    ]
    columns = ("", "dense", "SubNet", "speed-up")
    title = f"{asked.subnet}: median [95 % interval] of {record['latency_ms']['n']} pairs"
    print_table(title, columns, rows, right=columns[1:])
    say(f"cache of the SubNet at its peak: {megabytes(found.peak_cache_bytes)} MB")
    _print_conditions(record)


def _times(
    name: str, record: Mapping[str, Any], fields: tuple[str, str, str]
) -> tuple[str, str, str, str]:
    dense, pruned, speedup = (_figure(record[field]) for field in fields)
    return name, dense, pruned, speedup


def _figure(timing: Mapping[str, Any]) -> str:
    value = f"{timing['value']:.4g}"
    if timing["low"] is None:
        return value
    return f"{value} [{timing['low']:.4g}, {timing['high']:.4g}]"


def _memory(memory: Mapping[str, Mapping[str, int | None]]) -> tuple[str, str, str, str]:
    kind = "allocated" if memory["dense"]["allocated"] is not None else "resident"
    dense, pruned = (memory[side][kind] for side in ("dense", "pruned"))
    shown = ["" if count is None else megabytes(count) for count in (dense, pruned)]
    where = "GPU memory" if kind == "allocated" else "memory of the process"
    return f"peak {where}, MB", shown[0], shown[1], ""


def _print_conditions(record: Mapping[str, Any]) -> None:
    device = f"{record['device']}, {record['dtype']}, batch {record['batch_size']}"
    print_wrapped(
        "on",
        f"{device}, {record['threads']} CPU threads, compile: {record['compile']}"
        f"{', skipped calls jumped over' if record['fused'] else ''}",
    )
    print_wrapped("attention", record["attention"])
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    print_wrapped("versions", versions)
    if record["disturbed"] is not None:
        say(f"disturbed, so do not rely on it: {record['disturbed']}", stderr=True)
    if record["warmup"]["stable"] is False:
        pairs = record["warmup"]["pairs"]
        say(f"times had not settled after {pairs} pairs; raise --max-warmup", stderr=True)
    for what in record["unchecked"]:
        say(f"not checked: {what}", stderr=True)
