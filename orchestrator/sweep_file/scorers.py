"""The section `evaluate.scorers`: the networks that judge images, by role."""

from __future__ import annotations

from pathlib import Path

from dipgo_core.evaluation.inception_files import INCEPTION
from dipgo_core.evaluation.lpips_files import BACKBONES
from dipgo_core.evaluation.scorers import TINY_FEATURES
from dipgo_core.families import Scorers
from dipgo_core.hub import split_id
from dipgo_core.zoo import ZOO_MODELS
from orchestrator.sweep_file.context import HUB_ID, Context, located
from orchestrator.sweep_file.fields import Fields, Reader, choice, text
from orchestrator.sweep_issues import Issues
from orchestrator.yaml_source import Node


def read_scorers(node: Node, issues: Issues, context: Context) -> Scorers:
    """Read `scorers`; a role that is not given keeps what fits the model."""
    default, network = context.scorers, _network(context)
    extractor = _named_or_file(context, (TINY_FEATURES, INCEPTION), with_file=(INCEPTION,))
    distance = _named_or_file(context, tuple(BACKBONES), with_file=tuple(BACKBONES))
    with Fields(node, issues) as section:
        return Scorers(
            features=section.get("features", extractor, default.features),
            clip=section.maybe("clip", network) or default.clip,
            cmmd=section.get("cmmd", network, default.cmmd),
            lpips=section.get("lpips", distance, default.lpips),
            dino=section.get("dino", network, default.dino),
            image_reward=section.maybe("image_reward", network) or default.image_reward,
        )


def _named_or_file(
    context: Context, names: tuple[str, ...], *, with_file: tuple[str, ...]
) -> Reader[str]:
    """Read one of `names`; those of `with_file` also as ``NAME:FILE``."""
    valid = choice(names)

    def read(node: Node, issues: Issues) -> str | None:
        kind, colon, file = str(node.value).partition(":")
        if not (isinstance(node.value, str) and kind in with_file and colon):
            return valid(node, issues)
        found = context.locate(file) if file else None
        if found is None:
            issues.add(node.issue(f"no such file: {file} (write {kind}:FILE)"))
        return None if found is None else f"{kind}:{found}"

    return read


def _network(context: Context) -> Reader[str]:
    """Read a bundled name, a folder, or a hub id (also ``owner/name@revision``)."""

    def read(node: Node, issues: Issues) -> str | None:
        name = text()(node, issues)
        if name is None or name in ZOO_MODELS:
            return name
        found = context.locate(name)
        if (found is None or not Path(found).is_dir()) and HUB_ID.fullmatch(split_id(name)[0]):
            return name
        return located(context, "folder")(node, issues)

    return read
