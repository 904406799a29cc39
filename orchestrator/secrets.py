"""Secrets: passwords and tokens are ``***`` in whatever a person, a log or a record may show.

What counts as one: what stands before the ``@`` of a URI, parameters of a URI that are named like
secrets, the values of environment variables that are (HF_TOKEN, AWS_SECRET_ACCESS_KEY, ...), and
what `remember` was told; each also as JSON, Python or a URI would write it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import traceback
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Final
from urllib.parse import quote, quote_plus, unquote

MASK: Final = "***"

#: Shorter values are words of everyday text: "1", "none", "true".
_SHORTEST: Final = 6
#: Digits before a slash are a port: what follows is a path, which may hold an ``@``.
_USER: Final = re.compile(
    r"""(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)
    (?P<user>[^\s/@:'"<>\[]*) (?: : (?!\d+[/?\#]) (?P<password>[^\s'"<>]*) )? @""",
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
    r"(^|_)(TOKEN|SECRET|KEY|APIKEY|CREDENTIALS?|CONNECTION_STRING)(_ID)?$"
    r"|(PASSWORD|PASSWD|PASSPHRASE)$|_(PASS|PAT|PWD)$",
    re.IGNORECASE,
)
#: A key such as ``SORT_KEY=images`` names something; it opens nothing.
_NAMES_SOMETHING: Final = re.compile(r"(?i:(\w+_)?KEY)=[a-z]{1,12}")


#: Secrets that this process was told otherwise than by its environment.
_TOLD: set[str] = set()


def remember(uri: str) -> None:
    """Mask the password of a URI wherever it turns up, also without the rest of the URI."""
    _TOLD.update(_passwords(uri))


def redact(text: str) -> str:
    """Return `text` with every secret in it as ``***``."""
    for secret in _as_written(frozenset(_secrets_here())):
        text = text.replace(secret, MASK)
    text = _USER.sub(_masked_user, text)
    text = _PARAMETER.sub(rf"\g<name>{MASK}", text)
    return _HEADER.sub(rf"\g<name>{MASK}", text)


def redacted(document: Any) -> Any:
    """Return a JSON document whose texts hold no secret; its keys and numbers stay."""
    if isinstance(document, str):
        return redact(document)
    if isinstance(document, Mapping):
        return {key: redacted(value) for key, value in document.items()}
    if isinstance(document, (list, tuple)):
        return [redacted(each) for each in document]
    return document


def spelled_out(uri: str, text: str) -> bool:
    """Whether a text that a URI comes from holds its password or token as it is.

    It does not where the text says ``${NAME}``, for the environment to fill in.
    """
    found = _USER.search(uri)
    written = [match[0] for match in _PARAMETER.finditer(uri)]
    if found is not None:
        password = found["password"]
        written.append(f"://{found['user']}@" if password is None else f":{password}@")
    return any(each in text for each in written)


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
    yield from _TOLD
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and not _NAMES_SOMETHING.fullmatch(f"{name}={value}"):
            if len(value) >= _SHORTEST:
                yield value
        elif "://" in value:
            yield from _passwords(value)


def _passwords(uri: str) -> Iterator[str]:
    """Yield the password of a URI, as it is written there and as it is meant."""
    found = _USER.search(uri)
    password = (found and found["password"]) or ""
    yield from (one for one in {password, unquote(password)} if len(one) >= _SHORTEST)


@lru_cache(maxsize=8)
def _as_written(secrets: frozenset[str]) -> tuple[str, ...]:
    """Return secrets in every form that texts hold them in, the longest first."""
    forms = {form for secret in secrets for form in _forms(secret)}
    return tuple(sorted(forms, key=len, reverse=True))


def _forms(secret: str) -> Iterator[str]:
    yield secret
    for plain in (False, True):
        inside = json.dumps(secret, ensure_ascii=plain)[1:-1]
        yield inside
        yield json.dumps(inside, ensure_ascii=plain)[1:-1]  # JSON in a text of JSON
    yield repr(secret)[1:-1]
    for safe in ("", "/"):
        yield quote(secret, safe=safe)
    yield quote_plus(secret)
