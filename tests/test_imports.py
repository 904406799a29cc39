"""Walls between modules, checked from the source and by importing with torch out of reach."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("dipgo_core", "orchestrator")

#: Modules that import these, and nobody else.
HOMES: dict[str, str | tuple[str, ...]] = {
    "ray": "orchestrator/executors/ray_tune",
    "mlflow": "orchestrator/tracking",
    "optuna": ("orchestrator/task/explore", "dipgo_core/search/genetic"),
    "typer": "orchestrator/cli",
    "yaml": "orchestrator/yaml_source",
    "torch_fidelity": "dipgo_core/evaluation/fid",
    "pynvml": "dipgo_core/evaluation/nvml",
}
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "torch.save", "__import__"}

TORCH_FREE = [
    "dipgo_core",
    "dipgo_core.errors",
    "dipgo_core.config",
    "dipgo_core.gates",
    "dipgo_core.graph",
    "dipgo_core.subnet",
    "dipgo_core.families",
    "dipgo_core.postprocess",
    "dipgo_core.strategies",
    "dipgo_core.baselines",
    "dipgo_core.evaluation.protocol",
    "dipgo_core.evaluation.prompts",
    "dipgo_core.evaluation.intervals",
    "dipgo_core.evaluation.reference",
    "dipgo_core.evaluation.scorers",
    "dipgo_core.evaluation.device",
    "dipgo_core.evaluation.load",
    "dipgo_core.evaluation.nvml",
    "orchestrator.records",
    "orchestrator.sweep_settings",
    "orchestrator.sweep_file",
    "orchestrator.store",
    "orchestrator.points",
    "orchestrator.speeds",
    "orchestrator.task.latency_process",
    "orchestrator.plan",
    "orchestrator.pareto",
    "orchestrator.report",
    "orchestrator.cli",
]


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return names


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@pytest.mark.parametrize(("library", "home"), HOMES.items())
def test_library_has_one_home(library: str, home: str | tuple[str, ...]) -> None:
    users = [
        path.relative_to(ROOT).as_posix()
        for path in sources()
        if any(name.split(".")[0] == library for name in imported(parse(path)))
    ]
    assert users, f"nothing imports {library}"
    assert [user for user in users if not user.startswith(home)] == []


def test_dipgo_core_does_not_know_the_orchestrator() -> None:
    core = [path for path in sources() if path.is_relative_to(ROOT / "dipgo_core")]
    users = [p for p in core if any(n.startswith("orchestrator") for n in imported(parse(p)))]
    assert users == []


def test_nothing_reads_or_writes_pickles() -> None:
    users = {
        str(path.relative_to(ROOT)): sorted(found)
        for path in sources()
        if (found := {name.split(".")[0] for name in imported(parse(path))} & UNSAFE_MODULES)
    }
    assert users == {}


#: torch-fidelity's class takes weights only as an archive: one in memory, never on a disk.
IN_MEMORY = "torch.save(inception_state(feature_extractor_weights_path), archive)"


def test_nothing_evaluates_text_or_loads_by_torch() -> None:
    calls = [
        (str(path.relative_to(ROOT)), node.lineno)
        for path in sources()
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in UNSAFE_CALLS
        and "weights_only=True" not in map(ast.unparse, node.keywords)  # reads tensors only
        and ast.unparse(node) != IN_MEMORY
    ]
    assert calls == []


def test_only_the_cli_prints() -> None:
    users = [
        path.relative_to(ROOT).as_posix()
        for path in sources()
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    scripts = ("orchestrator/cli", "dipgo_core/zoo/")
    assert [user for user in users if not user.startswith(scripts)] == []


def test_planning_fronts_reports_and_cli_load_without_torch() -> None:
    code = (
        "import sys, importlib\n"
        "sys.modules['torch'] = None\n"  # importing it now raises ImportError
        f"for name in {TORCH_FREE!r}: importlib.import_module(name)\n"
        "assert not {'ray', 'mlflow', 'diffusers', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_import_contracts_hold() -> None:
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
