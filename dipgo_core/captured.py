"""Captured inputs: what a pipeline calls its denoiser with, told by one call that ends there."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final

from dipgo_core.errors import TraceError
from dipgo_core.hooks import Forward, MethodHook, bind_arguments

#: Arguments that a call for one image may take, by their names in the pipelines of diffusers.
_CALL: Final[Mapping[str, Any]] = {
    "prompt": "a photograph",
    "class_labels": [0],
    "num_inference_steps": 2,
    "guidance_scale": 1.0,  # none: guidance doubles the batch
    "use_resolution_binning": False,
    "clean_caption": False,
    "output_type": "latent",
}


class _Captured(Exception):
    """Leaves a pipeline call where its denoiser would run."""


def example_call(pipe: Any) -> dict[str, Any]:
    """Return arguments with which a pipeline of unknown class makes one image, without guidance."""
    accepted = inspect.signature(type(pipe).__call__).parameters
    return {name: value for name, value in _CALL.items() if name in accepted}


def captured_inputs(pipe: Any, attribute: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of the first denoiser call that a pipeline call would make.

    attribute: under which the pipeline holds its denoiser. The denoiser does not run.

    Raises:
        TraceError: the pipeline cannot be called like this, or never calls its denoiser.
    """
    captured: dict[str, Any] = {}

    def intercept(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        captured.update(bind_arguments(forward, args, kwargs))
        raise _Captured

    hook = MethodHook(getattr(pipe, attribute), "forward", intercept)
    name = type(pipe).__name__
    try:
        pipe(**arguments)
    except _Captured:
        return captured
    except Exception as error:  # whatever code of an unknown pipeline stumbles over
        raise TraceError(
            f"{name} cannot be called with {', '.join(arguments)} to see what its {attribute} is "
            f"given: {error}"
        ) from error
    finally:
        hook.remove()
    raise TraceError(f"{name} ended without calling its {attribute}")
