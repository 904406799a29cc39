"""Decoding watched: a run that ends in NaN or infinity is one clear error, not a black image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dipgo_core.errors import SubNetError
from dipgo_core.hooks import Forward, Interceptor
from dipgo_core.subnet import SubNet


def watched_decode(pipe: Any, subnet: SubNet, is_armed: Callable[[], bool]) -> Interceptor:
    """Return an interceptor of the autoencoder's `decode` that refuses what is not finite.

    The images are about to be copied to the host anyway, so looking at them costs no time.
    """

    def intercept(decode: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not is_armed():
            return decode(*args, **kwargs)
        latents = args[0] if args else kwargs["z"]
        if not _is_finite(latents):
            raise SubNetError(
                f"the run ended in latents that are not finite: {subnet.model['denoiser']} of "
                f"{subnet.model['id']} in {_name(latents.dtype)}, under a SubNet that prunes "
                f"{subnet.macs['pruned_ratio']:.0%}. Load the model in bfloat16 or float32; if the "
                "run is finite without the SubNet, choose one that prunes less"
            )
        output = decode(*args, **kwargs)
        images = output[0]
        if not _is_finite(images):
            raise SubNetError(
                f"the latents of this run are finite, but {type(pipe.vae).__name__} of "
                f"{subnet.model['id']} in {_name(images.dtype)} makes images of them that are not; "
                "the SubNet has no part in it: decode in float32 (pipe.vae.to(torch.float32), or "
                "force_upcast), or load the model in bfloat16"
            )
        return output

    return intercept


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
