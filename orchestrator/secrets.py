"""Secrets: passwords and tokens are ``***`` in whatever a person, a log or a record may show.

What counts as one: what stands before the ``@`` of a URI, parameters of a URI that are named like
secrets, and the values of environment variables that are (HF_TOKEN, AWS_SECRET_ACCESS_KEY, ...).
"""

from __future__ import annotations

import logging
import os
import re
import traceback
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import unquote

MASK: Final = "***"

#: Shorter values are words of everyday text: "1", "none", "true".
_SHORTEST: Final = 6
_USER: Final = re.compile(
    r"""(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)
    (?P<user>[^\s/@:'"<>]*) (?: : (?P<password>[^\s'"<>]*) )? @""",
    re.VERBOSE,
)
_PARAMETER: Final = re.compile(
    r"""(?P<name>[?&;](?:[\w.-]*(?:password|passwd|token|secret|credential|signature)|pwd|sig|
    api[_-]?key|access[_-]?key)=)[^&\s'"\#<>]+""",
    re.VERBOSE | re.IGNORECASE,
)
_HEADER: Final = re.compile(
    r"(?P<name>authorization['\"]?\s*[:=]\s*['\"]?)[^'\"\n]+", re.IGNORECASE
)
_SECRET_NAME: Final = re.compile(
    r"(^|_)(TOKEN|PASSWORD|PASSWD|SECRET|KEY|APIKEY|CREDENTIALS?)(_ID)?$", re.IGNORECASE
)


def redact(text: str) -> str:
    """Return `text` with every secret in it as ``***``."""
    for secret in sorted(_secrets_here(), key=len, reverse=True):
        text = text.replace(secret, MASK)
    text = _USER.sub(_masked_user, text)
    text = _PARAMETER.sub(rf"\g<name>{MASK}", text)
    return _HEADER.sub(rf"\g<name>{MASK}", text)


def has_credentials(uri: str) -> bool:
    """Whether a URI carries a user, a password or a token."""
    return _USER.search(uri) is not None or _PARAMETER.search(uri) is not None


def credentials_rule(uri: str) -> str | None:
    """Return the rule that a place of storage breaks by carrying credentials, or None."""
    if not has_credentials(uri):
        return None
    return (
        f"must hold no user, password or token, got {redact(uri)}: whoever reads the results "
        "would read them too. Give them in the environment (AWS_ACCESS_KEY_ID, "
        "AWS_SECRET_ACCESS_KEY, or a profile named by AWS_PROFILE)"
    )


def redact_logs() -> None:
    """Redact every log record of this process, tracebacks too, whoever logs and handles it.

    A handler that cannot write (its stream is closed) is silent: logging would print the error that
    was being logged, as it was raised.
    """
    logging.raiseExceptions = False
    make = logging.getLogRecordFactory()
    if make is not _redacted_record:
        global _make_record
        _make_record = make
        logging.setLogRecordFactory(_redacted_record)


_make_record: Any = logging.LogRecord


def _redacted_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    record: logging.LogRecord = _make_record(*args, **kwargs)
    try:
        record.msg, record.args = redact(record.getMessage()), None
    except (TypeError, ValueError):  # arguments that do not fit: logging itself reports them
        return record
    if record.exc_info and record.exc_info[0] is not None:
        record.exc_text = redact("".join(traceback.format_exception(*record.exc_info))).rstrip()
    return record


def _masked_user(found: re.Match[str]) -> str:
    return f"{found['scheme']}{MASK}@"


def _secrets_here() -> Iterator[str]:
    """Yield the secrets that the environment holds, those inside of its URIs too."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST:
            yield value
        elif "://" in value and (found := _USER.search(value)) is not None:
            password = found["password"] or ""
            yield from (one for one in {password, unquote(password)} if len(one) >= _SHORTEST)
