"""Secrets: what is masked, and what is left alone. Oracle: a canary word that must be gone."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from urllib.parse import quote, quote_plus

import pytest

from orchestrator import secrets
from orchestrator.cli.show import print_json, print_table, print_wrapped
from orchestrator.secrets import (
    credentials_rule,
    has_credentials,
    redact,
    redact_logs,
    remember,
    spelled_out,
)

CANARY = "c4nary-w0rd"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"http://me:{CANARY}@host:5000/x", "http://***@host:5000/x"),
        (f"http://me:{CANARY}/1@host", "http://***@host"),
        (f"https://{CANARY}@host/x", "https://***@host/x"),
        (f"redis://:{CANARY}@host", "redis://***@host"),
        (f"postgresql://u:a@b/{CANARY}@host/db?x=1", "postgresql://***@host/db?x=1"),
        (f"mysql+pymysql://u:{CANARY}@h/db, next", "mysql+pymysql://***@h/db, next"),
        (f"https://h/x?a=1&access_token={CANARY}&b=2", "https://h/x?a=1&access_token=***&b=2"),
        (f"https://b.s3/x?X-Amz-Signature={CANARY}", "https://b.s3/x?X-Amz-Signature=***"),
        (f"'Authorization': 'Bearer {CANARY}'", "'Authorization': '***'"),
        (f"Authorization: Basic {CANARY}\nnext", "Authorization: ***\nnext"),
    ],
)
def test_redact_masks(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////srv/me@work/mlflow.db",
        "http://127.0.0.1:5000/#/experiments/1",
        "s3://bucket/prefix",
        "http://gateway:8080/models/a@v1",
        "http://h:5000/#/x?u=me@y",
        "http://[::1]:5000/a@b",
        "owner/name@0123abc",
        "file:///a:b@c",
        "a token of 77 tokens; key: value",
    ],
)
def test_redact_leaves_alone(text: str) -> None:
    assert redact(text) == text and not has_credentials(text)


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID",
     "PGPASSWORD", "MYSQL_PWD", "DB_PASS", "GITHUB_PAT", "AZURE_STORAGE_CONNECTION_STRING",
     "RAY_AUTH_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "WANDB_API_KEY"],
)  # fmt: skip
def test_redact_masks_secrets_of_the_environment(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, CANARY)
    assert redact(f"said {CANARY}!") == "said ***!"


def test_redact_masks_passwords_of_uris_in_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://u:{CANARY}%21@host")
    assert redact(f"login {CANARY}%21 or {CANARY}! failed") == "login *** or *** failed"


AWKWARD = "pa\"ss\\wörd/+='end"


@pytest.mark.parametrize(
    "written",
    [
        lambda s: s,
        json.dumps,
        lambda s: json.dumps(s, ensure_ascii=False),
        lambda s: json.dumps(json.dumps({"said": s})),
        repr,
        quote,
        quote_plus,
        lambda s: quote(s, safe=""),
    ],
)
def test_redact_masks_a_secret_however_it_is_written(
    written: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", AWKWARD)
    shown = redact(f"say {written(AWKWARD)}.")
    assert "***" in shown and "rd" not in shown and "pa" not in shown


def test_password_of_a_uri_that_was_used_is_masked_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_TOLD", set())
    remember(f"postgresql://me:{CANARY}%2F@host/db")
    assert redact(f"no such password: {CANARY}/ or {CANARY}%2F") == "no such password: *** or ***"


def test_json_is_redacted_by_its_texts_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", AWKWARD)
    monkeypatch.setenv("DB_PASSWORD", "images")
    monkeypatch.setenv("SORT_KEY", "latency")
    print_json({"images": 16, "by": "latency", "error": [f"login {AWKWARD}"], "kept": {"a"}})
    shown = json.loads(capsys.readouterr().out)
    assert shown == {"images": 16, "by": "latency", "error": ["login ***"], "kept": ["a"]}


def test_tables_and_lists_show_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("t", ("a",), [(f"http://me:{CANARY}@h",)])
    print_wrapped("log", f"http://me:{CANARY}@h")
    shown = capsys.readouterr().out
    assert CANARY not in shown and shown.count("http://***@h") == 2


@pytest.mark.parametrize(
    ("uri", "text", "spelled"),
    [
        (f"http://me:{CANARY}@h", f"uri: http://me:{CANARY}@h", True),
        (f"http://me:{CANARY}@h", f"uri: http://${{ME}}:{CANARY}@h", True),
        (f"http://me:{CANARY}@h", "uri: http://me:${WORD}@h", False),
        (f"http://me:{CANARY}@h", "uri: ${URI}", False),
        (f"https://{CANARY}@h", f"uri: https://{CANARY}@h", True),
        (f"https://h/?token={CANARY}", f"uri: https://h/?token={CANARY}", True),
        ("http://h:5000", "uri: http://h:5000", False),
    ],
)
def test_spelled_out_tells_passwords_from_names_of_variables(
    uri: str, text: str, spelled: bool
) -> None:
    assert spelled_out(uri, text) is spelled


def test_redact_leaves_short_and_public_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "on")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-value")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/etc/token")
    assert redact("on false-value /etc/token") == "on false-value /etc/token"


def test_storage_with_credentials_is_refused_without_telling_them() -> None:
    rule = credentials_rule(f"s3://me:{CANARY}@bucket")
    assert rule is not None and CANARY not in rule and "AWS_ACCESS_KEY_ID" in rule
    assert credentials_rule("s3://bucket/prefix") is None


def test_logs_are_redacted_whoever_handles_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "_logRecordFactory", logging.getLogRecordFactory())
    monkeypatch.setattr(logging, "raiseExceptions", True)
    redact_logs()
    redact_logs()  # once is enough
    log = logging.getLogger("somebody else's")
    log.addHandler(logging.StreamHandler())
    try:
        raise RuntimeError(f"http://me:{CANARY}@host")
    except RuntimeError:
        log.exception("at %s, %d %%", f"http://you:{CANARY}@host", 3)
    log.handlers.clear()
    printed = capsys.readouterr().err
    assert CANARY not in printed
    assert "at http://***@host, 3 %" in printed and "RuntimeError: http://***@host" in printed
