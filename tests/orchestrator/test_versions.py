"""Versions of two machines, compared."""

from __future__ import annotations

from importlib.metadata import version

from dipgo_core import NUMERICS_VERSION
from orchestrator.versions import differences, installed_versions


def test_versions_are_those_of_the_installed_packages() -> None:
    found = installed_versions()
    assert found["torch"] == version("torch")
    assert found["numerics"] == str(NUMERICS_VERSION)
    assert list(found)[0] == "python"


def test_every_difference_is_listed_and_nothing_else() -> None:
    here = {"python": "3.11", "ray": "2.60.0", "torch": "2.9"}
    there = {"python": "3.12", "ray": "2.60.0", "diffusers": "1"}
    assert differences(here, there) == [
        "python: 3.11 here, 3.12 on the cluster",
        "torch: 2.9 here, none on the cluster",
        "diffusers: none here, 1 on the cluster",
    ]
    assert differences(here, here) == []
