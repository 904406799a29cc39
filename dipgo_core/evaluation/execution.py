"""How a denoiser is being computed: attention backend and compile mode, as they really are."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import nn

from dipgo_core.compiled import is_compiled
from dipgo_core.hooks import computes_compiled

LIBRARIES = ("torch", "diffusers", "transformers")


def attention_in_use(denoiser: nn.Module) -> str:
    """Return the attention processors of a denoiser and the backends they may call.

    Such as ``AttnProcessor2_0 (native; sdpa: flash, math)``: the processors by class, diffusers'
    active backend (of the processors that ask for it), and the kernels that PyTorch may choose.
    """
    modules = [module for module in denoiser.modules() if hasattr(module, "processor")]
    names = sorted({type(module.processor).__name__ for module in modules})
    own = {str(getattr(m.processor, "_attention_backend", None) or "") for m in modules} - {""}
    active = "/".join(sorted(own)) or str(_AttentionBackendRegistry.get_active_backend()[0].value)
    return f"{', '.join(names) or 'none'} ({active}; sdpa: {', '.join(_sdpa_kernels())})"


def _sdpa_kernels() -> list[str]:
    """Return the kernels that scaled_dot_product_attention is allowed to use."""
    backends: Any = torch.backends.cuda
    allowed = {
        "flash": backends.flash_sdp_enabled(),
        "memory-efficient": backends.mem_efficient_sdp_enabled(),
        "cudnn": backends.cudnn_sdp_enabled(),
        "math": backends.math_sdp_enabled(),
    }
    return [name for name, enabled in allowed.items() if enabled]


def compile_mode(denoiser: nn.Module) -> str:
    """Return ``none``, or ``torch.compile`` if the denoiser or any part of it is compiled."""
    compiled = computes_compiled(denoiser) or any(map(is_compiled, denoiser.modules()))
    return "torch.compile" if compiled else "none"


def library_versions() -> Mapping[str, Any]:
    """Return the versions of what computes; of CUDA and cuDNN where this PyTorch uses them."""
    found: dict[str, Any] = {name: version(name) for name in LIBRARIES}
    if torch.cuda.is_available():
        cudnn: Any = torch.backends.cudnn
        found |= {"cuda": torch.version.cuda, "cudnn": str(cudnn.version())}
    return found
