"""Versions of what decides results or travels between machines, without importing any of it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from dipgo_core import NUMERICS_VERSION

PACKAGES: Final = ("dipgo-sweep", "ray", "torch", "diffusers", "transformers")


def installed_versions() -> dict[str, str]:
    """Return the version of Python, of each package ("none" if absent) and of our numerics."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    found |= {name: _version(name) for name in PACKAGES}
    return {**found, "numerics": str(NUMERICS_VERSION)}


def differences(here: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    """Return a line for each version that differs. here, there: as `installed_versions` gives."""
    names = dict.fromkeys((*here, *there))
    return [
        f"{name}: {here.get(name, 'none')} here, {there.get(name, 'none')} on the cluster"
        for name in names
        if here.get(name) != there.get(name)
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
