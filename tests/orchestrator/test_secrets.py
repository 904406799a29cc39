"""Secrets: what is masked, and what is left alone. Oracle: a canary word that must be gone."""

from __future__ import annotations

import logging

import pytest

from orchestrator.secrets import credentials_rule, has_credentials, redact, redact_logs

CANARY = "c4nary-w0rd"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"http://me:{CANARY}@host:5000/x", "http://***@host:5000/x"),
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
        "sqlite:////home/me@work/mlflow.db",
        "http://127.0.0.1:5000/#/experiments/1",
        "s3://bucket/prefix",
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
