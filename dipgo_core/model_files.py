"""Which files a model consists of, and the digest that identifies its weights. No torch."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, cast

from safetensors import SafetensorError, safe_open

from dipgo_core import hub
from dipgo_core.config import ModelSettings
from dipgo_core.errors import HubError, ModelFilesError
from dipgo_core.model_base import Elsewhere, base_of, model_folder, single_file


def weights_digest(settings: ModelSettings) -> str:
    """Return what identifies the weights, without loading them.

    For bundled names, folders and single files the SHA-256 of the files that decide the output; for
    hub ids ``hub:<id>@<revision>``, where a sweep that runs gives the commit as revision. With that
    of the base, if the rest of the pipeline comes from one.

    Raises:
        ModelFilesError: a folder lacks files, or weights are damaged.
    """
    base = base_of(settings)
    if base is None:
        return _own_digest(settings)
    file = single_file(settings.id)
    if file is None:
        return f"{_denoiser_digest(settings)}+{_rest_digest(base)}"
    check_weights([file])
    return _sha256(f"{file_sha256(file)} {_configs_digest(base)}")


def _own_digest(settings: ModelSettings) -> str:
    folder = model_folder(settings.id)
    if folder is None:
        return _hub_name(settings)
    return _digest(folder, check_pipeline(folder), _settings_of(folder))


def _denoiser_digest(settings: ModelSettings) -> str:
    """Return what identifies a denoiser that is alone in its folder or repository."""
    folder = model_folder(settings.id)
    if folder is None:
        return _hub_name(settings)
    return _digest(folder, check_network(folder), "")


def _rest_digest(base: ModelSettings) -> str:
    """Return what identifies all of a base but its denoiser."""
    folder = model_folder(base.id)
    if folder is None:
        return _hub_name(base)
    return _digest(folder, check_pipeline(folder, "denoiser"), _settings_of(folder))


def _configs_digest(base: ModelSettings) -> str:
    """Return what identifies configs and tokenizers of a base; its weights are not those."""
    folder = model_folder(base.id)
    if folder is None:
        return _hub_name(base)
    return _digest(folder, check_pipeline(folder, "weights"), _settings_of(folder))


def _hub_name(settings: ModelSettings) -> str:
    return f"hub:{settings.id}@{settings.revision or hub.MAIN}"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, which are read again only after the file changed.

    Raises:
        ModelFilesError: the file cannot be read.
    """
    try:
        stat = path.stat()
        stamp = (str(path.absolute()), stat.st_mtime_ns, stat.st_size)
        if stamp in _digests:
            return _digests[stamp]
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ModelFilesError(f"cannot read {path}: {error.strerror}") from error
    if time.time_ns() - stat.st_mtime_ns > _SETTLED_NS:
        _digests[stamp] = digest
    return digest


#: By path, time of the last change, and size. A file may change twice within one tick of the file
#: system's clock, so a fresh one is not kept.
_digests: dict[tuple[str, int, int], str] = {}
_SETTLED_NS: Final = 2_000_000_000


