"""The command line: exit codes, what goes to stdout, what loads, and what is said when it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dipgo_core.errors import StoreError
from orchestrator.cli import app as commands
from orchestrator.cli import main
from orchestrator.cli.options import ExitCode

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "sweeps" / "quickstart.yaml")
COMMANDS = [
    "run",
    "retry",
    "stop",
    "cache",
    "plan",
    "validate",
    "status",
    "pareto",
    "compare",
    "report",
    "export",
    "generate",
    "models",
    "bench",
    "pin",
    "prefetch",
    "ui",
]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


def call_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert call(*arguments) == ExitCode.DONE
    return json.loads(capsys.readouterr().out)


# --- the command line itself ---


@pytest.mark.parametrize("command", ["run", "retry"])
@pytest.mark.parametrize(
    ("options", "environment", "both"),
    [
        ("--executor local --address h:1", "", ("--address", "--executor local")),
        ("--executor local --workers 2", "", ("--workers", "--executor local")),
        ("--workers 2 --address h:1", "", ("--workers", "--address")),
        ("--workers 2", "h:1", ("--workers", "RAY_ADDRESS")),
    ],
)
def test_option_that_would_be_ignored_is_a_usage_error_naming_both(
    command: str,
    options: str,
    environment: str,
    both: tuple[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", environment)
    assert call(command, QUICKSTART, *options.split()) == ExitCode.USAGE
    told = capsys.readouterr().err
    assert all(each in told for each in both)


def test_help_lists_every_command_of_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == ExitCode.DONE
    text = capsys.readouterr().out
    assert [name for name in COMMANDS if name not in text] == []


@pytest.mark.parametrize("command", ["run", "plan", "cache ls", "models show", "bench", "status"])
def test_help_shows_defaults(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What rich takes for markup is left out, and a full stop stands alone."""
    assert call(*command.split(), "--help") == ExitCode.DONE
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert " ." not in text.replace(" ./", "")
    assert "[default:" in text


