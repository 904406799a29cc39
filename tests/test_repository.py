"""The repository holds what a clone needs, and the packages carry their data."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("dipgo_core", "orchestrator")
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize(
    "folder",
    ["dipgo_core", "orchestrator", "sweeps", "k8s", "tests", "benchmarks", "docs", ".ci"],
)
def test_folder_of_the_design_exists(folder: str) -> None:
    assert any((ROOT / folder).iterdir())


@pytest.mark.parametrize(
    "name", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", ".ci/run"]
)
def test_file_of_the_repository_exists(name: str) -> None:
    assert (ROOT / name).stat().st_size > 0


def test_licence_is_the_whole_apache_text(project: dict[str, Any]) -> None:
    text = (ROOT / "LICENSE").read_text()
    assert project["project"]["license"] == "Apache-2.0"
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text


def test_ci_is_executable_and_calls_make() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make check test" in script.read_text()


@pytest.mark.parametrize(
    "target", ["install", "demo", "rehearse", "test", "test-cluster", "check", "bench", "clean"]
)
def test_makefile_has_target(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_constraints_pin_by_name_and_version_only() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[^\s;@/]+", line)] == []


def test_every_dependency_is_pinned(project: dict[str, Any]) -> None:
    pinned = {canonical(line.split("==")[0]) for line in constraints()}
    wanted = [*project["project"]["dependencies"]]
    wanted += project["project"]["optional-dependencies"]["dev"]
    names = {canonical(re.match(r"[A-Za-z0-9._-]+", item)[0]) for item in wanted}  # type: ignore[index]
    assert names - pinned == set()


def constraints() -> list[str]:
    return (ROOT / "constraints.txt").read_text().split()


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_markers_are_those_the_contributing_page_names(project: dict[str, Any]) -> None:
    registered = project["tool"]["pytest"]["ini_options"]["markers"]
    assert {marker.split(":")[0] for marker in registered} == {"slow", "gpu", "cluster", "live"}
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert all(f"`{name}`" in text for name in ("gpu", "cluster", "live"))


def test_packages_carry_bundled_models() -> None:
    weights = files("dipgo_core") / "zoo" / "weights"
    names = {entry.name for entry in weights.iterdir() if entry.is_dir()}
    assert {"tiny-sd", "tiny-dit", "tiny-clip", "tiny-features"} <= names


def test_bundled_weights_stay_under_25_megabytes() -> None:
    weights = Path(str(files("dipgo_core") / "zoo" / "weights"))
    size = sum(path.stat().st_size for path in weights.rglob("*") if path.is_file())
    assert 1 * MEGABYTE < size <= 25 * MEGABYTE


def test_package_data_patterns_cover_every_data_file(project: dict[str, Any]) -> None:
    patterns = project["tool"]["setuptools"]["package-data"]
    for package in PACKAGES:
        folder = ROOT / package
        covered = {path for pattern in patterns[package] for path in folder.glob(pattern)}
        data = {p for p in tracked(package) if p.suffix not in (".py", ".pyi", ".md")}
        assert data - covered == set()


def tracked(folder: str) -> list[Path]:
    """Files under version control; all files where there is no checkout."""
    listing = subprocess.run(
        ["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listing.returncode == 0:
        return [ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).is_file()]
    return [p for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts]


def test_no_pickle_or_other_binary_of_code_is_kept() -> None:
    forbidden = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz"}
    kept = [path for package in PACKAGES for path in tracked(package)]
    assert [path for path in kept if path.suffix in forbidden] == []


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_first_statement_of_a_module_is_its_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    if tree.body:
        assert ast.get_docstring(tree), f"{path} does not say its one idea"


def test_no_file_names_a_path_of_one_machine() -> None:
    text_files = [path for path in tracked(".") if path.suffix in (".py", ".yaml", ".md", ".toml")]
    homes = re.compile(r"(?<![\w.])/(?:home|root|work|Users)/\w")
    found = [path for path in text_files if homes.search(path.read_text(encoding="utf-8"))]
    assert found == []


def test_module_version_is_the_distributions(project: dict[str, Any]) -> None:
    code = "import dipgo_core; print(dipgo_core.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == project["project"]["version"]
