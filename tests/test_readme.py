"""What the pages promise exists: commands, options, links, Python names, sweep files."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main

from orchestrator.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md"]


def pages() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    names = listing.stdout.splitlines() if listing.returncode == 0 else PAGES
    return [ROOT / name for name in names if (ROOT / name).exists()]


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def shell_lines() -> list[str]:
    lines = "\n".join(blocks(ROOT / "README.md", "bash")).splitlines()
    return [line for line in lines if line.strip()]


def words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def calls() -> list[list[str]]:
    found = [words(line) for line in shell_lines()]
    return [line[1:] for line in found if line[0].endswith("dipgo-sweep")]


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_links_of_a_page_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    broken = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, fragment = link.partition("#")
        target = page.parent / path if path else page
        headings = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.M) if fragment else []
        if not target.exists() or (fragment and fragment not in map(anchor, headings)):
            broken.append(link)
    assert broken == []


def test_readme_shows_commands() -> None:
    assert len(calls()) >= 6


def command_of(call: list[str]) -> Any:
    """The command that a line calls, a subcommand where it names one."""
    command: Any = typer.main.get_command(app).commands[call[0]]  # type: ignore[attr-defined]
    return getattr(command, "commands", {}).get(call[1] if call[1:] else "", command)


@pytest.mark.parametrize("call", calls(), ids=lambda call: " ".join(call[:2]))
def test_command_of_the_readme_exists_with_its_options(call: list[str]) -> None:
    command = command_of(call)
    known = {name for parameter in command.params for name in parameter.opts}
    assert [word for word in call[1:] if word.startswith("-") and word not in known] == []


@pytest.mark.parametrize("call", calls(), ids=lambda call: " ".join(call[:2]))
def test_sweep_files_of_the_readme_exist(call: list[str]) -> None:
    assert [w for w in call if w.endswith(".yaml") and not (ROOT / w).is_file()] == []


def test_make_targets_of_the_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    text = "".join((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))
    named = set(re.findall(r"`make ([a-z-]+)", text)) | set(
        re.findall(r"^make ([a-z-]+)", text, re.M)
    )
    assert named and named <= targets


def test_python_of_the_readme_imports() -> None:
    for block in blocks(ROOT / "README.md", "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_sweep_of_the_readme_is_valid(tmp_path: Path) -> None:
    from orchestrator.sweep_file import load_sweep

    (block,) = blocks(ROOT / "README.md", "yaml")
    path = tmp_path / "sweep.yaml"
    path.write_text(block, encoding="utf-8")
    assert load_sweep(path, []).models[0].settings.id == "tiny-sd"


def test_every_command_is_named_in_the_readme() -> None:
    commands = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {name for name in commands if f"dipgo-sweep {name}" not in text} - {"run"} == set()