def model_index(folder: Path) -> dict[str, Any]:
    """Return a saved pipeline's model_index.json.

    Raises:
        ModelFilesError: the folder has none, it is not JSON, or a component is no pair of library
            and class.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFilesError(
            f"{folder} is not a saved pipeline: model_index.json {error}. Point the id at the "
            "folder that `save_pretrained` wrote."
        ) from error
    if not isinstance(index, dict):
        raise ModelFilesError(f"{folder}: model_index.json is no mapping; copy the model again")
    for name, origin in index.items():
        if not name.startswith("_") and isinstance(origin, list) and not _is_origin(origin):
            raise ModelFilesError(
                f"{folder}: model_index.json has {json.dumps(origin)} as {name}; a component is a "
                "library and a class, or null and null. Copy the model again."
            )
    return cast(dict[str, Any], index)


def _is_origin(entry: list[Any]) -> bool:
    return len(entry) == 2 and all(part is None or isinstance(part, str) for part in entry)


def _settings_of(folder: Path) -> str:
    """Return what a saved pipeline's model_index.json decides beside naming components: its class
    and the arguments that are no networks, as canonical JSON."""
    index = model_index(folder)
    named = {
        name: value
        for name, value in index.items()
        if not name.startswith("_") and not isinstance(value, list) and name not in _NO_SETTINGS
    }
    settings = {**named, "_class_name": index.get("_class_name")}
    return json.dumps(settings, sort_keys=True, separators=(",", ":"))


#: Names of labels, and what a pipeline warns of; the components that safety needs decide nothing.
_NO_SETTINGS: Final = ("id2label", "requires_safety_checker")


@dataclass(frozen=True)
class PipelineFiles:
    """Paths inside a saved pipeline. deciding: what its output depends on; loaded: what diffusers
    reads, these included; missing: what neither is there nor can be done without."""

    deciding: tuple[str, ...]
    loaded: tuple[str, ...]
    missing: tuple[str, ...]


#: What pipelines call their denoiser.
DENOISERS: Final = ("unet", "transformer")
#: Components that only a safety checker reads.
_SAFETY: Final = ("safety_checker", "feature_extractor")
_WEIGHTS: Final = re.compile(r"(?:diffusion_pytorch_)?model(-\d{5}-of-\d{5})?\.safetensors")
_SHARD: Final = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")


def pipeline_files(index: Mapping[str, Any], names: Iterable[str]) -> PipelineFiles:
    """Return which of the files `names` a pipeline with this model_index.json consists of."""
    there = set(names)
    deciding: list[str] = []
    extra: list[str] = []
    missing: list[str] = []
    for component, origin in sorted(index.items()):
        if component.startswith("_") or not isinstance(origin, list) or origin[1] is None:
            continue
        found = sorted(name for name in there if _decides(name) and _folder_of(name) == component)
        if component in _SAFETY:
            extra += [name for name in found if component != _SAFETY[0]]
            continue
        deciding += found
        has_weights = "Tokenizer" not in origin[1] and "Scheduler" not in origin[1]
        missing += _lacking(component, found, has_weights)
    loaded = ("model_index.json", *deciding, *extra)
    return PipelineFiles(tuple(deciding), loaded, tuple(missing))


def without(files: PipelineFiles, part: Elsewhere | None) -> PipelineFiles:
    """Return the files of a base that are needed of it. part: what comes from elsewhere."""

    def needed(names: Iterable[str]) -> tuple[str, ...]:
        if part == "weights":
            return tuple(name for name in names if not name.endswith(".safetensors"))
        return tuple(n for n in names if part is None or _folder_of(n) not in DENOISERS)

    return PipelineFiles(needed(files.deciding), needed(files.loaded), needed(files.missing))


def check_pipeline(folder: Path, part: Elsewhere | None = None) -> list[Path]:
    """Return the files of a saved pipeline that decide its output; none is loaded.

    part: what of it comes from elsewhere, as `without` takes it.

    Raises:
        ModelFilesError: files are missing or damaged; names all of them.
    """
    names = (path.relative_to(folder).as_posix() for path in folder.glob("*/*"))
    files = without(pipeline_files(model_index(folder), names), part)
    if files.missing:
        raise ModelFilesError(
            f"{folder} lacks {', '.join(files.missing)}. Only safetensors are read; copy the "
            "missing files there, or convert the weights with `save_pretrained`."
        )
    paths = [folder / name for name in files.deciding]
    check_weights(paths)
    return paths


def check_network(folder: Path) -> list[Path]:
    """Return the files of a network that is alone in its folder; none is loaded.

    Raises:
        ModelFilesError: files are missing or damaged; names all of them.
    """
    files = network_files((path.name for path in folder.iterdir()), folder)
    if files.missing:
        raise ModelFilesError(f"{folder} {lacking_message(files)}")
    paths = [folder / name for name in files.deciding]
    check_weights(paths)
    return paths


def check_weights(paths: Iterable[Path]) -> None:
    """Check headers and sizes of safetensors files, without reading the tensors.

    Raises:
        ModelFilesError: files are torn, or no safetensors; names all of them.
    """
    damaged = [
        f"{path} ({fault})"
        for path in paths
        if path.suffix == ".safetensors" and (fault := _fault(path))
    ]
    if damaged:
        raise ModelFilesError(f"damaged weights: {'; '.join(damaged)}. Copy them again.")


def hub_pipeline(settings: ModelSettings, part: Elsewhere | None = None) -> Path:
    """Return the folder in the hub's cache that holds the pipeline, after fetching what it lacks.

    part: what of it comes from elsewhere, as `without` takes it.

    Raises:
        HubError: files cannot be fetched, or the repository has none that are read.
        ModelFilesError: weights in the cache are damaged.
    """
    commit = hub.resolve_commit(settings.id, settings.revision)
    files = hub_pipeline_files(settings.id, commit, part)
    folder = hub.fetch(settings.id, commit, files.loaded)
    check_weights(folder / name for name in files.loaded)
    return folder


def hub_pipeline_files(hub_id: str, commit: str, part: Elsewhere | None = None) -> PipelineFiles:
    """Return which files of a hub repository its pipeline consists of; fetches its index only.

    Raises:
        HubError: the repository cannot be read, or holds no pipeline of safetensors.
    """
    index = model_index(hub.fetch(hub_id, commit, ["model_index.json"]))
    files = without(pipeline_files(index, hub.files_at(hub_id, commit)), part)
    return _complete(files, hub_id, commit)


#: What open_clip calls its files, and those it keeps of a tokenizer.
OPEN_CLIP_CONFIG: Final = "open_clip_config.json"
OPEN_CLIP_WEIGHTS: Final = "open_clip_model.safetensors"
_OPEN_CLIP_PICKLE: Final = "open_clip_pytorch_model.bin"
_TOKENIZER: Final = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
#: Either of these says what kind of network the weights beside it are.
NETWORK_CONFIGS: Final = ("config.json", OPEN_CLIP_CONFIG)


def network_files(names: Iterable[str], folder: Path) -> PipelineFiles:
    """Return which of the files `names` a network consists of, as transformers or open_clip saves
    it: configs, a tokenizer, and safetensors. folder: where its config.json lies, if it has one."""
    there = {name for name in names if "/" not in name}
    if is_open_clip(there, folder):
        return _open_clip_files(there)
    found = sorted(filter(_decides, there))
    weights = [name for name in found if _WEIGHTS.fullmatch(name)]
    others = [name for name in found if not name.endswith(".safetensors")]
    lacking = [] if "config.json" in others else ["config.json"]
    lacking += absent_shards(weights) if weights else ["model.safetensors"]
    files = tuple(others + weights)
    return PipelineFiles(files, files, tuple(lacking))


def is_open_clip(names: Collection[str], folder: Path) -> bool:
    """Return whether files are those of a CLIP that open_clip saved, and transformers did not too.

    folder: where config.json lies, which is read where names alone do not tell: that of timm,
    whose weights are an image tower only, says no model_type.
    """
    if OPEN_CLIP_CONFIG not in names:
        return False
    if "config.json" not in names or not any(map(_WEIGHTS.fullmatch, names)):
        return True
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False  # told where it is loaded
    return not isinstance(config, dict) or "model_type" not in config


def _open_clip_files(there: Collection[str]) -> PipelineFiles:
    files = [n for n in (OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS, *_TOKENIZER) if n in there]
    lacking = [] if OPEN_CLIP_WEIGHTS in there else [OPEN_CLIP_WEIGHTS]
    if "tokenizer.json" not in there and not {"vocab.json", "merges.txt"} <= set(there):
        lacking.append("tokenizer.json")
    return PipelineFiles(tuple(files), tuple(files), tuple(lacking))


def lacking_message(files: PipelineFiles) -> str:
    """Return what a network's files lack, and what to do about it."""
    lacks = hub.listed(files.missing)
    if files.missing == (_TOKENIZER[0],):
        return f"has no {lacks}, nor {_TOKENIZER[1]} with {_TOKENIZER[2]}: choose another revision"
    if OPEN_CLIP_WEIGHTS not in files.missing:
        return (
            f"has no {lacks}. Only safetensors are read; choose another revision, or convert the "
            "model with `save_pretrained` and name the folder"
        )
    return (
        f"has no {lacks}. {_OPEN_CLIP_PICKLE} is a pickle, which is never read: choose a revision "
        f"that has safetensors, or download the repository, write {OPEN_CLIP_WEIGHTS} beside it "
        f"with safetensors.torch.save_file(torch.load({_OPEN_CLIP_PICKLE!r}, weights_only=True), "
        f"{OPEN_CLIP_WEIGHTS!r}) and name the folder"
    )


