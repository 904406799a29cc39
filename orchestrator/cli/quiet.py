"""Keeps the loading bars and hints of model libraries out of this program's own output."""

from __future__ import annotations


def silence_loading() -> None:
    """Switch off progress bars and warnings of diffusers and transformers in this process."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