@pytest.mark.parametrize("arguments", [["--help"], ["models"], ["validate", QUICKSTART]])
def test_light_commands_load_no_heavy_library(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from orchestrator.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'ray', 'mlflow', 'diffusers', 'transformers', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_unknown_command_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("prune", QUICKSTART) == ExitCode.USAGE
    assert "prune" in capsys.readouterr().err


def test_unknown_option_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", QUICKSTART, "--jsno") == ExitCode.USAGE
    captured = capsys.readouterr()
    assert "--json" in captured.err and captured.out == ""


def test_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    assert call("--version") == ExitCode.DONE
    assert capsys.readouterr().out.split() == ["dipgo-sweep", version("dipgo-sweep")]


def test_error_of_the_store_is_text_without_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise StoreError("the record is torn; delete it")

    monkeypatch.setattr(commands, "app", refuse)
    assert call("status") == ExitCode.INTERNAL
    assert capsys.readouterr().err == "error: the record is torn; delete it\n"


def test_fault_of_our_own_shows_a_traceback_and_advice(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("unthought of")

    monkeypatch.setattr(commands, "app", fail)
    assert call("status") == ExitCode.INTERNAL
    text = capsys.readouterr().err
    assert "Traceback" in text and "unthought of" in text and "--verbose" in text


# --- sweep files ---


@pytest.mark.parametrize("name", ["quickstart", "tiny_full", "sd_family", "transformer_family"])
def test_validate_accepts_the_sweeps_of_the_repository(name: str) -> None:
    assert call("validate", str(ROOT / "sweeps" / f"{name}.yaml")) == ExitCode.DONE


def test_validate_names_every_error_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("schema_version: 1\nname: x\nmodels: [tiny-sd]\ntargts: [0.5]\nstorage: 3\n")
    assert call("validate", str(path)) == ExitCode.USAGE
    captured = capsys.readouterr()
    assert f"{path}:4:" in captured.err and "targets" in captured.err
    assert f"{path}:5:" in captured.err
    assert captured.out == "" and "Traceback" not in captured.err


def test_missing_sweep_file_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("validate", "nowhere.yaml") == ExitCode.USAGE
    assert "nowhere.yaml" in capsys.readouterr().err


def test_validate_json_is_the_resolved_file(capsys: pytest.CaptureFixture[str]) -> None:
    document = call_json(capsys, "validate", QUICKSTART, "-o", "targets=[0.5]", "--json")
    assert [model["targets"] for model in document["models"]] == [[0.5], [0.5]]


def test_override_of_an_unknown_key_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("validate", QUICKSTART, "-o", "evaluate.imags=3") == ExitCode.USAGE
    assert "images" in capsys.readouterr().err


# --- plan, status, fronts of a sweep that never ran ---


def test_plan_json_keeps_its_contract(capsys: pytest.CaptureFixture[str]) -> None:
    document = call_json(capsys, "plan", QUICKSTART, "--json")
    assert {"models", "searches", "evaluations", "baselines", "cached", "tasks"} <= set(document)
    assert (document["models"], document["searches"], document["cached"]) == (2, 4, 0)
    assert all({"key", "kind", "needs"} <= set(task) for task in document["tasks"])


def test_plan_counts_searches_once_for_all_targets(capsys: pytest.CaptureFixture[str]) -> None:
    one = call_json(capsys, "plan", QUICKSTART, "-o", "targets=[0.5]", "--json")
    three = call_json(capsys, "plan", QUICKSTART, "--json")
    assert one["searches"] == three["searches"]
    assert three["evaluations"] == 3 * one["evaluations"]


def test_plan_shows_memory_and_what_is_done_to_fit(capsys: pytest.CaptureFixture[str]) -> None:
    gpu = "resources={search: {gpus: 1, gpu_memory_gb: 24}}"
    rows = call_json(capsys, "plan", QUICKSTART, "-o", gpu, "--json")["memory"]
    searches = [row for row in rows if row["kind"] == "search"]
    assert {row["gpu_bytes"] for row in searches} == {24_000_000_000}
    assert all(row["fits"] for row in searches) and all(row["parts"] for row in rows)
    assert call("plan", QUICKSTART, "-o", gpu) == ExitCode.DONE
    assert "of 24.0" in capsys.readouterr().out


def test_plan_refuses_what_cannot_fit(capsys: pytest.CaptureFixture[str]) -> None:
    gpu = "resources={search: {gpus: 1, gpu_memory_gb: 1}}"  # the driver's context alone takes it
    assert call("plan", QUICKSTART, "-o", gpu) == ExitCode.USAGE
    assert "needs about 1." in capsys.readouterr().err


def test_status_of_a_new_sweep_has_nothing_done(capsys: pytest.CaptureFixture[str]) -> None:
    document = call_json(capsys, "status", QUICKSTART, "--json")
    assert document["tasks"]["done"] == 0 and document["tasks"]["total"] > 0
    assert not document["complete"] and document["failures"] == []


def test_pareto_of_a_new_sweep_has_points_and_no_fronts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    document = call_json(capsys, "pareto", QUICKSTART, "--json")
    assert document["fronts"] == []
    assert {point["state"] for point in document["points"]} == {"pending"}


def test_pareto_of_a_new_sweep_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("pareto", QUICKSTART) == ExitCode.DONE
    assert "dipgo-sweep run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "tiny-sd, tiny-dit"),
        (["--model", "tiny-s"], "Did you mean 'tiny-sd'?"),
        (["--model", "tiny-sd"], "nothing of it is finished"),
        (["--model", "tiny-sd", "--target", "0.5"], "no finished searched point"),
        (["--point", "zz"], "fits 0 points"),
    ],
)
def test_export_of_what_is_not_there_says_what_is(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("export", QUICKSTART, *arguments) == ExitCode.USAGE
    assert words in capsys.readouterr().err


# --- models and generate ---


def test_models_json_gives_both_conventions_as_measured_by_hand(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The method's page has SD-1.5 at 401.6 and 338.6 G, DiT-XL/2 at 118.7 and 114.4 G."""
    document = call_json(capsys, "models", "--json")
    known = {m["id"]: m for family in document["families"] for m in family["models"]}
    sd15 = known["stable-diffusion-v1-5/stable-diffusion-v1-5"]["macs"]
    dit = known["facebook/DiT-XL-2-256"]["macs"]
    figures = [sd15["all"], sd15["paper"], dit["all"], dit["paper"]]
    assert [round(figure / 1e9, 1) for figure in figures] == [401.6, 338.6, 118.7, 114.4]
    assert all(model["blocks"] > 1 for model in known.values())


def test_generate_without_a_subnet_file_says_who_writes_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call("generate", "none.json", "--prompt", "a red bag") == ExitCode.USAGE
    assert "dipgo-sweep export" in capsys.readouterr().err


# --- ui ---


def test_ui_of_a_server_prints_its_address(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("ui", QUICKSTART, "-o", "tracking.uri=http://tracker:5000") == ExitCode.DONE
    assert capsys.readouterr().out.strip() == "http://tracker:5000"


def test_ui_of_a_database_serves_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[tuple[list[str], str]] = []

    def serve(command: list[str], env: dict[str, str]) -> int:
        served.append((command[1:], env["MLFLOW_BACKEND_STORE_URI"]))
        return 0

    monkeypatch.setattr(subprocess, "call", serve)
    assert call("ui", QUICKSTART, "--port", "5055") == ExitCode.DONE
    assert capsys.readouterr().out.strip() == "http://127.0.0.1:5055"
    assert served == [(["-m", "mlflow", "ui", "--port", "5055"], "sqlite:///mlflow.db")]
