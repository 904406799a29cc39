"""`export`: which point of a sweep is meant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dipgo_core.errors import ConfigError, TargetError, nearest
from orchestrator.pareto import knee_note

if TYPE_CHECKING:
    from orchestrator.cli.sweeps import Results
    from orchestrator.points import ResolvedPoint


def choose_point(
    results: Results, *, point: str | None, model: str | None, target: float | None
) -> ResolvedPoint:
    """Return the point with a key, the headline one of a target, or the knee of the front.

    Raises:
        ConfigError: no or several points fit.
        TargetError: nothing was searched at the target, or it is not finished.
    """
    if point is not None:
        return point_by_key(results.points, point)
    name = _model(results, model)
    return _knee(results, name) if target is None else _headline(results, name, target)


def point_by_key(points: Sequence[ResolvedPoint], start: str) -> ResolvedPoint:
    """Return the one point whose key begins so.

    Raises:
        ConfigError: no or several points fit.
    """
    found = [point for point in points if point.key.startswith(start)]
    if len(found) != 1:
        raise ConfigError(
            f"the key {start!r} fits {len(found)} points of this sweep; "
            "`dipgo-sweep pareto FILE --json` lists their keys"
        )
    return found[0]


def _model(results: Results, name: str | None) -> str:
    names = list(dict.fromkeys(point.model for point in results.points))
    if name is None and len(names) == 1:
        return names[0]
    if name not in names:
        given = "is needed" if name is None else f"has no {name!r}"
        raise ConfigError(
            f"--model {given}: this sweep's models are {', '.join(names)}."
            f"{nearest(name or '', names)}"
        )
    return name


def _knee(results: Results, model: str) -> ResolvedPoint:
    by_key = {point.key: point for point in results.points}
    for front in results.headline_fronts:
        if front.model == model and front.knee is not None:
            return by_key[front.knee]
        if front.model == model:
            raise ConfigError(
                f"{model}: {knee_note(results.points, front)}, or name a point with `--point KEY`"
            )
    raise ConfigError(
        f"no front of {model} yet: nothing of it is finished; `dipgo-sweep run` first"
    )


def _headline(results: Results, model: str, target: float) -> ResolvedPoint:
    by_key = {point.key: point for point in results.points}
    found = {line.target: line for line in results.headlines if line.model == model}
    if target not in found:
        listed = ", ".join(f"{each:g}" for each in sorted(found)) or "none"
        raise TargetError(
            f"--target {target:g}: no finished searched point of {model} there; there are: {listed}"
        )
    return by_key[found[target].searched]
