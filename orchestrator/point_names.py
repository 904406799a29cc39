"""What people call a point: its method, and what tells it from others of it. No torch."""

from __future__ import annotations

from orchestrator.methods import losses_of, unusual
from orchestrator.planned import Point


def point_name(point: Point) -> str:
    """Name a point for people, without its model and target."""
    variant = "" if point.variant is None else str(point.variant)
    layers = "layers" if point.granularity == "layer" else ""
    if point.method in ("few_steps", "ays", "deepcache"):
        return ", ".join(filter(None, (point.method.replace("_", " "), variant)))
    if point.method == "random":
        return " ".join(filter(None, ("random", layers, variant)))
    if point.method == "search":
        parts = [str(point.strategy), layers, *_settings(point), f"seed {point.seed}", variant]
        return " ".join(filter(None, parts))
    return point.method.replace("_", " ")


def _settings(point: Point) -> list[str]:
    """Return the settings of a search that its name tells."""
    search = point.search or {}
    if "loss" not in search:
        return unusual(search)
    losses = losses_of(search)
    weight = f"α={search['loss']['alpha']:g}"
    return ["" if losses == "ssim" else losses, weight, *unusual(search)]
