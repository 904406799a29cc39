"""Jumps: a run of skipped calls as one step of the noise scheduler, where the two are equal.

A skipped call repeats the noise (or the flow), along which DDIM and Euler go straight: many steps
end where one does. DDIM's steps must follow each other for that, as equal spacing has them do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dipgo_core.hooks import Forward

#: Arguments of a stock call that do something of their own at each call of the run.
_STEPWISE = (
    "callback",
    "callback_on_step_end",
    "denoising_end",
    "eta",
    "guidance_rescale",
    "skip_guidance_layers",
)


class _Stride(int):
    """Number of inference steps for DDIM, which divides by it to find how far a step goes."""

    def __rfloordiv__(self, trained: int) -> int:
        return int(self)


class Jumps:
    """Lets a noise scheduler go from one computed call to the next.

    computed: which calls of the whole run are computed, in order.
    """

    def __init__(self, scheduler: Any, computed: Sequence[int]) -> None:
        self._scheduler = scheduler
        self._computed = list(computed)
        self._whole: dict[str, Any] = {}
        self._strides: list[int] = []

    def shorten(self) -> bool:
        """Take the skipped calls out of the timesteps that were just set, if that changes nothing.

        Returns whether it does not.
        """
        self._whole, self._strides = {}, []
        kind = type(self._scheduler).__name__
        if not _SHORTENERS[kind](self):
            return False
        self._set("timesteps", self._scheduler.timesteps[self._computed])
        return True

    def step(self, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make one step, a jump where calls were taken out."""
        if not self._strides:
            return original(*args, **kwargs)
        scheduler = self._scheduler
        steps, scheduler.num_inference_steps = scheduler.num_inference_steps, self._strides.pop(0)
        try:
            return original(*args, **kwargs)
        finally:
            scheduler.num_inference_steps = steps

    def restore(self) -> None:
        """Give the noise scheduler back what `shorten` took."""
        for name, value in self._whole.items():
            setattr(self._scheduler, name, value)
        self._whole = {}

    def _set(self, name: str, value: Any) -> None:
        self._whole[name] = getattr(self._scheduler, name)
        setattr(self._scheduler, name, value)

    def _shorten_ddim(self) -> bool:
        scheduler = self._scheduler
        times = scheduler.timesteps.tolist()
        stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        times.append(times[-1] - stride)  # where the last step ends
        if any(here - stride != there for here, there in zip(times, times[1:], strict=False)):
            return False
        ends = [*self._computed[1:], len(times) - 1]
        self._strides = [
            _Stride(times[start] - times[end])
            for start, end in zip(self._computed, ends, strict=True)
        ]
        return True

    def _shorten_euler(self) -> bool:
        sigmas = self._scheduler.sigmas  # one more than timesteps: where the last step ends
        self._set("sigmas", torch.cat([sigmas[self._computed], sigmas[-1:]]))
        return True


_SHORTENERS = {
    "DDIMScheduler": Jumps._shorten_ddim,
    "EulerDiscreteScheduler": Jumps._shorten_euler,
    "FlowMatchEulerDiscreteScheduler": Jumps._shorten_euler,
}


def jumps_for(
    scheduler: Any, computed: Sequence[int], arguments: Mapping[str, Any]
) -> Jumps | None:
    """Return the jumps of one call of a pipeline that makes images from prompts or labels alone.

    None where something has to happen at every call, or where the noise scheduler adds noise or
    bends its way. arguments: of the call, defaults included.
    """
    config = scheduler.config
    bent = any(config.get(name) for name in ("clip_sample", "thresholding", "stochastic_sampling"))
    if bent or any(arguments.get(name) for name in _STEPWISE):
        return None
    return Jumps(scheduler, computed) if type(scheduler).__name__ in _SHORTENERS else None