def hub_network(hub_id: str, revision: str | None = None) -> Path:
    """Return the folder in the hub's cache that holds a network, after fetching what it lacks.

    Raises:
        HubError: files cannot be fetched, or the repository has none that are read.
        ModelFilesError: weights in the cache are damaged.
    """
    commit = hub.resolve_commit(hub_id, revision)
    files = hub_network_files(hub_id, commit)
    folder = hub.fetch(hub_id, commit, files.loaded)
    check_weights(folder / name for name in files.loaded)
    return folder


def hub_network_files(hub_id: str, commit: str) -> PipelineFiles:
    """Return which files of a hub repository its network consists of.

    Raises:
        HubError: the repository cannot be read, or holds no network of safetensors.
    """
    names = hub.files_at(hub_id, commit)
    folder = hub.snapshot_folder(hub_id, commit)
    if set(NETWORK_CONFIGS) <= set(names):
        folder = hub.fetch(hub_id, commit, ["config.json"])  # tells which of the two is meant
    return _complete(network_files(names, folder), hub_id, commit)


def _complete(files: PipelineFiles, hub_id: str, commit: str) -> PipelineFiles:
    if files.missing:
        raise HubError(f"{hub_id} at {commit[:12]} {lacking_message(files)}")
    return files


def _folder_of(name: str) -> str:
    return name.rpartition("/")[0]


