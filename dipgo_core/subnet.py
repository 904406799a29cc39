"""SubNet: a gate table with everything needed to run it on the right pipeline. JSON, no torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from dipgo_core.config import DType, ModelSettings
from dipgo_core.errors import SubNetError
from dipgo_core.families import num_calls, short_name
from dipgo_core.gates import GateTable
from dipgo_core.graph import Reuse
from dipgo_core.hub import fetch, is_hub_id, resolve_commit, upload
from dipgo_core.subnet_fields import check_fields, check_macs

KIND = "dipgo.subnet"
FILE_NAME = "subnet.json"
SCHEMA_VERSION = 1


def config_sha256(config: Mapping[str, Any]) -> str:
    """SHA-256 of the fields that decide the output (keys with a leading ``_`` are left out)."""
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    text = json.dumps(public, sort_keys=True, separators=(",", ":"), default=list)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class SubNet:
    """What a user deploys (``subnet.json``).

    model: family, id, revision, base, resolution (as in ModelSettings), denoiser, config,
    config_sha256; latent_side and tokens, the size of the call that the MACs are counted for.
    sampler: scheduler (class name), config, config_sha256, steps, custom (timesteps or sigmas given
    to the stock call instead), timesteps (one a row of keep), guidance_scale.
    macs: dense, kept, pruned_ratio, convention, paper.
    """

    gates: GateTable
    block_names: tuple[str, ...]
    reuse: tuple[Reuse, ...]
    granularity: str
    model: Mapping[str, Any]
    sampler: Mapping[str, Any]
    macs: Mapping[str, Any]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        timesteps = self.sampler.get("timesteps")
        if not isinstance(timesteps, Sequence) or len(timesteps) != self.gates.num_calls:
            got = "none" if timesteps is None else len(timesteps)
            raise SubNetError(
                f"sampler.timesteps needs {self.gates.num_calls} entries, one a row of keep; "
                f"got {got}"
            )
        if not len(self.block_names) == len(self.reuse) == self.gates.num_blocks:
            raise SubNetError(
                f"blocks has {len(self.block_names)} names, keep has {self.gates.num_blocks} "
                "columns"
            )

    def model_settings(self, dtype: DType = "float32") -> ModelSettings:
        """Return the settings that load the model it was made for, in another precision perhaps."""
        return ModelSettings(
            id=str(self.model["id"]),
            revision=self.model.get("revision"),
            base=self.model.get("base"),
            resolution=self.model.get("resolution"),
            dtype=dtype,
        )

    def call_kwargs(self) -> dict[str, Any]:
        """Return the arguments the pipeline must be called with: steps, or a list, and guidance."""
        return {
            "num_inference_steps": int(self.sampler["steps"]),
            **self.sampler.get("custom", {}),
            "guidance_scale": float(self.sampler["guidance_scale"]),
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": KIND,
            "schema_version": SCHEMA_VERSION,
            "model": dict(self.model),
            "sampler": dict(self.sampler),
            "granularity": self.granularity,
            "blocks": [
                {"name": name, "reuse": str(reuse)}
                for name, reuse in zip(self.block_names, self.reuse, strict=True)
            ],
            "keep": self.gates.to_strings(),
            **_extrapolation(self.gates),
            "keep_sha256": self.gates.digest,
            "macs": dict(self.macs),
            "provenance": dict(self.provenance),
            "metrics": dict(self.metrics),
        }

    @classmethod
    def from_json(cls, data: object, *, source: str = "this document") -> SubNet:
        """Build a SubNet from the parsed file.

        Raises:
            SubNetError: not a SubNet, another schema version, missing or inconsistent fields, or a
                config that was edited after its hash was written.
        """
        if not isinstance(data, Mapping) or data.get("kind") != KIND:
            raise SubNetError(
                f"{source} is not a SubNet file (kind must be {KIND!r}); `dipgo-sweep export` "
                "writes one"
            )
        version = data.get("schema_version")
        if type(version) is not int or version != SCHEMA_VERSION:  # True and 1.0 equal 1
            raise SubNetError(
                f"{source} has schema_version {version!r}, this dipgo-sweep "
                f"reads {SCHEMA_VERSION}: export it again, or install the matching version"
            )
        check_fields(data, source)
        _check_hashes(data, source)
        check_macs(data, source)
        try:
            subnet = cls(
                gates=GateTable.from_strings(data["keep"], data.get("extrapolation", 0.0)),
                block_names=tuple(block["name"] for block in data["blocks"]),
                reuse=tuple(Reuse(block["reuse"]) for block in data["blocks"]),
                granularity=data["granularity"],
                model=data["model"],
                sampler=data["sampler"],
                macs=data["macs"],
                provenance=data.get("provenance", {}),
                metrics=data.get("metrics", {}),
            )
            _check_keep(subnet.gates, data.get("keep_sha256"))
            _check_steps(subnet.sampler)
        except SubNetError as error:
            raise SubNetError(f"{source}: {error}; export the SubNet again") from error
        return subnet

    def resample(self, steps: int) -> SubNet:
        """Return a SubNet of another number of steps, its rows taken from this one's.

        Nothing was searched or measured at that number: the provenance says from what it was
        made, and no metrics are kept. Loads torch and diffusers, but no model.

        Raises:
            SubNetError: the noise scheduler cannot do so many steps, or follows a list of its own.
        """
        resampled: SubNet = import_module("dipgo_core.resample").resampled(self, steps)
        return resampled

    def push_to_hub(self, repo_id: str, *, private: bool = False, message: str = "") -> str:
        """Commit the file to a model repository of the hub, made if need be; return the commit.

        Raises:
            HubError: the hub is out of reach or refuses it.
        """
        return upload(
            repo_id,
            {FILE_NAME: self._text().encode()},
            message=message or f"Add a SubNet of {self.model['id']}",
            private=private,
        )

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], revision: str | None = None) -> SubNet:
        """Load a SubNet from a file, a folder that holds one, or a repository of the hub.

        revision: of a repository; branch, tag or commit.

        Raises:
            SubNetError: there is none, or it is broken.
            HubError: the repository does not exist, may not be read, or holds no SubNet.
        """
        path = Path(name)
        if path.is_file():
            return cls.load(path)
        if path.is_dir():
            return cls.load(path / FILE_NAME)
        if path.suffix == ".json" or not is_hub_id(str(name)):
            raise SubNetError(
                f"{name} is no file, no folder with a {FILE_NAME}, and no repository of the hub "
                "(owner/name); give the path of a SubNet that `dipgo-sweep export` wrote"
            )
        commit = resolve_commit(str(name), revision)
        return cls.load(fetch(str(name), commit, [FILE_NAME]) / FILE_NAME)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file through a temporary name, so that no half-written SubNet is ever seen."""
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        temporary.write_text(self._text(), encoding="utf-8")
        temporary.replace(target)

    def _text(self) -> str:
        return json.dumps(self.to_json(), indent=1) + "\n"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SubNet:
        """Read a SubNet file.

        Raises:
            SubNetError: the file is missing, no JSON, or not a valid SubNet.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise SubNetError(
                f"no SubNet file at {path}; `dipgo-sweep export` writes one"
            ) from error
        except OSError as error:
            raise SubNetError(f"{path} cannot be read: {error}; name a SubNet file") from error
        except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, endless nesting
            raise SubNetError(
                f"{path} is not JSON ({error}); it may be truncated: export it again"
            ) from error
        return cls.from_json(data, source=str(path))


def _check_hashes(data: Mapping[str, Any], source: str) -> None:
    """Raise SubNetError where a config was edited after its hash was written."""
    for part in ("model", "sampler"):
        if config_sha256(data[part]["config"]) != data[part]["config_sha256"]:
            raise SubNetError(
                f"{source}: {part}.config does not match {part}.config_sha256; the file was "
                "edited or truncated: export the SubNet again"
            )


def _extrapolation(gates: GateTable) -> dict[str, float]:
    """Return the field of a SubNet whose skipped calls do not just repeat."""
    return {"extrapolation": gates.extrapolation} if gates.extrapolation else {}


def _check_keep(gates: GateTable, noted: str | None) -> None:
    """Raise SubNetError where rows were edited: the MACs beside them are of others.

    noted: None in files of versions that wrote none.
    """
    if noted not in (None, gates.digest):
        raise SubNetError(
            f"the rows of keep have the SHA-256 {gates.digest[:12]}..., keep_sha256 says "
            f"{noted[:12]}...: they were edited, and macs are counted for the rows there were"
        )


def _check_steps(sampler: Mapping[str, Any]) -> None:
    """Raise SubNetError where a known noise scheduler makes another number of calls of steps."""
    name, steps, found = sampler["scheduler"], sampler["steps"], len(sampler["timesteps"])
    known = short_name(name)
    if known is not None and num_calls(known, steps) != found:
        raise SubNetError(
            f"sampler.steps is {steps}, of which {name} makes {num_calls(known, steps)} calls, "
            f"but sampler.timesteps has {found} entries; another number of steps is made by "
            "subnet.resample(steps) of the unedited file"
        )
