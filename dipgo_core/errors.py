"""Every error the product raises on purpose.

DipgoError
├── ConfigError              a setting is wrong: names the setting, the value and the rule
│   ├── SweepFileError       errors of a sweep file, each with file, line, column and field
│   └── PreflightError       what a sweep needs is missing or does not fit; lists all of it
├── UnknownModelError        a model, family, scorer or bundled name that does not exist
├── ModelFilesError          weights or configs that cannot be found or read
│   └── HubError             what the model hub refuses or does not have
│       └── HubUnreachableError  the hub is out of reach, and the cache lacks what is asked for
├── TraceError               the block graph of a denoiser could not be found
├── SubNetError              a SubNet file that is broken, or that was made for something else
│   └── SubNetMismatchError  pipeline and SubNet differ; lists the fields
├── SamplingError            a pipeline call that cannot be made, or never reaches its decoder
├── TargetError              a pruned ratio that no SubNet reaches; lists the reachable ones
├── SearchError              a search that cannot go on (non-finite loss, collapsed gates)
├── EvaluationError          images, scorers or statistics that cannot be used
├── DeviceError              a device that is not there, or does not tell what it is asked
├── StoreError               records or artifacts that are missing, torn or refused
│   └── StorageError         the storage is out of reach or full, which may pass
├── TaskError                a task that failed; names its log and the command that retries it
└── TrackingError            the tracking server refused or lost something
"""

from __future__ import annotations

from typing import Any


class DipgoError(Exception):
    """Root of all errors raised on purpose; its message is written for the user."""


class ConfigError(DipgoError):
    """A setting is wrong."""


class SweepFileError(ConfigError):
    """A sweep file has errors; the message lists all of them, `errors` holds them one by one."""

    def __init__(self, message: str, errors: tuple[Any, ...] = ()) -> None:
        super().__init__(message)
        self.errors = errors


class PreflightError(ConfigError):
    """A sweep cannot be run as the world is; the message lists every reason."""


class UnknownModelError(DipgoError):
    """A name that is not among the known ones."""


class ModelFilesError(DipgoError):
    """Weights or configs cannot be found or read."""


class HubError(ModelFilesError):
    """The model hub refuses something, or does not have it."""


class HubUnreachableError(HubError):
    """The hub is out of reach, and the local cache lacks what is asked for."""


class TraceError(DipgoError):
    """The block graph of a denoiser could not be found."""


class SubNetError(DipgoError):
    """A SubNet is broken or does not fit."""


class SubNetMismatchError(SubNetError):
    """Pipeline and SubNet differ; the message names both sides."""


class SamplingError(DipgoError):
    """A pipeline call cannot be made, or does not end where it should."""


class TargetError(DipgoError):
    """No SubNet reaches the target."""


class SearchError(DipgoError):
    """A search cannot go on."""


class SearchDivergedError(SearchError):
    """A search leads nowhere; `outcome`: SearchOutcome of its last good step, None if none was."""

    def __init__(self, message: str, outcome: Any = None) -> None:
        super().__init__(message)
        self.outcome = outcome


class EvaluationError(DipgoError):
    """Images, scorers or statistics cannot be used."""


class DeviceError(DipgoError):
    """A device is not there, or does not tell what it is asked."""


class StoreError(DipgoError):
    """Records or artifacts are missing, torn or refused."""


class StorageError(StoreError):
    """The storage cannot be reached, or has no room; it may work again in a moment."""


class TaskError(DipgoError):
    """A task failed."""


class TrackingError(DipgoError):
    """The tracking server refused or lost something."""


def nearest(name: str, valid: list[str] | tuple[str, ...]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest valid name, or an empty string."""
    from difflib import get_close_matches

    match = get_close_matches(name, valid, n=1)
    return f" Did you mean {match[0]!r}?" if match else ""