def _decides(name: str) -> bool:
    """Configs, vocabularies and the default weights; variants such as ``x.fp16.safetensors`` no."""
    path = PurePosixPath(name)
    if path.suffix == ".safetensors":
        return "." not in path.stem
    return path.suffix in (".json", ".txt", ".model")


def _lacking(component: str, found: Sequence[str], has_weights: bool) -> list[str]:
    """Return which files a component cannot do without, of those that were not found."""
    weights = [name for name in found if name.endswith(".safetensors")]
    lacking = [] if any(name.endswith(".json") for name in found) else [f"{component}/*.json"]
    if has_weights and not weights:
        lacking.append(f"{component}/*.safetensors")
    return lacking + absent_shards(weights)


def absent_shards(weights: Sequence[str]) -> list[str]:
    """Return the names of shards that are not there, by the numbers in the names of the others."""
    shards = [match for match in map(_SHARD.fullmatch, weights) if match]
    expected = {
        f"{stem}-{i:05d}-of-{count}.safetensors"
        for stem, count in {(match[1], match[2]) for match in shards}
        for i in range(1, int(count) + 1)
    }
    return sorted(expected - set(weights))


def _fault(path: Path) -> str | None:
    """Return why a safetensors file cannot be used: its header says where every tensor lies."""
    try:
        with safe_open(path, framework="numpy"):
            return None
    except (OSError, SafetensorError) as error:
        return str(error)


def _digest(folder: Path, files: Sequence[Path], settings: str) -> str:
    total = hashlib.sha256(settings.encode())
    for path in files:
        total.update(f"{path.relative_to(folder).as_posix()} {file_sha256(path)}\n".encode())
    return total.hexdigest()
