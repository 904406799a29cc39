"""Freed memory goes back to the system at once, so that a worker's memory is what it uses."""

from __future__ import annotations

import ctypes
import logging
import sys

logger = logging.getLogger(__name__)

#: Blocks of this many bytes and more are mapped one by one, and unmapped when they are freed.
MAPPED_BYTES = 8 * 2**20
_M_MMAP_THRESHOLD = -3  # <malloc.h> of glibc


def return_freed_memory() -> bool:
    """Ask glibc to map large blocks one by one; return whether it took it.

    Left alone, glibc raises this threshold to 32 MiB as large blocks are freed (mallopt(3)): image
    batches then end up between smaller blocks of the heap, which can no longer shrink.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        taken = bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES))
    except (AttributeError, OSError) as error:  # another C library
        logger.debug("memory is left to the C library: %s", error)
        return False
    return taken
