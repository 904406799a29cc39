"""The DiP-GO method: SuperNet, gradient search, SubNet runtime and evaluation for diffusers models.

Usable from a notebook without the orchestrator. Importing this package imports no torch.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("dipgo-sweep")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0.0.0"

#: Raised whenever a change alters the numbers a task produces; part of every content key.
NUMERICS_VERSION = 2
