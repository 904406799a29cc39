"""The command line `dipgo-sweep`: thin; each command imports what it needs when it runs."""

from orchestrator.cli.app import main

__all__ = ["main"]
