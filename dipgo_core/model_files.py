"""Which files a model consists of, and the digest that identifies its weights. No torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from dipgo_core.config import ModelSettings
from dipgo_core.errors import ModelFilesError
from dipgo_core.families import find_known
from dipgo_core.zoo import zoo_path


def weights_digest(settings: ModelSettings) -> str:
    """Return what identifies the weights, without loading them.

    For bundled names and folders the SHA-256 of the files that decide the output; for hub ids
    ``hub:<id>@<revision>``.

    Raises:
        ModelFilesError: a folder lacks files.
    """
    folder = model_folder(settings.id)
    if folder is None:
        return f"hub:{settings.id}@{settings.revision or 'main'}"
    files = _deciding_files(folder)
    stamp = tuple((str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in files)
    if stamp not in _digests:
        _digests[stamp] = _digest(folder, files)
    return _digests[stamp]


_digests: dict[tuple[tuple[str, int, int], ...], str] = {}


def model_folder(model_id: str) -> Path | None:
    """Return the folder of a bundled name or local path, or None for a hub id."""
    known = find_known(model_id)
    if known is not None and known.bundled:
        return zoo_path(known.id)
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        return folder
    if known is None and not re.fullmatch(r"[\w.-]+/[\w.-]+", model_id):
        raise ModelFilesError(
            f"{model_id!r} is no bundled model, no folder here and no hub id (owner/name)"
        )
    return None


def model_index(folder: Path) -> dict[str, Any]:
    """Return a saved pipeline's model_index.json.

    Raises:
        ModelFilesError: the folder has none, or it is not JSON.
    """
    try:
        return cast(dict[str, Any], json.loads((folder / "model_index.json").read_text("utf-8")))
    except (OSError, json.JSONDecodeError) as error:
        raise ModelFilesError(
            f"{folder} is not a saved pipeline: model_index.json {error}. Point the id at the "
            "folder that `save_pretrained` wrote."
        ) from error


def _deciding_files(folder: Path) -> list[Path]:
    index = model_index(folder)
    files: list[Path] = []
    missing: list[str] = []
    for name, origin in sorted(index.items()):
        if name.startswith("_") or name in ("safety_checker", "feature_extractor"):
            continue
        if not isinstance(origin, list) or origin[1] is None:
            continue
        found = sorted(p for p in (folder / name).glob("*") if _decides(p))
        files.extend(found)
        if not any(p.suffix == ".json" for p in found):
            missing.append(f"{name}/*.json")
        has_weights = "Tokenizer" not in origin[1] and "Scheduler" not in origin[1]
        if has_weights and not any(p.suffix == ".safetensors" for p in found):
            missing.append(f"{name}/*.safetensors")
    if missing:
        raise ModelFilesError(
            f"{folder} lacks {', '.join(missing)}. Only safetensors are read; copy the missing "
            "files there, or convert the weights with `save_pretrained`."
        )
    return files


def _decides(path: Path) -> bool:
    """Configs, vocabularies and the default weights; variants such as ``x.fp16.safetensors`` no."""
    if path.suffix == ".safetensors":
        return "." not in path.stem
    return path.suffix in (".json", ".txt", ".model")


def _digest(folder: Path, files: Sequence[Path]) -> str:
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            part = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()} {part}\n".encode())
    return total.hexdigest()
